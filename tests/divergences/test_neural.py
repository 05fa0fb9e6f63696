"""The neural mirror map: its table against the 126 units, its ladder by enumeration, and what it refuses.

The units are written out once more here, one by one, with their antiderivatives; they serve float64 tensors (autograd
then gives the expected gradients) and mpmath numbers (where the textbook difference would be pure noise).
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import mirrorpo
from mirrorpo.divergences import neural_table
from mirrorpo.divergences.neural import GROUPS, SLICES, MirrorMap, phi_inv, project
from mirrorpo.divergences.neural_fit import non_negative_least_squares
from mirrorpo.divergences.neural_table import LOG_BOTTOM, TABLE_ERROR, build_table
from mirrorpo.divergences.neural_units import curvature
from naive import logits

INF, NAN = math.inf, math.nan
V = 7
DIGITS = 170  # d is e^-160 of the constants in h at p = e^-80
ESTIMATORS = ("sampled", "weighted", "score")


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
    moved[SLICES["a"]] += 1e-6  # so that not everything can be 0
    return project(moved)


MAPS = {
    "random": random_like(0),
    "evolved": evolved_like(3),
    **{f"{group}({w:g} x + {b:g})": single(group, w, b) for group in GROUPS for w, b in ((1.0, 0.0), (10.0, 1e-3))},
    "cbrt(x + 1e-12)": single("cbrt", 1.0, 1e-12),
    "c": only(c=1.0),
    "a": only(a=2.0),
}
EVERY_MAP = pytest.mark.parametrize("parameters", MAPS.values(), ids=MAPS)


def build(parameters: Any) -> mirrorpo.Divergence:
    return mirrorpo.divergence("neural", parameters=parameters)


# --- the definition -------------------------------------------------------------------------------------------------


@EVERY_MAP
def test_phi_inv_is_the_sum_of_its_units(parameters: torch.Tensor) -> None:
    x = torch.tensor([[1e-30, 1e-9, 1e-3], [0.2, 0.7, 1.0]], dtype=torch.float64)
    gap = phi_inv(parameters, x) - naive(parameters, x)[0]
    # units without slope are constants, which the naive sum leaves out
    torch.testing.assert_close(gap, gap[:1, :1].expand_as(gap), rtol=1e-12, atol=1e-12 * x.numel() * gap.abs().max())


@EVERY_MAP
def test_curvature_is_the_derivative_of_phi_inv_in_log_x(parameters: torch.Tensor) -> None:
    log = torch.linspace(-30.0, 0.0, 41, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(naive(parameters, log.exp())[0].sum(), log)
    torch.testing.assert_close(curvature(parameters, log.detach().exp()), expected, rtol=1e-12, atol=0)


# --- the table ------------------------------------------------------------------------------------------------------


def table_error(parameters: torch.Tensor, log: torch.Tensor) -> float:
    """The largest relative error of the table's curvature, and a check that it is positive everywhere."""
    table = build_table(parameters)
    _, _, beta, alpha = table.columns
    x = log.exp()
    place = ((log + table.rate * x) / table.width + table.shift).int()
    found, expected = beta[place] + alpha[place] * x, curvature(parameters, x)
    assert (found > 0).all()
    # At both ends of every segment: s h'' = beta + alpha s is linear in s, so it is positive in between too.
    ends = (torch.arange(1, table.columns.shape[1], dtype=torch.float64) - table.shift) * table.width
    at = neural_table._points(ends, table.rate).exp()
    assert (beta[1:] + alpha[1:] * at > 0).all()
    assert (beta[:-1] + alpha[:-1] * at > 0).all()
    assert beta[0] >= 0
    assert alpha[0] >= 0
    return ((found - expected) / expected).abs().amax().item()


