"""A packed row holds every token once, and each sees its prompt and its own past: nothing else, nothing less."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mirrorpo.kernels.attention import masked_attention, prefix_attention
from mirrorpo.kernels.packing import Packing, RowTooLongError, UnpackableError, pack

# Prompt sizes and completion sizes of each group; the groups' completions are dealt out in turn, so groups interleave.
BATCHES = {
    "ragged": [(6, [5, 1, 0, 7]), (3, [3, 2]), (4, [6])],
    "one completion of one token": [(2, [1])],
    "groups of one": [(5, [4]), (2, [3]), (3, [1])],
    "equal lengths": [(4, [3, 3, 3, 3])],
    "completions of one token": [(3, [1, 1, 1]), (1, [1, 2])],
    "an empty group": [(3, [0, 0]), (2, [2, 4])],
}


def batch(groups: list[tuple[int, list[int]]], seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Padded ids, mask and T, the completions of all groups in turn."""
    g = torch.Generator().manual_seed(seed)
    num_prompt, num_completion = max(p for p, _ in groups), max(1, *(max(sizes) for _, sizes in groups))
    prompts = [torch.randint(1, 1000, (p,), generator=g) for p, _ in groups]
    rows = []
    for turn in range(max(len(sizes) for _, sizes in groups)):
        rows += [(prompts[i], sizes[turn]) for i, (_, sizes) in enumerate(groups) if turn < len(sizes)]
    ids = torch.randint(1, 1000, (len(rows), num_prompt + num_completion), generator=g)
    mask = torch.zeros_like(ids)
    for row, (prompt, size) in enumerate(rows):
        ids[row, num_prompt - len(prompt) : num_prompt] = prompt
        mask[row, num_prompt - len(prompt) : num_prompt + size] = 1
    return ids, mask, num_completion


def located(packing: Packing) -> list[tuple[int, int]]:
    """Row and place in it for every hidden state."""
    return [(number, at) for number, row in enumerate(packing.rows) for at in range(row.segments.length)]


@pytest.mark.parametrize("budget", [None, 14, 25])
@pytest.mark.parametrize("name", BATCHES)
def test_what_predicts_a_token_has_seen_its_prompt_and_its_past_in_order(name: str, budget: int | None) -> None:
    ids, mask, num_completion = batch(BATCHES[name])
    packing = pack(ids, mask, num_completion, budget)
    num_prompt = ids.shape[1] - num_completion
    places = located(packing)
    slots = mask[:, num_prompt:].reshape(-1).nonzero().squeeze(1)
    assert packing.slots.tolist() == slots.tolist()
    for slot, token, predictor in zip(packing.slots.tolist(), packing.tokens, packing.predictors.tolist(), strict=True):
        completion, step = divmod(slot, num_completion)
        assert token == ids[completion, num_prompt + step]
        number, at = places[predictor]
        row = packing.rows[number]
        seen = row.segments.mask[at]
        column = torch.arange(ids.shape[1])
        past = mask[completion].bool() & (column < num_prompt + step)
        assert row.ids[seen].tolist() == ids[completion][past].tolist()
        assert row.columns[seen].tolist() == column[past].tolist()
        assert row.positions[seen].tolist() == (column[past] - column[past][0]).tolist()


@pytest.mark.parametrize("name", BATCHES)
def test_a_prompt_is_read_once_and_last_tokens_are_not_read(name: str) -> None:
    ids, mask, num_completion = batch(BATCHES[name])
    # each prompt with a completion in it, and all tokens of a completion but the last
    expected = sum(p + sum(max(0, s - 1) for s in sizes) for p, sizes in BATCHES[name] if any(sizes))
    assert pack(ids, mask, num_completion).num_tokens == expected


def test_groups_are_binned_longest_first_into_the_first_row_with_room() -> None:
    # rows of 3 + 4 = 7 (prompt 3, one completion of 5), 2 + 2 = 4, 1 + 2 = 3, 4 + 5 = 9 tokens, at most 11 in one
    ids, mask, num_completion = batch([(3, [5]), (2, [3]), (1, [3]), (4, [6])])
    rows = pack(ids, mask, num_completion, 11).rows
    # 9; 7 does not fit beside it; 4 fits beside 7; 3 fits nowhere
    assert [row.segments.length for row in rows] == [9, 11, 3]
    assert [row.segments.size for row in rows] == [(9,), (7, 4), (3,)]


def test_a_group_beyond_the_budget_is_cut_between_completions_and_its_prompt_repeated() -> None:
    ids, mask, num_completion = batch([(4, [5, 5, 5])])
    rows = pack(ids, mask, num_completion, 13).rows  # 4 + 4 + 4 = 12, and 4 + 4
    assert [row.segments.length for row in rows] == [12, 8]
    assert all(row.ids[:4].tolist() == rows[0].ids[:4].tolist() for row in rows)


def test_the_plan_is_the_same_every_time() -> None:
    ids, mask, num_completion = batch(BATCHES["ragged"])
    one, two = (pack(ids, mask, num_completion, 20) for _ in range(2))
    assert [row.ids.tolist() for row in one.rows] == [row.ids.tolist() for row in two.rows]
    assert one.predictors.tolist() == two.predictors.tolist()


def test_a_row_that_is_too_long_is_named_with_its_lengths() -> None:
    ids, mask, num_completion = batch([(6, [2, 7])])
    with pytest.raises(
        RowTooLongError, match=r"prompt of 6 tokens with a completion of 7 makes a row of 13.*token_budget, 12"
    ):
        pack(ids, mask, num_completion, 12)


