"""How the coefficient moves: schedules, and the controller to a target divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest

import mirrorpo
from mirrorpo.losses.coefficient import Control, control_from
from mirrorpo.training.resuming import PenaltyState


@pytest.mark.parametrize(("kind", "half"), [("linear", 1.25), ("cosine", 1.25)])
def test_a_schedule_goes_from_start_to_end(kind: Any, half: float) -> None:
    control = Control(kind=kind, start=2.0, end=0.5)
    assert control.factor_at(0.0) == 2.0
    assert control.factor_at(0.5) == pytest.approx(half)
    assert control.factor_at(1.0) == pytest.approx(0.5)
    assert control.factor_at(2.0) == pytest.approx(0.5)


def test_the_cosine_is_a_cosine() -> None:
    control = Control(kind="cosine", start=1.0, end=0.0)
    assert control.factor_at(0.25) == pytest.approx((1 + math.cos(math.pi * 0.25)) / 2)


def test_the_controller_moves_by_at_most_a_fifth_of_its_rate() -> None:
    control = Control(kind="adaptive", target=0.1, rate=0.5)
    assert control.updated(1.0, 0.105) == pytest.approx(1 + 0.5 * 0.05)
    assert control.updated(1.0, 100.0) == pytest.approx(1.1)
    assert control.updated(1.0, 0.0) == pytest.approx(0.9)
    assert control.updated(1.0, math.nan) == 1.0


def test_the_controller_settles_at_its_target() -> None:
    # A system whose divergence falls as the coefficient rises: D = 0.2 / factor.
    control = Control(kind="adaptive", target=0.1, rate=0.5)
    factor = 0.2
    for _ in range(400):
        factor = control.updated(factor, 0.2 / factor)
    assert 0.2 / factor == pytest.approx(0.1, rel=1e-3)


def test_the_factor_never_runs_away() -> None:
    control = Control(kind="adaptive", target=0.1, rate=1.0)
    factor = 1.0
    for _ in range(2000):
        factor = control.updated(factor, 0.0)
    assert factor == 1e-6


def test_a_step_uses_the_mean_over_its_micro_batches() -> None:
    state = PenaltyState(Control(kind="adaptive", target=0.1, rate=0.5))
    state.observe(0.10)
    state.observe(0.12)
    state.step(0.5)
    assert state.factor == pytest.approx(1 + 0.5 * 0.1)
    state.step(0.6)  # nothing observed: nothing moves
    assert state.factor == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("spec", "piece"),
    [
        ({"kind": "adaptiv", "target": 1}, "did you mean 'adaptive'"),
        ({"kind": "adaptive"}, "needs target"),
        ({"kind": "adaptive", "target": 0}, "target must be a number in (0"),
        ({"kind": "linear", "target": 1}, "does not take 'target'. Legal: start, end"),
        ({"kind": "linear", "end": -1}, "end must be a number in [0"),
        ("adaptive", "must be a mapping"),
    ],
)
def test_a_bad_control_is_named_with_what_is_legal(spec: Any, piece: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        control_from(spec)
    assert piece in str(caught.value)


def test_a_control_or_a_placement_without_a_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="control has no effect"):
        mirrorpo.objective("dr_grpo", control={"kind": "linear"})
    with pytest.raises(ValueError, match="placement has no effect"):
        mirrorpo.objective("dr_grpo", placement="reward")
    with pytest.raises(ValueError, match="estimator must be 'sampled' or 'weighted'"):
        mirrorpo.objective("grpo", placement="reward", estimator="score")