@pytest.mark.parametrize("make", [random_like, evolved_like])
def test_a_thousand_maps_are_convex_and_their_tables_right(make: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    worst = (0.0, -1)
    for seed in range(1000):
        log = torch.rand(2, 500, generator=generator, dtype=torch.float64) * torch.tensor([[LOG_BOTTOM], [-3.0]])
        worst = max(worst, (table_error(make(seed), log.view(-1)), seed))
    assert worst[0] <= TABLE_ERROR, worst


@EVERY_MAP
def test_the_table_of_single_units_is_right(parameters: torch.Tensor) -> None:
    assert table_error(parameters, torch.linspace(LOG_BOTTOM, 0.0, 20_001, dtype=torch.float64)) <= TABLE_ERROR


@pytest.mark.parametrize("rate", [0.2, 0.3, 40.0, 500.0])
def test_the_table_follows_steep_exponentials(rate: float) -> None:
    log = torch.linspace(-12.0, 0.0, 20_001, dtype=torch.float64)
    assert table_error(single("exp", rate, 0.0, 1e-3), log) <= TABLE_ERROR


def pairs_near_and_far() -> torch.Tensor:
    """(log p, log q), float64, including both sides of where the evaluation goes from near to far."""
    gaps = (1e-7, 1e-5, 1.2e-4, 2.5e-4, 5e-4, 6e-4, 2e-3, 0.1, 5.0, 20.0)
    found = [(a + s * g, a) for a in (-1e-3, -0.7, -5.0, -59.0) for g in gaps for s in (-1.0, 1.0)]
    return torch.tensor([pair for pair in found if -80.0 <= pair[0] <= 0.0], dtype=torch.float64)


@EVERY_MAP
def test_value_and_slope_are_within_the_table_error_of_many_digits(parameters: torch.Tensor) -> None:
    logs = pairs_near_and_far()
    if "random" in MAPS and parameters is MAPS["random"]:
        logs = logs[::4]  # 126 units in many digits take a while
    value, slope = build(parameters).term(*logs.unbind(-1))
    with mpmath.workdps(DIGITS):
        for i, (log_x, log_z) in enumerate(logs.tolist()):
            x, z = mpmath.exp(mpmath.mpf(log_x)), mpmath.exp(mpmath.mpf(log_z))
            expected = naive_term(parameters, x, z)
            expected_slope = x * (naive(parameters, x)[0] - naive(parameters, z)[0])
            assert abs(mpmath.mpf(value[i].item()) / expected - 1) <= TABLE_ERROR, (log_x, log_z)
            assert abs(mpmath.mpf(slope[i].item()) / expected_slope - 1) <= TABLE_ERROR, (log_x, log_z)


@EVERY_MAP
def test_float32_is_right_where_the_textbook_form_is_noise(parameters: torch.Tensor) -> None:
    x = torch.tensor([0.5, 0.3, 0.05, 0.9, 1e-3])
    z = x * torch.tensor([1 - 2e-7, 1 - 4e-7, 1 + 3e-6, 1 + 2e-6, 1 + 1e-4])  # |x - z| from 1e-7
    logp, logp_ref = x.log().requires_grad_(), z.log()
    assert (logp != logp_ref).all()
    value = build(parameters).sampled(logp, logp_ref)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    with mpmath.workdps(DIGITS):
        for i, logs in enumerate(zip(logp.tolist(), logp_ref.tolist(), strict=True)):
            p, q = (mpmath.exp(mpmath.mpf(n)) for n in logs)
            expected = naive_term(parameters, p, q)
            slope = p * (naive(parameters, p)[0] - naive(parameters, q)[0])
            for got, number in ((value[i], expected), (gradient[i], slope)):
                if abs(number) > 1.2e-38:
                    assert abs(mpmath.mpf(got.item()) / number - 1) <= 1e-5


def test_the_textbook_form_is_noise_there() -> None:
    x, z = torch.tensor([0.5]), torch.tensor([0.5 - 1e-7])
    single_precision = naive_term(MAPS["random"], x, z).item()
    right = quadrature(MAPS["random"], x.double().item(), z.double().item())
    assert abs(single_precision / right - 1) > 10


@pytest.mark.parametrize("name", ["random", "evolved", "sqrt(10 x + 0.001)", "log(10 x + 0.001)", "exp(1 x + 0)"])
def test_the_term_is_the_integral_of_phi_inv(name: str) -> None:
    d = build(MAPS[name])
    for x, z in ((0.9, 0.1), (1e-6, 0.5), (0.3, 0.31), (1.0, 1e-9), (2e-5, 1e-5)):
        value, _ = d.term(*torch.tensor([[x], [z]], dtype=torch.float64).log())
        assert value.item() == pytest.approx(quadrature(MAPS[name], x, z), rel=2e-6)


log_probabilities = st.floats(-700.0, 0.0, allow_nan=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 50), logs=st.lists(st.tuples(log_probabilities, log_probabilities), min_size=1, max_size=20))
def test_the_divergence_is_never_negative_and_its_slope_points_away(seed: int, logs: list[tuple[float, float]]) -> None:
    d = build(evolved_like(seed))
    logx, logz = torch.tensor(logs, dtype=torch.float64).unbind(-1)
    value, slope = d.term(logx, logz)
    assert (value >= 0).all()
    assert (slope * (logx - logz) >= 0).all()
    same, slope = d.term(logx, logx)
    assert (same == 0).all()
    assert (slope == 0).all()


