r"""What does a divergence over the whole vocabulary add to a sweep? A value and a gradient per token, block by block.

For a block of rows with log-probabilities log p (policy) and log q (anchor) a term gives D and the parts of its
gradient in the logits,

.. math:: \frac{\partial D}{\partial z} = a\, p + \text{dense} + \text{sparse},

so that the sweep adds it to its own gradient in place: ``exact`` has a = -sum_v x d'(x) and the dense part x d'(x);
``top_k`` has no dense part at all.

Precision: a float32 difference of two float32 logits is right to about 1e-6 whatever follows, so the divergences whose
formula loses no more than that are evaluated in float32; the others (``beta``, ``neural``, your own) in float64, like
``Divergence.exact``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mirrorpo.divergences import BregmanDivergence, Divergence, RatioDivergence, bregman, fdivergence
from mirrorpo.divergences.base import LOG_PROB_FLOOR, MAX_LOG_WEIGHT, MAX_MAGNITUDE, Term
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
        value, slope = coordinates(term.divergence, logp, logq)
        return Measured(value=value.sum(-1), share=-slope.sum(-1), dense=slope)
    return _top_k(term.divergence, logp, p, logq, tokens, term.k)


def coordinates(divergence: Divergence, logp: Tensor, logq: Tensor) -> Term:
    """d(p_v, q_v) and its derivative in log p_v, (R, V), in the dtype of ``logp``."""
    if logp.dtype == torch.float32:
        if isinstance(divergence, RatioDivergence) and _function(divergence.form) in _FORMS:
            return _ratio(divergence.form, divergence.growth, logp, logq)
        if isinstance(divergence, BregmanDivergence) and _function(divergence.coordinate) in _COORDINATES:
            return _bregman(divergence, logp, logq)
    value, slope = _held(divergence.term(*(x.double().clamp_(min=LOG_PROB_FLOOR) for x in (logp, logq))))
    return value.to(logp.dtype), slope.to(logp.dtype)


# The library's own formulas, which lose a digit or two near equality in float32. Somebody else's may lose all.
_FORMS = {
    fdivergence.reverse_kl,
    fdivergence.forward_kl,
    fdivergence.jeffreys,
    fdivergence.js,
    fdivergence.tv,
    fdivergence.chi2,
    fdivergence.hellinger,
    fdivergence.alpha,
    fdivergence.k1,
    fdivergence.k2,
    fdivergence.log_l2,
}
_COORDINATES = {bregman.kl, bregman.prob_l2, bregman.itakura_saito, bregman.beta}
# Held closer than float32 reaches: a factor of a Bregman term is a square of the ratio.
_MAX_BREGMAN_LOG_RATIO = 40.0


def _function(formula: Any) -> Any:
    """The function behind a formula with its option filled in; a power of 1/q (beta < 0) leaves float32 and is none."""
    if not isinstance(formula, partial):
        return formula
    return None if formula.keywords.get("beta", 0.0) < 0.0 else formula.func


def _ratio(form: fdivergence.Form, growth: float, logp: Tensor, logq: Tensor) -> Term:
    # As RatioDivergence.term, with the log-ratio held where float32 ends: p is held with it, so that p S keeps its
    # limit as p -> 0.
    bound = MAX_LOG_WEIGHT / max(1.0, growth)
    delta = (logp - logq).clamp_(-bound, bound)
    x = torch.maximum(logp, logq + delta).exp_()
    value, _, score = form(delta)
    return value * x, x.mul_(score)


def _bregman(divergence: BregmanDivergence, logp: Tensor, logq: Tensor) -> Term:
    if divergence.coordinate is bregman.kl:  # the sum of reverse_kl, term by term
        return _ratio(fdivergence.reverse_kl, 1.0, logp, logq)
    if divergence.coordinate is bregman.prob_l2:
        x = logp.exp()
        gap = logq.exp().neg_().add_(x)
        return gap.square(), x.mul_(gap).mul_(2.0)
    bound = _MAX_BREGMAN_LOG_RATIO / max(1.0, divergence.growth)
    value, slope = divergence.coordinate(*bregman.hold(logp, logq, bound))
    return _held((value, slope))


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


__all__ = ["Anchor", "Measured", "VocabularyTerm", "coordinates", "measure"]
