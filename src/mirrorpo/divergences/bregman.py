r"""Bregman divergences: those of a convex generator h of the probability itself.

:math:`D_h(p, q) = \sum_v h(p_v) - h(q_v) - h'(q_v)(p_v - q_v)` (GBMPO, arXiv 2602.04380). ``sampled`` is the coordinate
term at the sampled token, whose expectation is a *policy-weighted* divergence :math:`\sum_v b_v d_h(p_v, q_v)`.

``beta`` is one dial through the others: Itakura-Saito at 0, KL at 1, half of ProbL2 at 2. Itakura-Saito's coordinate
term at (p_y, b_y) is KL3(w) = w - 1 - log w of the unified clipping paper (arXiv 2602.05494).

**The power gap** is the one function behind KL, Itakura-Saito, ProbL2, chi2, Hellinger and everything between

.. math:: B_a(\delta) = \frac{t^a - 1 - a (t - 1)}{a (a - 1)}, \quad t = e^\delta,

with its limits :math:`B_0 = t - 1 - \log t` and :math:`B_1 = t \log t - t + 1`. It is the alpha-divergence's F(t), and
the beta Bregman divergence is :math:`d_\beta(x, z) = z^\beta B_\beta(\log x/z)`.

Numerics: with k(u) = e^u - 1 - u, :math:`B_a = (k(a\delta)/a - k(\delta)) / (a - 1)`, which has no singularity at a = 0
but one at a = 1; the symmetry :math:`B_a(\delta) = e^\delta B_{1-a}(-\delta)` moves every a > 1/2 to the good side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, MAX_LOG_WEIGHT, MAX_MAGNITUDE, Divergence, Term

# exp beyond this leaves float64: a factor is clamped there, so that 0 * factor stays 0. The slope, computed on its own,
# is not affected.
MAX_EXPONENT = 700.0


def k(u: Tensor) -> Tensor:
    """e^u - 1 - u; relative error about 4e-16 / |u| in float64, never negative."""
    return (torch.expm1(u) - u).clamp_(min=0.0)


def power_gap(a: float, delta: Tensor, shift: float, offset: Tensor | float = 0.0) -> Tensor:
    """exp(shift * delta + offset) * B_a(delta), without overflow in the factors where the product has none."""
    if a > 0.5:
        return power_gap(1.0 - a, -delta, -(shift + 1.0), offset)
    # k(a delta)/a - k(delta) with its two terms in delta cancelled by hand
    gap = k(delta) if a == 0.0 else ((torch.expm1(a * delta) / a - torch.expm1(delta)) / (a - 1.0)).clamp_(min=0.0)
    if shift == 0.0 and isinstance(offset, float) and offset == 0.0:
        return gap
    exponent = shift * delta + offset
    return gap * exponent.clamp_(max=MAX_EXPONENT).exp_()


def power_slope(a: float, delta: Tensor) -> Tensor:
    """dB_a/dt = (t^(a-1) - 1) / (a - 1), the limit log t at a = 1."""
    return delta if a == 1.0 else torch.expm1((a - 1.0) * delta) / (a - 1.0)


Coordinate = Callable[[Tensor, Tensor, Tensor], Term]


def kl(logx: Tensor, logz: Tensor, delta: Tensor) -> Term:
    """h = x log x - x: d = x log(x/z) - x + z."""
    x = logx.exp()
    return x * k(-delta).to(x.dtype), x * delta.to(x.dtype)


def prob_l2(logx: Tensor, logz: Tensor, delta: Tensor) -> Term:
    """h = x^2 (GBMPO's ProbL2): d = (x - z)^2."""
    x = logx.exp()
    gap = (-delta).expm1_().mul_(x)  # z - x without cancellation, so that float32 will do
    return gap * gap, x.mul_(gap).mul_(-2.0)


def itakura_saito(logx: Tensor, logz: Tensor, delta: Tensor) -> Term:
    """h = -log x: d = x/z - 1 - log(x/z)."""
    e = torch.expm1(delta)
    return (e - delta).clamp_(min=0.0), e


def beta(logx: Tensor, logz: Tensor, delta: Tensor, *, beta: float) -> Term:
    """h = x^beta / (beta (beta - 1)): d = z^beta B_beta(log x/z)."""
    anchor = beta * logz.to(delta.dtype)
    slope = (delta + anchor).clamp_(max=-LOG_PROB_FLOOR).exp_() * power_slope(beta, delta)
    return power_gap(beta, delta, 0.0, anchor), slope


def hold(logx: Tensor, logz: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log x, log z, log x/z) with the log-ratio held in [-bound, bound].

    Where a small ratio is clamped, x is clamped with it: a product of x and a function of the ratio keeps its limit as
    x -> 0.
    """
    delta = (logx - logz).clamp_(-bound, bound)
    return torch.maximum(logx, logz + delta), logz, delta


# Clamped closer than float32 reaches: a factor of a Bregman term is a square of the ratio.
MAX_FLOAT32_LOG_RATIO = 40.0


def kl_float32(logx: Tensor, logz: Tensor) -> Term:
    """``kl`` for sums over the vocabulary."""
    logx, _, delta = hold(logx, logz, MAX_LOG_WEIGHT)
    x = logx.exp()
    return (-delta).expm1_().add_(delta).clamp_(min=0.0).mul_(x), x.mul_(delta)


def prob_l2_float32(logx: Tensor, logz: Tensor) -> Term:
    """``prob_l2`` for sums over the vocabulary."""
    x = logx.exp()
    gap = logz.exp().neg_().add_(x)
    return gap.square(), x.mul_(gap).mul_(2.0)


def clamped_float32(coordinate: Coordinate, growth: float, logx: Tensor, logz: Tensor) -> Term:
    """Any coordinate term that keeps its digits in float32."""
    value, slope = coordinate(*hold(logx, logz, MAX_FLOAT32_LOG_RATIO / max(1.0, growth)))
    return value.clamp_(max=MAX_MAGNITUDE), slope.clamp_(-MAX_MAGNITUDE, MAX_MAGNITUDE)


@dataclass(frozen=True)
class BregmanDivergence(Divergence):
    """A Bregman divergence.

    Attributes:
        coordinate: ``(log x, log z, log x/z) -> (d, x * dd/dx)``, in the dtype of the log-ratio or narrower.
        max_log_ratio: where the log-ratio is clamped in ``sampled`` and ``weighted`` so that float32 does not overflow;
            value and slope stay what they are there, so the gradient does not vanish.
        float32_term: ``(log x, log z) -> (d, x * dd/dx)`` for float32 sums over the vocabulary; None: float64 is used.
    """

    coordinate: Coordinate = field(kw_only=True)
    max_log_ratio: float = field(default=-LOG_PROB_FLOOR, kw_only=True)
    float32_term: Callable[[Tensor, Tensor], Term] | None = field(default=None, kw_only=True)

    def _sampled(self, logp: Tensor, logq: Tensor, guard: bool) -> Term:
        if not guard:
            delta = logp - logq
            return self.coordinate(logp, logq, delta.double() if self.needs_float64 else delta)
        return self.coordinate(*hold(logp, logq, self.max_log_ratio))

    def _weighted(self, logp: Tensor, logq: Tensor, logb: Tensor, guard: bool) -> Term:
        # in float64: d of a rare token may be below float32 where d / b is not
        value, slope = self._sampled(logp.double(), logq.double(), guard)
        weight = logb.double().neg().clamp_(max=-LOG_PROB_FLOOR).exp_()
        return value * weight, slope * weight

    def term(self, logx: Tensor, logz: Tensor) -> Term:
        return self.coordinate(*hold(logx, logz, -LOG_PROB_FLOOR / max(1.0, self.growth)))

    def _in_float32(self, logx: Tensor, logz: Tensor) -> Term | None:
        return None if self.float32_term is None else self.float32_term(logx, logz)

    def constraint(self, log_ratio: Tensor, logz: Tensor) -> Tensor:
        return self.term(logz + log_ratio, logz)[0]


def beta_divergence(beta_value: float) -> BregmanDivergence:
    """The beta Bregman divergence with this beta."""
    # With beta < 1 the generator's slope z^(beta - 1) is unbounded at rare tokens.
    unbounded = max(1.0 - beta_value, -beta_value)
    held = MAX_LOG_WEIGHT / unbounded if unbounded > 0.12 else -LOG_PROB_FLOOR
    growth = max(1.0, abs(beta_value - 1.0), abs(beta_value) if beta_value <= 0.5 else 0.0)
    held = min(held, -LOG_PROB_FLOOR / growth)
    coordinate = partial(beta, beta=beta_value)
    return BregmanDivergence(
        "beta",
        coordinate=coordinate,
        max_log_ratio=held,
        growth=growth,
        growth_known=True,
        # a power of 1/z (beta < 0) leaves float32
        float32_term=partial(clamped_float32, coordinate, growth) if beta_value >= 0.0 else None,
    )
