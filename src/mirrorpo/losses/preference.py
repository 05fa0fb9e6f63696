r"""Preference losses with any divergence: DPO and f-DPO from one formula.

A policy that maximises reward minus :math:`\beta D(p, q)` reveals the reward up to a constant:
:math:`r(y) = \beta s(y) + \lambda`, with s the derivative of the divergence at the sequence y (``slope.score``). Under
the Bradley-Terry model of preferences the loss of a pair is :math:`-\log \sigma(\beta [s(y^+) - s(y^-)])`.

For an f-divergence s = f'(p(y)/q(y)); ``reverse_kl`` is DPO. A Bregman divergence gives s = h'(p(y)) - h'(q(y)), a
function of probabilities of whole sequences, which are tiny: ``prob_l2`` is flat there, ``itakura_saito`` steep.

References:
    Rafailov et al. 2023, "Direct preference optimization" (arXiv 2305.18290), Eq. 7; Wang et al. 2023, "Beyond reverse
    KL" (f-DPO, arXiv 2309.16240), Eq. 9.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from mirrorpo._checks import Float, Num, Tensor, check_logps
from mirrorpo.divergences.base import LOG_ZERO, MAX_LOG_WEIGHT, Divergence, upcast
from mirrorpo.divergences.slope import require_convex, score, score_and_slope, score_at_zero
from mirrorpo.errors import check_number
from mirrorpo.losses.regions import resolve_divergence

# A score leaves float32 beyond this. From the last point below it the score continues along its tangent: it still
# increases, its gradient is the one at that point, and a logarithm (DPO) continues as itself.
_LARGEST = 1e36
# Log-probabilities at which a Bregman score may go over to its tangent; the lowest that fits is taken.
_FLOORS = (-180.0, -80.0, -40.0, -20.0, -10.0)
# Log-probabilities of a token and of a sequence, and the ratio of the slopes of s there that counts as flat (or,
# inverted, as steep).
_TOKEN, _SEQUENCE, _FLAT = -1.0, -100.0, 1e-3


@dataclass(frozen=True)
class ImplicitReward:
    """The score s of a divergence on log-probabilities of sequences, differentiable; ``ImplicitReward.of`` builds it.

    Attributes:
        divergence: D.
        end: the log-ratio, or for a Bregman divergence the log-probability, beyond which s is continued linearly.
    """

    divergence: Divergence
    end: float

    @classmethod
    def of(cls, divergence: Any) -> ImplicitReward:
        """The score of a divergence in any form that ``mirrorpo.objective`` takes.

        Raises:
            ValueError: a divergence that is not convex.
        """
        d = resolve_divergence(divergence)
        require_convex(d, "a preference loss")
        if not d.depends_on_token:
            return cls(d, MAX_LOG_WEIGHT / max(1.0, d.growth))
        floors = torch.tensor(_FLOORS, dtype=torch.float64)
        fits = score(d, floors, torch.zeros_like(floors)).abs() < _LARGEST
        return cls(d, floors[fits][0].item() if fits.any() else _FLOORS[-1])

    def __call__(self, logp: Tensor, logp_ref: Tensor) -> Tensor:
        """s, float64; no gradient flows to ``logp_ref``."""
        live = logp.double().clamp(min=LOG_ZERO)
        at, at_ref = live.detach(), logp_ref.detach().double().clamp(min=LOG_ZERO)
        if self.divergence.depends_on_token:
            floor = torch.full_like(at, self.end)
            near, near_ref = at.clamp(self.end, 0.0), at_ref.clamp(self.end, 0.0)
            value, slope = score_and_slope(self.divergence, near, near_ref)
            beyond = score_and_slope(self.divergence, floor, floor)[1] * ((at - near) - (at_ref - near_ref))
        else:
            near = (at - at_ref).clamp(-self.end, self.end)
            value, slope = score_and_slope(self.divergence, near, torch.zeros_like(near))
            beyond = slope * (at - at_ref - near)
        return value + beyond + slope * (live - at)  # the last is 0, and carries the derivative

    def concerns(self) -> list[str]:
        """What a preference loss with this divergence cannot do, one line each; [] for DPO."""
        d, found = self.divergence, []
        if d.depends_on_token:
            logs = torch.tensor([_TOKEN, _SEQUENCE], dtype=torch.float64)
            token, sequence = score_and_slope(d, logs, logs)[1].tolist()
            if sequence < _FLAT * token:
                found.append(
                    f"divergence {d.name!r}: its score h'(p) - h'(q) is flat for the probabilities of whole sequences, "
                    "so almost no gradient is left"
                )
            elif sequence > token / _FLAT:
                found.append(
                    f"divergence {d.name!r}: its score h'(p) - h'(q) grows without bound for the probabilities of "
                    "whole sequences, so the longest pair decides"
                )
            return found
        logs = torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=torch.float64)
        if not score_and_slope(d, logs, torch.zeros_like(logs))[1].any():
            found.append(f"divergence {d.name!r}: its score f'(p/q) is flat, so there is no gradient")
        if score_at_zero(d) is not None:
            found.append(
                f"divergence {d.name!r}: f' is finite at 0, so the optimum leaves the support of the reference and the "
                "reward is not identified there"
            )
        return found

    def warn(self, stacklevel: int) -> None:
        """Issues each concern as a ``UserWarning``."""
        for concern in self.concerns():
            warnings.warn(concern, UserWarning, stacklevel=stacklevel + 1)


def preference_loss(
    logp_chosen: Num[Tensor, ...],
    logp_rejected: Num[Tensor, ...],
    logp_ref_chosen: Num[Tensor, ...],
    logp_ref_rejected: Num[Tensor, ...],
    divergence: Any = "reverse_kl",
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    r"""The mean over pairs of :math:`-\log \sigma(\beta [s(y^+) - s(y^-)])`.

    Its minimiser over all policies, for preferences that follow the Bradley-Terry model of a reward r, is
    ``mirrorpo.optimum(divergence, q, r, beta)``, where that has full support.

    Args:
        logp_chosen: log-probabilities of the preferred sequences under the policy (sums over their tokens), any shape.
        logp_rejected: the same of the other sequence of each pair.
        logp_ref_chosen: of the preferred sequences under the reference; constant.
        logp_ref_rejected: of the others; constant.
        divergence: D: a name, a ``Divergence``, a function, or a mapping with ``name`` and options.
        beta: > 0, the coefficient of D, in reward units per nat.

    Returns:
        A scalar, float32 (float64 for float64 input; computed in float64), differentiable once. The gradient is
        :math:`-\beta \sigma(-\beta \Delta s) [s' \nabla \log p]`, difference over the pair.

    Raises:
        ValueError: shapes that differ, a log-probability above 0 or NaN, beta <= 0, a divergence that is not convex.

    Warns:
        UserWarning: the score is flat or too steep on sequences (most Bregman divergences), or the reward is not
            identified (``chi2``, ``alpha`` > 1, ``tv``).

    Reference: f-DPO, arXiv 2309.16240, Eq. 9; DPO, arXiv 2305.18290, Eq. 7.

    Example:
        >>> import torch, mirrorpo
        >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-12.0])
        >>> mirrorpo.preference_loss(chosen, rejected, chosen - 1.0, rejected, beta=0.5)  # softplus(-0.5)
        tensor(0.4741)
    """
    reward = ImplicitReward.of(divergence)
    reward.warn(stacklevel=2)
    return loss_of(reward, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, beta)


def loss_of(
    reward: ImplicitReward,
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    logp_ref_chosen: Tensor,
    logp_ref_rejected: Tensor,
    beta: float,
) -> Tensor:
    """``preference_loss`` with a score that was built before, without its warnings."""
    names = ("logp_chosen", "logp_rejected", "logp_ref_chosen", "logp_ref_rejected")
    check_logps(names, logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected)
    if logp_chosen.numel() == 0:
        raise ValueError(f"logp_chosen must hold at least one pair, got shape {tuple(logp_chosen.shape)}")
    coefficient = check_number("beta", beta, 0.0, open_low=True)
    margin = coefficient * (reward(logp_chosen, logp_ref_chosen) - reward(logp_rejected, logp_ref_rejected))
    dtype = torch.promote_types(upcast(logp_chosen).dtype, upcast(logp_rejected).dtype)
    return torch.nn.functional.softplus(-margin).mean().to(dtype)


__all__ = ["ImplicitReward", "loss_of", "preference_loss"]
