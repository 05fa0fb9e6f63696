r"""The power gap, the one function behind KL, Itakura-Saito, ProbL2, chi2, Hellinger and everything between

.. math:: B_a(\delta) = \frac{t^a - 1 - a (t - 1)}{a (a - 1)}, \quad t = e^\delta,

with its limits :math:`B_0 = t - 1 - \log t` and :math:`B_1 = t \log t - t + 1`. It is the alpha-divergence's F(t), and
the beta Bregman divergence is :math:`d_\beta(x, z) = z^\beta B_\beta(\log x/z)`.

Numerics: with k(u) = e^u - 1 - u, :math:`B_a = (k(a\delta)/a - k(\delta)) / (a - 1)`, which has no singularity at a = 0
but one at a = 1; the symmetry :math:`B_a(\delta) = e^\delta B_{1-a}(-\delta)` moves every a > 1/2 to the good side.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp beyond this leaves float64: a factor is held there, so that 0 * factor stays 0. The slope, computed on its own, is
# not affected.
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
