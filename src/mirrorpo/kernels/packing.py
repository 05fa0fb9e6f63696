r"""Plans of packed rows: the place of each token of a padded batch of completions when nothing is computed twice.

A trainer holds G completions of a prompt as G padded rows, each with its own copy of the prompt. Packed, they are one
row ``[prompt][c_1][c_2]...``: a token sees its prompt and what came before it in its own completion, positions restart
after the prompt, and nothing is padded. The hidden state of the prompt's last token predicts the first token of every
completion; the last token of a completion predicts nothing and is left out.

Groups are found by their prompts' tokens, wherever they stand in the batch, and binned into rows under a token budget
by first fit, longest first (Johnson 1973). A group beyond the budget is cut between completions, its prompt repeated.

The same plan serves every attention kernel: ``Segments`` says which tokens attend to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Segments are attended in buckets of similar length, padded to the longest: shorter ones than this share of it open a
# bucket of their own. Nearer 1: less padding, more kernel calls.
_BUCKET_RATIO = 0.75


class RowTooLongError(ValueError):
    """A prompt with one completion is longer than the token budget."""


class UnpackableError(ValueError):
    """A batch whose layout this module does not know: padding on another side, holes, an empty prompt."""


class Bucket:
    """Segments of similar length, side by side.

    Args:
        places: (b, T_b) positions in the row, -1 beyond a segment's end.

    Attributes:
        shape: (b, T_b).
        padding: (b, T_b) bool, true beyond a segment's end.
        source: (b * T_b,), the positions, 0 for padding.
        valid: (n,), which of these are no padding.
        target: (n,), their positions.
    """

    def __init__(self, places: Tensor) -> None:
        flat = places.reshape(-1)
        self.shape = tuple(places.shape)
        self.padding = places < 0
        self.source = flat.clamp(min=0)
        self.valid = (flat >= 0).nonzero().squeeze(1)
        self.target = flat[self.valid]


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Who attends to what in one packed row.

    Attributes:
        length: L, tokens in the row.
        start: first position of each segment, ascending: a prompt, a completion, or a prompt with its only completion.
        size: tokens of each segment; a token sees those of its segment up to itself,
        prefix_start: and before them all those of its prefix, which begins here
        prefix_size: and has so many tokens; 0 for none.
        device: of the index tensors.
    """

    length: int
    start: tuple[int, ...]
    size: tuple[int, ...]
    prefix_start: tuple[int, ...]
    prefix_size: tuple[int, ...]
    device: torch.device

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The segments by length, each bucket's at least ``_BUCKET_RATIO`` as long as its longest."""
        return tuple(Bucket(places.to(self.device)) for places in _buckets(self.start, self.size))

    @cached_property
    def prefixes(self) -> list[tuple[slice, slice]]:
        """(queries, keys) of every prefix: the tokens of all completions of a group, and those of their prompt."""
        found: dict[int, list[int]] = {}
        for start, size, prefix, prefix_size in zip(
            self.start, self.size, self.prefix_start, self.prefix_size, strict=True
        ):
            if prefix_size:
                bounds = found.setdefault(prefix, [start, start, prefix_size])
                bounds[1] = start + size
        return [(slice(first, last), slice(key, key + size)) for key, (first, last, size) in found.items()]

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor]:
        """The row as variable-length attention takes it, causal and aligned to the last key.

        Positions of the keys that each segment reads, one segment after the other, its prefix first; cumulative sizes
        of the queries and of the keys, int32, beginning with 0.
        """
        spans = zip(self.start, self.size, self.prefix_start, self.prefix_size, strict=True)
        both = [((prefix, length), (start, size)) for start, size, prefix, length in spans]
        keys = _ranges([first for pair in both for first, _ in pair], [count for pair in both for _, count in pair])
        sizes = [prefix + own for own, prefix in zip(self.size, self.prefix_size, strict=True)]
        ends_q = torch.tensor([0, *self.size], device="cpu").cumsum(0, dtype=torch.int32)
        ends_k = torch.tensor([0, *sizes], device="cpu").cumsum(0, dtype=torch.int32)
        return keys.to(self.device), ends_q.to(self.device), ends_k.to(self.device)

    @cached_property
    def mask(self) -> Tensor:
        """(L, L) bool, true where a query (first axis) sees a key."""
        seen = torch.zeros(self.length, self.length, dtype=torch.bool, device="cpu")
        for start, size, prefix, prefix_size in zip(
            self.start, self.size, self.prefix_start, self.prefix_size, strict=True
        ):
            own = slice(start, start + size)
            seen[own, own] = torch.ones(size, size, dtype=torch.bool, device="cpu").tril()
            seen[own, prefix : prefix + prefix_size] = True
        return seen.to(self.device)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed row.

    Attributes:
        ids: (L,), token ids.
        columns: (L,), of the tokens in the padded batch: rotary embeddings are then, bit for bit, those of padded rows.
        positions: (L,), the same without padding on the left, as generation counts them.
        segments: who attends to what.
        idle: whether no completion of it is expected to have a gradient.
    """

    ids: Tensor
    columns: Tensor
    positions: Tensor
    segments: Segments
    idle: bool = False


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A padded batch as packed rows.

    Attributes:
        rows: the rows; their hidden states, one after the other, are (M, H).
        predictors: (N,), for every token of every completion, completion by completion: the place among the M whose
            hidden state predicts it.
        tokens: (N,), these tokens.
        slots: (N,), their places in the flattened (B, T) of the batch.
        shape: (B, T).
    """

    rows: tuple[Row, ...]
    predictors: Tensor
    tokens: Tensor
    slots: Tensor
    shape: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """M: tokens in all rows."""
        return sum(row.segments.length for row in self.rows)

    def unpack(self, values: Tensor) -> Tensor:
        """(N,) or (N, ...) per completion token -> (B, T, ...), 0 where there is none; differentiable."""
        empty = values.new_zeros((self.shape[0] * self.shape[1], *values.shape[1:]))
        return empty.index_copy(0, self.slots, values).view(*self.shape, *values.shape[1:])


