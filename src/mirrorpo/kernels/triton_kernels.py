"""The sweep over a chunk of logits by Triton's kernels: two passes over memory.

``measure`` reads a chunk and leaves a few numbers a row, of which torch takes the objective's loss and its derivative;
``gradient_`` reads it again and writes d loss / d logits. See ``triton_rows`` for what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import triton  # pyright: ignore[reportMissingImports]  (an extra)
import triton.language as tl  # pyright: ignore[reportMissingImports]  (an extra)
from torch import Tensor

from mirrorpo.divergences.neural.map import NeuralDivergence
from mirrorpo.kernels import triton_rows
from mirrorpo.kernels.backend import Form, form_of
from mirrorpo.kernels.head import Head
from mirrorpo.kernels.sweep import Chunk, Found
from mirrorpo.kernels.vocabulary import Anchor, VocabularyTerm

# Entries of a row that a program holds at once, and warps that share them.
BLOCK, WARPS = 4096, 8
# The same where divergences are evaluated, which takes more registers; float64 (`neural`) more still.
TERM_BLOCK, TABLE_BLOCK = 2048, 512
# Rows of what a measurement writes, (_COMMON + _PER_TERM * terms, C).
_COMMON, _PER_TERM = 3, 4


@dataclass(frozen=True, kw_only=True)
class Other:
    """What a divergence over the vocabulary is taken of.

    Attributes:
        form: which divergence (``backend.form_of``).
        logits: (C, V), of the anchor; None for the uniform one.
        scale: they are multiplied by it.
        table: (S + 1, 4), float64, of a neural map (``Table.rows``).
    """

    form: Form
    logits: Tensor | None
    scale: float = 1.0
    table: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernels' ``term``: logits, scale, table, its last segment; as constants family, name, option, bound."""
        last = 0 if self.table is None else self.table.shape[0] - 2
        return (self.logits, self.scale, self.table, last, *(tl.constexpr(x) for x in self.form))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What ``measure`` finds of C rows; float32.

    Attributes:
        numbers: (3 + 4 J, C); the others are views of it.
    """

    numbers: Tensor

    @property
    def logp(self) -> Tensor:
        """(C,), of the tokens."""
        return self.numbers[0]

    @property
    def entropy(self) -> Tensor:
        """(C,), in nats."""
        return self.numbers[1]

    def of_term(self, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """(C,) each: the divergence, the sum of its slopes, the token's log-probability under the anchor."""
        first = _COMMON + _PER_TERM * j
        return self.numbers[first], self.numbers[first + 1], self.numbers[first + 3]


def measure(products: Tensor, tokens: Tensor, head: Head, others: Sequence[Other] = ()) -> Statistics:
    """Log-probabilities, entropies and divergences of a chunk.

    Args:
        products: (C, V), contiguous, float32 or 16-bit: h W^T, from which ``head`` makes logits.
        tokens: (C,), integers.
        head: its bias, soft cap, scale and temperature are read.
        others: of each divergence.
    """
    numbers = torch.empty(_COMMON + _PER_TERM * len(others), products.shape[0], device=products.device)
    _launch(triton_rows.measure, products, tokens, head, (numbers,), others)
    return Statistics(numbers=numbers)


