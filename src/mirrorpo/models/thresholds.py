"""What a config says about a model as a function: lengths at which it changes, its context, its noise.

A causal language model usually computes the same for a token whatever follows it and however wide the batch is.
Some features break that beyond a length: rotary embeddings that change their frequencies with the longest position of a
forward pass (``longrope``: Ding et al. 2024, arXiv 2402.13753; ``dynamic`` NTK), and attention that sees a part of what
came before (a sliding window, chunks, an index of the most relevant keys). Packed rows have neither, so a batch that is
wider than such a threshold must stay padded. Dropout and the like make two passes of a training model differ, so that a
policy is not its own reference in the first step.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Config keys of attention that sees a part of the past, and the layer types (a part of their names) that have it. A
# config that lists its layers' types, none of them of this kind, does not use the key.
_ATTENTION: dict[str, tuple[str, ...]] = {
    "sliding_window": ("sliding", "local", "window", "hybrid", "compressed"),
    "sliding_window_size": ("sliding", "local", "window", "hybrid"),
    "sliding_window_len": ("sliding", "local", "window"),
    "local_attention_window_len": ("sliding", "local", "window"),
    "attention_window_size": ("sliding", "local", "window", "attention"),
    "attention_chunk_size": ("chunk",),
    "window_size": ("local", "sliding", "window"),  # GPT-Neo
    "keep_window_size": (),  # Doge: beyond it the least important keys are left out
    "index_topk": (),  # DeepSeek V3.2: beyond it the least relevant keys are left out
}
_LAYER_TYPES = ("layer_types", "attention_layers")
# Names of tables of learned or precomputed absolute positions.
_POSITION_TABLE = re.compile(
    r"(^|\.)(wpe|pos_emb|position_embeddings?|embed_positions|pos_encoding|position_encoding)$"
)

# Names of settings that draw random numbers in a training pass, and of those that belong to heads for classification.
_NOISE = re.compile(r"drop(out|$|_|path|layer)|layerdrop|pdrop|jitter")
_OTHER_HEADS = re.compile(r"classif|summary|^cls_")

# Of the largest logit: between rounding in 16 bits and what a shifted position or a state that has read padding does.
_PADDING_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A length beyond which a feature of a model takes effect.

    Attributes:
        feature: the config's key and value.
        length: the longest batch, in columns, that it does not change.
        reason: what it does beyond, in a few words.
    """

    feature: str
    length: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Context:
    """The longest sequence that a model is made for.

    Attributes:
        limit: tokens; None for a model without a limit.
        hard: whether a longer sequence cannot be computed at all (a table of positions ends); otherwise only its
            quality is unknown.
    """

    limit: int | None
    hard: bool


def thresholds(config: Any) -> tuple[Threshold, ...]:
    """All thresholds of a model, the shortest first.

    Args:
        config: of transformers; of a multimodal model, its text part counts.

    Example:
        >>> from transformers import MistralConfig
        >>> [(t.feature, t.length) for t in thresholds(MistralConfig(sliding_window=4096))]
        [('sliding_window 4096', 4096)]
    """
    values = config.get_text_config(decoder=True).to_dict()
    found = [*_rotary(values), *_attention(values)]
    return tuple(sorted(set(found), key=lambda t: (t.length, t.feature)))


def context_of(config: Any, model: nn.Module | None = None) -> Context:
    """The longest sequence that a model is made for.

    Args:
        config: of transformers.
        model: the model, on any device; without it a table of positions is not found.

    Returns:
        Where positions come from a table: its length. With rotary embeddings: ``max_position_embeddings``, or what
        their scaling extends the original context to if that is more; none with ``dynamic`` NTK, which adapts to any
        length. None for a model without positions (ALiBi, recurrent models).

    Example:
        >>> from transformers import Qwen2Config
        >>> scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
        >>> context_of(Qwen2Config(max_position_embeddings=32768, rope_parameters=scaling))
        Context(limit=131072, hard=False)
    """
    table = None if model is None else _table(model)
    if table is not None:
        return Context(limit=table, hard=True)
    values = config.get_text_config(decoder=True).to_dict()
    ropes = list(_rope_parameters(values))
    if not ropes or any(_is_dynamic(rope) for rope in ropes):
        return Context(limit=None, hard=False)
    limits = [length] if (length := _integer(values.get("max_position_embeddings"))) else []
    for rope in ropes:
        factor, original = rope.get("factor"), _original(rope, values)
        if isinstance(factor, int | float) and original and "original_max_position_embeddings" in {**values, **rope}:
            limits.append(round(factor * original))
    return Context(limit=max(limits, default=None), hard=False)


def noise_of(config: Any) -> dict[str, float]:
    """Settings that draw random numbers while a model trains, and are not 0.

    Example:
        >>> from transformers import GPT2Config
        >>> noise_of(GPT2Config(embd_pdrop=0.0))
        {'attn_pdrop': 0.1, 'resid_pdrop': 0.1}
    """
    values = config.get_text_config(decoder=True).to_dict()
    return {
        key: value
        for key, value in sorted(values.items())
        if _NOISE.search(key) and not _OTHER_HEADS.search(key) and isinstance(value, float) and value > 0.0
    }