@dataclass
class _Piece:
    """A prompt and some of its completions, in one row."""

    members: list[int]
    size: int


def pack(
    ids: Tensor,
    attention_mask: Tensor,
    num_completion: int,
    token_budget: int | None = None,
    idle: Tensor | None = None,
) -> Packing:
    """The packed rows of a padded batch.

    Args:
        ids: (B, P + T), prompts padded on the left, completions on the right.
        attention_mask: (B, P + T), 0 for padding.
        num_completion: T.
        token_budget: most tokens of a row; None: everything in one row.
        idle: (B,) bool, completions that are expected to have no gradient: groups of them only get rows of their own.

    Returns:
        The plan; its index tensors are on the device of ``ids``.

    Raises:
        RowTooLongError: a prompt with one completion exceeds ``token_budget``.
        UnpackableError: padding on another side, holes in the mask, an empty prompt.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 1, 2, 3], [5, 6, 4, 0, 0]])  # two completions of one prompt: 1 2 3 and 4
        >>> packing = pack(ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), num_completion=3)
        >>> packing.rows[0].ids.tolist(), packing.predictors.tolist(), packing.tokens.tolist()
        ([5, 6, 1, 2], [1, 2, 3, 1], [1, 2, 3, 4])
    """
    width = ids.shape[1]
    num_prompt = width - num_completion
    # One copy to the host: the plan is made of Python integers.
    on_host, kept = ids.cpu(), attention_mask.bool().cpu()
    prompt_sizes, sizes = _sizes(kept, num_prompt)
    groups: dict[int, list[int]] = {}
    prompts = on_host[:, :num_prompt].masked_fill(~kept[:, :num_prompt], -1)
    for index, group in enumerate(prompts.unique(dim=0, return_inverse=True)[1].tolist()):
        groups.setdefault(group, []).append(index)
    limit = token_budget if token_budget is not None else int(kept.sum()) + 1
    _check_lengths(prompt_sizes, sizes, token_budget)
    pieces = [piece for members in groups.values() for piece in _cut(members, prompt_sizes, sizes, limit)]
    layout = _Layout(prompt_sizes, sizes, num_prompt, num_completion)
    resting = [False] * len(sizes) if idle is None else idle.tolist()
    rows = []
    for rests in (False, True):
        chosen = [piece for piece in pieces if all(resting[i] for i in piece.members) is rests]
        rows += [layout.row(bin_, ids, rests) for bin_ in _first_fit(chosen, limit)]
    return layout.packing(rows, ids)


def _sizes(kept: Tensor, num_prompt: int) -> tuple[list[int], list[int]]:
    prompt, completion = kept[:, :num_prompt], kept[:, num_prompt:]
    prompt_sizes, sizes = prompt.sum(1), completion.sum(1)
    left = torch.arange(num_prompt, device="cpu") >= num_prompt - prompt_sizes.unsqueeze(1)
    right = torch.arange(completion.shape[1], device="cpu") < sizes.unsqueeze(1)
    if not torch.equal(prompt, left) or not torch.equal(completion, right):
        raise UnpackableError("prompts must be padded on the left and completions on the right, without holes")
    if bool((prompt_sizes == 0).any()):
        raise UnpackableError("every prompt must have a token, got an empty one")
    return prompt_sizes.tolist(), sizes.tolist()


def _check_lengths(prompt_sizes: list[int], sizes: list[int], token_budget: int | None) -> None:
    index = max(range(len(sizes)), key=lambda i: prompt_sizes[i] + sizes[i])
    prompt, completion = prompt_sizes[index], sizes[index]
    if token_budget is not None and prompt + completion > token_budget:
        raise RowTooLongError(
            f"a prompt of {prompt} tokens with a completion of {completion} makes a row of {prompt + completion}, "
            f"longer than token_budget, {token_budget}"
        )


def _inputs(size: int) -> int:
    """Tokens of a completion that are read: all but the last, which predicts nothing."""
    return max(0, size - 1)