def gradient_(
    products: Tensor,
    tokens: Tensor,
    head: Head,
    found: Statistics,
    slope: Tensor,
    others: Sequence[Other] = (),
    weights: Sequence[Tensor | None] = (),
    entropy_weight: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """d loss / d products, in their place or in ``out``.

    Args:
        products: as in ``measure``; overwritten, if there is no ``out``.
        tokens: (C,), integers.
        head: as in ``measure``.
        found: what ``measure`` found.
        slope: (C,), d loss / d logp of the tokens.
        others: as in ``measure``.
        weights: (C,), d loss / d value of each divergence; None: it is not in the loss.
        entropy_weight: (C,), d loss / d entropy.
        out: (C, V), contiguous, of any of the three dtypes.
    """
    places = tuple(j for j, weight in enumerate(weights) if weight is not None)
    coefficients = torch.zeros(3 + len(places), products.shape[0], device=products.device)
    coefficients[0], coefficients[1] = -slope, slope
    if entropy_weight is not None:
        # H = -sum p log p: dH/dz = -p (log p + H)
        coefficients[0] -= entropy_weight * found.entropy
        coefficients[2] = -entropy_weight
    for row, j in enumerate(places):
        weight = weights[j]
        assert weight is not None
        coefficients[3 + row] = weight
        coefficients[0] -= weight * found.of_term(j)[1]
    coefficients.mul_(head.factor)
    flags = {"PLACES": places, "ENTROPY": entropy_weight is not None}
    buffers = (found.numbers, coefficients, products if out is None else out)
    _launch(triton_rows.gradient, products, tokens, head, buffers, [others[j] for j in places], **flags)


def _launch(
    kernel: Any, products: Tensor, tokens: Tensor, head: Head, buffers: tuple[Tensor, ...], others: Sequence[Other],
    **flags: Any,
) -> None:  # fmt: skip
    assert all(x is None or x.is_contiguous() for x in (products, *(other.logits for other in others)))
    vocabulary = products.shape[1]
    block = TERM_BLOCK if others else BLOCK
    if any(other.table is not None for other in others):
        block = TABLE_BLOCK
    cap_in = cap_out = 1.0
    if head.softcap is not None:
        cap_in, cap_out = head.scale / head.softcap, head.softcap / head.temperature
    with torch.cuda.device_of(products):
        kernel[(products.shape[0],)](
            products, tokens, head.bias, *buffers, head.factor, cap_in, cap_out,
            tuple(other.arguments for other in others), TERMS=len(others), CAPPED=head.softcap is not None,
            V=vocabulary, B=min(block, triton.next_power_of_2(vocabulary)), num_warps=WARPS,
            enable_fp_fusion=True,  # the default changes with Triton's version
            **flags,
        )  # fmt: skip


@dataclass
class TritonChunk(Chunk):
    """A chunk of the sweep whose logits Triton's kernels work on; ``z`` holds products until it holds the gradient."""

    scales_anchors: ClassVar[bool] = True
    statistics: Statistics = field(init=False)

    @cached_property
    def _others(self) -> tuple[Other, ...]:
        return tuple(self._other(term) for term in self.terms)

    def _other(self, term: VocabularyTerm) -> Other:
        form = form_of(term.divergence)
        assert form is not None
        table = term.divergence.table.rows(self.z.device) if isinstance(term.divergence, NeuralDivergence) else None
        if term.anchor is None:
            return Other(form=form, logits=None, table=table)
        assert isinstance(term.anchor, Anchor)
        head = term.anchor.head
        return Other(
            form=form,
            logits=self.others[id(term.anchor)],
            scale=head.factor if head.only_scales else 1.0,
            table=table,
        )

    def _normalise(self, found: Found) -> None:
        self.statistics = measure(self.z, self.tokens, self.head, self._others)
        found.logp[self.part], found.entropy[self.part] = self.statistics.logp, self.statistics.entropy
        for j in range(len(self.terms)):
            value, _, anchor_logp = self.statistics.of_term(j)
            found.values[j][self.part], found.anchor_logps[j][self.part] = value, anchor_logp

    def _measure(self, found: Found, numbers: list[int]) -> None:
        """Nothing: the values are there already."""

    def _logits_gradient(
        self,
        found: Found,
        slope: Tensor,
        weights: tuple[Tensor | None, ...],
        entropy_weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        out = self.z if dtype == self.z.dtype else torch.empty_like(self.z, dtype=dtype)
        gradient_(
            self.z, self.tokens, self.head, self.statistics, slope, self._others, weights, entropy_weight, out=out
        )
        return out


__all__ = ["Other", "Statistics", "TritonChunk", "gradient_", "measure"]
