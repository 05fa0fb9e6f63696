r"""Functions of the ratio t = p/q: the f-divergences, and the penalties on the log-ratio.

:math:`D_f(p \| q) = \sum_v q_v f(p_v / q_v)`, f convex, f(1) = 0. With :math:`F(t) = f(t) - f'(1)(t - 1)`, which
changes nothing for normalised p and q and has its minimum 0 at t = 1, everything follows from one function of
:math:`\delta = \log t`:

    ``form(delta) -> (S, S', g)``,  S = F(t) / t, the one-sample estimate for y ~ p, its derivative in delta, and the
    score weight g = F'(t) = S + S', given on its own because that sum cancels where t is small.

Then the coordinate term is d = p S, and the trust-region constraint is F(w).
``reverse_kl``'s S is k3 (q/p - 1 - log(q/p)); the constraint of ``forward_kl``, w - 1 - log w, is ATR-GRPO's KL3.

The penalties ``k1``, ``k2`` and ``log_l2`` fit the same scheme with S given outright: :math:`E_{y \sim p}[S(\delta)]`,
g = S + S'. ``k1`` is reverse KL without its control variate (so ``sampled`` has the right value and a gradient of
expectation zero); ``k2`` and ``log_l2`` are not f-divergences: their ``sampled`` gradient on policy is that of
KL(p || q), once and twice, while their value is a second moment.

References:
    Csiszar (1967) and Ali & Silvey (1966) for f-divergences; Schulman, "Approximating KL divergence" (2020) for k1,
    k2, k3; "A unified clipping framework" (arXiv 2602.05494) for F as a constraint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, MAX_LOG_WEIGHT, Divergence, Term
from mirrorpo.divergences.bregman import power_gap, power_slope

Parts = tuple[Tensor, Tensor, Tensor]
Form = Callable[[Tensor], Parts]


def reverse_kl(delta: Tensor) -> Parts:
    """f = t log t, KL(p || q): S = 1/t - 1 + log t."""
    e = (-delta).expm1_()
    return (e + delta).clamp_(min=0.0), e.neg_(), delta


def forward_kl(delta: Tensor) -> Parts:
    """f = -log t, KL(q || p): S = (t - 1 - log t) / t."""
    e = (-delta).expm1_()
    slope = torch.addcmul(delta, delta, e)
    return (e + slope).neg_().clamp_(min=0.0), slope, e.neg_()


def jeffreys(delta: Tensor) -> Parts:
    """f = (t - 1) log t, the sum of both KLs: S = (1 - 1/t) log t."""
    u = -delta
    e = torch.expm1(u)
    return u * e, u.exp_().mul_(delta).sub_(e), delta - e


def js(delta: Tensor) -> Parts:
    """f = (t log t - (1 + t) log((1 + t)/2)) / 2, the mean of both KLs to the mixture."""
    e = (-delta).expm1_()
    log_mix = torch.log1p(0.5 * e)  # log(m / t) with m = (1 + t) / 2
    half_rest = 0.5 * (log_mix + delta) * (e + 1.0)
    return (-0.5 * log_mix - half_rest).clamp_(min=0.0), half_rest, -0.5 * log_mix


def tv(delta: Tensor) -> Parts:
    """f = |t - 1| / 2, total variation; at t = 1 the subgradient 0 is used."""
    half_sign, u = delta.sign().mul_(0.5), -delta
    return u.expm1().abs_().mul_(0.5), u.exp_().mul_(half_sign), half_sign


def chi2(delta: Tensor) -> Parts:
    """f = (t - 1)^2, Pearson: S = (t - 1)^2 / t."""
    up = torch.expm1(delta)
    share = up * (-delta).exp_()  # 1 - 1/t
    return up * share, up + share, 2.0 * up


def hellinger(delta: Tensor) -> Parts:
    """f = 1 - sqrt t, squared Hellinger: S = (1/sqrt(t) - 1)^2 / 2."""
    half = -0.5 * delta
    e = torch.expm1(half)
    score = -0.5 * e
    return -e * score, score * half.exp_(), score


def alpha(delta: Tensor, *, alpha: float) -> Parts:
    """f = (t^alpha - alpha t + alpha - 1) / (alpha (alpha - 1)); 1 is reverse KL, 0 forward KL."""
    value = power_gap(alpha, delta, -1.0)
    slope = power_slope(alpha, delta)
    return value, slope - value, slope


def k1(delta: Tensor) -> Parts:
    """S = log(p / q): reverse KL without a control variate."""
    return delta, torch.ones_like(delta), delta + 1.0


def k2(delta: Tensor) -> Parts:
    """S = (log(p / q))^2 / 2."""
    value = 0.5 * delta * delta
    return value, delta, value + delta


def log_l2(delta: Tensor) -> Parts:
    """S = (log p - log q)^2."""
    value = delta * delta
    return value, 2.0 * delta, value + 2.0 * delta


@dataclass(frozen=True)
class RatioDivergence(Divergence):
    """A divergence whose every form is a function of the log-ratio alone.

    Attributes:
        form: ``delta -> (S, S', g)``, float64.
        float32_sums: whether ``form`` in float32 is right enough for a sum over the vocabulary, where it may lose a
            digit or two near equality but not all.
    """

    form: Form = field(kw_only=True)
    float32_sums: bool = field(default=False, kw_only=True)

    bucket_rest: ClassVar[bool] = True
    depends_on_token: ClassVar[bool] = False

    def _hold(self, delta: Tensor, limit: float) -> Tensor:
        # Beyond the limit value and slope stay what they are at the limit: finite, and the gradient does not vanish.
        bound = limit / max(1.0, self.growth)
        return delta.clamp(-bound, bound)

    def _form(self, delta: Tensor, guard: bool) -> Parts:
        if guard:
            return self.form(self._hold(delta, MAX_LOG_WEIGHT))
        return self.form(delta.double() if self.needs_float64 else delta)

    def _sampled(self, logp: Tensor, logq: Tensor, guard: bool) -> Term:
        value, slope, _ = self._form(logp - logq, guard)
        return value, slope

    def _weighted(self, logp: Tensor, logq: Tensor, logb: Tensor, guard: bool) -> Term:
        value, _, score = self._form(logp - logq, guard)
        weight = (logp - logb).clamp_(max=MAX_LOG_WEIGHT).exp_()
        return weight * value, weight * score

    def term(self, logx: Tensor, logz: Tensor) -> Term:
        delta = self._hold(logx - logz, -LOG_PROB_FLOOR)
        # Where a small ratio is clamped, x is clamped with it: x S stays z F(t), which has a limit as t -> 0.
        x = torch.maximum(logx, logz + delta).exp()
        value, _, score = self.form(delta)
        return x * value, x * score

    def _in_float32(self, logx: Tensor, logz: Tensor) -> Term | None:
        if not self.float32_sums:
            return None
        # As `term`, with the log-ratio clamped where float32 ends; a look that makes no host wait spares three passes.
        delta = logx - logz
        bound = MAX_LOG_WEIGHT / max(1.0, self.growth)
        if delta.device.type == "cpu" and delta.numel() and all(abs(end) <= bound for end in _ends(delta)):
            x = logx.exp()
        else:
            delta = delta.clamp_(-bound, bound)
            x = torch.maximum(logx, logz + delta).exp_()
        value, _, score = self.form(delta)
        return value.mul_(x), x.mul_(score)

    def constraint(self, log_ratio: Tensor, logz: Tensor) -> Tensor:
        return log_ratio.exp() * self.form(log_ratio)[0]


def _ends(x: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(x)
    return low.item(), high.item()


@dataclass(frozen=True)
class LogRatioPenalty(RatioDivergence):
    """A penalty S on the log-ratio that is no f-divergence: as a trust region S itself is the constraint."""

    bucket_rest: ClassVar[bool] = False

    def constraint(self, log_ratio: Tensor, logz: Tensor) -> Tensor:
        return self.form(log_ratio)[0]


def alpha_divergence(alpha_value: float) -> RatioDivergence:
    """The alpha-divergence with this alpha."""
    growth = max(abs(alpha_value), abs(alpha_value - 1.0))
    form = partial(alpha, alpha=alpha_value)
    return RatioDivergence("alpha", form=form, growth=growth, growth_known=True, float32_sums=True)
