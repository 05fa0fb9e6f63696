r"""Attention of packed rows without a wasted score: own tokens and prefix apart, joined by log-sum-exp.

Softmax attention over two disjoint sets of keys is the mean of the attention over each, weighted by its share of the
normaliser (Milakov & Gimelshein 2018, arXiv 1805.02867, eq. 3):

.. math::
    o = e^{\ell_1 - \ell} o_1 + e^{\ell_2 - \ell} o_2, \qquad \ell = \log(e^{\ell_1} + e^{\ell_2})

so all completions of a group attend to their prompt in one dense product, without a mask and without a copy of its
keys, and each attends to itself causally. The gradient of each part needs only the joined :math:`o` and :math:`\ell`
(FlashAttention, arXiv 2205.14135, appendix B.2), which the kernels of torch take.

Three forms of the same function:

=========  ===========================================  ==============================================================
form       where                                        how
=========  ===========================================  ==============================================================
flash      CPU                                          the above, on torch's flash attention for the CPU
varlen     CUDA, bfloat16 and float16                   variable-length flash attention, the prompt's keys gathered for
                                                        every completion
masked     elsewhere, and the oracle of the tests       one masked attention over the row: quadratic in the row
=========  ===========================================  ==============================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.torch_version import TorchVersion

from mirrorpo.kernels.packing import Bucket, Segments

# Stands for the log-sum-exp of a query that is padding: exp(score - _PADDING) is 0, so it sends no gradient to a key.
_PADDING = 1e30

# Where fewer key heads than heads are an argument of torch's function; torch 2.11 knows no such argument.
_VARLEN_GROUPS_HEADS = TorchVersion(torch.__version__) >= "2.13"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention within a packed row.

    Args:
        query: (1, heads, L, D).
        key: (1, key heads, L, D); key heads divide heads.
        value: (1, key heads, L, D).
        segments: who attends to what, for these L tokens.
        scale: factor on the scores.

    Returns:
        (1, L, heads, D); differentiable.

    Raises:
        ValueError: more than one row, values of another width than the keys, key heads that do not divide the heads.
    """
    if query.shape[0] != 1 or query.shape[2] != segments.length:
        raise ValueError(
            f"query must have shape (1, heads, {segments.length}, D) for this row, got {tuple(query.shape)}"
        )
    if value.shape[-1] != query.shape[-1]:
        raise ValueError(f"values must be as wide as queries, {query.shape[-1]}, got {value.shape[-1]}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"key heads must divide the {query.shape[1]} heads, got {key.shape[1]}")
    repeats = query.shape[1] // key.shape[1]
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, segments, scale)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if query.device.type == "cpu":
        return _Flash.apply(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), segments, scale)  # pyright: ignore[reportReturnType]
    return masked_attention(query, key, value, segments, scale)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """``prefix_attention`` for any device and as many key heads as heads, by one mask: quadratic in the row."""
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=segments.mask, scale=scale)
    return out.transpose(1, 2)


class _Flash(torch.autograd.Function):
    """(1, L, heads, D) each; tokens before heads, so that a gather moves whole tokens."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        length, heads, _ = query.shape[1:]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(length, heads, dtype=query.dtype if query.dtype == torch.float64 else torch.float32)
        for bucket in segments.buckets:
            part, part_lse = _flash(*(_taken(x, bucket) for x in (query, key, value)), 0.0, True, scale=scale)
            _put(out, part, bucket)
            _put(lse.unsqueeze(0), part_lse, bucket)
        for queries, keys in segments.prefixes:
            part, part_lse = _flash(
                *(x.transpose(1, 2) for x in (query[:, queries], key[:, keys], value[:, keys])), 0.0, False, scale=scale
            )
            own_lse = lse[queries]
            prefix_lse = part_lse[0].transpose(0, 1)
            joined = torch.logaddexp(own_lse, prefix_lse)
            own, prefix = out[0, queries], part[0].transpose(0, 1)
            weight = (prefix_lse - joined).exp().unsqueeze(-1)
            # own + weight * (prefix - own): the weights of the two parts sum to 1
            out[0, queries] = torch.lerp(own.to(weight.dtype), prefix.to(weight.dtype), weight).to(out.dtype)
            lse[queries] = joined
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        scale, segments = ctx.scale, ctx.segments
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        for bucket in segments.buckets:
            padding = bucket.padding.unsqueeze(1)
            parts = _flash_backward(
                _taken(grad, bucket).masked_fill(padding.unsqueeze(-1), 0.0),
                *(_taken(x, bucket) for x in (query, key, value, out)),
                _taken(lse.unsqueeze(0), bucket).masked_fill(padding, _PADDING).contiguous(),
                0.0,
                True,
                scale=scale,
            )
            for whole, part in zip(grads, parts, strict=True):
                _put(whole, part, bucket)
        for queries, keys in segments.prefixes:
            taken = (grad[:, queries], query[:, queries], key[:, keys], value[:, keys], out[:, queries])
            parts = _flash_backward(
                *(x.transpose(1, 2) for x in taken),
                lse[queries].transpose(0, 1).unsqueeze(0).contiguous(),
                0.0,
                False,
                scale=scale,
            )
            for whole, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
                whole[:, where] += part.transpose(1, 2)
        return *grads, None, None


def _taken(x: Tensor, bucket: Bucket) -> Tensor:
    """(1, L, heads, D) -> (b, heads, T_b, D)."""
    return x[0].index_select(0, bucket.source).view(*bucket.shape, *x.shape[2:]).transpose(1, 2)


def _put(whole: Tensor, part: Tensor, bucket: Bucket) -> None:
    """(b, heads, T_b, D) -> its places in (1, L, heads, D)."""
    rows = part.transpose(1, 2).reshape(-1, *whole.shape[2:])
    whole[0].index_copy_(0, bucket.target, rows.index_select(0, bucket.valid))


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, ends_q, ends_k = segments.varlen
    repeats = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if repeats > 1 and _VARLEN_GROUPS_HEADS:
        options = {"enable_gqa": True}
    elif repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, keys),
        value[0].transpose(0, 1).index_select(0, keys),
        ends_q,
        ends_k,
        max(segments.size),
        max(own + prefix for own, prefix in zip(segments.size, segments.prefix_size, strict=True)),
        scale=scale,
        window_size=(-1, 0),  # causal, aligned to the last key
        **options,
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


__all__ = ["masked_attention", "prefix_attention"]
