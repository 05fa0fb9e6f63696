r"""The loss of a batch of completions: policy term, regions, penalties, aggregation.

.. math::
    L = \mathrm{agg}\Big(\text{surrogate}(w_t, A_t) \cdot c_t + \sum_j \beta_j\, \hat D_j(p_t, q_{jt})\Big)

with w = p/b the ratio to the behaviour policy, A the advantage, c an optional weight on the policy term and the masks
of the regions, and :math:`\hat D_j` an estimator of a divergence from the anchor q_j. A pure function of tensors: no
state, no I/O, no host synchronisation on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mirrorpo._checks import Float, Num, Shaped, Tensor
from mirrorpo.divergences.base import upcast
from mirrorpo.losses.aggregation import aggregate
from mirrorpo.losses.anchors import ANCHORS, AnchorLogps, check_shapes, read_anchors
from mirrorpo.losses.future_kl import future_kl_weight
from mirrorpo.losses.metrics import Output, TokenTerms
from mirrorpo.losses.parts import Parts, numbered
from mirrorpo.losses.penalties import Penalty
from mirrorpo.losses.regions import TrustRegion, trust_region
from mirrorpo.losses.surrogates import SURROGATES, Surrogate, Tokens
from mirrorpo.losses.terms import (
    Vocabulary,
    advantage_shift,
    bounds_of,
    divergence_over,
    dropped_by,
    kept_entries,
    outside_of,
    over_sequence,
    penalty_estimate,
    soft_term,
    truncated_weight,
)

_NO_REGION = trust_region("none")


@dataclass(frozen=True, kw_only=True)
class Objective(Parts):
    """A policy objective; built by ``mirrorpo.objective``. Its attributes are those of ``Parts``."""

    surrogate: Surrogate = SURROGATES["clip"]
    # What `mirrorpo.objective` was asked for; None for an objective that was put together or changed by hand.
    spec: Mapping[str, Any] | None = field(default=None, init=False, compare=False, repr=False)

    @property
    def region(self) -> TrustRegion:
        """The region of ``bound``; ``none`` without one."""
        return _NO_REGION if self.bound is None else self.bound.region

    def __call__(
        self,
        *,
        logp: Float[Tensor, "B T"],
        mask: Shaped[Tensor, "B T"],
        advantages: Float[Tensor, ...] | None = None,
        logp_old: Float[Tensor, "B T"] | None = None,
        logp_ref: Float[Tensor, "B T"] | None = None,
        logp_sampler: Float[Tensor, "B T"] | None = None,
        logp_teacher: Float[Tensor, "B T"] | None = None,
        max_completion_length: int | None = None,
        num_tokens: Num[Tensor, ""] | float | int | None = None,
        weight: Float[Tensor, ...] | None = None,
        logits: Float[Tensor, "B T V"] | None = None,
        logits_ref: Float[Tensor, "B T V"] | None = None,
        logits_old: Float[Tensor, "B T V"] | None = None,
        logits_teacher: Float[Tensor, "B T V"] | None = None,
        teacher_top: tuple[Tensor, Tensor] | None = None,
        tokens: Shaped[Tensor, "B T"] | None = None,
        vocabulary: int | None = None,
        entropy: Float[Tensor, "B T"] | None = None,
        penalty_scale: float = 1.0,
    ) -> Output:
        """Loss and metrics of a batch.

        Args:
            logp: (B, T), log-probabilities of the sampled tokens under the policy; differentiable.
            mask: (B, T), 0 drops a token; what stands there (even NaN) has no effect.
            advantages: (B,), (B, 1) or (B, T); None with surrogate ``none`` only.
            logp_old: the same as ``logp`` under the old policy; None: the policy itself (one update per batch).
            logp_ref: under the reference.
            logp_sampler: as the inference engine reported them; NaN and -inf mark what it could not score.
            logp_teacher: under the teacher. ``needs`` says which of these the objective reads.
            max_completion_length: tokens; needed by ``constant`` aggregation.
            num_tokens: see ``mirrorpo.aggregate``.
            weight: (B, T) or (B, 1), detached factor on the policy term only; one that is not finite counts as 0.
            logits: (B, T, V) of the policy, differentiable; needed by ``exact`` and ``top_k``.
            logits_ref: of the reference, likewise of the others: see ``needs_logits_of``.
            logits_old: of the old policy.
            logits_teacher: of the teacher.
            teacher_top: (B, T, K) tokens and (B, T, K) log-probabilities: a teacher known at K entries per position,
                for ``top_k``.
            tokens: (B, T), the sampled tokens; needed by ``top_k``.
            vocabulary: V; needed by a penalty toward ``uniform`` where there are no logits.
            entropy: (B, T), of the policy's next-token distributions; adds the entropy metrics.
            penalty_scale: factor on all coefficients (a schedule's or controller's).

        Returns:
            ``Output(loss, metrics)``.

        Raises:
            ValueError: something needed is missing; shapes that differ; a kept log-probability above 0 or NaN.

        Example:
            >>> import torch, mirrorpo
            >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
            >>> out = mirrorpo.objective("grpo")(
            ...     logp=logp, logp_old=logp.detach(), logp_ref=logp.detach(),
            ...     advantages=torch.tensor([1.0]), mask=torch.ones(1, 2),
            ... )
            >>> out.loss.item()
            -1.0
        """
        check_shapes(logp, advantages, mask, logp_old=logp_old, logp_ref=logp_ref, tokens=tokens)
        keep = mask.bool()
        over = Vocabulary(
            logits=logits,
            anchors={"reference": logits_ref, "old": logits_old, "teacher": logits_teacher},
            teacher_top=None if teacher_top is None else kept_entries(teacher_top, keep),
            tokens=None if tokens is None else torch.where(keep, tokens, 0),
            logp_teacher=None if logp_teacher is None else torch.where(keep, logp_teacher, 0.0),
        )
        return self.evaluate(
            logp=logp,
            mask=mask,
            logp_ref=logp_ref,
            max_completion_length=max_completion_length,
            num_tokens=num_tokens,
            entropy=entropy,
            logp_old=logp_old,
            logp_sampler=logp_sampler,
            logp_teacher=logp_teacher,
            vocabulary=vocabulary if logits is None else logits.shape[-1],
            advantages=advantages,
            weight=weight,
            penalty_scale=penalty_scale,
            outside=tuple(outside_of(rule, over) for rule in self.rules),
            over_vocabulary=tuple(divergence_over(p, over) for p in self.penalties),
        )

    def evaluate(
        self,
        *,
        logp: Float[Tensor, "B T"],
        mask: Shaped[Tensor, "B T"],
        max_completion_length: int | None = None,
        num_tokens: Num[Tensor, ""] | float | int | None = None,
        entropy: Float[Tensor, "B T"] | None = None,
        **given: Any,
    ) -> Output:
        """The call without logits: what needs the whole vocabulary has been evaluated already (``mirrorpo.kernels``).

        Arguments, result and errors as in the call; ``given`` are the other arguments of ``terms``.
        """
        terms = self.terms(logp=logp, mask=mask, **given)

        def average(x: Tensor) -> Tensor:
            return aggregate(
                x, mask, self.aggregation, max_completion_length=max_completion_length, num_tokens=num_tokens
            )

        policy_loss = average(terms.policy)
        penalty_loss = None if terms.penalty is None else average(terms.penalty)
        metrics = terms.metrics(entropy) | {"policy_loss/mean": policy_loss.detach()}
        if penalty_loss is not None:
            metrics["penalty_loss/mean"] = penalty_loss.detach()
        loss = policy_loss if penalty_loss is None else policy_loss + penalty_loss
        return Output(loss=loss, policy_loss=policy_loss, penalty_loss=penalty_loss, metrics=metrics)

    def terms(
        self,
        *,
        logp: Float[Tensor, "B T"],
        mask: Shaped[Tensor, "B T"],
        advantages: Float[Tensor, ...] | None = None,
        logp_old: Float[Tensor, "B T"] | None = None,
        logp_ref: Float[Tensor, "B T"] | None = None,
        logp_sampler: Float[Tensor, "B T"] | None = None,
        logp_teacher: Float[Tensor, "B T"] | None = None,
        vocabulary: int | None = None,
        weight: Float[Tensor, ...] | None = None,
        penalty_scale: float = 1.0,
        outside: tuple[Tensor | None, ...] = (),
        over_vocabulary: tuple[Tensor | None, ...] = (),
    ) -> TokenTerms:
        """What each token contributes before aggregation.

        Where ``token_separable`` holds, a token's terms depend on that token's arguments alone.

        Args:
            logp, mask, advantages, logp_old, logp_ref, logp_sampler, logp_teacher, vocabulary, weight, penalty_scale:
                as in the call.
            outside: one entry for each rule: (B, T), bool, where a region over the vocabulary is left; None for others.
            over_vocabulary: one entry for each penalty: (B, T), the divergence of an ``exact`` or ``top_k`` one,
                differentiable, or the baseline of one that has it; None for the others.
        """
        given = {"reference": logp_ref, "old": logp_old, "sampler": logp_sampler, "teacher": logp_teacher}
        check_shapes(logp, advantages, mask, **{ANCHORS[name].logp or name: x for name, x in given.items()})
        if weight is not None and weight.shape not in ((logp.shape[0], 1), logp.shape):
            raise ValueError(f"weight must have shape (B, 1) or (B, T), got {tuple(weight.shape)}")
        keep = mask.bool()
        # Masked positions are replaced on the way in, not multiplied by 0 on the way out: 0 * NaN is NaN.
        logp = torch.where(keep, upcast(logp), 0.0)
        anchors = read_anchors(logp, keep, given, vocabulary)
        over = tuple(over_vocabulary) + (None,) * (len(self.penalties) - len(over_vocabulary))
        state, log_ratio, fractions = self._state(logp, advantages, keep, anchors, penalty_scale, outside, over)
        penalty, values = self._penalty(logp, keep, anchors, penalty_scale, over)
        if self.truncation is not None:
            factor, fractions[f"truncate/{self.truncation.label}/frac"] = truncated_weight(
                self.truncation, anchors, keep
            )
            weight = factor if weight is None else weight * factor
        return TokenTerms(
            policy=self._policy(state, anchors, weight),
            penalty=penalty,
            values=values,
            state=state,
            log_ratio=log_ratio,
            logp_ref=anchors.by_name.get("reference"),
            fractions=fractions,
        )

    def _state(
        self,
        logp: Tensor,
        advantages: Tensor | None,
        keep: Tensor,
        anchors: AnchorLogps,
        penalty_scale: float,
        outside: tuple[Tensor | None, ...],
        over: tuple[Tensor | None, ...],
    ) -> tuple[Tokens, Tensor, dict[str, Tensor]]:
        """What the surrogate sees, log w of every token, and what is counted."""
        needed = self.behaviour in self.needs
        behaviour = anchors.of(self.behaviour if needed else "old", f"behaviour {self.behaviour!r}")
        token_log_ratio = logp - behaviour
        log_ratio = over_sequence(token_log_ratio, keep, self.level)
        advantage = self._advantage(logp, advantages, keep, anchors, token_log_ratio, penalty_scale, over)

        left_by_rule = list(outside) + [None] * (len(self.rules) - len(outside))
        absent = anchors.missing.get(self.behaviour if needed else "old")
        dropped, fractions = absent, {}
        if absent is not None:
            fractions["behaviour/missing/frac"] = absent
        low, high = logp.new_zeros(()), logp.new_full((), torch.inf)
        left, drift = None, None
        labels = iter(numbered([rule.label for rule in self.masks]))
        for rule, outside_of_rule in zip(self.rules, left_by_rule, strict=True):
            if rule.region.needs_logits and outside_of_rule is None:
                raise ValueError(f"region {rule.region.name!r} needs outside, got None")
            if rule.act == "mask":
                found = dropped_by(rule, logp.detach(), anchors, advantage, keep, outside_of_rule)
                fractions[f"mask/{next(labels)}/frac"] = found
                dropped = found if dropped is None else dropped | found
            elif rule.act == "clip":
                low, high, shift = bounds_of(rule, anchors, behaviour, advantage, keep)
                left = None if outside_of_rule is None else outside_of_rule & keep
                drift = None if shift is None else log_ratio - shift
        state = Tokens(
            log_ratio=log_ratio,
            logp=logp,
            advantage=advantage,
            mask=keep,
            low=low,
            high=high,
            outside=left,
            dropped=dropped,
            drift=drift,
            anchored=None if self.anchor in ("", self.behaviour) else logp - anchors.of(self.anchor, "the surrogate"),
        )
        return state, token_log_ratio, fractions

    def _advantage(
        self,
        logp: Tensor,
        advantages: Tensor | None,
        keep: Tensor,
        anchors: AnchorLogps,
        log_ratio: Tensor,
        penalty_scale: float,
        over: tuple[Tensor | None, ...],
    ) -> Tensor:
        if advantages is None:
            if self.surrogate.has_policy_term:
                raise ValueError("advantages must be given, got None: only surrogate 'none' does without")
            return torch.zeros_like(logp)
        advantage = torch.where(keep, advantages.unsqueeze(1) if advantages.dim() == 1 else advantages, 0.0)
        if self.future_kl is not None:
            advantage = advantage * future_kl_weight(self.future_kl, log_ratio.detach(), advantage, keep)
        for p, baseline in zip(self.penalties, over, strict=True):
            if p.placement != "advantage":
                continue
            shift = torch.where(keep, advantage_shift(p, logp, anchors, baseline), 0.0)
            advantage = advantage - p.coefficient * penalty_scale * shift
        return advantage

    def _policy(self, state: Tokens, anchors: AnchorLogps, weight: Tensor | None) -> Tensor:
        """The surrogate's term of each token, (B, T)."""
        policy = self.surrogate.loss(state, self.options)
        rule = self.bound
        if rule is not None and rule.act == "soft":
            behaviour = anchors.of(self.behaviour, "act 'soft'")
            policy = policy + soft_term(rule, state.logp, anchors, behaviour, state.advantage, state.mask)
        if weight is not None:
            # A weight that is not finite belongs to a token that the sampler could not score.
            policy = policy * torch.where(state.mask & weight.isfinite(), weight, 0.0).detach()
        if state.dropped is not None:
            policy = torch.where(state.dropped, 0.0, policy)
        return policy.expand_as(state.logp)

    def _penalty(
        self,
        logp: Tensor,
        keep: Tensor,
        anchors: AnchorLogps,
        penalty_scale: float,
        over: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The penalties' part of each token's loss, and their values by label."""
        penalty, values = None, {}
        for label, p, given in zip(self.penalty_labels, self.penalties, over, strict=True):
            value = given if p.summed else None
            if value is None:
                value = penalty_estimate(p, logp, anchors, self.behaviour if p.reads_behaviour else "old", given)
            value = torch.where(keep, value, 0.0)
            values[label] = value.detach()
            if p.placement == "loss":
                term = p.coefficient * penalty_scale * value
                penalty = term if penalty is None else penalty + term
        return penalty, values

    @torch.no_grad()
    def reward_penalty(
        self,
        logp: Float[Tensor, "B T"],
        logp_ref: Float[Tensor, "B T"] | None,
        mask: Shaped[Tensor, "B T"],
        penalty_scale: float = 1.0,
        *,
        logp_sampler: Float[Tensor, "B T"] | None = None,
        logp_teacher: Float[Tensor, "B T"] | None = None,
        vocabulary: int | None = None,
    ) -> Float[Tensor, B]:
        """What ``placement: reward`` subtracts from each completion's reward.

        The coefficients times the sum over the tokens of the estimated divergence, for tokens sampled from the policy
        of ``logp``: the reward then is that of the regularised problem, r - beta D summed over the completion.

        Args:
            logp: (B, T), log-probabilities under the policy that sampled them.
            logp_ref: (B, T), the same under the reference, or None where no penalty needs it.
            mask: (B, T), 0 drops a token.
            penalty_scale: factor on all coefficients.
            logp_sampler, logp_teacher, vocabulary: as in the call.

        Returns:
            (B,), detached.
        """
        keep = mask.bool()
        logp = torch.where(keep, upcast(logp), 0.0)
        given = {"reference": logp_ref, "sampler": logp_sampler, "teacher": logp_teacher}
        anchors = read_anchors(logp, keep, given, vocabulary)
        total = torch.zeros_like(logp)
        for p in self.placed("reward"):
            value = penalty_estimate(p, logp, anchors, "old")  # which is the policy of logp here
            total = total + p.coefficient * penalty_scale * torch.where(keep, value, 0.0)
        return total.sum(-1)


__all__ = ["Objective", "Output", "Penalty", "TokenTerms"]
