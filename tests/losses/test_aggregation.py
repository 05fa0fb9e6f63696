"""The four averages against python loops; gradient accumulation; what masks and empty batches do."""

import pytest
import torch

import mirrorpo
from mirrorpo.losses.aggregation import AGGREGATIONS, aggregation_weights
from naive import logits

NAN, INF = float("nan"), float("inf")
LENGTH = 7


def naive(x: list[list[float]], mask: list[list[int]], mode: str) -> float:
    kept = [[v for v, m in zip(row, keep, strict=True) if m] for row, keep in zip(x, mask, strict=True)]
    if mode == "sequence_mean":
        return sum(sum(row) / len(row) if row else 0.0 for row in kept) / len(kept)
    if mode == "token_mean":
        return sum(map(sum, kept)) / sum(map(len, kept))
    return sum(map(sum, kept)) / (len(kept) * (LENGTH if mode == "constant" else 1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_every_mode_is_its_double_loop(mode: str, dtype: torch.dtype) -> None:
    x = logits(5, 6, seed=1)
    mask = (logits(5, 6, seed=2) > -0.5).to(dtype)
    mask[3] = 0  # an empty completion
    got = mirrorpo.aggregate(x, mask, mode, max_completion_length=LENGTH)
    assert got.item() == pytest.approx(naive(x.tolist(), mask.int().tolist(), mode), rel=1e-12)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_what_stands_at_a_masked_position_reaches_neither_value_nor_gradient(mode: str) -> None:
    x = torch.tensor([[1.0, NAN, 3.0], [INF, -INF, 5.0]], requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    got = mirrorpo.aggregate(x, mask, mode, max_completion_length=LENGTH)
    assert got.item() == pytest.approx(naive([[1.0, 0.0, 3.0], [0.0, 0.0, 5.0]], mask.tolist(), mode), rel=1e-6)
    got.backward()
    assert x.grad is not None
    assert (x.grad[mask == 0] == 0).all()
    assert (x.grad[mask == 1] > 0).all()


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_nothing_kept_gives_a_zero_with_a_graph(mode: str, shape: tuple[int, int]) -> None:
    x = torch.full(shape, NAN, requires_grad=True)
    got = mirrorpo.aggregate(x, torch.zeros(shape), mode, max_completion_length=LENGTH)
    assert got.item() == 0
    got.backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


@pytest.mark.parametrize("splits", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_token_mean_over_micro_batches_is_that_of_the_whole_batch(splits: tuple[int, ...]) -> None:
    x, mask = logits(4, 5, seed=1), logits(4, 5, seed=2) > 0.5
    mask[0] = False
    whole = mirrorpo.aggregate(x, mask, "token_mean")
    parts = zip(x.split(splits), mask.split(splits), strict=True)
    summed = sum(mirrorpo.aggregate(a, m, "token_mean", num_tokens=mask.sum()) for a, m in parts)
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=0)


def test_a_share_below_one_token_is_a_denominator_like_any_other() -> None:
    # 2 tokens in the whole step, 8 micro-batches: each divides by 1/4, and the trainer averages over the 8
    x, mask = torch.tensor([[3.0]]), torch.ones(1, 1)
    for share in (0.25, torch.tensor(0.25)):
        assert mirrorpo.aggregate(x, mask, "token_mean", num_tokens=share).item() == 12.0
    assert mirrorpo.aggregate(x, torch.zeros(1, 1), "token_mean", num_tokens=0).item() == 0.0


@pytest.mark.parametrize(
    ("mode", "length", "words"),
    [
        ("constant", None, ("constant", "max_completion_length", "None")),
        ("constant", 0, ("constant", "max_completion_length", ">= 1", "0")),
        ("tokenmean", 1, ("aggregation", "'tokenmean'", "did you mean 'token_mean'", "sequence_mean")),
    ],
)
def test_bad_arguments_are_named(mode: str, length: int | None, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"must|needs|unknown") as caught:
        mirrorpo.aggregate(torch.zeros(1, 2), torch.ones(1, 2), mode, max_completion_length=length)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("num_tokens", [None, 2.5])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_the_average_is_a_product_with_the_weights(mode: str, num_tokens: float | None) -> None:
    x, mask = logits(5, 6, seed=1), logits(5, 6, seed=2) > -0.5
    mask[3] = False
    weights = aggregation_weights(mask, mode, max_completion_length=LENGTH, num_tokens=num_tokens, dtype=torch.float64)
    got = mirrorpo.aggregate(x, mask, mode, max_completion_length=LENGTH, num_tokens=num_tokens)
    assert got.item() == pytest.approx((weights * x).sum().item(), rel=1e-14)
    assert (weights[~mask] == 0).all()
    assert (weights[mask] > 0).all()
    with pytest.raises(ValueError, match="unknown aggregation"):
        aggregation_weights(mask, "mean")
