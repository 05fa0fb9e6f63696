"""The neural map's table against its 126 units: curvature, value and slope, near equality and far from it."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import mirrorpo
from mirror_naive import (
    DIGITS,
    MAPS,
    evolved_like,
    naive,
    naive_term,
    quadrature,
    random_like,
    single,
)
from mirrorpo.divergences.neural import table as neural_table
from mirrorpo.divergences.neural.generator import curvature
from mirrorpo.divergences.neural.map import NeuralDivergence, phi_inv
from mirrorpo.divergences.neural.table import LOG_BOTTOM, NODES_ERROR, NODES_NOISE, TABLE_ERROR, build_table
from naive import logits

V = 7
EVERY_MAP = pytest.mark.parametrize("parameters", MAPS.values(), ids=MAPS)


def build(parameters: Any) -> mirrorpo.Divergence:
    return mirrorpo.divergence("neural", parameters=parameters)


@EVERY_MAP
def test_phi_inv_is_the_sum_of_its_units(parameters: torch.Tensor) -> None:
    x = torch.tensor([[1e-30, 1e-9, 1e-3], [0.2, 0.7, 1.0]], dtype=torch.float64)
    gap = phi_inv(parameters, x) - naive(parameters, x)[0]
    # units without slope are constants, which the naive sum leaves out
    size = phi_inv(parameters, x).abs().max().item()
    torch.testing.assert_close(gap, gap[:1, :1].expand_as(gap), rtol=0, atol=1e-14 * size)


@EVERY_MAP
def test_curvature_is_the_derivative_of_phi_inv_in_log_x(parameters: torch.Tensor) -> None:
    log = torch.linspace(-30.0, 0.0, 41, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(naive(parameters, log.exp())[0].sum(), log)
    torch.testing.assert_close(curvature(parameters, log.detach().exp()), expected, rtol=1e-12, atol=0)


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
def test_three_hundred_maps_are_convex_and_their_tables_right(make: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    worst = (0.0, -1)
    for seed in range(300):
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
    gaps = (1e-7, 1e-5, 1.2e-4, 2.5e-4, 5e-4, 6e-4, 2e-3, 0.1, 5.0, 20.0, 75.0)
    found = [(a + s * g, a) for a in (-1e-3, -0.7, -5.0, -59.0, -79.0) for g in gaps for s in (-1.0, 1.0)]
    return torch.tensor([pair for pair in found if -80.0 <= pair[0] <= 0.0], dtype=torch.float64)


@EVERY_MAP
def test_value_and_slope_are_within_the_table_error_of_many_digits(parameters: torch.Tensor) -> None:
    logs = pairs_near_and_far()
    if parameters is MAPS["random"]:
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


def float32_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities that are numbers of float32, a third of them near each other, some below the table."""
    g = torch.Generator().manual_seed(3)
    logx = -30.0 * torch.rand(6000, generator=g).square()
    gap = torch.randn(6000, generator=g) * torch.tensor([1e-3, 0.1, 8.0]).repeat(2000)
    far = torch.tensor([-110.0, -300.0, -103.9, 0.0])
    return torch.cat([logx, far, far.flip(0)]), torch.cat([(logx + gap).clamp(max=0.0), far.flip(0), far.roll(1)])


@EVERY_MAP
def test_float32_of_the_vocabulary_is_the_float64_term_of_the_same_numbers(parameters: torch.Tensor) -> None:
    d = build(parameters)
    assert isinstance(d, NeuralDivergence)
    assert d.fits_float32
    logx, logz = float32_pairs()
    value, slope = (x.double() for x in d.over_vocabulary(logx, logz))
    expected, expected_slope = d.term(logx.double(), logz.double())
    delta = (logx.double() - logz.double()).abs()
    counted = (delta > 0) & (expected > 1e-36) & (expected_slope.abs() > 1e-36)  # below it float32 has fewer digits
    apart, apart_slope = ((value - expected).abs() / expected)[counted], ((slope / expected_slope - 1).abs())[counted]
    assert (apart_slope <= NODES_ERROR + NODES_NOISE / delta[counted]).all()
    # x (h'(x) - h'(z)) and G(x) - G(z), which are rounded each, leave d as their difference
    assert (apart <= NODES_ERROR + 5e-7 / delta[counted] + 10 * NODES_NOISE / delta[counted].square()).all()
    assert counted.double().mean() > 0.8


def test_float32_has_no_divergence_at_equality_and_reads_what_a_mask_removes() -> None:
    d = build(MAPS["random"])
    logx = torch.tensor([-1.0, -torch.inf, -20.0, torch.nan])
    value, slope = d.over_vocabulary(logx, logx)
    assert value[:3].tolist() == slope[:3].tolist() == [0.0] * 3
    value, _ = d.over_vocabulary(logx, torch.tensor([-torch.inf, -1.0, torch.nan, torch.nan]))
    assert value[:2].isfinite().all()
    assert value[2:].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e32])
def test_maps_beyond_float32_are_evaluated_in_float64(scale: float) -> None:
    d = build(single("square", 1.0, 0.0, scale))
    assert isinstance(d, NeuralDivergence)
    assert not d.fits_float32
    logx, logz = torch.tensor([-0.5]), torch.tensor([-1.5])
    wide = d.term(logx.double(), logz.double())
    torch.testing.assert_close(d.over_vocabulary(logx, logz), tuple(x.float() for x in wide))
