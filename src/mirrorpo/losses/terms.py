"""What rules and penalties do to the tokens of a batch: bounds, masks, weights, and the terms in the loss.

At the sampled tokens first; then, from logits, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mirrorpo.divergences.base import upcast
from mirrorpo.losses.anchors import ANCHORS, AnchorLogps
from mirrorpo.losses.penalties import Penalty
from mirrorpo.losses.regions import OverVocabulary
from mirrorpo.losses.rules import LEVELS, MASK_LEVELS, Rule
from mirrorpo.losses.surrogates import MAX_LOG_RATIO


def over_sequence(x: Tensor, keep: Tensor, level: str) -> Tensor:
    """Per-token numbers at a level: (B, T) for ``token``, else (B, 1): a mean, a sum or a maximum.

    Args:
        x: (B, T), 0 where ``keep`` is false; for ``max_divergence`` not negative.
        keep: (B, T), bool.
        level: of ``LEVELS`` or ``MASK_LEVELS``.
    """
    if level == "token":
        return x
    if level == "max_divergence":
        return x.amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)
    total = x.sum(-1, keepdim=True)
    if level in ("product", "sum_divergence"):
        return total
    return total / keep.sum(-1, keepdim=True).clamp(min=1)


def on_side(rule: Rule, advantage: Tensor, keep: Tensor) -> Tensor | None:
    """Whether the advantage is on the rule's side, (B, T) or (B, 1); None: it is on both."""
    if rule.side == "both":
        return None
    # A sequence is dropped as one: not the tokens of it whose own advantage has the sign.
    sign = over_sequence(torch.where(keep, advantage, 0.0), keep, "sequence" if rule.couples_tokens else "token")
    return sign > 0 if rule.side == "positive" else sign < 0


@torch.no_grad()
def dropped_by(
    rule: Rule, logp: Tensor, anchors: AnchorLogps, advantage: Tensor, keep: Tensor, outside: Tensor | None
) -> Tensor:
    """Which policy terms a mask drops, bool, (B, T) or (B, 1).

    Args:
        rule: with ``act: mask``.
        logp: (B, T), of the policy.
        anchors: of the batch.
        advantage: (B, T) or (B, 1).
        keep: (B, T), bool.
        outside: (B, T), for a region over the vocabulary: whether it is left.
    """
    absent = None
    if outside is None:
        what = f"region {rule.region.name!r} with act 'mask'"
        anchor = anchors.of(rule.anchor, what)
        subject = anchors.of("old", what) if rule.of == "old" else logp
        outside = _left(rule, subject - anchor, anchor, keep)
        absent = anchors.missing.get(rule.anchor)
    side = on_side(rule, advantage, keep)
    dropped = outside if side is None else outside & side
    # A token that the anchor could not score is outside, whatever the side.
    return dropped if absent is None or rule.level != "token" else dropped | absent


def _left(rule: Rule, log_ratio: Tensor, anchor: Tensor, keep: Tensor) -> Tensor:
    """Whether a region is left, (B, T) or (B, 1)."""
    if rule.level in MASK_LEVELS[:2]:
        assert rule.region.radius is not None
        values = rule.region.constrained(log_ratio, anchor)
        return over_sequence(torch.where(keep, values, 0.0), keep, rule.level) > rule.region.radius
    level = rule.level if rule.level in LEVELS else "token"
    ratio = over_sequence(log_ratio, keep, level).exp()
    low, high = rule.region.ratio_bounds(anchor)
    outside = (ratio < low) | (ratio > high)
    # The largest divergence is above the radius where a token's is: that holds for every region with bounds.
    return (outside & keep).any(-1, keepdim=True) if rule.level == "max_divergence" else outside


