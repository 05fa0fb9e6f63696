"""Future-KL weighting against the O(T^2) double loop of its definition."""

import math

import pytest
import torch

from mirrorpo.losses.future_kl import FutureKL, discounted_future_sum, future_kl_weight
from naive import logits


def naive_weight(settings: FutureKL, u: torch.Tensor, a: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """F_t = sum over k >= t of gamma^(k - t) mask_k log w_k, clipped; exclusions and the safety rule token by token."""
    gamma = 2 ** (-1 / settings.half_life)
    rows, width = u.shape
    weight = torch.zeros_like(u)
    for i in range(rows):
        for t in range(width):
            future = 0.0
            for j in range(t, width):
                w_j = math.exp(u[i, j].item())
                if mask[i, j] and w_j <= settings.max_ratio:
                    future += gamma ** (j - t) * u[i, j].item()
            low, high = (1 - settings.clip if settings.lower_bound else 1.0), 1 + settings.clip
            if a[i, t] < 0 and math.exp(u[i, t].item()) > settings.safety_ratio:
                low, high = 1 - settings.clip, 1.0
            weight[i, t] = min(max(math.exp(future), low), high)
    return weight


SETTINGS = [
    FutureKL(),
    FutureKL(lower_bound=True),
    FutureKL(half_life=1.0, clip=0.5, lower_bound=True, max_ratio=3.0, safety_ratio=1.5),
    FutureKL(half_life=4.0, clip=1.0, max_ratio=2.0, safety_ratio=2.0),
]


@pytest.mark.parametrize("scale", [0.02, 0.5, 2.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_the_weight_is_the_naive_double_loop(settings: FutureKL, scale: float) -> None:
    u, a = scale * logits(5, 23, seed=1), logits(5, 23, seed=2)
    mask = logits(5, 23, seed=3) > -1.0
    got = future_kl_weight(settings, u.requires_grad_(), a, mask)
    assert not got.requires_grad
    torch.testing.assert_close(got, naive_weight(settings, u.detach(), a, mask), rtol=1e-12, atol=0)


def test_one_advantage_per_sequence_is_enough() -> None:
    u, a = logits(3, 7, seed=1), torch.tensor([[1.0], [-1.0], [-2.0]], dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.bool)
    got = future_kl_weight(FutureKL(), u, a, mask)
    torch.testing.assert_close(got, naive_weight(FutureKL(), u, a.expand(3, 7), mask), rtol=1e-12, atol=0)


@pytest.mark.parametrize("half_life", [1.0, 32.0, 1e4])
@pytest.mark.parametrize("width", [1, 255, 256, 257, 700])
def test_the_chunked_sum_is_the_reverse_recursion(width: int, half_life: float) -> None:
    x, gamma = logits(2, width, seed=4), 2 ** (-1 / half_life)
    expected, carry = torch.zeros_like(x), torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(width)):
        carry = x[:, t] + gamma * carry
        expected[:, t] = carry
    torch.testing.assert_close(discounted_future_sum(x, gamma), expected, rtol=1e-10, atol=1e-12)


def test_a_future_log_ratio_counts_half_after_one_half_life() -> None:
    x = torch.zeros(1, 33, dtype=torch.float64)
    x[0, 32] = 0.1
    weight = future_kl_weight(FutureKL(half_life=32.0), x, torch.ones(1, 1), torch.ones(1, 33, dtype=torch.bool))
    assert weight[0, 0].item() == pytest.approx(math.exp(0.05), rel=1e-12)
    assert weight[0, 32].item() == pytest.approx(math.exp(0.1), rel=1e-12)


def test_weights_stay_in_range_for_extreme_ratios_and_empty_batches() -> None:
    u = torch.tensor([[50.0, -1e4, 300.0, -50.0]])
    weight = future_kl_weight(FutureKL(), u, torch.tensor([[-1.0]]), torch.ones(1, 4, dtype=torch.bool))
    assert weight.isfinite().all()
    assert ((weight >= 0.8) & (weight <= 1.2)).all()
    for shape in ((0, 3), (2, 0)):
        empty = torch.zeros(shape)
        assert future_kl_weight(FutureKL(), empty, empty, empty.bool()).shape == shape


@pytest.mark.parametrize(
    ("settings", "name", "legal"),
    [
        ({"half_life": 0.5}, "half_life", "[1, 1e+09]"),
        ({"clip": 1.5}, "clip", "[0, 1]"),
        ({"clip": float("nan")}, "clip", "[0, 1]"),
        ({"max_ratio": 0.5}, "max_ratio", "[1, inf]"),
        ({"safety_ratio": 0.0}, "safety_ratio", "[1, inf]"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, float], name: str, legal: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        FutureKL(**settings)
    assert legal in str(caught.value)
    assert repr(next(iter(settings.values()))) in str(caught.value)
