"""How far is the float32 path from 60 digits? Worst relative errors, per divergence."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import mpmath
import torch

import mirrorpo
from naive import DIGITS, Case

# Results outside are not float32 numbers with all their digits (or not finite); they are left out.
SMALLEST, LARGEST = 1.2e-38, 1e38
QUANTITIES = ("value", "gradient", "score")


@dataclass(frozen=True)
class Error:
    """A relative error and the inputs that gave it."""

    relative: float
    logp: float
    logp_ref: float


def computed(case: Case, logp: torch.Tensor, logp_ref: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the library gives: ``sampled``, its gradient in ``logp``, and ``score``."""
    d = mirrorpo.divergence(case.name, **case.options)
    logp = logp.detach().clone().requires_grad_()
    value = d.sampled(logp, logp_ref)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    return {"value": value.detach(), "gradient": gradient, "score": d.score(logp, logp_ref)}


def reference(case: Case, logp: float, logp_ref: float) -> dict[str, mpmath.mpf]:
    """The same three by their definitions with 60 digits."""
    with mpmath.workdps(DIGITS):
        x, z = mpmath.exp(mpmath.mpf(logp)), mpmath.exp(mpmath.mpf(logp_ref))
        return {"value": case.sampled(x, z), "gradient": case.sampled_slope(x, z), "score": case.score(x, z)}


def errors(case: Case, logp: torch.Tensor, logp_ref: torch.Tensor) -> dict[str, list[Error]]:
    """Relative errors at every pair of float32 log-probabilities whose result float32 can hold.

    Every pair is evaluated twice: in the batch, where one rare token sends all of them the guarded way, and alone.
    """
    found: dict[str, list[Error]] = {quantity: [] for quantity in QUANTITIES}
    together = computed(case, logp, logp_ref)
    for i, (x, z) in enumerate(zip(logp.tolist(), logp_ref.tolist(), strict=True)):
        expected = reference(case, x, z)
        alone = computed(case, logp[i : i + 1], logp_ref[i : i + 1])
        for quantity in QUANTITIES:
            if SMALLEST < abs(expected[quantity]) < LARGEST:
                for got in (together[quantity][i], alone[quantity][0]):
                    relative = abs(mpmath.mpf(got.item()) / expected[quantity] - 1)
                    found[quantity].append(Error(float(relative), x, z))
    return found


def worst(case: Case, logp: torch.Tensor, logp_ref: torch.Tensor) -> dict[str, Error]:
    """The largest of ``errors``, by quantity."""
    return {quantity: max(found, key=lambda e: e.relative) for quantity, found in errors(case, logp, logp_ref).items()}


def grid(per_decade: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (logp, logp_ref) in float32 with |logp - logp_ref| from 1e-6 to 20 and both from -80 to 0."""
    gaps = torch.logspace(-6, 1.30103, 7 * per_decade + 2, dtype=torch.float64).tolist()
    pairs = []
    for anchor, gap, direction in itertools.product((-1e-7, -1e-3, -0.1, -1.0, -5.0, -20.0, -59.0), gaps, (-1.0, 1.0)):
        logp = anchor + direction * gap
        if -80.0 <= logp <= 0.0:
            pairs.append((logp, anchor))
    logp, logp_ref = torch.tensor(pairs, dtype=torch.float32).unbind(-1)
    # float32 rounds the pair: where the two now agree (or nearly), the gap is not one of those asked for
    wide = (logp.double() - logp_ref.double()).abs() >= 1e-6
    return logp[wide].clone(), logp_ref[wide].clone()