def test_other_layouts_are_refused() -> None:
    ids, mask, num_completion = batch([(3, [2, 4])])
    holes = mask.clone()
    holes[1, 4] = 0
    right_padded = mask.clone()
    right_padded[0, 2] = 0
    with pytest.raises(UnpackableError, match="without holes"):
        pack(ids, holes, num_completion)
    with pytest.raises(UnpackableError, match="without holes"):
        pack(ids, right_padded, num_completion)
    mask[0, :3] = 0
    with pytest.raises(UnpackableError, match="empty"):
        pack(ids, mask, num_completion)


def test_unpacked_values_lie_where_their_tokens_do_and_carry_gradients() -> None:
    ids, mask, num_completion = batch(BATCHES["ragged"])
    packing = pack(ids, mask, num_completion)
    values = packing.tokens.double().requires_grad_()
    padded = packing.unpack(values)
    completion = mask[:, -num_completion:]
    assert torch.equal(padded, ids[:, -num_completion:].double() * completion)
    weights = torch.arange(padded.numel(), dtype=torch.float64).view_as(padded)
    (padded * weights).sum().backward()
    assert torch.equal(values.grad, weights[completion.bool()])


# Attention


def naive(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention query by query, head by head, over the keys that are seen; (1, L, heads, D)."""
    heads, length = query.shape[1:3]
    share = heads // key.shape[1]
    out = []
    for at in range(length):
        for head in range(heads):
            keys, values = key[0, head // share, seen[at]], value[0, head // share, seen[at]]
            out.append((keys @ query[0, head, at] * scale).softmax(0) @ values)
    return torch.stack(out).view(1, length, heads, -1)


def attention_inputs(length: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = [(1, 4, length, 8), (1, key_heads, length, 8), (1, key_heads, length, 8)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("name", BATCHES)
def test_attention_and_its_gradient_are_those_of_a_softmax_over_what_is_seen(
    name: str, key_heads: int, dtype: torch.dtype
) -> None:
    segments = pack(*batch(BATCHES[name])).rows[0].segments
    inputs = attention_inputs(segments.length, key_heads, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = prefix_attention(inputs[0], inputs[1], inputs[2], segments, 0.3)
    expected = naive(exact[0], exact[1], exact[2], segments.mask, 0.3)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    worst = max(((a - b).abs().max() / max(1.0, b.abs().max())).item() for a, b in pairs)  # pyright: ignore
    assert worst <= TOLERANCE[dtype], worst


def test_scores_of_hundreds_stay_finite() -> None:
    segments = pack(*batch(BATCHES["ragged"])).rows[0].segments
    inputs = [x.detach() * 40 for x in attention_inputs(segments.length, 4, torch.float32)]
    inputs = [x.requires_grad_() for x in inputs]
    out = prefix_attention(inputs[0], inputs[1], inputs[2], segments, 1.0)
    out.sum().backward()
    assert all(bool(torch.isfinite(x).all()) for x in (out, *(x.grad for x in inputs)))
    expected = naive(*(x.detach().double() for x in inputs), segments.mask, 1.0)
    assert (out - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_no_token_reaches_another_completion_in_either_direction() -> None:
    packing = pack(*batch([(3, [4, 5, 2]), (2, [3, 3])]))
    segments = packing.rows[0].segments
    inputs = attention_inputs(segments.length, 4, torch.float32)
    before = prefix_attention(inputs[0], inputs[1], inputs[2], segments, 0.3)
    own = slice(segments.start[1], segments.start[1] + segments.size[1])  # the first completion of the first group
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[:, :, own] += 100.0
    after = prefix_attention(changed[0], changed[1], changed[2], segments, 0.3)
    others = torch.ones(segments.length, dtype=torch.bool)
    others[own] = False
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, own], after[:, own])
    before[:, own].sum().backward()
    prompt = torch.arange(segments.length) < segments.size[0]
    for x in inputs[1:]:
        assert x.grad[:, :, others & ~prompt].abs().max() == 0.0
        assert x.grad[:, :, prompt].abs().max() > 0.0


def test_the_variable_length_plan_and_the_mask_say_the_same() -> None:
    segments = pack(*batch(BATCHES["ragged"])).rows[0].segments
    query, key, value = attention_inputs(segments.length, 4, torch.float64)
    keys, ends_q, ends_k = segments.varlen
    parts = []
    for i in range(len(ends_q) - 1):
        q = query[0, :, ends_q[i] : ends_q[i + 1]]
        at = keys[ends_k[i] : ends_k[i + 1]]
        scores = q @ key[0][:, at].transpose(1, 2) / math.sqrt(8)
        # causal, aligned to the last key: the last query sees all
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(at) - q.shape[1] + 1)
        parts.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ value[0][:, at])
    masked = masked_attention(query, key, value, segments, 1 / math.sqrt(8))
    assert (torch.cat(parts, dim=1).transpose(0, 1) - masked[0]).abs().max() < 1e-13


def test_attention_refuses_what_does_not_fit_the_row() -> None:
    segments = pack(*batch(BATCHES["equal lengths"])).rows[0].segments
    query, key, value = attention_inputs(segments.length, 4, torch.float32)
    with pytest.raises(ValueError, match="query must have shape"):
        prefix_attention(query[:, :, 1:], key, value, segments, 1.0)
    with pytest.raises(ValueError, match="as wide as queries"):
        prefix_attention(query, key, value[..., :4], segments, 1.0)
    with pytest.raises(ValueError, match="key heads must divide"):
        prefix_attention(query, key[:, :3], value[:, :3], segments, 1.0)
