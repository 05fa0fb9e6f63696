r"""One sweep over chunks of tokens, from hidden states to loss and gradients without logits in memory.

For each chunk: one projection; log-probabilities, probabilities and entropy in place; the loss of the chunk's tokens
and its derivative in their log-probabilities; with those the gradient of the logits, in place of the probabilities,

.. math:: \frac{\partial L}{\partial z_t} = f_t (e_{y_t} - p_t), \qquad f_t = \frac{\partial L}{\partial \log p_{y_t}};

then two products, into the gradients of hidden states and weight: 6 N H V floating-point operations. The same sweep,
called again with the derivatives that autograd hands back, is the backward pass of what is not known in advance
(``token_logps``): 8 N H V, as others need for every loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from mirrorpo.kernels.backend import uses_triton
from mirrorpo.kernels.head import (
    Head,
    add_hidden_grad_,
    add_weight_grad_,
    block_rows,
    chunk_rows,
    memory_advice,
    product_dtype,
    project_,
    slices,
    work_dtype,
)
from mirrorpo.kernels.idle import pays
from mirrorpo.kernels.vocabulary import Anchor, Block, Measured, VocabularyTerm, measure

# (logp of the chunk, its place, the values of the terms without a weight) -> d loss / d logp
SlopeOf = Callable[[Tensor, slice, tuple[Tensor | None, ...]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """What the loss does with what the sweep finds; all that it holds is detached.

    Attributes:
        of_logp: gives d loss / d logp, (C,), of a chunk.
        of_values: d loss / d value of each vocabulary term, (N,); None: it is measured only, before ``of_logp``.
        of_entropy: d loss / d entropy, (N,), or None.
        needs: which gradients to compute: hidden, weight, bias.
    """

    of_logp: SlopeOf
    of_values: tuple[Tensor | None, ...]
    of_entropy: Tensor | None
    needs: tuple[bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep found.

    Attributes:
        logp: (N,).
        entropy: (N,), in nats.
        values: (N,) of each vocabulary term.
        anchor_logps: (N,) of each vocabulary term: log-probabilities of the tokens under its anchor.
        grads: of hidden (N, H), weight (V, H) and bias (V,), in the accumulation dtype; None where not needed.
    """

    logp: Tensor
    entropy: Tensor
    values: tuple[Tensor, ...]
    anchor_logps: tuple[Tensor, ...]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]


def sweep(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    terms: tuple[VocabularyTerm, ...] = (),
    slopes: Slopes | None = None,
    chunk: int | None = None,
) -> Swept:
    """Everything of (N, H) hidden states, (N,) tokens; see the module. Without ``slopes`` no gradient."""
    work = work_dtype(hidden, head.weight)
    kind = Chunk
    if uses_triton(head.kernels, hidden.device, work, terms):
        from mirrorpo.kernels.triton_kernels import TritonChunk as kind  # imports triton: only where it is used

    rows = chunk_rows(hidden.shape[0], head.vocabulary, hidden.device, chunk)
    anchors = list({id(term.anchor): term.anchor for term in terms if isinstance(term.anchor, Anchor)}.values())
    with memory_advice(head, rows, 1 + len(anchors), hidden.device, work.itemsize):
        z = torch.empty(rows, head.vocabulary, dtype=work, device=hidden.device)
        found = Found(hidden, head, terms, slopes, work)
        others = {id(anchor): torch.empty_like(z) for anchor in anchors}
        for part in slices(hidden.shape[0], rows):
            length = part.stop - part.start
            at = {key: other[:length] for key, other in others.items()}
            for anchor in anchors:
                _distribution(anchor, part, at[id(anchor)], scaled=kind.scales_anchors)
            kind(hidden[part], head, tokens[part], z[:length], at, terms, part).run(found, slopes)
    return found.result()


def _distribution(anchor: Anchor, part: slice, out: Tensor, scaled: bool) -> None:
    """Logits of the anchor, (C, V); where ``scaled`` is true, a mere factor on them is left to the reader."""
    hidden, head = anchor.hidden[part], anchor.head
    project_(out, hidden, head.weight, product_dtype(hidden, head.weight))
    if not (scaled and head.only_scales):
        head.transform_(out)


