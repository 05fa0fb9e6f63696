"""How does a transformers model read packed rows? Its attention functions learn one more keyword argument.

transformers looks attention functions up by name (``AttentionInterface``) and hands keyword arguments of a forward pass
down to them. ``install`` wraps the registered functions once: given ``packed_row`` they compute ``prefix_attention``,
without it they are what they were, so generation and other models see no change. The argument travels with the call,
hence gradient checkpointing recomputes the same attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.import_utils import is_peft_available

from mirrorpo.kernels.attention import prefix_attention
from mirrorpo.kernels.packing import Packing, Row, Segments, pack
from mirrorpo.training.resuming import random_states, set_random_states

# The attention functions whose plain form (no cap, no sink, no bias) is softmax(scale q k) v. `eager` is not looked up
# in the table, `flex_attention` would need a block mask.
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
# Between hidden states of packed and of padded rows, relative to the largest: other rounding, the same function.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_TOLERANCE_16_BIT = 0.1
# What an attention function may be asked for beyond that.
_BEYOND = ("softcap", "s_aux", "position_bias")


class UnsupportedAttentionError(ValueError):
    """A model asks its attention for something that packed rows do not have."""


class PackedRow:
    """One row on its way through a model.

    Attributes:
        segments: who attends to what.
        num_calls: attention layers that have read it.
    """

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self.num_calls = 0


def install() -> None:
    """Teaches transformers' attention functions ``packed_row``; once per process."""
    for name in IMPLEMENTATIONS:
        registered = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(registered, _WithRows):
            AttentionInterface.register(name, _WithRows(registered))


class _WithRows:
    """An attention function that also reads packed rows."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_row: PackedRow | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed_row is None:
            return self.plain(module, query, key, value, *args, **kwargs)
        asked = [name for name in _BEYOND if kwargs.get(name) is not None]
        if kwargs.get("dropout"):
            asked.append("dropout")
        if asked:
            raise UnsupportedAttentionError(f"attention with {asked[0]}")
        if torch.is_autocast_enabled(query.device.type):  # as torch does before its own attention
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        packed_row.num_calls += 1
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return prefix_attention(query, key, value, packed_row.segments, scale), None


def prompt_adapter(model: nn.Module) -> str | None:
    """Why a model's adapters do not live in its layers, None if they do: virtual tokens are no part of a packed row."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            return f"the adapter adds tokens to the prompt ({type(model.active_peft_config).__name__})"
    return None


def hidden_states(model: PreTrainedModel, packing: Packing) -> Tensor:
    """The last hidden states of every token of every row, differentiable.

    With several rows a backward pass recomputes them one by one, so that the activations of one row are in memory at a
    time: that is what a token budget is for. A model that checkpoints its layers already does without.

    Args:
        model: a causal language model.
        packing: what it reads.

    Returns:
        (M, H), rows one after the other.
    """
    apart = len(packing.rows) > 1 and torch.is_grad_enabled() and not model.is_gradient_checkpointing
    read = partial(checkpoint, _read, use_reentrant=False) if apart else _read
    states = [read(model, row, PackedRow(row.segments)) for row in packing.rows]
    return states[0] if len(states) == 1 else torch.cat(states)


def _read(model: PreTrainedModel, row: Row, packed: PackedRow) -> Tensor:
    output = model.base_model(
        input_ids=row.ids.unsqueeze(0),
        # A mask of four dimensions is handed through as it is, and never looked at: the row says what is seen.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.ids.device),
        position_ids=row.positions.unsqueeze(0),
        use_cache=False,
        packed_row=packed,
    )
    return output.last_hidden_state[0]


def probe(model: PreTrainedModel) -> str | None:
    """Why this model cannot read packed rows, None if it can.

    Two small groups are read both ways: every layer must have attended to the packed row, and the hidden states of the
    completions must agree.
    """
    config = model.config.get_text_config()
    ids, mask = _probe_batch(config.vocab_size)
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    packing = pack(ids, mask, num_completion=4)
    row = PackedRow(packing.rows[0].segments)
    try:
        with undisturbed(model, training=True):  # dropout of attention weights
            _read(model, packing.rows[0], PackedRow(row.segments))
        with undisturbed(model, training=False):
            packed = _read(model, packing.rows[0], row)
            padded = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    except UnsupportedAttentionError as error:
        return f"{type(model).__name__}: {error}"
    # Untrusted: the code of any model somebody wrote for transformers, called with arguments that it may not know.
    except Exception as error:  # noqa: BLE001
        return f"{type(model).__name__} does not read packed rows ({type(error).__name__}: {_one_line(error)})"
    if row.num_calls != config.num_hidden_layers:
        return f"{type(model).__name__}: {row.num_calls} of {config.num_hidden_layers} layers attend to packed rows"
    wanted = padded[:, -5:-1].reshape(-1, padded.shape[-1])[packing.slots].float()
    error = (packed[packing.predictors].float() - wanted).abs().max().item()
    allowed = _TOLERANCE.get(packed.dtype, _TOLERANCE_16_BIT) * max(1.0, wanted.abs().max().item())
    if not error <= allowed:
        return f"{type(model).__name__}: hidden states of a packed row differ from the padded ones by {error:.1e}"
    return None


@contextmanager
def undisturbed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Without gradients, all modules in one mode; afterwards their modes and all random states are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    states = random_states()
    model.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        set_random_states(states)


def _probe_batch(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Prompts of 3 and 2 tokens, completions of 4, 1 and 3."""
    ids = (torch.arange(5 * 7).view(5, 7) * 7919 + 13) % vocabulary
    mask = torch.ones_like(ids)
    ids[1] = torch.where(torch.arange(7) < 3, ids[0], ids[1])
    ids[3] = torch.where(torch.arange(7) < 3, ids[2], ids[3])
    mask[2:4, 0] = 0
    mask[1, 4:], mask[3, 6:] = 0, 0
    return ids, mask


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


__all__ = [
    "IMPLEMENTATIONS",
    "UnsupportedAttentionError",
    "hidden_states",
    "install",
    "probe",
    "prompt_adapter",
    "undisturbed",
]