def test_a_large_tensor_is_evaluated_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    logx, logz = (logits(40, 50, seed=s).log_softmax(-1) for s in (1, 2))
    table = build_table(random_like(1))
    whole = table.between(logx, logz)
    monkeypatch.setattr(neural_table, "CPU_CHUNK", 77)
    for part, expected in zip(table.between(logx, logz), whole, strict=True):
        assert torch.equal(part, expected)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_in_the_evaluation_waits_for_the_device() -> None:
    d = build(evolved_like(1))
    theta, theta_ref = logits(3, V, seed=1).requires_grad_(), logits(3, V, seed=2)
    with _Operations() as seen:
        d.term(theta.detach().log_softmax(-1), theta_ref.log_softmax(-1))
        d.exact(theta, theta_ref).sum().backward()
    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")
    assert len(seen.names) > 30
    assert not [name for name in seen.names if name.split(".")[1] in waits]


# --- the ladder of every divergence ---------------------------------------------------------------------------------


def enumerated(parameters: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return naive_term(parameters, p, q)


def gradient(value: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), theta, retain_graph=True)[0]


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("on_policy", [True, False], ids=["on_policy", "off_policy"])
@EVERY_MAP
def test_every_estimator_by_enumeration(parameters: torch.Tensor, on_policy: bool) -> None:
    theta, logq = logits(3, V, seed=0).requires_grad_(), logits(3, V, seed=1).log_softmax(-1)
    logp = theta.log_softmax(-1)
    logb = logp.detach() if on_policy else logits(3, V, seed=2).log_softmax(-1)
    d, b = build(parameters), logb.exp()
    terms = enumerated(parameters, logp.exp(), logq.exp())
    whole = terms.sum(-1)
    sampled = (b * d.sampled(logp, logq)).sum(-1)
    assert_near(sampled, (b * terms).sum(-1))
    assert_near(gradient(sampled, theta), gradient((b * terms).sum(-1), theta))
    weighted = (b * d.weighted(logp, logq, logb)).sum(-1)
    assert_near(weighted, whole)
    assert_near(gradient(weighted, theta), gradient(whole, theta))
    assert_near(gradient(b * d.surrogate(logp, logq, logb), theta), gradient(whole, theta))
    g = d.score(logp, logq)
    assert_near(gradient((logp.detach().exp() * g * logp).sum(-1), theta), gradient(whole, theta))
    exact = d.exact(theta + 2.0, logq - 1.0)
    assert_near(exact, whole)
    assert_near(gradient(exact, theta), gradient(whole, theta))


