"""An objective's loss from hidden states: that of ``Objective.__call__``, without logits in memory.

Objectives whose tokens are separable (``Objective.token_separable``) take one sweep, the others two. Regularisers and
regions over the vocabulary (``exact``, ``top_k``) ride on the same sweep: the policy's logits are there already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mirrorpo._checks import Float, Num, Shaped, Tensor
from mirrorpo.kernels.fused import PerToken, measure_from_hidden, single_pass
from mirrorpo.kernels.head import Head, check_inputs, work_dtype
from mirrorpo.kernels.vocabulary import Anchor, Entries, VocabularyTerm
from mirrorpo.losses.aggregation import aggregation_weights
from mirrorpo.losses.objective import Objective, Output, Penalty
from mirrorpo.losses.regions import OverVocabulary
from mirrorpo.losses.rules import Rule
from mirrorpo.losses.terms import check_sparse, kept_entries

Weight = Tensor | Callable[[Tensor, Tensor], Tensor | None]


def objective_from_hidden(
    objective: Objective,
    hidden: Float[Tensor, "N H"],
    head: Head,
    tokens: Shaped[Tensor, ...],
    *,
    advantages: Float[Tensor, ...],
    mask: Shaped[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"] | None = None,
    logp_ref: Float[Tensor, "B T"] | None = None,
    logp_sampler: Float[Tensor, "B T"] | None = None,
    logp_teacher: Float[Tensor, "B T"] | None = None,
    reference: Anchor | None = None,
    rollout: Anchor | None = None,
    teacher: Anchor | None = None,
    teacher_top: tuple[Tensor, Tensor] | None = None,
    max_completion_length: int | None = None,
    num_tokens: Num[Tensor, ""] | float | int | None = None,
    weight: Weight | None = None,
    entropy_weight: float | Tensor = 0.0,
    penalty_scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[Output, Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Loss and metrics of a batch from the hidden states of the tokens that count.

    Args:
        objective: any.
        hidden: (N, H), the hidden states that predict the kept tokens: those where ``mask`` is true, row by row.
            However they were laid out (padded rows, packed rows), ``padded[mask]`` is this order.
        head: from hidden states to logits.
        tokens: (N,), the sampled tokens, in the same order.
        advantages: (B,), (B, 1) or (B, T); it, ``logp_old``, ``logp_ref``, ``max_completion_length``, ``num_tokens``
            and ``penalty_scale`` as in the objective's call.
        mask: (B, T), with N true entries.
        logp_old: (B, T) or None.
        logp_ref: (B, T) or None; with a ``reference`` it is not needed for ``exact`` and ``top_k`` penalties.
        logp_sampler: (B, T) or None.
        logp_teacher: (B, T) or None; as ``logp_ref``.
        reference: hidden states (N, H') and head of the reference; needed by ``exact`` and ``top_k`` penalties and
            regions around it.
        rollout: the same of the old policy.
        teacher: the same of the teacher.
        teacher_top: (B, T, K) tokens and (B, T, K) log-probabilities: a teacher known at K entries per position, for
            ``top_k``.
        max_completion_length: tokens.
        num_tokens: see ``mirrorpo.aggregate``.
        weight: (B, T) or (B, 1), detached factor on the policy term; or a function of the detached (B, T)
            log-probabilities and entropies that gives it: then two sweeps are needed.
        entropy_weight: the loss gains ``entropy_weight`` times the mean entropy over the kept tokens (negative for a
            bonus).
        penalty_scale: factor on all coefficients.
        chunk: tokens at once; None: what suits device and vocabulary.

    Returns:
        ``Output`` and the detached log-probabilities and entropies, (B, T), 0 where the mask drops a token. After one
        sweep ``policy_loss`` and ``penalty_loss`` are detached (only their sum has a graph, for one backward pass), and
        the entropy term is in ``loss`` alone.

    Raises:
        ValueError: something needed is missing, shapes that do not fit.
        torch.OutOfMemoryError: with the ``chunk`` that would have fitted.

    Example:
        >>> import torch, mirrorpo
        >>> hidden = torch.zeros(2, 3, requires_grad=True)
        >>> out, logp, _ = objective_from_hidden(
        ...     mirrorpo.objective("dapo"), hidden, Head(torch.ones(4, 3)), torch.tensor([0, 1]),
        ...     advantages=torch.tensor([1.0]), mask=torch.tensor([[1, 1, 0]]),
        ... )
        >>> out.loss.item(), logp
        (-1.0, tensor([[-1.3863, -1.3863,  0.0000]]))
    """
    keep = mask.bool()
    check_inputs(hidden, head, tokens, chunk)
    if int(keep.sum()) != hidden.shape[0]:
        raise ValueError(f"mask keeps {int(keep.sum())} tokens, hidden has {hidden.shape[0]} rows: they must agree")
    if teacher is not None and teacher_top is not None:
        raise ValueError("teacher and teacher_top say the same twice: give one of them")
    known = teacher if teacher_top is None else _entries(teacher_top, keep, logp_teacher)
    terms = _vocabulary_terms(objective, {"reference": reference, "old": rollout, "teacher": known})
    given: dict[str, Any] = {
        "advantages": advantages,
        "mask": mask,
        "logp_old": logp_old,
        "logp_sampler": logp_sampler,
        "logp_teacher": logp_teacher,
        "vocabulary": head.vocabulary,
        "penalty_scale": penalty_scale,
    }
    shared = {"max_completion_length": max_completion_length, "num_tokens": num_tokens}
    layout = _Layout(objective, keep, terms)
    if not objective.token_separable or callable(weight):
        logp, entropy, values, refs = measure_from_hidden(hidden, head, tokens, terms, chunk=chunk)
        padded, padded_entropy = layout.scatter(logp), layout.scatter(entropy)
        if callable(weight):
            weight = weight(padded.detach(), padded_entropy.detach())
        given["logp_teacher"] = layout.anchor_logp("teacher", logp_teacher, refs)
        logp_ref = layout.anchor_logp("reference", logp_ref, refs)
        given |= layout.over_vocabulary(values)
        out = objective.evaluate(
            logp=padded, logp_ref=logp_ref, weight=weight, entropy=padded_entropy.detach(), **given, **shared
        )
        loss = out.loss + _entropy_mean(entropy, entropy_weight)
        return replace(out, loss=loss), padded.detach(), padded_entropy.detach()

    work = work_dtype(hidden, head.weight)
    token_weights = aggregation_weights(mask, objective.aggregation, dtype=work, **shared)[keep]
    per_token = layout.per_token(token_weights, given | {"logp_ref": logp_ref, "weight": weight})
    entropy_weights = None
    if isinstance(entropy_weight, Tensor) or entropy_weight != 0.0:
        entropy_weights = (torch.ones_like(token_weights) / max(1, tokens.shape[0])) * entropy_weight
    done = single_pass(
        hidden,
        head,
        tokens,
        per_token,
        terms=terms,
        term_weights=layout.term_weights(token_weights, penalty_scale),
        entropy_weights=entropy_weights,
        chunk=chunk,
    )
    logp, entropy = layout.scatter(done.logp), layout.scatter(done.entropy)
    with torch.no_grad():
        out = objective.evaluate(
            logp=logp,
            logp_ref=layout.anchor_logp("reference", logp_ref, done.anchor_logps),
            weight=weight,
            entropy=entropy,
            **given | {"logp_teacher": layout.anchor_logp("teacher", logp_teacher, done.anchor_logps)},
            **shared,
            **layout.over_vocabulary(done.values),
        )
    return replace(out, loss=done.loss), logp, entropy