@torch.no_grad()
def truncated_weight(rule: Rule, anchors: AnchorLogps, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of act ``truncate`` on the policy term, and whether the ratio was clamped; (B, T) or (B, 1).

    Where the anchor could not score a token the factor is 0, or at the levels of sequences that of the others.
    """
    what = f"region {rule.region.name!r} with act 'truncate'"
    anchor = anchors.of(rule.anchor, what)
    ratio = over_sequence(anchors.of("old", what) - anchor, keep, rule.level).exp()
    low, high = rule.region.ratio_bounds(anchor)
    weight = torch.minimum(torch.maximum(ratio, low), high)
    absent = anchors.missing.get(rule.anchor)
    clamped = weight != ratio
    return (weight if absent is None or rule.level != "token" else weight.masked_fill(absent, 0.0)), clamped


def bounds_of(
    rule: Rule, anchors: AnchorLogps, behaviour: Tensor, advantage: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Bounds of a ``clip`` on w = p/b, and how far its anchor is from b.

    Around another anchor a the constraint is on p/a = w b/a, so the bounds are multiplied by a/b: with a = old and b =
    sampler that is decoupled PPO.

    Returns:
        ``(low, high, shift)``; shift is log a/b at the rule's level, or None where a is b.
    """
    what = f"region {rule.region.name!r}"
    anchor = anchors.of(rule.anchor, what)
    if rule.region.needs_logits:
        low = high = torch.ones((), dtype=behaviour.dtype, device=behaviour.device)
    else:
        low, high = rule.region.ratio_bounds(anchor)
    shift = None
    if anchor is not behaviour:
        shift = over_sequence(anchor - behaviour, keep, rule.level)
        low, high = low * shift.exp(), high * shift.exp()
    side = on_side(rule, advantage, keep)
    if side is not None:
        low, high = torch.where(side, low, 0.0), torch.where(side, high, torch.inf)
    return low, high, shift


def soft_term(
    rule: Rule, logp: Tensor, anchors: AnchorLogps, behaviour: Tensor, advantage: Tensor, keep: Tensor
) -> Tensor:
    """What a ``soft`` region adds to each token's loss, (B, T), differentiable."""
    assert rule.region.divergence is not None
    assert rule.region.radius is not None
    anchor = anchors.of(rule.anchor, f"region {rule.region.name!r} with act 'soft'")
    strength = advantage.abs() / (2.0 * rule.region.radius)
    side = on_side(rule, advantage, keep)
    if side is not None:
        strength = torch.where(side, strength, 0.0)
    return strength * rule.region.divergence.weighted(logp, anchor.to(logp.dtype), behaviour.to(logp.dtype))


def penalty_estimate(
    penalty: Penalty, logp: Tensor, anchors: AnchorLogps, behaviour: str, baseline: Tensor | None = None
) -> Tensor:
    """D at the sampled tokens, (B, T), differentiable; 0 where the anchor or b could not be scored.

    Args:
        penalty: a penalty at the sampled tokens.
        logp: (B, T), of the policy.
        anchors: of the batch.
        behaviour: the anchor that is b.
        baseline: (B, T), what is subtracted from g; the value does not change.
    """
    q, b = anchors.of(penalty.anchor, penalty.what), anchors.of(behaviour, penalty.what)
    value = penalty.divergence.estimate(penalty.estimator, logp, q, b)
    if baseline is not None:
        baseline = torch.where(baseline.isfinite(), baseline, 0.0)  # none is no bias either
        value = value - ((logp - b).clamp(max=MAX_LOG_RATIO).exp() * baseline).detach() * (logp - logp.detach())
    for name in {penalty.anchor, behaviour} if penalty.reads_behaviour else {penalty.anchor}:
        absent = anchors.missing.get(name)
        if absent is not None:
            value = torch.where(absent, 0.0, value)
    return value


@torch.no_grad()
def advantage_shift(penalty: Penalty, logp: Tensor, anchors: AnchorLogps, baseline: Tensor | None = None) -> Tensor:
    """What ``placement: advantage`` subtracts from each token's advantage, up to the coefficient: g, (B, T)."""
    g = penalty.divergence.score(logp.detach(), anchors.of(penalty.anchor, penalty.what)).to(logp.dtype)
    g = g if baseline is None else g - torch.where(baseline.isfinite(), baseline, 0.0)
    absent = anchors.missing.get(penalty.anchor)
    return g if absent is None else torch.where(absent, 0.0, g)


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


__all__ = [
    "Vocabulary",
    "advantage_shift",
    "bounds_of",
    "check_sparse",
    "divergence_over",
    "dropped_by",
    "kept_entries",
    "on_side",
    "outside_of",
    "over_sequence",
    "penalty_estimate",
    "soft_term",
    "truncated_weight",
]
