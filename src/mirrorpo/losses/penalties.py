"""What goes into an objective, and what comes out? Penalties; per-token terms; a loss with its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from mirrorpo._shapes import Tensor
from mirrorpo.divergences import Divergence
from mirrorpo.losses.metrics import batch_metrics
from mirrorpo.losses.surrogates import Tokens


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """One regulariser: ``coefficient * D(p, q)``.

    Attributes:
        divergence: D.
        estimator: ``sampled``, ``weighted``, ``score``, ``exact`` or ``top_k``.
        coefficient: > 0, in loss units per nat.
        k: K of ``top_k``.
    """

    divergence: Divergence
    estimator: str
    coefficient: float
    k: int = 64


@dataclass(frozen=True, kw_only=True)
class Output:
    """What an objective returns.

    Attributes:
        loss: scalar, differentiable; the sum of the next two.
        policy_loss: the surrogate's part, differentiable.
        penalty_loss: the regularisers' part, differentiable; None without a penalty in the loss.
        metrics: detached scalars; the suffix says how to reduce them over ranks: ``/mean`` and ``/frac`` over tokens,
            ``/max`` and ``/min`` as they say.
    """

    loss: Tensor
    policy_loss: Tensor
    penalty_loss: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """The loss before it is aggregated; (B, T), 0 or without meaning where the mask drops a token.

    Attributes:
        policy: the surrogate's term of each token, differentiable.
        penalty: the regularisers' with their coefficients, differentiable; None without a penalty in the loss.
        values: the penalties' estimates by divergence, detached.
        state: what the surrogate saw.
        log_ratio: log w of every token, whatever the level.
        logp_ref: under the reference, detached, or None.
    """

    policy: Tensor
    penalty: Tensor | None
    values: dict[str, Tensor]
    state: Tokens
    log_ratio: Tensor
    logp_ref: Tensor | None

    @property
    def mask(self) -> Tensor:
        """(B, T), bool, the tokens that count."""
        return self.state.mask

    @property
    def loss(self) -> Tensor:
        """(B, T), policy term and penalty: for a framework that averages by itself."""
        return self.policy if self.penalty is None else self.policy + self.penalty

    def metrics(self, entropy: Tensor | None = None) -> dict[str, Tensor]:
        """The metrics of ``Output``, without the two that need an average."""
        return batch_metrics(self.state, self.log_ratio, self.logp_ref, self.values, entropy)


__all__ = ["Output", "Penalty", "TokenTerms"]
