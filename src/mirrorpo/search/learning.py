r"""Learning the penalty by gradient: hypergradients of one training step, and the steps of the outer variables.

The inner step is :math:`\theta' = \theta - \eta P \nabla L_\varphi(\theta)` with the penalty as ``score``:
:math:`\nabla L_\varphi \ni \sum_t \omega_t w_t\, c\, g_\varphi(p_t, q_t)\, \nabla \log p_t`. The validation
reward after it has, in the outer variables, the derivative

.. math:: \frac{d J(\theta')}{d \varphi} = - \sum_t \omega_t w_t
          \frac{\partial [c\, g_\varphi(p_t, q_t)]}{\partial \varphi} \kappa_t,
          \qquad \kappa_t = \nabla \log p_t(\theta) \cdot \eta P v, \quad v = \nabla J(\theta').

v is a vector-Jacobian product on validation prompts (one backward pass); :math:`\kappa_t`, for all tokens at once, a
Jacobian-vector product on the tokens that were trained on, taken as a central difference of two forward passes. No
second derivative of the model is needed, since g depends on theta through p_t alone and the rest is linear in it.

``omega`` is the aggregation weight, w = p/b, P the optimiser's preconditioner (Adam's, taken as a constant, with the
share of the gradient in its first moment; the clipping factor belongs to it). Looking one step ahead drops the effect
of earlier steps on theta. At p = q every g is 0 whatever the map is, and so is the hypergradient.

References: arXiv 2409.10470 (bilevel learning of the map); Luketina et al. 2016, "Scalable gradient-based tuning of
continuous regularization hyperparameters" (arXiv 1511.06727), for looking one step ahead; Kivinen & Warmuth 1997,
"Exponentiated gradient versus gradient descent for linear predictors", for the exponentiated step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirrorpo.divergences import Divergence, divergence
from mirrorpo.divergences.neural.generator import GROUPS, LOG_OFFSET, split
from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.divergences.slope import score
from mirrorpo.errors import unknown_name

VARIABLES = ("map", "beta", "alpha", "coefficient")
RULES = ("exponentiated", "projected")
LIMITS = {"beta": (-2.0, 4.0), "alpha": (-4.0, 4.0)}
# The derivative of g in beta or alpha is a central difference in float64: error about 1e-10.
_OPTION_STEP = 1e-5
# A root unit's argument w x + b below this is treated as this: its slope in b, v u^(-1/2) / 2, stays below 500 v.
SMALLEST_ROOT = 1e-6
# Lengths of the perturbation, relative to the weights' norm, for float32 and float64.
_PERTURBATION = {torch.float32: 3e-4, torch.float64: 1e-5}


@dataclass(frozen=True, kw_only=True)
class Variable:
    """The outer variable: which part of the penalty is learned, and its values now.

    Attributes:
        what: ``map`` (380 parameters), ``beta``, ``alpha`` or ``coefficient``.
        values: (n,), float64.
    """

    what: str
    values: Tensor

    def divergence(self) -> Divergence | None:
        """The divergence with these values; None where the coefficient is learned."""
        if self.what == "map":
            return MirrorMap(self.values, "learned").divergence()
        if self.what in LIMITS:
            return divergence(self.what, **{self.what: self.values.item()})
        return None

    def moved(self, window: Sequence[Tensor], rule: str, rate: float, scale: float = 0.0) -> tuple[Variable, float]:
        r"""One outer step uphill along the mean of a window of hypergradients, at most ``rate`` long.

        With u = mean / size, where the size is the root mean square of the window's norms or that of an earlier window,
        if it was larger: u has length 1 where hypergradients agree, about W^{-1/2} where they are noise, and goes to 0
        with them. ``exponentiated`` multiplies by :math:`\exp(\text{rate}\, u)`, with hypergradients in log
        coordinates, so that no value reaches 0; ``projected`` adds rate u (times the norm of the parameters for a map)
        and returns to the legal set.

        Args:
            window: (n,) each, the newest last.
            rule: ``exponentiated`` or ``projected``.
            rate: see above.
            scale: the largest size so far.

        Returns:
            The variable after the step, and the largest size.
        """
        if rule not in RULES:
            raise unknown_name("rule", rule, RULES)
        stack = torch.stack([g * self.values for g in window] if rule == "exponentiated" else list(window))
        scale = max(scale, size_of(stack))
        direction = rate * (stack.mean(0) / scale if scale > 0.0 else torch.zeros_like(self.values))
        if rule == "exponentiated":
            moved = self.values * direction.exp()
        elif self.what in LIMITS:
            moved = (self.values + direction).clamp(*LIMITS[self.what])
        else:
            moved = (self.values + self.values.norm() * direction).clamp(min=0.0)
        # a map of zeros, or no penalty, is no divergence: such a step is not taken
        legal = self.what in LIMITS or _usable(moved, self.what)
        return (Variable(what=self.what, values=moved) if legal else self), scale


def _usable(values: Tensor, what: str) -> bool:
    if what != "map":
        return bool((values > 0.0).all())
    try:
        MirrorMap(values)
    except ValueError:
        return False
    return True


def size_of(stack: Tensor) -> float:
    """The root mean square of the norms of a window (W, n).

    Example:
        >>> size_of(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        5.0
    """
    largest = stack.abs().amax().item()
    if largest == 0.0:
        return 0.0
    return largest * (stack / largest).square().sum(-1).mean().sqrt().item()  # no square leaves the range of floats


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of an inner step, (N,) each, float64.

    Attributes:
        logp: under the policy before the step.
        logp_ref: under the anchor.
        weight: omega w: the aggregation weight times p/b.
        kappa: the change of log p_t along eta P v.
        ids: (N,), int64: which token of the vocabulary it is.
    """

    logp: Tensor
    logp_ref: Tensor
    weight: Tensor
    kappa: Tensor
    ids: Tensor

    def leash(self, d: Divergence, coefficient: float) -> Tensor:
        """(N,): what the validation reward gains, to first order, if the penalty's pull on this token is left out."""
        return self.weight * coefficient * score(d, self.logp, self.logp_ref) * self.kappa


def hypergradient(variable: Variable, d: Divergence, coefficient: float, tokens: Tokens) -> Tensor:
    """The derivative of the validation reward in the outer variable, (n,), float64.

    Formula: that of the module, with the sum over ``tokens``.

    Args:
        variable: what is learned.
        d: the penalty's divergence, at the variable's values.
        coefficient: of the penalty now.
        tokens: of the inner step.

    Reference: arXiv 2409.10470 (bilevel learning of mirror maps); one-step lookahead.

    Example:
        >>> at = torch.tensor([-1.0, -2.0]).double()
        >>> tokens = Tokens(
        ...     logp=at, logp_ref=at, weight=torch.ones(2), kappa=torch.ones(2), ids=torch.zeros(2).long()
        ... )
        >>> start = Variable(what="beta", values=torch.tensor([0.5]).double())
        >>> hypergradient(start, start.divergence(), 1.0, tokens) == 0  # p = q
        tensor([True])
    """
    along = (tokens.weight * tokens.kappa).masked_fill(tokens.logp == tokens.logp_ref, 0.0)
    if variable.what == "coefficient":
        return -(along * score(d, tokens.logp, tokens.logp_ref)).sum().view(1)
    if variable.what in LIMITS:
        low, high = LIMITS[variable.what]
        ends = [min(high, max(low, variable.values.item() + way * _OPTION_STEP)) for way in (1.0, -1.0)]
        up, down = (
            score(divergence(variable.what, **{variable.what: end}), tokens.logp, tokens.logp_ref) for end in ends
        )
        return -coefficient * (along * (up - down)).sum().view(1) / (ends[0] - ends[1])
    with torch.enable_grad():
        at = variable.values.detach().clone().requires_grad_()
        both = _map_slopes(at, torch.stack([tokens.logp, tokens.logp_ref]).exp())
        (found,) = torch.autograd.grad((along * (both[0] - both[1])).sum(), at)
    return -coefficient * found


def _map_slopes(parameters: Tensor, x: Tensor) -> Tensor:
    """``phi_inv`` with a slope in every parameter, exact zeros of them included; the shape of x."""
    v, w, b, a, c = split(parameters)
    flat = x.reshape(-1)
    u = w.unsqueeze(-1) * flat + b.unsqueeze(-1)
    cube, square, root, cube_root, log, exp = u
    root, cube_root = root.clamp(min=SMALLEST_ROOT), cube_root.clamp(min=SMALLEST_ROOT)
    units = [cube**3, square**2, root.sqrt(), cube_root.pow(1.0 / 3.0), (log + LOG_OFFSET).log(), exp.exp()]
    assert len(units) == len(GROUPS)
    value = (v.unsqueeze(-1) * torch.stack(units)).sum((0, 1)) + a * flat + c * flat.log()
    return value.view(x.shape)


def preconditioned(
    optimiser: Any, parameters: Sequence[Tensor], gradient: Sequence[Tensor], clip: float
) -> list[Tensor]:
    r"""eta P v: how the parameters move when the gradient moves by -v, with the optimiser's state held fixed.

    Adam and AdamW: :math:`\eta \frac{1 - \beta_1}{1 - \beta_1^t} (\sqrt{\hat v} + \epsilon)^{-1}`; plain SGD: the
    learning rate. Parameters that Adam has not moved yet, 0.

    Args:
        optimiser: after the step.
        parameters: of the policy, those that are trained.
        gradient: v, a tensor for each.
        clip: the factor that clipping put on the gradient.
    """
    groups = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    found = []
    for p, g in zip(parameters, gradient, strict=True):
        group, state = groups[id(p)], optimiser.state.get(p, {})  # indexing would add an empty state
        if "betas" in group and "exp_avg_sq" not in state:  # Adam has never moved it, since it had no gradient
            found.append(torch.zeros_like(g))
            continue
        moved = g.detach() * (float(group["lr"]) * clip)
        if "exp_avg_sq" in state:
            beta1, beta2 = group["betas"]
            steps = float(state["step"])
            scale = (state["exp_avg_sq"] / (1.0 - beta2**steps)).sqrt_().add_(group["eps"])
            moved = moved * ((1.0 - beta1) / (1.0 - beta1**steps)) / scale
        found.append(moved)
    return found


@torch.no_grad()
def change_along(
    scores: Callable[[], Tensor], parameters: Sequence[Tensor], centre: Sequence[Tensor], direction: Sequence[Tensor]
) -> Tensor:
    """The derivative of ``scores`` at ``centre`` along ``direction``, float64: two forward passes.

    Args:
        scores: reads the parameters.
        parameters: set and put back.
        centre: where the derivative is taken, a tensor for each.
        direction: the same; a length of 0 gives 0.

    Example:
        >>> at = torch.tensor([2.0]).double()
        >>> change_along(lambda: at * at, [at], [at.clone()], [torch.tensor([0.5]).double()])  # 2 * 2 * 0.5
        tensor([2.0000], dtype=torch.float64)
    """
    length, size = (float(torch.stack([t.double().norm() for t in ts]).norm()) for ts in (direction, centre))
    with kept(parameters):
        if length == 0.0:
            return torch.zeros_like(scores(), dtype=torch.float64)
        epsilon = _PERTURBATION[parameters[0].dtype] * size / length
        ends = []
        for way in (epsilon, -epsilon):
            for p, at, along in zip(parameters, centre, direction, strict=True):
                p.copy_(at + way * along.to(at))
            ends.append(scores().double())
    return (ends[0] - ends[1]) / (2.0 * epsilon)


@contextmanager
def kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """The parameters are afterwards what they were, bit for bit."""
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


__all__ = [
    "LIMITS",
    "RULES",
    "VARIABLES",
    "Tokens",
    "Variable",
    "change_along",
    "hypergradient",
    "kept",
    "preconditioned",
    "size_of",
]
