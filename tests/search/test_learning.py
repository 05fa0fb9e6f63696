"""Hypergradients: against finite differences of the whole look-ahead, against evolution strategies, and their zeros."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mirrorpo.divergences import divergence
from mirrorpo.divergences.neural.map import MirrorMap, phi_inv
from mirrorpo.search.learning import Tokens, Variable, change_along, hypergradient, preconditioned
from mirrorpo.search.strategy import directions, estimate

V, COEFFICIENT, RATE = 6, 0.7, 0.3


def f64(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Small:
    """A two-layer policy over V tokens in three states, an inner batch with off-policy weights, a validation reward."""

    def __init__(self) -> None:
        self.parameters = [0.5 * f64(3, 4, seed=1), 0.5 * f64(4, V, seed=2)]
        self.reference = 0.5 * f64(3, V, seed=3)
        self.states = torch.arange(3).repeat(5)
        self.ids = torch.randint(V, (15,), generator=torch.Generator().manual_seed(4))
        self.weight = f64(15, seed=5).square() / 15
        self.advantages = f64(15, seed=6)
        self.reward = f64(3, V, seed=7)

    def logps(self, parameters: list[Tensor]) -> Tensor:
        return (parameters[0].tanh() @ parameters[1]).log_softmax(-1)

    def tokens(self, parameters: list[Tensor]) -> Tensor:
        return self.logps(parameters)[self.states, self.ids]

    def value(self, parameters: list[Tensor]) -> Tensor:
        """The exact expected validation reward."""
        return (self.logps(parameters).exp() * self.reward).sum(-1).mean()

    def looked_ahead(self, g: Tensor) -> list[Tensor]:
        """The parameters after the inner step, with these weights of the penalty."""
        at = [p.clone().requires_grad_() for p in self.parameters]
        loss = (self.weight * (COEFFICIENT * g - self.advantages) * self.tokens(at)).sum()
        return [p - RATE * slope for p, slope in zip(self.parameters, torch.autograd.grad(loss, at), strict=True)]

    def after(self, variable: Variable, coefficient: float = COEFFICIENT) -> float:
        """The validation reward after an inner step with the penalty at these values: what is differentiated."""
        if variable.what == "coefficient":
            coefficient = variable.values.item()
        g = self.pull(variable)
        return self.value(self.looked_ahead(g * coefficient / COEFFICIENT)).item()

    def pull(self, variable: Variable) -> Tensor:
        """g; of a map by its definition, since its table has an error of 1e-6."""
        logp, logq = self.tokens(self.parameters), self.reference.log_softmax(-1)[self.states, self.ids]
        if variable.what == "map":
            return phi_inv(variable.values, logp.exp()) - phi_inv(variable.values, logq.exp())
        return (variable.divergence() or divergence("js")).score(logp, logq)

    def hypergradient(self, variable: Variable) -> Tensor:
        logp, logq = self.tokens(self.parameters), self.reference.log_softmax(-1)[self.states, self.ids]
        d, g = variable.divergence() or divergence("js"), self.pull(variable)
        at = [p.requires_grad_() for p in self.looked_ahead(g)]
        v = torch.autograd.grad(self.value(at), at)
        live = [p.clone() for p in self.parameters]
        kappa = change_along(lambda: self.tokens(live), live, self.parameters, [RATE * x for x in v])
        tokens = Tokens(logp=logp, logp_ref=logq, weight=self.weight, kappa=kappa, ids=self.ids)
        return hypergradient(variable, d, COEFFICIENT, tokens)


START = {
    "map": MirrorMap.random(3, 1.0).parameters,
    "beta": torch.tensor([0.4]).double(),
    "alpha": torch.tensor([-0.6]).double(),
    "coefficient": torch.tensor([COEFFICIENT]).double(),
}


@pytest.mark.parametrize("what", START)
def test_the_hypergradient_is_the_derivative_of_the_validation_reward_after_the_step(what: str) -> None:
    small, values = Small(), START[what]
    found = small.hypergradient(Variable(what=what, values=values))
    expected, chosen = [], [*range(0, len(values), 7), *range(len(values))[-2:]]
    for i in chosen:
        step = torch.zeros_like(values)
        step[i] = 1e-4
        ends = [small.after(Variable(what=what, values=values + way * step)) for way in (1.0, -1.0)]
        expected.append((ends[0] - ends[1]) / 2e-4)
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found[chosen], wanted, rtol=0, atol=1e-8)


def test_evolution_strategies_see_the_same_gradient() -> None:
    """Cosine of both, with the standard error over four independent estimates, against what their noise allows."""
    small, start, sigma, pairs = Small(), START["map"], 1e-3, 200
    wanted = small.hypergradient(Variable(what="map", values=start))
    cosines = []
    for generation in range(4):
        epsilon = directions(0, generation, pairs)
        sides = [
            [small.after(Variable(what="map", values=start + way * sigma * e)) for e in epsilon] for way in (1.0, -1.0)
        ]
        found = estimate(epsilon, *sides, sigma, "raw").gradient
        cosines.append(torch.cosine_similarity(found, wanted, dim=0).item())
    mean, spread = torch.tensor(cosines).mean().item(), torch.tensor(cosines).std().item()
    # For a linear function the estimate is g plus noise of variance |g|^2 / n in each of d - 1 directions: the cosine
    # is close to (1 + (d - 1) / n)^(-1/2).
    allowed = 1.0 / math.sqrt(1.0 + 379 / pairs)
    assert abs(mean - allowed) < 4.0 * spread / math.sqrt(4) + 0.01, (mean, spread, allowed)


@pytest.mark.parametrize("what", START)
def test_the_hypergradient_is_zero_where_the_policy_equals_its_reference(what: str) -> None:
    at = f64(50, seed=1).abs().neg()
    tokens = Tokens(logp=at, logp_ref=at, weight=f64(50, seed=2), kappa=f64(50, seed=3), ids=torch.zeros(50).long())
    variable = Variable(what=what, values=START[what])
    found = hypergradient(variable, variable.divergence() or divergence("kl"), 1.0, tokens)
    assert (found == 0.0).all()


def test_exact_zeros_of_a_map_have_finite_derivatives() -> None:
    variable = Variable(what="map", values=MirrorMap.like("kl").parameters)
    empty = Variable(what="map", values=torch.cat([torch.zeros(379), torch.ones(1)]).double())
    tokens = Tokens(logp=f64(50, seed=1).abs().neg(), logp_ref=f64(50, seed=2).abs().neg(), weight=f64(50, seed=2),
                    kappa=f64(50, seed=3), ids=torch.zeros(50).long())  # fmt: skip
    for one in (variable, empty):
        assert hypergradient(one, divergence("kl"), 1.0, tokens).isfinite().all()


def test_steps_follow_what_a_window_agrees_on_and_stay_legal() -> None:
    g = torch.tensor([0.01, -0.02, 0.005]).double()
    start = Variable(what="coefficient", values=torch.ones(3).double())
    agreed = start.moved([g, g], "exponentiated", 0.1)[0].values
    torch.testing.assert_close(agreed.log(), 0.1 * g / g.norm())
    assert (start.moved([g, -g], "exponentiated", 0.1)[0].values == 1.0).all()  # nothing is agreed on
    assert (start.moved([0 * g], "exponentiated", 0.1)[0].values == 1.0).all()
    for huge in (1e200, 1e-200):  # the size of the first hypergradients is no part of the step
        torch.testing.assert_close(start.moved([huge * g], "exponentiated", 0.1)[0].values, agreed)
    # ... and of later ones it is: what they have lost in size the step loses
    later = start.moved([g / 10], "exponentiated", 0.1, scale=g.norm().item())[0].values
    torch.testing.assert_close(later.log(), 0.01 * g / g.norm())
    edge = Variable(what="beta", values=torch.tensor([3.99]).double())
    assert edge.moved([torch.ones(1).double()], "projected", 0.1)[0].values.item() == 4.0
    parameters = MirrorMap.random(0).parameters
    moved = Variable(what="map", values=parameters).moved([-torch.ones(380).double()], "projected", 0.9)[0].values
    assert (moved >= 0.0).all()
    assert (moved == 0.0).any()


def test_a_step_that_would_leave_no_divergence_is_not_taken() -> None:
    variable = Variable(what="map", values=MirrorMap.random(0).parameters)
    assert variable.moved([-torch.ones(380).double()], "projected", 100.0)[0] is variable
    coefficient = Variable(what="coefficient", values=torch.tensor([1.0]).double())
    assert coefficient.moved([-torch.ones(1).double()], "projected", 3.0)[0] is coefficient


def test_noise_in_a_window_shortens_the_step() -> None:
    variable = Variable(what="map", values=MirrorMap.random(0).parameters)
    window = list(f64(64, 380, seed=1) / variable.values)
    noisy = variable.moved(window, "exponentiated", 1.0)[0].values / variable.values
    alone = variable.moved(window[:1], "exponentiated", 1.0)[0].values / variable.values
    assert noisy.log().norm().item() == pytest.approx(1 / 8, rel=0.3)
    assert alone.log().norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_preconditioner_is_the_derivative_of_adams_step_in_the_gradient(steps: int) -> None:
    """With the second moment held fixed: compared with Adam's formula at two values of the newest gradient."""
    p = torch.nn.Parameter(f64(4, seed=1))
    adam = torch.optim.Adam([p], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    gradients = [f64(4, seed=10 + i) for i in range(steps)]
    for gradient in gradients:
        p.grad = gradient.clone()
        adam.step()
    v = f64(4, seed=5)
    first = sum(0.1 * 0.9 ** (steps - 1 - i) * g for i, g in enumerate(gradients))
    second = sum(0.01 * 0.99 ** (steps - 1 - i) * g * g for i, g in enumerate(gradients)) / (1 - 0.99**steps)

    def step(newest: Tensor) -> Tensor:
        return -0.01 * (first + 0.1 * newest) / (1 - 0.9**steps) / (second.sqrt() + 1e-8)

    torch.testing.assert_close(preconditioned(adam, [p], [v], 1.0)[0], step(0 * v) - step(v))
    torch.testing.assert_close(preconditioned(adam, [p], [v], 0.5)[0], (step(0 * v) - step(v)) / 2)
    plain = torch.optim.SGD([p], lr=0.2)
    torch.testing.assert_close(preconditioned(plain, [p], [v], 1.0)[0], 0.2 * v)


def test_a_parameter_that_adam_has_not_moved_has_no_step_and_gets_no_state() -> None:
    moved, idle = (torch.nn.Parameter(f64(3, seed=i)) for i in range(2))
    adam = torch.optim.AdamW([moved, idle], lr=0.01)
    moved.grad = f64(3, seed=5)
    adam.step()
    found = preconditioned(adam, [moved, idle], [f64(3, seed=6)] * 2, 1.0)
    assert (found[0] != 0.0).all()
    assert (found[1] == 0.0).all()
    assert idle not in adam.state
