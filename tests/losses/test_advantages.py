"""Group advantages against python loops."""

import math
import statistics

import pytest
import torch

import mirrorpo
from naive import logits

NAN = float("nan")
KINDS = ("grpo", "dr_grpo", "rloo", "maxrl", "soft_value")


def naive(rewards: list[float], kind: str) -> list[float]:
    """One group; NaN rewards leave it."""
    scored = [r for r in rewards if not math.isnan(r)]
    result = []
    for r in rewards:
        if math.isnan(r):
            result.append(0.0)
        elif kind == "rloo":
            others = (sum(scored) - r) / (len(scored) - 1) if len(scored) > 1 else r
            result.append(r - others)
        elif kind == "soft_value":
            result.append(r - 0.5 * math.log(statistics.fmean(math.exp(x / 0.5) for x in scored)))
        else:
            mean = sum(scored) / len(scored)
            std = statistics.stdev(scored) if len(scored) > 1 else 0.0  # the sample deviation, n - 1
            by = {"grpo": std + 1e-4, "dr_grpo": 1.0, "maxrl": mean or 1.0}[kind]
            result.append((r - mean) / by)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_formula_group_by_group(kind: str) -> None:
    rewards = logits(24, seed=1).abs()  # `maxrl` is for rewards >= 0
    rewards[:4] = 0.0
    got = mirrorpo.advantages(rewards, 4, kind)
    expected = [x for start in range(0, 24, 4) for x in naive(rewards[start : start + 4].tolist(), kind)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_without_a_score_leaves_its_group(kind: str) -> None:
    rewards = [1.0, NAN, 0.0, 0.5, NAN, NAN, 2.0, NAN, NAN, NAN, NAN, NAN]
    got = mirrorpo.advantages(torch.tensor(rewards), 4, kind)
    scored_groups = naive(rewards[:4], kind) + naive(rewards[4:8], kind) + [0.0] * 4
    assert got.tolist() == pytest.approx(scored_groups, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_equal_rewards_give_zero(kind: str, value: float) -> None:
    if kind == "maxrl" and value < 0:
        with pytest.raises(ValueError, match=r"'maxrl' divides by the mean reward and needs rewards >= 0, got -3.5"):
            mirrorpo.advantages(torch.full((6,), value), 3, kind)
        return
    assert mirrorpo.advantages(torch.full((6,), value), 3, kind).tolist() == [0.0] * 6


def test_rloo_is_dr_grpo_times_n_over_n_minus_1() -> None:
    rewards = logits(15, seed=2)
    torch.testing.assert_close(
        mirrorpo.advantages(rewards, 5, "rloo"), mirrorpo.advantages(rewards, 5, "dr_grpo") * 1.25
    )


def test_rewards_are_constants_and_low_precision_is_upcast() -> None:
    rewards = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    got = mirrorpo.advantages(rewards, 2)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    # std = sqrt(1/2)
    assert got.tolist() == pytest.approx([-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)], rel=1e-6)


def test_an_empty_batch_gives_no_advantages() -> None:
    assert mirrorpo.advantages(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "group_size", "kind", "words"),
    [
        (torch.zeros(6), 4, "grpo", ("rewards", "divisible by group_size 4", "(6,)")),
        (torch.zeros(4), 1, "grpo", ("group_size", ">= 2", "1")),
        (torch.zeros(4), 0, "grpo", ("group_size", ">= 2", "0")),
        (torch.zeros(4), 2, "gpro", ("advantage", "'gpro'", "did you mean 'grpo'", "dr_grpo, grpo, maxrl, rloo")),
    ],
)
def test_bad_arguments_are_named(rewards: torch.Tensor, group_size: int, kind: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"must|needs|unknown") as caught:
        mirrorpo.advantages(rewards, group_size, kind)
    for word in words:
        assert word in str(caught.value)
