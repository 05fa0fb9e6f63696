r"""What does one batch of completions contribute to the loss? Trust region + regulariser + aggregation.

.. math::
    L = \mathrm{agg}\Big(\text{surrogate}(w_t, A_t) \cdot c_t + \sum_j \beta_j\, \hat D_j(p_t, q_t)\Big)

with w = p/b the ratio to the rollout policy, A the advantage, c an optional weight on the policy term (importance
correction for the sampler's mismatch), and :math:`\hat D_j` an estimator of a divergence from the reference q.
A pure function of tensors: no state, no I/O, no host synchronisation on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mirrorpo._checks import check_logps
from mirrorpo._shapes import Float, Num, Shaped, Tensor
from mirrorpo.divergences import LOGITS_ESTIMATORS
from mirrorpo.divergences.base import upcast
from mirrorpo.losses.aggregation import aggregate
from mirrorpo.losses.coefficient import Control
from mirrorpo.losses.future_kl import FutureKL, future_kl_weight
from mirrorpo.losses.penalties import Output, Penalty, TokenTerms
from mirrorpo.losses.regions import OverVocabulary, TrustRegion
from mirrorpo.losses.surrogates import SURROGATES, Surrogate, Tokens


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A policy objective; built by ``mirrorpo.objective``.

    Attributes:
        name: of the preset it came from.
        region: the trust region around the rollout policy.
        penalties: regularisers toward the reference; empty for none.
        surrogate: what is maximised inside the region: an entry of ``mirrorpo.losses.surrogates``.
        level: ``token``, or ``sequence`` for w = exp(mean_t log w_t) (GSPO).
        advantage: how rewards become advantages (``mirrorpo.advantages``); not used in the call.
        aggregation: how tokens become a loss (``mirrorpo.aggregate``).
        options: of the surrogate, all of them, by name.
        future_kl: future-KL weighting of the advantages, or None.
        placement: ``loss``, or ``reward``: the penalty is subtracted from the rewards (``reward_penalty``) and is no
            part of the loss.
        control: how the coefficient moves over the run, or None; whoever trains applies it as ``penalty_scale``.
    """

    name: str
    region: TrustRegion
    penalties: tuple[Penalty, ...] = ()
    surrogate: Surrogate = SURROGATES["clip"]
    level: str = "token"
    advantage: str = "grpo"
    aggregation: str = "sequence_mean"
    options: Mapping[str, float | None] = field(default_factory=dict)
    future_kl: FutureKL | None = None
    placement: str = "loss"
    control: Control | None = None
    # What `mirrorpo.objective` was asked for; None for an objective that was put together or changed by hand.
    spec: Mapping[str, Any] | None = field(default=None, init=False, compare=False, repr=False)

    @property
    def needs_reference(self) -> bool:
        """Whether ``logp_ref`` must be given."""
        return bool(self.penalties)

    @property
    def needs_logits(self) -> bool:
        """Whether ``logits`` (and ``logits_ref``, ``logits_old``) must be given."""
        return self.region.needs_logits or any(p.estimator in LOGITS_ESTIMATORS for p in self.penalties)

    @property
    def penalty_labels(self) -> tuple[str, ...]:
        """The penalties' names in the metrics: the divergence's, numbered from the second of one name on."""
        names = [p.divergence.name for p in self.penalties]
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        return tuple(name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True))

    @property
    def token_separable(self) -> bool:
        """Whether a token's term depends on no other token: then loss and gradient need one sweep over the tokens."""
        return self.level == "token" and not self.surrogate.couples_tokens and self.future_kl is None

    def describe(self) -> str:
        """One line: region, penalties with estimator and coefficient, level, advantage, aggregation."""
        region = vars(self.region)
        bounds = ", ".join(f"{key} {region[key]:.5g}" for key in ("low", "high", "radius") if key in region)
        parts = [
            f"{self.name}: {self.surrogate.name} surrogate, region {self.region.name}"
            + (f" ({bounds})" if bounds else "")
        ]
        for p in self.penalties:
            parts.append(f"penalty {p.coefficient:g} * {p.divergence.name} ({p.estimator})")
        if not self.penalties:
            parts.append("no penalty")
        elif self.placement == "reward":
            parts.append("subtracted from the reward")
        if self.control is not None:
            parts.append(f"{self.control.kind} coefficient")
        if self.future_kl is not None:
            parts.append(f"future-KL weights (half life {self.future_kl.half_life:g})")
        parts.append(f"{self.level} level, {self.advantage} advantages, {self.aggregation} aggregation")
        return "; ".join(parts)

    def __call__(
        self,
        *,
        logp: Float[Tensor, "B T"],
        advantages: Float[Tensor, ...],
        mask: Shaped[Tensor, "B T"],
        logp_old: Float[Tensor, "B T"] | None = None,
        logp_ref: Float[Tensor, "B T"] | None = None,
        max_completion_length: int | None = None,
        num_tokens: Num[Tensor, ""] | float | int | None = None,
        weight: Float[Tensor, ...] | None = None,
        logits: Float[Tensor, "B T V"] | None = None,
        logits_ref: Float[Tensor, "B T V"] | None = None,
        logits_old: Float[Tensor, "B T V"] | None = None,
        tokens: Shaped[Tensor, "B T"] | None = None,
        entropy: Float[Tensor, "B T"] | None = None,
        penalty_scale: float = 1.0,
    ) -> Output:
        """Loss and metrics of a batch.

        Args:
            logp: (B, T), log-probabilities of the sampled tokens under the policy; differentiable.
            advantages: (B,), (B, 1) or (B, T).
            mask: (B, T), 0 drops a token; what stands there (even NaN) has no effect.
            logp_old: the same under the rollout policy; None: the policy itself (one update per batch).
            logp_ref: the same under the reference; needed with a penalty.
            max_completion_length: tokens; needed by ``constant`` aggregation.
            num_tokens: see ``mirrorpo.aggregate``.
            weight: (B, T) or (B, 1), detached factor on the policy term only.
            logits: (B, T, V) of the policy, differentiable; needed by ``exact`` and ``top_k``.
            logits_ref: of the reference; needed by such a penalty.
            logits_old: of the rollout policy; needed by such a region.
            tokens: (B, T), the sampled tokens; needed by ``top_k``.
            entropy: (B, T), of the policy's next-token distributions; adds the entropy metrics.
            penalty_scale: factor on all coefficients (a schedule's or controller's).

        Returns:
            ``Output(loss, metrics)``.

        Raises:
            ValueError: something needed is missing; shapes that differ; a log-probability above 0 or NaN where the mask
                keeps the token.

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
        self._check_shapes(logp, advantages, mask, logp_old=logp_old, logp_ref=logp_ref, tokens=tokens)
        keep = mask.bool()
        tokens = None if tokens is None else torch.where(keep, tokens, 0)
        return self.evaluate(
            logp=logp,
            mask=mask,
            logp_ref=logp_ref,
            max_completion_length=max_completion_length,
            num_tokens=num_tokens,
            entropy=entropy,
            logp_old=logp_old,
            advantages=advantages,
            weight=weight,
            penalty_scale=penalty_scale,
            outside=self._outside(logits, logits_old, tokens),
            over_vocabulary=tuple(self._over_vocabulary(p, logits, logits_ref, tokens) for p in self.penalties),
        )

    def evaluate(
        self,
        *,
        logp: Float[Tensor, "B T"],
        mask: Shaped[Tensor, "B T"],
        logp_ref: Float[Tensor, "B T"] | None = None,
        max_completion_length: int | None = None,
        num_tokens: Num[Tensor, ""] | float | int | None = None,
        entropy: Float[Tensor, "B T"] | None = None,
        **given: Any,
    ) -> Output:
        """The call without logits: what needs the whole vocabulary has been evaluated already (``mirrorpo.kernels``).

        Arguments, result and errors as in the call; ``given`` are the other arguments of ``terms``.
        """
        terms = self.terms(logp=logp, mask=mask, logp_ref=logp_ref, **given)

        def average(x: Tensor) -> Tensor:
            return aggregate(
                x, mask, self.aggregation, max_completion_length=max_completion_length, num_tokens=num_tokens
            )

        policy_loss = average(terms.policy)
        penalty_loss = None if terms.penalty is None else average(terms.penalty)
        metrics = terms.metrics(entropy)
        metrics["policy_loss/mean"] = policy_loss.detach()
        if penalty_loss is not None:
            metrics["penalty_loss/mean"] = penalty_loss.detach()
        loss = policy_loss if penalty_loss is None else policy_loss + penalty_loss
        return Output(loss=loss, policy_loss=policy_loss, penalty_loss=penalty_loss, metrics=metrics)

    def terms(
        self,
        *,
        logp: Float[Tensor, "B T"],
        advantages: Float[Tensor, ...],
        mask: Shaped[Tensor, "B T"],
        logp_old: Float[Tensor, "B T"] | None = None,
        logp_ref: Float[Tensor, "B T"] | None = None,
        weight: Float[Tensor, ...] | None = None,
        penalty_scale: float = 1.0,
        outside: Shaped[Tensor, "B T"] | None = None,
        over_vocabulary: tuple[Tensor | None, ...] = (),
    ) -> TokenTerms:
        """What each token contributes before aggregation.

        Where ``token_separable`` holds, a token's terms depend on that token's arguments alone.

        Args:
            logp, advantages, mask, logp_old, logp_ref, weight, penalty_scale: as in the call.
            outside: (B, T), bool: where a region over the vocabulary is left.
            over_vocabulary: one entry for each penalty: (B, T), the divergence of an ``exact`` or ``top_k`` one,
                differentiable; None for the others.
        """
        self._check_shapes(logp, advantages, mask, logp_old=logp_old, logp_ref=logp_ref)
        if weight is not None and weight.shape not in ((logp.shape[0], 1), logp.shape):
            raise ValueError(f"weight must have shape (B, 1) or (B, T), got {tuple(weight.shape)}")
        keep = mask.bool()
        # Masked positions are replaced on the way in, not multiplied by 0 on the way out: 0 * NaN is NaN.
        logp = torch.where(keep, upcast(logp), 0.0)
        logp_old = logp.detach() if logp_old is None else torch.where(keep, upcast(logp_old), 0.0).detach()
        logp_ref = None if logp_ref is None else torch.where(keep, upcast(logp_ref), 0.0).detach()
        given = {"logp": logp.detach(), "logp_old": logp_old} | ({} if logp_ref is None else {"logp_ref": logp_ref})
        check_logps(tuple(given), *given.values())

        token_log_ratio = logp - logp_old
        log_ratio = token_log_ratio
        if self.level == "sequence":
            log_ratio = token_log_ratio.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
        advantage = torch.where(keep, advantages.unsqueeze(1) if advantages.dim() == 1 else advantages, 0.0)
        if self.future_kl is not None:
            advantage = advantage * future_kl_weight(self.future_kl, token_log_ratio.detach(), advantage, keep)

        if self.region.needs_logits:
            outside = _given({"outside": outside}, f"region {self.region.name!r}")["outside"] & keep
            low = high = torch.ones((), dtype=logp.dtype, device=logp.device)
        else:
            low, high = self.region.ratio_bounds(logp_old)
        state = Tokens(
            log_ratio=log_ratio, logp=logp, advantage=advantage, mask=keep, low=low, high=high, outside=outside
        )
        policy = self.surrogate.fn(state, **self.options)
        if weight is not None:
            policy = policy * torch.where(keep, weight, 0.0).detach()
        penalty, values = None, {}
        for index, (label, p) in enumerate(zip(self.penalty_labels, self.penalties, strict=True)):
            value = over_vocabulary[index] if index < len(over_vocabulary) else None
            if value is None:
                needed = _given({"logp_ref": logp_ref}, _name_of(p))
                value = p.divergence.estimate(p.estimator, logp, needed["logp_ref"], logp_old)
            value = torch.where(keep, value, 0.0)
            values[label] = value.detach()
            if self.placement == "loss":
                term = p.coefficient * penalty_scale * value
                penalty = term if penalty is None else penalty + term
        return TokenTerms(
            policy=policy.expand_as(logp),
            penalty=penalty,
            values=values,
            state=state,
            log_ratio=token_log_ratio,
            logp_ref=logp_ref,
        )

    @torch.no_grad()
    def reward_penalty(
        self,
        logp: Float[Tensor, "B T"],
        logp_ref: Float[Tensor, "B T"],
        mask: Shaped[Tensor, "B T"],
        penalty_scale: float = 1.0,
    ) -> Float[Tensor, B]:
        """What ``placement: reward`` subtracts from each completion's reward.

        The coefficients times the sum over the tokens of the estimated divergence, for tokens sampled from the policy
        of ``logp``: the reward then is that of the regularised problem, r - beta D summed over the completion.

        Args:
            logp: (B, T), log-probabilities under the policy that sampled them.
            logp_ref: (B, T), the same under the reference.
            mask: (B, T), 0 drops a token.
            penalty_scale: factor on all coefficients.

        Returns:
            (B,), detached.
        """
        keep = mask.bool()
        logp, logp_ref = torch.where(keep, upcast(logp), 0.0), torch.where(keep, upcast(logp_ref), 0.0)
        total = torch.zeros_like(logp)
        for p in self.penalties:
            value = p.divergence.estimate(p.estimator, logp, logp_ref, logp)
            total = total + p.coefficient * penalty_scale * torch.where(keep, value, 0.0)
        return total.sum(-1)

    def _check_shapes(self, logp: Tensor, advantages: Tensor, mask: Tensor, **others: Tensor | None) -> None:
        if logp.dim() != 2 or mask.shape != logp.shape:
            raise ValueError(
                f"logp and mask must have the same shape (B, T), got {tuple(logp.shape)} and {tuple(mask.shape)}"
            )
        for name, other in others.items():
            if other is not None and other.shape != logp.shape:
                raise ValueError(f"{name} must have the shape of logp, {tuple(logp.shape)}, got {tuple(other.shape)}")
        rows = logp.shape[0]
        if advantages.shape not in ((rows,), (rows, 1), tuple(logp.shape)):
            raise ValueError(f"advantages must have shape (B,), (B, 1) or (B, T), got {tuple(advantages.shape)}")

    def _outside(self, logits: Tensor | None, logits_old: Tensor | None, tokens: Tensor | None) -> Tensor | None:
        if not isinstance(self.region, OverVocabulary):
            return None
        given = _given({"logits": logits, "logits_old": logits_old, "tokens": tokens}, f"region {self.region.name!r}")
        return self.region.outside(given["logits"], given["logits_old"], given["tokens"])

    def _over_vocabulary(
        self, p: Penalty, logits: Tensor | None, logits_ref: Tensor | None, tokens: Tensor | None
    ) -> Tensor | None:
        if p.estimator == "exact":
            given = _given({"logits": logits, "logits_ref": logits_ref}, _name_of(p))
            return p.divergence.exact(given["logits"], given["logits_ref"])
        if p.estimator == "top_k":
            given = _given({"logits": logits, "logits_ref": logits_ref, "tokens": tokens}, _name_of(p))
            return p.divergence.top_k(given["logits"], given["logits_ref"], given["tokens"], p.k)
        return None


def _name_of(p: Penalty) -> str:
    return f"penalty {p.divergence.name!r} with estimator {p.estimator!r}"


def _given(needed: Mapping[str, Tensor | None], what: str) -> dict[str, Tensor]:
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{what} needs {missing[0]}, got None{_HOW_TO_GET.get(missing[0], '')}")
    return {name: value for name, value in needed.items() if value is not None}


_HOW_TO_GET = {
    "logp_ref": ": compute the reference's log-probabilities of the sampled tokens (in the trainer: a coefficient > 0)",
    "logits": ": keep the policy's next-token logits, (B, T, V)",
    "logits_ref": ": keep the reference's next-token logits, (B, T, V)",
    "logits_old": ": keep the rollout policy's next-token logits, (B, T, V)",
    "tokens": ": pass the sampled tokens, (B, T)",
}


__all__ = ["Objective", "Output", "Penalty", "TokenTerms"]