def _entropy_mean(entropy: Tensor, entropy_weight: float | Tensor) -> Tensor | float:
    if not isinstance(entropy_weight, Tensor) and entropy_weight == 0.0:
        return 0.0
    return entropy.sum() / max(1, entropy.shape[0]) * entropy_weight


def _entries(teacher_top: tuple[Tensor, Tensor], keep: Tensor, logp_teacher: Tensor | None) -> Entries:
    indices, logp = kept_entries(teacher_top, keep)
    of_tokens = None if logp_teacher is None else logp_teacher.detach()[keep]
    return Entries(indices=indices.long()[keep], logp=logp.detach()[keep], of_tokens=of_tokens)


def _vocabulary_terms(
    objective: Objective, anchors: Mapping[str, Anchor | Entries | None]
) -> tuple[VocabularyTerm, ...]:
    """Those of the regions first, then those of the penalties, in their order."""
    terms = []
    for rule in objective.rules:
        if isinstance(rule.region, OverVocabulary):
            what = f"region {rule.region.name!r}"
            anchor = _needed(anchors, rule.anchor, what)
            if isinstance(anchor, Entries):
                raise ValueError(f"{what} needs teacher, got teacher_top: pass Anchor(hidden, head) of that model")
            terms.append(VocabularyTerm(divergence=rule.region.divergence, anchor=anchor, k=rule.region.k))
    for p in objective.penalties:
        if p.needs_logits:
            anchor = None if p.anchor == "uniform" else _needed(anchors, p.anchor, p.what)
            if isinstance(anchor, Entries):
                check_sparse(p)
            k = p.k if p.estimator == "top_k" else None
            terms.append(
                VocabularyTerm(
                    divergence=p.divergence, anchor=anchor, k=k, support=p.support, baseline=p.baseline == "exact"
                )
            )
    return tuple(terms)


def _needed(anchors: Mapping[str, Anchor | Entries | None], name: str, what: str) -> Anchor | Entries:
    anchor = anchors[name]
    if anchor is None:
        argument = {"old": "rollout"}.get(name, name)
        raise ValueError(f"{what} needs {argument}, got None: pass Anchor(hidden, head) of that model")
    if isinstance(anchor, Entries):
        return anchor
    return Anchor(hidden=anchor.hidden.detach(), head=anchor.head.detached())


