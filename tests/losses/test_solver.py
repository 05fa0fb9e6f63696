"""The vectorised bisection against closed forms."""

import math

import pytest
import torch
from scipy.special import lambertw

from mirrorpo.losses.solver import solve_log_bounds


def ends(value: float = 700.0) -> tuple[torch.Tensor, torch.Tensor]:
    end = torch.tensor(value, dtype=torch.float64)
    return -end, end


@pytest.mark.parametrize("radius", [1e-8, 1e-3, 1.0, 1e3])
def test_a_parabola_in_log_w_has_symmetric_bounds(radius: float) -> None:
    low, high = solve_log_bounds(lambda s: 0.5 * s * s, radius, *ends())
    assert high.item() == pytest.approx(math.sqrt(2 * radius), rel=1e-11)
    assert low.item() == pytest.approx(-math.sqrt(2 * radius), rel=1e-11)


@pytest.mark.parametrize("radius", [1e-4, 0.03, 0.5, 10.0])
def test_w_minus_1_minus_log_w_has_the_two_branches_of_lambert_w(radius: float) -> None:
    low, high = solve_log_bounds(lambda s: torch.expm1(s) - s, radius, *ends())
    argument = -math.exp(-1 - radius)
    assert low.exp().item() == pytest.approx(-lambertw(argument, 0).real, rel=1e-10)
    assert high.exp().item() == pytest.approx(-lambertw(argument, -1).real, rel=1e-10)


def test_a_side_that_never_reaches_the_radius_has_no_bound() -> None:
    # (1 - w)^2 tends to 1 as w -> 0 and to infinity as w grows
    low, high = solve_log_bounds(lambda s: torch.expm1(s) ** 2, 2.0, *ends(350.0))
    assert low.item() == -math.inf
    assert high.exp().item() == pytest.approx(1 + math.sqrt(2), rel=1e-12)


def test_every_element_has_its_own_bracket_and_its_own_bound() -> None:
    scale = torch.tensor([1.0, 4.0, 100.0], dtype=torch.float64)
    lowest, highest = torch.full((3,), -1.0, dtype=torch.float64), torch.tensor([0.5, 5.0, 5.0], dtype=torch.float64)
    low, high = solve_log_bounds(lambda s: scale * s * s, 1.0, lowest, highest)
    torch.testing.assert_close(low, torch.tensor([-1.0, -0.5, -0.1], dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert high[0] == math.inf  # 0.5^2 < 1
    torch.testing.assert_close(high[1:], torch.tensor([0.5, 0.1], dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_an_infinite_constraint_at_the_bracket_end_counts_as_reached() -> None:
    _, high = solve_log_bounds(lambda s: torch.where(s < 1.0, 0.0, math.inf), 5.0, *ends())
    assert high.item() == pytest.approx(1.0, rel=1e-12)


def test_empty_brackets_give_empty_bounds() -> None:
    nothing = torch.zeros(0, 3, dtype=torch.float64)
    low, high = solve_log_bounds(lambda s: s * s, 1.0, nothing, nothing)
    assert low.shape == high.shape == (0, 3)
