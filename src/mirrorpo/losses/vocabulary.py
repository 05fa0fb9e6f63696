"""Regions and penalties over the whole vocabulary, from logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mirrorpo.divergences.base import upcast
from mirrorpo.losses.anchors import ANCHORS
from mirrorpo.losses.regions import OverVocabulary

if TYPE_CHECKING:
    from mirrorpo.losses.penalties import Penalty
    from mirrorpo.losses.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Next-token logits of a batch, and what goes with them.

    Attributes:
        logits: (B, T, V) of the policy, differentiable.
        anchors: (B, T, V) by anchor.
        teacher_top: (B, T, K) tokens and (B, T, K) log-probabilities of a teacher that is known there only.
        tokens: (B, T), the sampled tokens.
        logp_teacher: (B, T), of the sampled tokens under the teacher.
    """

    logits: Tensor | None
    anchors: Mapping[str, Tensor | None]
    teacher_top: tuple[Tensor, Tensor] | None = None
    tokens: Tensor | None = None
    logp_teacher: Tensor | None = None

    def of_policy(self, what: str) -> Tensor:
        """(B, T, V)."""
        return _given("logits", self.logits, what, "keep the policy's next-token logits, (B, T, V)")

    def of(self, anchor: str, what: str) -> Tensor:
        """(B, T, V) of an anchor."""
        if anchor == "uniform":
            return torch.zeros_like(self.of_policy(what), requires_grad=False)
        name = ANCHORS[anchor].logits or anchor
        owner = {"old": "rollout policy"}.get(anchor, anchor)
        return _given(name, self.anchors[anchor], what, f"keep the {owner}'s next-token logits, (B, T, V)")

    def sampled(self, what: str) -> Tensor:
        """(B, T), the tokens."""
        return _given("tokens", self.tokens, what, "pass the sampled tokens, (B, T)")


def kept_entries(teacher_top: tuple[Tensor, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of a sparse teacher; none where the mask drops the token."""
    indices, entries = teacher_top
    if tuple(indices.shape[:-1]) != tuple(keep.shape) or indices.shape != entries.shape:
        raise ValueError(
            f"teacher_top must hold two tensors (B, T, K) with (B, T) = {tuple(keep.shape)}, got "
            f"{tuple(indices.shape)} and {tuple(entries.shape)}"
        )
    return torch.where(keep.unsqueeze(-1), indices, 0), torch.where(keep.unsqueeze(-1), entries, -torch.inf)


def outside_of(rule: Rule, over: Vocabulary) -> Tensor | None:
    """(B, T), whether a region over the vocabulary is left; None for a region with bounds."""
    region = rule.region
    if not isinstance(region, OverVocabulary):
        return None
    what = f"region {region.name!r}"
    return region.outside(over.of_policy(what), over.of(rule.anchor, what), over.sampled(what))


def divergence_over(p: Penalty, over: Vocabulary) -> Tensor | None:
    """(B, T), the divergence of an ``exact`` or ``top_k`` penalty, differentiable, or a baseline; else None."""
    if not p.needs_logits:
        return None
    logits = over.of_policy(p.what)
    if p.anchor == "teacher" and over.teacher_top is not None:
        return _sparse(p, logits, over)
    anchor = over.of(p.anchor, p.what)
    if p.baseline == "exact":
        with torch.no_grad():  # sum_v p_v g_v, and p_v g_v is the slope in log p_v
            logp, logq = upcast(logits).log_softmax(-1), upcast(anchor).log_softmax(-1)
            return p.divergence.over_vocabulary(logp, logq)[1].sum(-1)
    if p.estimator == "exact":
        return p.divergence.exact(logits, anchor)
    return p.divergence.top_k(logits, anchor, over.sampled(p.what), p.k, p.support)


def check_sparse(p: Penalty) -> None:
    """Raises ``ValueError`` unless a penalty can be evaluated from the teacher's own entries."""
    if p.estimator != "top_k" or p.support != "anchor":
        raise ValueError(
            f"{p.what} and support {p.support!r} needs logits_teacher: teacher_top holds the teacher's own entries "
            "only. Legal: estimator 'top_k' with support 'anchor'"
        )


def _sparse(p: Penalty, logits: Tensor, over: Vocabulary) -> Tensor:
    assert over.teacher_top is not None
    if over.anchors["teacher"] is not None:
        raise ValueError("logits_teacher and teacher_top say the same twice: give one of them")
    check_sparse(p)
    indices, entries = over.teacher_top
    if over.logp_teacher is None:
        return p.divergence.top_k_sparse(logits, indices, entries)
    return p.divergence.top_k_sparse(logits, indices, entries, over.sampled(p.what), over.logp_teacher)


def _given(name: str, x: Tensor | None, what: str, how: str) -> Tensor:
    if x is None:
        raise ValueError(f"{what} needs {name}, got None: {how}")
    return x


__all__ = ["Vocabulary", "check_sparse", "divergence_over", "kept_entries", "outside_of"]