def _column(x: Tensor | None) -> Tensor:
    assert x is not None  # a term without a weight is measured first
    return x.unsqueeze(-1)


@dataclass(frozen=True)
class _Layout:
    """Between (N,) kept tokens and (B, T); between the list of vocabulary terms and the objective's parts."""

    objective: Objective
    keep: Tensor
    terms: tuple[VocabularyTerm, ...]

    @cached_property
    def _rules(self) -> tuple[Rule, ...]:
        """Those over the vocabulary, in the order of their terms."""
        return tuple(rule for rule in self.objective.rules if rule.region.needs_logits)

    @cached_property
    def _penalties(self) -> tuple[Penalty, ...]:
        """The same of the penalties."""
        return tuple(p for p in self.objective.penalties if p.needs_logits)

    def scatter(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.keep.shape).masked_scatter(self.keep, x)

    def anchor_logp(self, anchor: str, logp: Tensor | None, anchor_logps: tuple[Tensor, ...]) -> Tensor | None:
        """An anchor's log-probabilities of the sampled tokens, from a term toward it if they were not given."""
        if logp is not None:
            return logp
        names = [part.anchor for part in (*self._rules, *self._penalties)]
        if anchor not in names:
            return None
        place = names.index(anchor)
        # A teacher that is known at K entries does not say this token's.
        return None if isinstance(self.terms[place].anchor, Entries) else self.scatter(anchor_logps[place])

    def outside(self, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """For each rule, whether its region over the vocabulary is left, in the shape of the values."""
        rest = iter(values)
        found: list[Tensor | None] = []
        for rule in self.objective.rules:
            region = rule.region
            if not isinstance(region, OverVocabulary):
                found.append(None)
                continue
            value = next(rest)
            assert value is not None
            found.append(value.detach() > region.radius)
        return tuple(found)

    def over_vocabulary(self, values: tuple[Tensor, ...]) -> dict[str, Any]:
        """What ``Objective.terms`` takes in place of logits."""
        count = len(self._rules)
        outside = (None if x is None else self.scatter(x) for x in self.outside(values[:count]))
        rest = iter(values[count:])
        of_penalties = (self.scatter(next(rest)) if p.needs_logits else None for p in self.objective.penalties)
        return {"outside": tuple(outside), "over_vocabulary": tuple(of_penalties)}

    def term_weights(self, token_weights: Tensor, penalty_scale: float) -> tuple[Tensor | None, ...]:
        """d loss / d value of each vocabulary term; a region has none, a penalty that is not in the loss neither."""
        return (None,) * len(self._rules) + tuple(
            token_weights * (p.coefficient * penalty_scale) if p.summed and p.placement == "loss" else None
            for p in self._penalties
        )

    def per_token(self, token_weights: Tensor, given: dict[str, Any]) -> PerToken:
        """The objective's terms of a chunk, as a batch of one-token completions."""
        # What is in the loss by itself, and what moves the advantages; exact and top_k ride on the sweep.
        penalties = tuple(p for p in self.objective.penalties if not p.summed and p.placement != "reward")
        sampled = replace(self.objective, penalties=penalties)
        mask = self.keep[self.keep].unsqueeze(-1)
        plain = {name: given[name] for name in ("penalty_scale", "vocabulary")}
        columns: dict[str, Any] = {
            name: self._column(given[name], name)
            for name in ("advantages", "logp_old", "logp_ref", "logp_sampler", "logp_teacher", "weight")
            if given[name] is not None
        }
        count = len(self._rules)
        places = [self._penalties.index(p) + count if p.needs_logits else None for p in penalties]

        def terms(logp: Tensor, part: slice, values: tuple[Tensor | None, ...]) -> Tensor:
            found = sampled.terms(
                logp=logp.unsqueeze(-1),
                mask=mask[part],
                outside=tuple(None if x is None else x.unsqueeze(-1) for x in self.outside(values[:count])),
                over_vocabulary=tuple(None if place is None else _column(values[place]) for place in places),
                **plain,
                **{name: column[part] for name, column in columns.items()},
            )
            total = found.policy if found.penalty is None else found.policy + found.penalty
            return total.squeeze(-1) * token_weights[part]

        return terms

    def _column(self, x: Tensor, name: str) -> Tensor:
        """(N, 1) of (B,), (B, 1) or (B, T)."""
        shape = tuple(self.keep.shape)
        x = x.unsqueeze(-1) if name == "advantages" and x.dim() == 1 else x
        if x.shape != shape and (x.shape != (shape[0], 1) or name.startswith("logp")):
            legal = f"{shape}" if name.startswith("logp") else f"({shape[0]}, 1) or {shape}"
            raise ValueError(f"{name} must have shape {legal}, got {tuple(x.shape)}")
        return x.expand(shape)[self.keep].unsqueeze(-1)


__all__ = ["objective_from_hidden"]