@pytest.mark.parametrize("k", [1, 3, V])
def test_top_k_leaves_the_rest_out(k: int) -> None:
    theta, logq = logits(4, V, seed=3).requires_grad_(), logits(4, V, seed=4).log_softmax(-1)
    tokens = torch.tensor([0, 2, 4, 6])
    terms = enumerated(MAPS["random"], theta.softmax(-1), logq.exp())
    inside = torch.zeros_like(terms).scatter(-1, logq.topk(k).indices, 1.0).scatter(-1, tokens[:, None], 1.0)
    got = build(MAPS["random"]).top_k(theta, logq, tokens, k)
    assert_near(got, (inside * terms).sum(-1))
    assert_near(gradient(got, theta), gradient((inside * terms).sum(-1), theta))


@EVERY_MAP
def test_gradcheck(parameters: torch.Tensor) -> None:
    logq = logits(V, seed=1).log_softmax(-1)
    d = build(parameters)
    logp = logits(V, seed=0).log_softmax(-1).requires_grad_()
    # The step must stay short of a segment, and the slope relative: the cubic map's is 1e-3 of the others'.
    scale = d.sampled(logp.detach(), logq).max()
    assert torch.autograd.gradcheck(lambda x: d.sampled(x, logq) / scale, logp, eps=1e-5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("parameters", "name"), [(only(a=2.0), "prob_l2"), (only(c=1.0), "kl")])
def test_a_alone_is_prob_l2_and_c_alone_is_kl(parameters: torch.Tensor, name: str) -> None:
    one, other = build(parameters), mirrorpo.divergence(name)
    logp, logq, logb = (logits(50, seed=s, scale=3.0).log_softmax(-1) for s in (1, 2, 3))
    x = logp.clone().requires_grad_()
    for estimator in ESTIMATORS:
        got, expected = (d.estimate(estimator, x, logq, logb) for d in (one, other))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(gradient(got, x), gradient(expected, x), rtol=1e-8, atol=0)
    torch.testing.assert_close(one.exact(logp, logq), other.exact(logp, logq), rtol=1e-9, atol=0)
    tokens = torch.tensor(3)
    torch.testing.assert_close(one.top_k(logp, logq, tokens, 5), other.top_k(logp, logq, tokens, 5), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EVERY_MAP
def test_extremes_stay_finite(parameters: torch.Tensor, dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, 5e-4, -1e-9, -1.0, -80.0, -200.0, -1e4, -INF], dtype=dtype)
    logp, logq, logb = torch.cartesian_prod(extremes, extremes, extremes).unbind(-1)
    x = logp.clone().requires_grad_()
    d = build(parameters)
    for estimator in ESTIMATORS:
        value = d.estimate(estimator, x, logq, logb)
        assert value.isfinite().all()
        assert (value >= 0).all()
        assert gradient(value, x).isfinite().all()
    assert d.score(logp, logq).isfinite().all()
    theta = torch.tensor([0.0, 1.0, -INF, -1e4], dtype=dtype, requires_grad=True)
    exact = d.exact(theta, torch.tensor([0.0, -INF, -INF, 60.0], dtype=dtype))
    assert exact.isfinite()
    assert gradient(exact, theta).isfinite().all()


def test_logits_that_are_nan_poison_their_own_position_only() -> None:
    theta = logits(3, V, seed=1)
    theta[1, 2] = NAN
    value = build(random_like(0)).exact(theta, logits(3, V, seed=2))
    assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_upcast_first(dtype: torch.dtype) -> None:
    logp, logq, logb = (logits(9, seed=s).log_softmax(-1).to(dtype) for s in (1, 2, 3))
    d = build(random_like(0))
    for estimator in ESTIMATORS:
        low, high = logp.clone().requires_grad_(), logp.float().requires_grad_()
        got, expected = d.estimate(estimator, low, logq, logb), d.estimate(estimator, high, logq.float(), logb.float())
        assert torch.equal(got, expected)
        assert torch.equal(gradient(got, low), gradient(expected, high).to(dtype))


def test_no_token_is_no_value() -> None:
    x = torch.zeros((0, 3), requires_grad=True)
    value = build(random_like(0)).sampled(x, x)
    assert value.shape == (0, 3)
    value.sum().backward()