class Found:
    """Where chunks leave their results."""

    def __init__(
        self, hidden: Tensor, head: Head, terms: tuple[VocabularyTerm, ...], slopes: Slopes | None, work: torch.dtype
    ) -> None:
        length = hidden.shape[0]

        def per_token() -> Tensor:
            return torch.empty(length, dtype=work, device=hidden.device)

        self.logp, self.entropy = per_token(), per_token()
        self.values = tuple(per_token() for _ in terms)
        self.anchor_logps = tuple(per_token() for _ in terms)
        needs = (False, False, False) if slopes is None else slopes.needs
        like = (hidden, head.weight, head.weight[:, 0])
        self.grads = tuple(
            torch.zeros(x.shape, dtype=work, device=x.device) if needed else None
            for x, needed in zip(like, needs, strict=True)
        )

    def result(self) -> Swept:
        hidden, weight, bias = self.grads
        return Swept(
            logp=self.logp,
            entropy=self.entropy,
            values=self.values,
            anchor_logps=self.anchor_logps,
            grads=(hidden, weight, bias),
        )


@dataclass
class Chunk:
    """One chunk on its way: ``z`` holds products, then probabilities or their logs, then the gradient of the logits."""

    hidden: Tensor
    head: Head
    tokens: Tensor
    z: Tensor
    others: dict[int, Tensor]
    terms: tuple[VocabularyTerm, ...]
    part: slice
    # Whether z holds log p, which terms, entropy and soft cap need later; else p, which saves an exp.
    logs: bool = True
    # Whether anchors come without the factor of a head that does nothing else.
    scales_anchors: ClassVar[bool] = False
    log_sum: Tensor = field(init=False)

    @cached_property
    def spares(self) -> tuple[Tensor, Tensor]:
        block = self.z[self._blocks()[0]]
        return torch.empty_like(block), torch.empty_like(block)

    def run(self, found: Found, slopes: Slopes | None) -> None:
        dtype = product_dtype(self.hidden, self.head.weight)
        project_(self.z, self.hidden, self.head.weight, dtype)
        entropy_weight = None if slopes is None else self._of(slopes.of_entropy)
        self.logs = bool(self.terms) or self.head.softcap is not None or entropy_weight is not None
        self._normalise(found)
        weights = (None,) * len(self.terms) if slopes is None else tuple(self._of(x) for x in slopes.of_values)
        self._measure(found, [number for number, weight in enumerate(weights) if weight is None])
        if slopes is None:
            return
        seen = tuple(
            value[self.part] if weight is None else None for value, weight in zip(found.values, weights, strict=True)
        )
        slope = slopes.of_logp(found.logp[self.part], self.part, seen)
        moved = self._moved(slope, *weights, entropy_weight) if any(slopes.needs) else None
        if moved is None:
            self._measure(found, [number for number, weight in enumerate(weights) if weight is not None])
            return
        hidden_grad, weight_grad, bias_grad = found.grads
        narrow = dtype == torch.bfloat16 and bias_grad is None
        grad = self._logits_gradient(found, slope, weights, entropy_weight, dtype if narrow else self.z.dtype)[moved]
        if bias_grad is not None:
            bias_grad.add_(grad.sum(0))
        if dtype == torch.bfloat16:
            grad = grad.to(dtype)  # once, for both products
        if hidden_grad is not None:
            add_hidden_grad_(hidden_grad[self.part][moved], grad, self.head.weight, dtype)
        if weight_grad is not None:
            add_weight_grad_(weight_grad, grad, self.hidden[moved], dtype)

    def _of(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[self.part].to(self.z.dtype)

    def _moved(self, *slopes: Tensor | None) -> slice | None:
        """The tokens from the first to the last that has a gradient; None: none has, as where all rewards are equal."""
        if self.z.device.type != "cpu":
            return slice(None)  # the look would make the host wait
        places = torch.stack([x != 0 for x in slopes if x is not None]).any(0).nonzero()
        if not len(places):
            return None
        first, last = int(places[0]), int(places[-1])
        saved = pays(len(self.z) - 1 - (last - first), [self.head.weight], self.z.device)
        return slice(first, last + 1) if saved else slice(None)

    def _blocks(self) -> list[slice]:
        return list(slices(self.z.shape[0], block_rows(self.z.shape[1], self.z.device)))

    def _spare(self, block: Tensor, number: int) -> Tensor:
        """Room for what is made of a block; on a CPU the same for all, where new memory costs as much as an exp."""
        return self.spares[number][: block.shape[0]] if block.device.type == "cpu" else torch.empty_like(block)

    def _at(self, block: slice) -> slice:
        return slice(self.part.start + block.start, self.part.start + block.stop)

    def _normalise(self, found: Found) -> None:
        """Products become probabilities, or their logs; log-probabilities of the tokens and entropies are found."""
        self.log_sum = self.z.new_empty(self.z.shape[0], 1)
        for block in self._blocks():
            z = self.head.transform_(self.z[block])
            largest = z.amax(-1, keepdim=True)
            e = torch.exp(z.sub_(largest), out=self._spare(z, 0))
            total = e.sum(-1, keepdim=True)
            log_total = total.log()
            at, of_token = self._at(block), z.gather(-1, self.tokens[block].unsqueeze(-1))
            found.logp[at] = of_token.sub_(log_total).squeeze(-1)
            weighted = torch.mul(e, z, out=self._spare(z, 1)).sum(-1, keepdim=True).div_(total)
            found.entropy[at] = (log_total - weighted).clamp_(min=0.0).squeeze(-1)
            if self.logs:
                z.sub_(log_total)
                self.log_sum[block] = largest.add_(log_total)
            else:
                torch.div(e, total, out=z)

    def _measure(self, found: Found, numbers: list[int]) -> None:
        """The values of the terms of these numbers, without their gradients."""
        for block in self._blocks() if numbers else []:
            p = torch.exp(self.z[block], out=self._spare(self.z[block], 0))
            for number in numbers:
                self._term(number, self.terms[number], block, p, found)

    def _term(self, number: int, term: VocabularyTerm, block: slice, p: Tensor, found: Found) -> Measured:
        logits = self.others[id(term.anchor)][block] if isinstance(term.anchor, Anchor) else None
        at = self._at(block)
        rows = Block(logp=self.z[block], p=p, tokens=self.tokens[block], at=at)
        measured, found.anchor_logps[number][at] = measure(term, rows, logits)
        found.values[number][at] = measured.value
        return measured

    def _logits_gradient(
        self,
        found: Found,
        slope: Tensor,
        weights: tuple[Tensor | None, ...],
        entropy_weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """d loss / d(h W^T + b), in place; ``dtype`` is what the caller makes of it."""
        slope = slope * self.head.factor
        weighted = [
            (number, term, weight * self.head.factor)
            for number, (term, weight) in enumerate(zip(self.terms, weights, strict=True))
            if weight is not None
        ]
        if entropy_weight is not None:
            entropy_weight = entropy_weight * self.head.factor
        for block in self._blocks():
            z = self.z[block]
            p = torch.exp(z, out=self._spare(z, 0)) if self.logs else z
            share, dense, sparse = slope[block].neg(), None, []
            for number, term, weight in weighted:
                measured = self._term(number, term, block, p, found)
                coefficient = weight[block]
                share.add_(coefficient * measured.share)
                if measured.dense is not None:
                    part = measured.dense.mul_(coefficient.unsqueeze(-1))
                    dense = part if dense is None else dense.add_(part)
                if measured.index is not None and measured.sparse is not None:
                    sparse.append((measured.index, measured.sparse * coefficient.unsqueeze(-1)))
            if entropy_weight is not None:
                # H = -sum p log p: dH/dz = -p (log p + H)
                coefficient = entropy_weight[block]
                share.sub_(coefficient * found.entropy[self._at(block)])
                part = torch.mul(p, z, out=self._spare(z, 1)).mul_(coefficient.neg().unsqueeze(-1))
                dense = part if dense is None else dense.add_(part)
            p.mul_(share.unsqueeze(-1))
            if dense is not None:
                p.add_(dense)
            for index, value in sparse:
                p.scatter_add_(-1, index, value)
            p.scatter_add_(-1, self.tokens[block].unsqueeze(-1), slope[block].unsqueeze(-1))
            if self.head.softcap is not None:
                self.head.chain_(p, z.add_(self.log_sum[block]))
            if self.logs:
                z.copy_(p)
        return self.z


__all__ = ["Slopes", "Swept", "sweep"]
