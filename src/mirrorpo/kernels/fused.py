r"""Losses from hidden states: every one that is a function of log-probabilities and entropies.

================  ======================================  ==========  ================================================
function          result                                  flops       for
================  ======================================  ==========  ================================================
``single_pass``   a loss, with its gradient               6 N H V     losses that are sums over tokens
``token_logps``   log-probabilities and entropies         2 (+ 6)     anything else; old and reference log-probabilities
``exact_...``     D(p, q) per token, both models' heads   4 (+ 8)     regularisers and regions over the vocabulary
================  ======================================  ==========  ================================================

(in brackets: the backward pass, which computes the chunks' logits again). No logits beyond a chunk are ever held.
Differentiable once, in the hidden states and in the head's weight and bias; anchors are constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mirrorpo._checks import Float, Shaped, Tensor
from mirrorpo.divergences.base import Divergence
from mirrorpo.kernels.head import Head, check_inputs, work_dtype
from mirrorpo.kernels.sweep import Slopes, Swept, sweep
from mirrorpo.kernels.vocabulary import Anchor, VocabularyTerm

# (logp of a chunk (C,), its place in N, values of the terms without weights) -> weighted loss of each token, (C,)
PerToken = Callable[[Tensor, slice, tuple[Tensor | None, ...]], Tensor]


@dataclass(frozen=True, kw_only=True)
class SinglePass:
    """What ``single_pass`` returns; all but the loss is detached.

    Attributes:
        loss: scalar, differentiable once, in ONE backward pass (its gradients are kept once, not twice).
        logp: (N,), log-probabilities of the tokens.
        entropy: (N,), in nats.
        values: (N,) of each vocabulary term.
        anchor_logps: (N,) of each vocabulary term, log-probabilities of the tokens under its anchor.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    values: tuple[Tensor, ...]
    anchor_logps: tuple[Tensor, ...]


def single_pass(
    hidden: Float[Tensor, "N H"],
    head: Head,
    tokens: Shaped[Tensor, ...],
    per_token: PerToken | None,
    *,
    terms: tuple[VocabularyTerm, ...] = (),
    term_weights: tuple[Tensor | None, ...] | None = None,
    entropy_weights: Float[Tensor, ...] | None = None,
    chunk: int | None = None,
) -> SinglePass:
    r"""A loss that is a sum over tokens, and all its gradients, from one projection.

    .. math:: L = \sum_t \ell_t(\log p_{y_t}) + \sum_j \sum_t \omega_{jt} D_j(p_t, q_{jt}) + \sum_t \eta_t H(p_t)

    Args:
        hidden: (N, H), floating; the hidden states that predict the tokens.
        head: from hidden states to logits.
        tokens: (N,), integers in [0, V).
        per_token: gives the loss terms of a chunk, already multiplied by what each token weighs in the loss
            (``aggregation_weights``), from the chunk's log-probabilities; differentiable in them. None: no such term.
        terms: divergences over the vocabulary.
        term_weights: (N,) for each of them, omega; None in a place: it is measured only, and ``per_token`` is handed
            its values. None altogether: all are measured only.
        entropy_weights: (N,), eta; negative for an entropy bonus.
        chunk: tokens at once; None: what suits device and vocabulary. Memory: chunk * V numbers, and as many for
            each anchor.

    Returns:
        ``SinglePass(loss, logp, entropy, values, anchor_logps)``.

    Raises:
        ValueError: shapes that do not fit, tokens out of range, chunk < 1.
        torch.OutOfMemoryError: with the ``chunk`` that would have fitted.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(3, 2, requires_grad=True), torch.ones(4, 2)
        >>> done = single_pass(hidden, Head(weight), torch.tensor([0, 1, 2]), lambda logp, part, _: -logp / 3)
        >>> done.loss  # log 4
        tensor(1.3863, grad_fn=<_SinglePassBackward>)
    """
    weights = (None,) * len(terms) if term_weights is None else term_weights
    _check(hidden, head, tokens, terms, chunk)
    for name, given in (("term_weights", weights), ("entropy_weights", (entropy_weights,))):
        for weight in given:
            if weight is not None and weight.shape != tokens.shape:
                raise ValueError(f"{name} must have shape {tuple(tokens.shape)}, got {tuple(weight.shape)}")
    if len(weights) != len(terms):
        raise ValueError(f"term_weights must hold {len(terms)} entries, one for each term, got {len(weights)}")
    plan = _Plan(
        head=head.detached(),
        tokens=tokens,
        terms=terms,
        chunk=chunk,
        per_token=per_token,
        weights=tuple(None if x is None else x.detach() for x in weights),
        entropy_weights=None if entropy_weights is None else entropy_weights.detach(),
        graph=torch.is_grad_enabled(),
    )
    loss, logp, entropy, *rest = _SinglePass.apply(plan, hidden, head.weight, head.bias)
    count = len(terms)
    return SinglePass(
        loss=loss, logp=logp, entropy=entropy, values=tuple(rest[:count]), anchor_logps=tuple(rest[count:])
    )