# --- roles and sources ----------------------------------------------------------------------------------------------


@EVERY_MAP
def test_as_a_trust_region_the_bounds_are_where_the_radius_is_met(parameters: torch.Tensor) -> None:
    logb = torch.tensor([0.01, 0.2, 0.6], dtype=torch.float64).log()
    d = build(parameters)
    radius = d.term(logb[1:2] + 0.3, logb[1:2])[0].item()  # what w = e^0.3 costs at b = 0.2
    low, high = mirrorpo.trust_region("neural", radius=radius, parameters=parameters).ratio_bounds(logb)
    assert high[1].item() == pytest.approx(math.exp(0.3), rel=1e-9)
    for bound in (low, high):
        inside = bound.isfinite() & (bound > 1e-9)
        cost = d.term(logb[inside] + bound[inside].log(), logb[inside])[0]
        torch.testing.assert_close(cost, torch.full_like(cost, radius), rtol=1e-9, atol=0)
    assert (low < 1).all()
    assert (high > 1).all()


def test_a_random_map_is_that_of_its_seed_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = (mirrorpo.divergence("neural", seed=s).map.parameters for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0 <= one.min() < 1e-3
    assert 9e-3 < one.max() <= 0.01
    assert torch.equal(mirrorpo.divergence("neural").map.parameters, MirrorMap.random(0).parameters)


@pytest.mark.parametrize("form", ["tensor", "array", "list", "mapping", "float32", "map"])
def test_parameters_can_be_given_in_any_usual_form(form: str) -> None:
    parameters = random_like(5).float().double()
    given = {
        "tensor": parameters,
        "array": parameters.numpy(),
        "list": parameters.tolist(),
        "mapping": {name: parameters[at].tolist() for name, at in SLICES.items()},
        "float32": parameters.float().requires_grad_(),
        "map": MirrorMap(parameters),
    }[form]
    got = mirrorpo.divergence("neural", parameters=given).map.parameters
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert torch.equal(got, parameters)


def test_a_map_does_not_follow_the_tensor_it_was_made_from() -> None:
    parameters = random_like(5)
    made = MirrorMap(parameters)
    parameters.zero_()
    assert made.parameters.sum() > 0


@pytest.mark.parametrize("name", ["kl", "prob_l2"])
def test_a_map_like_a_representable_divergence_is_that_divergence(name: str) -> None:
    d = mirrorpo.divergence("neural", like=name)
    assert d.map.fit_error == 0.0
    logp, logq = (logits(30, seed=s).log_softmax(-1) for s in (1, 2))
    torch.testing.assert_close(d.sampled(logp, logq), mirrorpo.divergence(name).sampled(logp, logq), rtol=1e-8, atol=0)


def test_the_error_of_a_map_that_is_only_alike_is_stated() -> None:
    made = MirrorMap.like("itakura_saito")
    x = torch.logspace(-4, 0, 400, dtype=torch.float64)
    error = (curvature(made.parameters, x) * x - 1.0).abs().max().item()  # x h'' = 1/x
    assert made.fit_error == pytest.approx(error, rel=1e-3)
    assert 0.5 < error < 1.0 or error > 1.0
    # no map has x h'' falling in x, so over [1e-4, 1] nothing can do better than (1e4 - 1) / (1e4 + 1) in the worst case
    assert error >= (1e4 - 1) / (1e4 + 1) - 1e-3
    assert torch.equal(made.parameters, MirrorMap.like("itakura_saito").parameters)


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_without_negative_numbers_equals_scipys(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    matrix, target = logits(30, 12, seed=seed).abs(), logits(30, seed=seed + 50)
    expected, _ = optimize.nnls(matrix.numpy(), target.numpy())
    got = non_negative_least_squares(matrix, target)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)


def test_project_is_the_nearest_map() -> None:
    moved = torch.randn(3, 380, generator=torch.Generator().manual_seed(0))
    got = project(moved)
    assert torch.equal(got, torch.where(moved > 0, moved, 0.0))
    assert torch.equal(project(got), got)
    build(got[0])


@pytest.mark.parametrize(("preset", "base"), [("nm_grpo", "prob_l2_grpo"), ("nm_gspo", "prob_l2_gspo")])
def test_the_presets_are_those_of_prob_l2_with_a_random_map(preset: str, base: str) -> None:
    one, other = mirrorpo.objective(preset), mirrorpo.objective(base)
    (penalty,), (expected,) = one.penalties, other.penalties
    assert penalty.divergence.name == "neural"
    assert (penalty.coefficient, penalty.estimator) == (expected.coefficient, expected.estimator) == (1e-4, "sampled")
    for part in ("region", "surrogate", "level", "advantage", "aggregation"):
        assert getattr(one, part) == getattr(other, part)
    own = mirrorpo.objective(preset, divergence={"name": "neural", "seed": 4}).penalties[0].divergence
    assert torch.equal(own.map.parameters, MirrorMap.random(4).parameters)


# --- bad input ------------------------------------------------------------------------------------------------------


def changed(at: int, value: float) -> torch.Tensor:
    parameters = random_like(0)
    parameters[at] = value
    return parameters


def mapping(**changes: Any) -> dict[str, Any]:
    full = {name: random_like(0)[at].tolist() for name, at in SLICES.items()}
    return {key: value for key, value in (full | changes).items() if value != "missing"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": changed(0, -1e-9)}, r"v\[0\] \(group 'cube'\) must be in \[0, inf\), got -1e-09"),
        ({"parameters": changed(126 + 125, NAN)}, r"w\[125\] \(group 'exp'\) must be in \[0, inf\), got nan"),
        ({"parameters": changed(252 + 42, INF)}, r"b\[42\] \(group 'sqrt'\) must be in \[0, inf\), got inf"),
        ({"parameters": changed(379, -INF)}, r"c must be in \[0, inf\), got -inf"),
        ({"parameters": torch.ones(379)}, r"parameters must be 380 numbers, got shape \(379,\)"),
        ({"parameters": torch.ones(2, 190)}, r"got shape \(2, 190\)"),
        ({"parameters": torch.ones(380, dtype=torch.bool)}, "got dtype torch.bool"),
        ({"parameters": torch.ones(380, dtype=torch.complex64)}, "got dtype torch.complex64"),
        ({"parameters": "map.json"}, "parameters must be 380 numbers, got str"),
        ({"parameters": mapping(c="missing")}, "'c' is missing"),
        ({"parameters": mapping(d=1.0)}, "unknown parameters key 'd'"),
        ({"parameters": mapping(w=[0.1] * 3)}, r"parameters\['w'\] must be 126 numbers, got shape \(3,\)"),
        ({"parameters": mapping(b=["x"] * 126)}, r"parameters\['b'\] must be 126 numbers, got list"),
        ({"parameters": torch.zeros(380)}, "constant phi_inv"),
        ({"parameters": single("sqrt", 0.0, 1.0)}, "constant phi_inv"),
        ({"parameters": single("cube", 1.0, 1.0, v=0.0)}, "constant phi_inv"),
        ({"parameters": single("exp", 800.0, 0.0)}, "beyond float64"),
        ({"parameters": torch.full((380,), 1e200, dtype=torch.float64)}, "beyond float64"),
        ({"like": "kll"}, "unknown like 'kll'; did you mean 'kl'"),
        ({"like": ["kl"]}, "unknown like"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^63\), got -1"),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"seed": 1, "like": "kl"}, "takes one of seed, path, parameters, like, got seed and like"),
        ({"beta": 1.0}, "does not take 'beta'. Legal: like, parameters, path, seed"),
        ({"path": "no/such/map.json"}, "path 'no/such/map.json' cannot be read"),
    ],
)
def test_bad_sources_are_refused_with_a_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mirrorpo.divergence("neural", **options)


@pytest.mark.parametrize("scale", [0.0, -1.0, 11.0, NAN, "1"])
def test_a_bad_scale_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a number in"):
        MirrorMap.random(0, scale)
