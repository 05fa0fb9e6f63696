"""The neural mirror map as its definition reads: unit by unit, slow, independent of the library.

The same lines serve float64 tensors (autograd then gives the expected gradients) and mpmath numbers (where the textbook
difference would be pure noise). And the maps that the tests run over.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import torch

from mirrorpo.divergences.neural.map import GROUPS, SLICES, phi_inv, project

DIGITS = 170  # d is e^-160 of the constants in h at p = e^-80


def cube_root(u: Any) -> Any:
    return u ** (1 / 3) if isinstance(u, torch.Tensor) else mpmath.cbrt(u)


def units(u: Any, group: int) -> tuple[Any, Any]:
    """sigma(u) and its antiderivative."""
    m = torch if isinstance(u, torch.Tensor) else mpmath
    if group == 4:
        shifted = u + (1e-3 if m is torch else mpmath.mpf(1e-3))
        return m.log(shifted), shifted * m.log(shifted) - shifted
    return [
        lambda: (u**3, u**4 / 4),
        lambda: (u**2, u**3 / 3),
        lambda: (m.sqrt(u), 2 * m.sqrt(u) * u / 3),
        lambda: (cube_root(u), 3 * cube_root(u) * u / 4),
        None,
        lambda: (m.exp(u), m.exp(u)),
    ][group]()


def naive(parameters: torch.Tensor, x: Any) -> tuple[Any, Any]:
    """h'(x) and h(x), unit by unit."""
    log = x.log() if isinstance(x, torch.Tensor) else mpmath.log(x)
    exact = float if isinstance(x, torch.Tensor) else mpmath.mpf
    v, w, b, a, c = ([exact(n) for n in parameters[at].tolist()] for at in SLICES.values())
    slope, height = a[0] * x, a[0] * x * x / 2
    if c[0] > 0:
        slope, height = slope + c[0] * log, height + c[0] * (x * log - x)
    for j in range(126):
        if v[j] > 0 and w[j] > 0:  # without slope a unit is a constant
            sigma, antiderivative = units(w[j] * x + b[j], j // 21)
            slope, height = slope + v[j] * sigma, height + v[j] / w[j] * antiderivative
    return slope, height


def naive_term(parameters: torch.Tensor, x: Any, z: Any) -> Any:
    """h(x) - h(z) - h'(z)(x - z)."""
    (_, h_x), (slope_z, h_z) = naive(parameters, x), naive(parameters, z)
    return h_x - h_z - slope_z * (x - z)


def quadrature(parameters: torch.Tensor, x: float, z: float) -> float:
    """int_z^x (phi_inv(s) - phi_inv(z)) ds in float64, Gauss-Legendre on panels that double in s."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    low, high = min(x, z), max(x, z)
    panels = max(1, math.ceil(math.log2(high / low)))
    ends = low * (high / low) ** (np.arange(panels + 1) / panels)
    half = np.diff(ends)[:, None] / 2
    s = torch.from_numpy((ends[:-1, None] + half) + half * nodes)
    gap = phi_inv(parameters, s) - phi_inv(parameters, torch.tensor([z]))
    return float((gap.numpy() * weights * half).sum()) * (1.0 if x > z else -1.0)


def single(group: str, w: float, b: float, v: float = 1.0) -> torch.Tensor:
    """A map of one unit."""
    parameters = torch.zeros(380, dtype=torch.float64)
    at = GROUPS.index(group) * 21
    parameters[at], parameters[126 + at], parameters[252 + at] = v, w, b
    return parameters


def only(**values: float) -> torch.Tensor:
    """A map of a and c alone."""
    parameters = torch.zeros(380, dtype=torch.float64)
    for name, value in values.items():
        parameters[SLICES[name]] = value
    return parameters


def random_like(seed: int) -> torch.Tensor:
    return 0.01 * torch.rand(380, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evolved_like(seed: int) -> torch.Tensor:
    """A random map after large non-negative perturbations: scales from 1e-6 to 10, many exact zeros."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    scale = 10 ** (-6 + 7 * torch.rand(380, generator=generator, dtype=torch.float64))
    moved = random_like(seed) + scale * torch.randn(380, generator=generator, dtype=torch.float64)
    zero = torch.rand(380, generator=generator) < torch.rand(1, generator=generator)
    moved[zero] = 0.0
    moved = project(moved)
    moved[SLICES["a"]] += 1e-6  # so that not everything can be 0
    return moved


MAPS = {
    "random": random_like(0),
    "evolved": evolved_like(3),
    **{f"{group}({w:g} x + {b:g})": single(group, w, b) for group in GROUPS for w, b in ((1.0, 0.0), (10.0, 1e-3))},
    "cbrt(x + 1e-12)": single("cbrt", 1.0, 1e-12),
    "c": only(c=1.0),
    "a": only(a=2.0),
}
