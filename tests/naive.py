"""Every divergence as its definition is written in the mathematics page: slow, obvious, independent of the library.

The same lines serve torch tensors (autograd then gives the expected gradient) and mpmath numbers (60 digits, so that
the cancellation of a definition does not matter).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpmath
import torch

DIGITS = 60
BETAS = (-1.0, -0.5, 0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-9, 1.5, 2.0, 3.0)
ALPHAS = (-1.0, 0.0, 1e-9, 0.5, 1.0, 1.0 + 1e-9, 2.0, 3.0)
BREGMAN = ("kl", "prob_l2", "itakura_saito", "beta")
PENALTIES = ("k1", "k2", "log_l2")


def log(x: Any) -> Any:
    return x.log() if isinstance(x, torch.Tensor) else mpmath.log(x)


def sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, torch.Tensor) else mpmath.sqrt(x)


def sign(x: Any) -> Any:
    return x.sign() if isinstance(x, torch.Tensor) else mpmath.sign(x)


def exact_number(value: float, like: Any) -> Any:
    """``value`` in the arithmetic of ``like``."""
    return value if isinstance(like, torch.Tensor) else mpmath.mpf(value)


def bregman_generator(name: str, x: Any, beta: float | None = None) -> tuple[Any, Any]:
    """h(x) and h'(x)."""
    if name == "kl" or beta == 1.0:
        return x * log(x) - x, log(x)
    if name == "itakura_saito" or beta == 0.0:
        return -log(x), -1 / x
    if name == "prob_l2":
        return x * x, 2 * x
    b = exact_number(beta, x)
    return x**b / (b * (b - 1)), x ** (b - 1) / (b - 1)


# f(t) and f'(t); a new f-divergence is one line here.
F_GENERATORS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "reverse_kl": lambda t: (t * log(t), log(t) + 1),
    "forward_kl": lambda t: (-log(t), -1 / t),
    "jeffreys": lambda t: (t * log(t) - log(t), log(t) + 1 - 1 / t),
    "js": lambda t: ((t * log(t) - (1 + t) * log((1 + t) / 2)) / 2, (log(t) - log((1 + t) / 2)) / 2),
    "tv": lambda t: (abs(t - 1) / 2, sign(t - 1) / 2),
    "chi2": lambda t: ((t - 1) ** 2, 2 * (t - 1)),
    "hellinger": lambda t: (1 - sqrt(t), -1 / (2 * sqrt(t))),
    "k3": lambda t: (t * log(t), log(t) + 1),
}
F_DIVERGENCES = (*F_GENERATORS, "alpha")


def f_generator(name: str, t: Any, alpha: float | None = None) -> tuple[Any, Any]:
    """f(t) and f'(t)."""
    if alpha is None:
        return F_GENERATORS[name](t)
    if alpha in (0.0, 1.0):
        return F_GENERATORS["reverse_kl" if alpha == 1.0 else "forward_kl"](t)
    a = exact_number(alpha, t)
    return (t**a - a * t + a - 1) / (a * (a - 1)), (t ** (a - 1) - 1) / (a - 1)


# S(log t) and S'(log t) of the penalties on the log-ratio
PENALTY: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "k1": lambda u: (u, u / u if not isinstance(u, torch.Tensor) else torch.ones_like(u)),
    "k2": lambda u: (u * u / 2, u),
    "log_l2": lambda u: (u * u, 2 * u),
}


@dataclass(frozen=True)
class Case:
    """A name of the table with its options."""

    name: str
    options: dict[str, float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name + "".join(f"({value!r})" for value in self.options.values())

    @property
    def tolerance(self) -> float:
        """Of the naive formula in float64: 1 / (a (a - 1)) with a within 1e-9 of 0 or 1 magnifies 1e-16 by 1e9."""
        near = any(0 < abs(value - pole) < 1e-6 for value in self.options.values() for pole in (0.0, 1.0))
        return 3e-6 if near else 1e-10

    def excess(self, t: Any) -> tuple[Any, Any]:
        """F(t) = f(t) - f'(1)(t - 1) and F'(t)."""
        value, slope = f_generator(self.name, t, **self.options)
        _, slope_1 = f_generator(self.name, t / t, **self.options)
        return value - slope_1 * (t - 1), slope - slope_1

    def coordinate(self, x: Any, z: Any) -> Any:
        """d(x, z), summing to D."""
        if self.name in BREGMAN:
            (h_x, _), (h_z, slope_z) = (bregman_generator(self.name, v, **self.options) for v in (x, z))
            return h_x - h_z - slope_z * (x - z)
        if self.name in F_DIVERGENCES:
            return z * self.excess(x / z)[0]
        return x * PENALTY[self.name](log(x / z))[0]

    def sampled(self, x: Any, z: Any) -> Any:
        """The form at the sampled token."""
        return self.coordinate(x, z) if self.name in BREGMAN else self.coordinate(x, z) / x

    def sampled_slope(self, x: Any, z: Any) -> Any:
        """d sampled / d log x."""
        if self.name in BREGMAN:
            return x * self.score(x, z)
        if self.name in F_DIVERGENCES:
            value, slope = self.excess(x / z)
            return slope - value / (x / z)
        return PENALTY[self.name](log(x / z))[1]

    def score(self, x: Any, z: Any) -> Any:
        """g = d/dx d(x, z)."""
        if self.name in BREGMAN:
            slopes = [bregman_generator(self.name, v, **self.options)[1] for v in (x, z)]
            return slopes[0] - slopes[1]
        if self.name in F_DIVERGENCES:
            return self.excess(x / z)[1]
        value, slope = PENALTY[self.name](log(x / z))
        return value + slope

    def divergence(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """D(p, q) over the last axis, from its definition (for f: sum q f(p/q), not F)."""
        if self.name in F_DIVERGENCES:
            return (q * f_generator(self.name, p / q, **self.options)[0]).sum(-1)
        return self.coordinate(p, q).sum(-1)


CASES = (
    *(Case(n) for n in (*BREGMAN, *F_DIVERGENCES, *PENALTIES) if n not in ("beta", "alpha")),
    *(Case("beta", {"beta": b}) for b in BETAS),
    *(Case("alpha", {"alpha": a}) for a in ALPHAS),
)


def logits(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Random float64 logits, the same for the same seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
