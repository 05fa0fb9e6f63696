r"""Divergences over the whole vocabulary within a sweep: a value and a gradient per token, block by block.

For a block of rows with log-probabilities log p (policy) and log q (anchor) a term gives D and the parts of its
gradient in the logits,

.. math:: \frac{\partial D}{\partial z} = a\, p + \text{dense} + \text{sparse},

so that the sweep adds it to its own gradient in place: ``exact`` has a = -sum_v x d'(x) and the dense part x d'(x);
``top_k`` has no dense part at all.

Precision: a float32 difference of two float32 logits is right to about 1e-6 whatever follows, so the divergences whose
formula loses no more than that say so (``Divergence.over_vocabulary``) and are evaluated in float32; the others
(``neural``, your own) in float64, like ``Divergence.exact``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, MAX_MAGNITUDE, Divergence, Term
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
class VocabularyTerm:
    """A divergence from an anchor, over the whole vocabulary.

    Attributes:
        divergence: D.
        anchor: the other distribution.
        k: None for ``exact``, else the K of ``top_k``.
    """

    divergence: Divergence
    anchor: Anchor
    k: int | None = None


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


def measure(term: VocabularyTerm, logp: Tensor, p: Tensor, logq: Tensor, tokens: Tensor) -> Measured:
    """The term of a block: (R, V) log-probabilities of both models, p = exp(logp), (R,) sampled tokens."""
    if term.k is None:
        value, slope = term.divergence.over_vocabulary(logp, logq)
        return Measured(value=value.sum(-1), share=-slope.sum(-1), dense=slope)
    return _top_k(term.divergence, logp, p, logq, tokens, term.k)


def _top_k(divergence: Divergence, logp: Tensor, p: Tensor, logq: Tensor, tokens: Tensor, k: int) -> Measured:
    likely = logq.topk(min(k, logq.shape[-1]), dim=-1).indices
    index = torch.cat([likely, tokens.unsqueeze(-1)], dim=-1)
    again = torch.zeros_like(index, dtype=torch.bool)
    again[:, -1] = (likely == tokens.unsqueeze(-1)).any(-1)  # the sampled token counts once
    logx, logz = (x.gather(-1, index).double().clamp_(min=LOG_PROB_FLOOR) for x in (logp, logq))
    value, slope = (x.masked_fill(again, 0.0) for x in _held(divergence.term(logx, logz)))
    total, share, sparse = value.sum(-1), -slope.sum(-1), slope
    if divergence.bucket_rest:
        # The rest's own sum, not 1 minus the others: that would cancel.
        rest_x, rest_z = (
            x.scatter(-1, index, 0.0).sum(-1).double().log_().clamp_(min=LOG_PROB_FLOOR) for x in (p, logq.exp())
        )
        rest_value, rest_slope = _held(divergence.term(rest_x, rest_z))
        total = total + rest_value
        # d log p_rest / d z_k = p_k / p_rest - p_k in the rest, -p_k outside of it
        per_rest = rest_slope * rest_x.neg().exp()
        share = share - rest_slope + per_rest
        sparse = sparse - (per_rest.unsqueeze(-1) * logx.exp()).masked_fill(again, 0.0)
    work = logp.dtype
    return Measured(value=total.to(work), share=share.to(work), index=index, sparse=sparse.to(work))


def _held(term: Term) -> Term:
    value, slope = (x.clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE) for x in term)
    return value, slope


__all__ = ["Anchor", "Measured", "VocabularyTerm", "measure"]