def _cut(members: list[int], prompt_sizes: list[int], sizes: list[int], limit: int) -> list[_Piece]:
    members = [i for i in members if sizes[i]]  # an empty completion asks for nothing
    pieces: list[_Piece] = []
    for i in members:
        if not pieces or pieces[-1].size + _inputs(sizes[i]) > limit:
            pieces.append(_Piece(members=[], size=prompt_sizes[i]))
        pieces[-1].members.append(i)
        pieces[-1].size += _inputs(sizes[i])
    return pieces


def _first_fit(pieces: list[_Piece], limit: int) -> list[list[_Piece]]:
    bins: list[list[_Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda p: -p.size):  # stable: equal sizes keep the batch's order
        index = next((i for i, free in enumerate(room) if piece.size <= free), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(limit)
        bins[index].append(piece)
        room[index] -= piece.size
    return bins


class _Layout:
    """Lays pieces out in rows and remembers what predicts each completion."""

    def __init__(self, prompt_sizes: list[int], sizes: list[int], num_prompt: int, num_completion: int) -> None:
        self.prompt_sizes, self.sizes = prompt_sizes, sizes
        self.num_prompt, self.num_completion, self.width = num_prompt, num_completion, num_prompt + num_completion
        self.offset = 0  # of the next row in the hidden states of all rows
        self.first = [0] * len(sizes)  # what predicts a completion's first token
        self.later = [0] * len(sizes)  # what predicts its second; the others follow

    def row(self, pieces: list[_Piece], ids: Tensor, idle: bool) -> Row:
        spans: list[tuple[int, int, int]] = []  # place in the flattened batch, size, position
        segments: list[tuple[int, int, int, int]] = []  # start, size, prefix start, prefix size
        at = 0
        for piece in pieces:
            prompt_at, prompt = at, self.prompt_sizes[piece.members[0]]
            alone = len(piece.members) == 1
            spans.append((piece.members[0] * self.width + self.num_prompt - prompt, prompt, 0))
            if not alone:
                segments.append((prompt_at, prompt, 0, 0))
            at += prompt
            for i in piece.members:
                read = _inputs(self.sizes[i])
                self.first[i], self.later[i] = self.offset + prompt_at + prompt - 1, self.offset + at
                if alone:
                    segments.append((prompt_at, prompt + read, 0, 0))
                elif read:
                    segments.append((at, read, prompt_at, prompt))
                spans.append((i * self.width + self.num_prompt, read, prompt))
                at += read
        self.offset += at
        sources, counts, places = (list(column) for column in zip(*spans, strict=True))
        source = _ranges(sources, counts)
        start, size, prefix_start, prefix_size = zip(*segments, strict=True)
        return Row(
            ids=ids.reshape(-1)[source.to(ids.device)],
            columns=(source % self.width).to(ids.device),
            positions=_ranges(places, counts).to(ids.device),
            segments=Segments(
                length=at,
                start=start,
                size=size,
                prefix_start=prefix_start,
                prefix_size=prefix_size,
                device=ids.device,
            ),
            idle=idle,
        )

    def packing(self, rows: list[Row], ids: Tensor) -> Packing:
        within = _ranges([0] * len(self.sizes), self.sizes)
        owner = torch.arange(len(self.sizes), device="cpu").repeat_interleave(torch.tensor(self.sizes, device="cpu"))
        later = torch.tensor(self.later, device="cpu")[owner] + within - 1
        predictors = torch.where(within == 0, torch.tensor(self.first, device="cpu")[owner], later)
        tokens = ids.reshape(-1)[(owner * self.width + self.num_prompt + within).to(ids.device)]
        return Packing(
            rows=tuple(rows),
            predictors=predictors.to(ids.device),
            tokens=tokens,
            slots=(owner * self.num_completion + within).to(ids.device),
            shape=(ids.shape[0], self.num_completion),
        )


def _buckets(start: Sequence[int], size: Sequence[int]) -> list[Tensor]:
    buckets: list[list[int]] = []
    for index in sorted(range(len(size)), key=lambda i: -size[i]):
        if not buckets or size[index] < _BUCKET_RATIO * size[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(index)
    made = []
    for bucket in buckets:
        steps = torch.arange(size[bucket[0]], device="cpu")
        first = torch.tensor([start[i] for i in bucket], device="cpu").unsqueeze(1)
        length = torch.tensor([size[i] for i in bucket], device="cpu").unsqueeze(1)
        made.append(torch.where(steps < length, first + steps, -1))
    return made


def _ranges(first: Sequence[int], count: Sequence[int]) -> Tensor:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    counts = torch.tensor(count, device="cpu")
    ends = counts.cumsum(0)
    shift = torch.tensor(first, device="cpu") - (ends - counts)
    return torch.arange(int(counts.sum()), device="cpu") + shift.repeat_interleave(counts)


__all__ = ["Bucket", "Packing", "Row", "RowTooLongError", "Segments", "UnpackableError", "pack"]