def forget_lengths(model: nn.Module) -> None:
    """Takes ``dynamic`` rotary frequencies back to those of the original context.

    transformers keeps those of the longest pass so far until a short one comes, so that what a batch gives would depend
    on the batches before it, and differ between a policy and its reference.
    """
    for module in model.modules():
        state = vars(module)
        original = state.get("original_max_seq_len")
        if original is None:
            continue
        for name in [name for name in state if name.endswith("max_seq_len_cached") and state[name] > original]:
            prefix = name.removesuffix("max_seq_len_cached")  # a layer type, where each has its own
            buffer = module.get_buffer(f"{prefix}inv_freq")
            frequencies = getattr(module, f"{prefix}original_inv_freq").to(buffer.device)
            module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
            setattr(module, name, original)


def count_positions(model: nn.Module) -> None:
    """Makes a model with a table of positions count them by the mask, where a call gives none.

    Generation leaves padding on the left out of the count. Left to itself, such a model (GPT-2, CTRL) takes a token's
    column: behind a shorter prompt it would score a completion as if it stood elsewhere in the text.
    """
    base = model.base_model
    assert isinstance(base, nn.Module)
    if _table(model) is None or counts_by_mask(model):
        return
    if "position_ids" in inspect.signature(base.forward).parameters:
        base.register_forward_pre_hook(_by_mask, with_kwargs=True)


def counts_by_mask(model: nn.Module) -> bool:
    """Whether ``count_positions`` had an effect on a model."""
    base = model.base_model
    assert isinstance(base, nn.Module)
    return _by_mask in base._forward_pre_hooks.values()


def _by_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("position_ids") is not None
    if given or not isinstance(mask, Tensor) or ids is None or mask.shape != ids.shape:
        return args, kwargs
    return args, {**kwargs, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def reads_padding(model: nn.Module) -> bool:
    """Whether padding on the left changes what a model computes for the tokens behind it, as in some recurrent ones."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # dropout would differ between the two passes
    try:
        device = next(model.parameters()).device
        # Not the first tokens of the vocabulary: behind those, rounding in 16 bits alone moves logits by an eighth.
        embeddings = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        ids = (torch.arange(1, 6, device=device) * (embeddings.weight.shape[0] // 8)).unsqueeze(0)
        padded = torch.cat([ids[:, :3], ids], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :3] = 0
        calls = ((ids, torch.ones_like(ids)), (padded, mask))
        logits = [model(input_ids=i, attention_mask=seen, use_cache=False).logits[0, -2:].float() for i, seen in calls]
    finally:
        for module, mode in modes:
            module.training = mode
    alone, behind = logits
    return bool((alone - behind).abs().max() > _PADDING_TOLERANCE * alone.abs().max().clamp(min=1.0))


def say_padding(model: nn.Module) -> None:
    """Logs a line if padding changes what a model computes."""
    if reads_padding(model):
        logger.warning(
            "%s reads padding: behind a shorter prompt of a batch a completion has other probabilities than alone; "
            "use prompts of one length, or one prompt at a time",
            type(model).__name__,
        )


def _rotary(values: Mapping[str, Any]) -> Iterator[Threshold]:
    for rope in _rope_parameters(values):
        if rope["rope_type"] == "longrope" and (length := _original(rope, values)):
            yield Threshold(
                feature="rope_type 'longrope'",
                length=length,
                reason="a longer batch has other rotary frequencies",
            )
        elif _is_dynamic(rope) and (length := _integer(values.get("max_position_embeddings"))):
            yield Threshold(
                feature=f"rope_type {rope['rope_type']!r}",
                length=length,
                reason="the rotary frequencies of a longer batch depend on its length",
            )


def _attention(values: Mapping[str, Any]) -> Iterator[Threshold]:
    if values.get("use_sliding_window") is False:
        values = {**values, "sliding_window": None}
    listed = [str(name) for key in _LAYER_TYPES for name in values.get(key) or ()]
    for key, kinds in _ATTENTION.items():
        length = _integer(values.get(key))
        used = not listed or not kinds or any(kind in name for kind in kinds for name in listed)
        if length and used:
            yield Threshold(
                feature=f"{key} {length}", length=length, reason="attention over a part of a longer sequence"
            )
    blocks, size = _integer(values.get("index_topk_blocks")), _integer(values.get("index_block_size"))
    if blocks and size:
        yield Threshold(
            feature=f"index_topk_blocks {blocks} of {size} tokens",
            length=blocks * size,
            reason="attention over a part of a longer sequence",
        )


def _rope_parameters(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parameters of every kind of rotary embedding: one for the model, or one for each type of its layers."""
    for value in values.values():
        if isinstance(value, Mapping):
            if isinstance(value.get("rope_type"), str):
                yield value
            else:
                yield from _rope_parameters(value)


def _is_dynamic(rope: Mapping[str, Any]) -> bool:
    # With a fixed `alpha` (HunYuan) the frequencies do not move.
    return "dynamic" in rope["rope_type"] and not rope.get("alpha")


def _original(rope: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    """The context before its extension."""
    for where in (rope, values):
        if length := _integer(where.get("original_max_position_embeddings")):
            return length
    return _integer(values.get("max_position_embeddings"))


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _table(model: nn.Module) -> int | None:
    """Rows of the shortest table of positions that the model's decoder looks up, None if it has none."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name):
            rows.append(module.num_embeddings - int(vars(module).get("offset", 0)))
    for name, buffer in model.named_buffers():
        if isinstance(buffer, Tensor) and buffer.dim() == 2 and _POSITION_TABLE.search(name):
            rows.append(buffer.shape[0])
    return min(rows, default=None)


__all__ = [
    "Context",
    "Threshold",
    "context_of",
    "count_positions",
    "counts_by_mask",
    "forget_lengths",
    "noise_of",
    "reads_padding",
    "say_padding",
    "thresholds",
]