def token_logps(
    hidden: Float[Tensor, "N H"], head: Head, tokens: Shaped[Tensor, ...], *, chunk: int | None = None
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probabilities of tokens and entropies of their distributions.

    The backward pass computes the chunks' logits again. Under ``torch.no_grad`` it is what old and reference
    log-probabilities need.

    Args:
        hidden: (N, H), floating.
        head: from hidden states to logits.
        tokens: (N,), integers in [0, V).
        chunk: tokens at once; None: what suits device and vocabulary.

    Returns:
        Two tensors (N,), float32 (float64 for float64 input), both differentiable once.

    Raises:
        ValueError: shapes that do not fit, tokens out of range, chunk < 1.
        torch.OutOfMemoryError: with the ``chunk`` that would have fitted.

    Example:
        >>> import torch
        >>> token_logps(torch.zeros(1, 2), Head(torch.ones(4, 2)), torch.tensor([3]))
        (tensor([-1.3863]), tensor([1.3863]))
    """
    logp, entropy, *_ = measure_from_hidden(hidden, head, tokens, chunk=chunk)
    return logp, entropy


def measure_from_hidden(
    hidden: Float[Tensor, "N H"],
    head: Head,
    tokens: Shaped[Tensor, ...],
    terms: tuple[VocabularyTerm, ...] = (),
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``token_logps`` and the values of vocabulary terms in the same two passes.

    Returns:
        Log-probabilities, entropies, the values of the terms, the log-probabilities under their anchors; (N,) each;
        the last detached.
    """
    _check(hidden, head, tokens, terms, chunk)
    plan = _Plan(head=head.detached(), tokens=tokens, terms=terms, chunk=chunk)
    logp, entropy, *rest = _TwoPass.apply(plan, hidden, head.weight, head.bias)
    return logp, entropy, tuple(rest[: len(terms)]), tuple(rest[len(terms) :])


def exact_from_hidden(
    divergence: Divergence,
    hidden: Float[Tensor, "N H"],
    head: Head,
    hidden_ref: Float[Tensor, ...],
    head_ref: Head,
    *,
    chunk: int | None = None,
) -> Float[Tensor, " N"]:
    r"""``Divergence.exact`` from both models' hidden states: :math:`\sum_v d(p_v, q_v)`, no logits beyond a chunk.

    Args:
        divergence: Bregman, f or neural.
        hidden: (N, H), of the policy.
        head: of the policy.
        hidden_ref: (N, H_ref), of the reference; constant.
        head_ref: of the reference; constant.
        chunk: tokens at once; None: what suits device and vocabulary.

    Returns:
        (N,), in nats, differentiable once in ``hidden`` and in the head's weight and bias.

    Raises:
        ValueError: shapes or vocabularies that do not fit, chunk < 1.
        torch.OutOfMemoryError: with the ``chunk`` that would have fitted.

    Example:
        >>> import torch, mirrorpo
        >>> head, hidden = Head(torch.eye(2)), torch.tensor([[0.0, 0.0]])
        >>> exact_from_hidden(mirrorpo.divergence("tv"), hidden, head, torch.tensor([[0.0, 1.0]]), head)
        tensor([0.2311])
    """
    term = VocabularyTerm(divergence=divergence, anchor=Anchor(hidden=hidden_ref.detach(), head=head_ref.detached()))
    tokens = torch.zeros(hidden.shape[:1], dtype=torch.long, device=hidden.device)
    return measure_from_hidden(hidden, head, tokens, (term,), chunk=chunk)[2][0]


def top_k_from_hidden(
    divergence: Divergence,
    hidden: Float[Tensor, "N H"],
    head: Head,
    hidden_ref: Float[Tensor, ...],
    head_ref: Head,
    tokens: Shaped[Tensor, ...],
    k: int = 64,
    *,
    chunk: int | None = None,
) -> Float[Tensor, " N"]:
    """``Divergence.top_k`` from both models' hidden states, no logits beyond a chunk.

    Args, shapes, errors and differentiability as in ``exact_from_hidden``; ``tokens`` (N,) are the sampled ones, ``k``
    the number of the reference's likeliest tokens, at least 1.

    Example:
        >>> import torch, mirrorpo
        >>> head, hidden = Head(torch.eye(2)), torch.tensor([[0.0, 0.0]])
        >>> d, tokens = mirrorpo.divergence("tv"), torch.tensor([0])
        >>> top_k_from_hidden(d, hidden, head, torch.tensor([[0.0, 1.0]]), head, tokens, k=1)
        tensor([0.2311])
    """
    anchor = Anchor(hidden=hidden_ref.detach(), head=head_ref.detached())
    term = VocabularyTerm(divergence=divergence, anchor=anchor, k=k)
    return measure_from_hidden(hidden, head, tokens, (term,), chunk=chunk)[2][0]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    head: Head
    tokens: Tensor
    terms: tuple[VocabularyTerm, ...]
    chunk: int | None
    per_token: PerToken | None = None
    weights: tuple[Tensor | None, ...] = ()
    entropy_weights: Tensor | None = None
    graph: bool = True


class _SinglePass(torch.autograd.Function):
    """Computes the gradients with the loss; the backward pass multiplies them by what comes from above."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        of_hidden, of_weight, of_bias = (needed and plan.graph for needed in ctx.needs_input_grad[1:])
        needs = (of_hidden, of_weight, of_bias)
        loss = torch.zeros((), dtype=work_dtype(hidden, weight), device=hidden.device)

        def slope_of(logp: Tensor, part: slice, values: tuple[Tensor | None, ...]) -> Tensor:
            if plan.per_token is None:
                return torch.zeros_like(logp)
            with torch.set_grad_enabled(any(needs)):
                leaf = logp.detach().requires_grad_(any(needs))
                total = plan.per_token(leaf, part, values).sum()
                loss.add_(total.detach())
                if not total.requires_grad:
                    return torch.zeros_like(logp)
                return torch.autograd.grad(total, leaf)[0]

        slopes = Slopes(of_logp=slope_of, of_values=plan.weights, of_entropy=plan.entropy_weights, needs=needs)
        swept = sweep(hidden, plan.head, plan.tokens, plan.terms, slopes, plan.chunk)
        for value, term_weight in zip(swept.values, plan.weights, strict=True):
            if term_weight is not None:
                loss.add_((value * term_weight).sum())
        if plan.entropy_weights is not None:
            loss.add_((swept.entropy * plan.entropy_weights).sum())
        ctx.grads, ctx.dtypes = swept.grads, tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
        detached = (swept.logp, swept.entropy, *swept.values, *swept.anchor_logps)
        ctx.mark_non_differentiable(*detached)
        return (loss, *detached)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradients of a single pass are handed out once: a second backward pass needs a second call, or "
                "token_logps and the plain objective"
            )
        grads, ctx.grads = ctx.grads, None
        upstream = grad_outputs[0]
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        return (None, *_cast(grads, ctx.dtypes))


class _TwoPass(torch.autograd.Function):
    """Log-probabilities, entropies and vocabulary terms; the backward pass sweeps again with the given slopes."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        swept = sweep(hidden, plan.head, plan.tokens, plan.terms, None, plan.chunk)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.plan = plan
        ctx.mark_non_differentiable(*swept.anchor_logps)
        return (swept.logp, swept.entropy, *swept.values, *swept.anchor_logps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        plan: _Plan = ctx.plan
        of_logp, of_entropy, *rest = grad_outputs
        of_values = tuple(rest[: len(plan.terms)])
        if all(x is None for x in (of_logp, of_entropy, *of_values)):
            return (None, None, None, None)
        upstream = torch.zeros_like(plan.tokens, dtype=work_dtype(hidden, weight)) if of_logp is None else of_logp
        slopes = Slopes(
            of_logp=lambda logp, part, values: upstream[part].to(logp.dtype),
            of_values=of_values,
            of_entropy=of_entropy,
            needs=tuple(ctx.needs_input_grad[1:]),
        )
        swept: Swept = sweep(hidden, plan.head, plan.tokens, plan.terms, slopes, plan.chunk)
        return (None, *_cast(swept.grads, tuple(None if x is None else x.dtype for x in (hidden, weight, bias))))


def _cast(grads: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(
        None if grad is None or dtype is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )


def _check(hidden: Tensor, head: Head, tokens: Tensor, terms: tuple[VocabularyTerm, ...], chunk: int | None) -> None:
    check_inputs(hidden, head, tokens, chunk)
    for term in terms:
        anchor = term.anchor
        if term.k is not None and (isinstance(term.k, bool) or not isinstance(term.k, int) or term.k < 1):
            raise ValueError(f"k must be an integer >= 1, got {term.k!r}")
        if not isinstance(anchor, Anchor):
            continue
        check_inputs(anchor.hidden, anchor.head, None, None, "the anchor's hidden")
        if anchor.hidden.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"the anchor's hidden must have {hidden.shape[0]} rows, those of hidden, got {anchor.hidden.shape[0]}"
            )
        if anchor.head.vocabulary != head.vocabulary:
            raise ValueError(
                f"the anchor's vocabulary has {anchor.head.vocabulary} tokens, the policy's {head.vocabulary}: they "
                "must agree"
            )


__all__ = [
    "PerToken",
    "SinglePass",
    "exact_from_hidden",
    "measure_from_hidden",
    "single_pass",
    "token_logps",
    "top_k_from_hidden",
]
