r"""The first and second derivative of a divergence in its first argument, and what they say at the ends.

For :math:`D(p, q) = \sum_v d(p_v, q_v)` the *score* is :math:`g = \partial d / \partial x` at x = p_v, z = q_v:
:math:`h'(x) - h'(z)` for a Bregman divergence, :math:`f'(x/z) - f'(1)` for an f-divergence. The optimum of a penalised
reward and the implicit reward of a preference loss both come from it. Its derivative in log x,
:math:`x \, \partial^2 d / \partial x^2`, is taken by automatic differentiation, so every divergence has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, Divergence
from mirrorpo.divergences.bregman import BregmanDivergence

# Where the ends are probed: three log-ratios with equal steps, all inside the range in which every divergence (custom
# ones included) evaluates its formula and not a limit.
_END = -25.0
# Differences of the score below this part of it are rounding.
_ROUNDING = 1e-12
# A score this many times larger than at the ordinary ratios has no limit.
_UNBOUNDED = 1e9


def reach(d: Divergence) -> float:
    """The largest |log x/z| at which the formulas of d stay within float64."""
    return 0.98 * -LOG_PROB_FLOOR / max(1.0, d.growth)


def score(d: Divergence, logx: Tensor, logz: Tensor) -> Tensor:
    """g(x, z), float64 in and out, any shapes that broadcast; below z exp(-reach) what it is there."""
    logx, logz = torch.broadcast_tensors(logx, logz)
    logx = torch.maximum(logx, (logz - reach(d)).clamp(min=0.98 * LOG_PROB_FLOOR))
    return d.term(logx, logz)[1] * logx.neg().exp()


def _copy(saved: Tensor) -> Tensor:
    return saved.detach().clone()


def _as_it_is(copied: Tensor) -> Tensor:
    return copied


def score_and_slope(d: Divergence, logx: Tensor, logz: Tensor) -> tuple[Tensor, Tensor]:
    """g(x, z) and its derivative in log x; as ``score``."""
    logx, logz = torch.broadcast_tensors(logx.detach(), logz.detach())
    # h'(x) - h'(z) has a slope that does not depend on z. It is taken away from x = z, where a table has an absolute
    # value in its formula.
    beside = logx - 1.0 if isinstance(d, BregmanDivergence) else logz
    # The formulas work in place, so autograd keeps copies. Not allow_mutation_on_saved_tensors: it tells tensors apart
    # by their address, which a later tensor may reuse, and then differentiates with the wrong one.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_copy, _as_it_is):
        at = logx.clone().requires_grad_()
        g = score(d, at, beside)
        slope = torch.zeros_like(at)
        if g.requires_grad:
            (slope,) = torch.autograd.grad(g.sum(), at, materialize_grads=True)
    return score(d, logx, logz), slope


def require_convex(d: Divergence, what: str) -> None:
    """Raises ``ValueError`` if d is not convex in its first argument (``k2``, ``log_l2``): ``what`` needs that."""
    logs = torch.linspace(-12.0, 0.0, 97, dtype=torch.float64, device="cpu")
    for log_z in (-0.5, -3.0, -8.0):
        g = score(d, logs, torch.full_like(logs, log_z))
        fall = g[:-1] - g[1:]
        if (fall > 1e-6 * g.abs().amax()).any():
            at = int(fall.argmax())
            raise ValueError(
                f"{what} needs a divergence that is convex in p, and {d.name!r} is not: at q = {_e(log_z)} its "
                f"derivative falls between p = {_e(logs[at].item())} and p = {_e(logs[at + 1].item())}"
            )


def _e(log: float) -> str:
    return f"{math.exp(log):.3g}"


def limit(values: Tensor) -> float | None:
    """The limit of a sequence from three equally spaced members; None where it grows without bound.

    Aitken's formula, which is exact for a geometric approach (``alpha``, ``beta``: powers of the ratio); a constant
    step is a logarithm, which has no limit.
    """
    first, second, third = values.tolist()
    step, last = second - first, third - second
    if not abs(third) < _UNBOUNDED * max(abs(first), 1e-300):
        return None
    if abs(last) <= _ROUNDING * abs(third):
        return third
    if not abs(last) < (1.0 - 1e-6) * abs(step):
        return None
    return third + last * last / (step - last)


def score_without_anchor(d: Divergence) -> float | None:
    """The limit of g(1, z) for z -> 0: finite where D(p, q) stays finite although q has a 0 that p has not."""
    logz = torch.tensor([_END, 2.0 * _END, 3.0 * _END], dtype=torch.float64, device="cpu")
    return limit(score(d, torch.zeros_like(logz), logz))


def score_at_zero(d: Divergence, logz: float = -1.0) -> float | None:
    """The limit of g(x, z) for x -> 0: finite where an optimum may put a probability to exactly 0."""
    logx = torch.tensor([_END, 2.0 * _END, 3.0 * _END], dtype=torch.float64, device="cpu")
    return limit(score(d, logx, torch.full_like(logx, logz)))


__all__ = [
    "limit",
    "reach",
    "require_convex",
    "score",
    "score_and_slope",
    "score_at_zero",
    "score_without_anchor",
]
