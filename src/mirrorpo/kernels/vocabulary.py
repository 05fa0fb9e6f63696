r"""Divergences over the whole vocabulary within a sweep: a value and a gradient per token, block by block.

For a block of rows with log-probabilities log p (policy) and log q (anchor) a term gives D and the parts of its
gradient in the logits,

.. math:: \frac{\partial D}{\partial z} = a\, p + \text{dense} + \text{sparse},

so that the sweep adds it to its own gradient in place: ``exact`` has a = -sum_v x d'(x) and the dense part x d'(x);
``top_k`` has no dense part at all.

The anchor is a model (hidden states and a head, projected block by block), the uniform distribution, or what a server
reported: K entries per position.

Precision: a float32 difference of two float32 logits is right to about 1e-6 whatever follows, so the divergences whose
formula loses no more than that say so (``Divergence.over_vocabulary``) and are evaluated in float32; the others
(your own, ``beta`` below 0) in float64, like ``Divergence.exact``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, MAX_MAGNITUDE, SMALLEST_REST, Divergence, Term
from mirrorpo.kernels.head import Head


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchor:
    """A model whose next-token distributions a divergence is measured from; constant.

    Attributes:
        hidden: (N, H'), its hidden states at the same tokens.
        head: its head; the vocabulary is the policy's.
    """

    hidden: Tensor
    head: Head


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """A model known at K entries per position; constant.

    Attributes:
        indices: (N, K), tokens.
        logp: (N, K), their log-probabilities; -inf and NaN mark padding.
        of_tokens: (N,), those of the sampled tokens; None: not known.
    """

    indices: Tensor
    logp: Tensor
    of_tokens: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyTerm:
    """A divergence from an anchor, over the whole vocabulary.

    Attributes:
        divergence: D.
        anchor: the other distribution; None for the uniform one.
        k: None for ``exact``, else the K of ``top_k``; without meaning for ``Entries``, which have a K of their own.
        support: of ``top_k``: whose K likeliest tokens: the ``anchor``'s, the ``policy``'s, or their ``union``.
        baseline: what is measured is sum_v p_v g_v, with g of ``Divergence.score``; without a gradient.
    """

    divergence: Divergence
    anchor: Anchor | Entries | None
    k: int | None = None
    support: str = "anchor"
    baseline: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """D of R rows and its gradient: ``share * p + dense``, plus ``sparse`` at ``index``.

    Attributes:
        value: (R,).
        share: (R,), the multiple of p in the gradient.
        dense: (R, V) or None.
        index: (R, K) or None.
        sparse: (R, K) or None.
    """

    value: Tensor
    share: Tensor
    dense: Tensor | None = None
    index: Tensor | None = None
    sparse: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of rows of the policy, and where it lies.

    Attributes:
        logp: (R, V), log-probabilities.
        p: (R, V), exp(logp).
        tokens: (R,), the sampled tokens.
        at: its place in (N,).
    """

    logp: Tensor
    p: Tensor
    tokens: Tensor
    at: slice


def measure(term: VocabularyTerm, block: Block, logits: Tensor | None) -> tuple[Measured, Tensor]:
    """The term of a block, and the log-probabilities of the sampled tokens under its anchor (NaN: not known).

    Args:
        term: what is measured.
        block: of the policy.
        logits: (R, V), of the anchor, where it is a model.
    """
    if isinstance(term.anchor, Entries):
        return _of_entries(term, term.anchor, block)
    uniform = -math.log(block.logp.shape[-1])
    logq = torch.full_like(block.logp, uniform) if logits is None else logits.log_softmax(-1)
    of_tokens = logq.gather(-1, block.tokens.unsqueeze(-1)).squeeze(-1)
    if term.k is not None:
        return _top_k(term, term.k, block, logq), of_tokens
    value, slope = term.divergence.over_vocabulary(block.logp, logq)
    if term.baseline:  # the slope in log p_v is p_v g_v
        return Measured(value=slope.sum(-1), share=torch.zeros_like(of_tokens)), of_tokens
    return Measured(value=value.sum(-1), share=-slope.sum(-1), dense=slope), of_tokens


def _top_k(term: VocabularyTerm, k: int, block: Block, logq: Tensor) -> Measured:
    sources = {"anchor": (logq,), "policy": (block.logp,), "union": (logq, block.logp)}[term.support]
    likely = [x.topk(min(k, x.shape[-1]), dim=-1).indices for x in sources]
    index = torch.cat([*likely, block.tokens.unsqueeze(-1)], dim=-1)
    counted = _first(index, block.logp.shape[-1])  # a token that is listed twice counts once
    rest = logq.exp().scatter(-1, index, 0.0).sum(-1).double().log_()  # its own sum: 1 minus the others would cancel
    return _selected(term.divergence, block, index, logq.gather(-1, index).double(), counted, rest)


def _of_entries(term: VocabularyTerm, anchor: Entries, block: Block) -> tuple[Measured, Tensor]:
    index, logz = anchor.indices[block.at], anchor.logp[block.at].double()
    of_tokens = torch.full_like(block.logp[:, 0], torch.nan)
    if anchor.of_tokens is not None:
        of_tokens = anchor.of_tokens[block.at].to(of_tokens.dtype)
        index = torch.cat([index, block.tokens.unsqueeze(-1)], dim=-1)
        logz = torch.cat([logz, of_tokens.double().unsqueeze(-1)], dim=-1)
    # The likeliest first, so that padding never hides a real entry of the same token.
    logz, order = logz.nan_to_num(nan=-torch.inf, neginf=-torch.inf).sort(dim=-1, descending=True, stable=True)
    index = index.gather(-1, order)
    counted = _first(index, block.logp.shape[-1]) & (logz > -torch.inf)
    rest = 1.0 - torch.where(counted, logz, -torch.inf).exp().sum(-1)
    return _selected(term.divergence, block, index, logz, counted, rest.clamp(min=SMALLEST_REST).log()), of_tokens


def _first(index: Tensor, vocabulary: int) -> Tensor:
    """Whether an entry is the first of its token in its row, (R, K)."""
    place = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    first = place.new_full((*index.shape[:-1], vocabulary), index.shape[-1])
    return first.scatter_reduce_(-1, index, place, "amin").gather(-1, index) == place


def _selected(
    divergence: Divergence, block: Block, index: Tensor, logz: Tensor, counted: Tensor, rest_z: Tensor
) -> Measured:
    """The terms of selected tokens, and for an f-divergence one bucket for the rest.

    Args:
        divergence: D.
        block: of the policy.
        index: (R, K), tokens.
        logz: (R, K), float64, their log-probabilities under the anchor.
        counted: (R, K), bool; the others are not there.
        rest_z: (R,), float64, log of the anchor's mass outside.
    """
    of_index = block.p.gather(-1, index)
    logx = block.logp.gather(-1, index).double().clamp_(min=LOG_PROB_FLOOR)
    value, slope = (x.masked_fill(~counted, 0.0) for x in _held(divergence.term(logx, logz.clamp(min=LOG_PROB_FLOOR))))
    total, share, sparse = value.sum(-1), -slope.sum(-1), slope
    if divergence.bucket_rest:
        # Each counted token is taken out by its own value, which leaves exactly 0.
        outside = block.p.scatter_add(-1, index, of_index.masked_fill(~counted, 0.0).neg())
        rest_x = outside.sum(-1).double().log_().clamp_(min=LOG_PROB_FLOOR)
        everything = counted.sum(-1) == block.logp.shape[-1]  # then there is no rest
        rest_value, rest_slope = (
            x.masked_fill(everything, 0.0) for x in _held(divergence.term(rest_x, rest_z.clamp(min=LOG_PROB_FLOOR)))
        )
        total = total + rest_value
        # d log p_rest / d z_k = p_k / p_rest - p_k in the rest, -p_k outside of it
        per_rest = rest_slope * rest_x.neg().exp()
        share = share - rest_slope + per_rest
        sparse = sparse - (per_rest.unsqueeze(-1) * logx.exp()).masked_fill(~counted, 0.0)
    work = block.logp.dtype
    return Measured(value=total.to(work), share=share.to(work), index=index, sparse=sparse.to(work))


def _held(term: Term) -> Term:
    value, slope = (x.clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE) for x in term)
    return value, slope


__all__ = ["Anchor", "Block", "Entries", "Measured", "VocabularyTerm", "measure"]
