"""Completions of prompts, drawn token by token: the loop beside transformers' ``generate``.

Equal prompts are read once and their keys and values handed to every completion; a finished completion leaves the
batch; keys and values are written into blocks instead of being copied with every token; a token is drawn by the inverse
of the distribution function. A model that prepares its inputs in a way of its own, or keeps another kind of state than
keys and values, is decoded by ``generate``, with the same draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.import_utils import is_peft_available

from mirrorpo.models.generation import bare_generation, causal_part
from mirrorpo.models.thresholds import forget_lengths, thresholds

# From logits (rows, V), the rows' numbers (rows,) in the batch and the position in the completion to tokens (rows,).
Draw = Callable[[Tensor, Tensor, int], Tensor]

_BLOCK = 64  # tokens by which the space for keys and values grows
_LEAVE = 0.125  # share of finished rows at which they are taken out: each time, the cache of the others is copied
_SHORTLIST = 1024  # most likely tokens that are sorted first for a nucleus; beyond them the whole vocabulary is
_MERGED = 4  # bytes of a weight that an adapter is merged into, at least
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
# Parts of generation that a model class may change: then it must be decoded by its own.
_HOOKS = (
    "generate",
    "prepare_inputs_for_generation",
    "_prepare_cache_for_generation",
    "_update_model_kwargs_for_generation",
)


def pick(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """The token of each row at which the distribution function passes ``uniform``.

    Args:
        logits: (B, V).
        uniform: (B,), in [0, 1).
        temperature: above 0.
        top_p: only the fewest most likely tokens whose probabilities reach it are drawn.
        top_k: only so many most likely tokens are drawn; 0 for all. Taken before ``top_p``.
        min_p: only tokens with at least this share of the greatest probability are drawn.

    Returns:
        (B,) token ids, each with probability softmax(logits / temperature) within what is kept, renormalised.

    Reference: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, Eq. 2 (nucleus).

    Example:
        >>> pick(torch.tensor([[0.0, 0.0]]), torch.tensor([0.75]), 1.0, 1.0)
        tensor([1])
    """
    probs = (logits.float() / temperature).softmax(-1)
    if 0 < top_k < probs.shape[-1]:
        probs = probs.masked_fill(probs < probs.topk(top_k, dim=-1).values[:, -1:], 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1.0:
        probs = _nucleus(probs, top_p)
    if min_p > 0.0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    # Below the total even after rounding, or the search would run past the last token that can be drawn.
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted, right=True)[:, 0]


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """``probs`` with 0 outside the fewest most likely tokens that reach ``top_p``."""
    ordered, index = probs.topk(min(_SHORTLIST, probs.shape[-1]), dim=-1)
    if bool((ordered.sum(-1) < top_p).any()) and ordered.shape[-1] < probs.shape[-1]:
        ordered, index = probs.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def reason_for_generate(model: nn.Module) -> str | None:
    """Why a model is decoded by transformers' ``generate``, in a few words; None if by the loop here."""
    causal: Any = causal_part(model)
    if causal.config.is_encoder_decoder:
        return "an encoder and a decoder"
    if any(getattr(type(causal), name) is not getattr(GenerationMixin, name) for name in _HOOKS):
        return "the model prepares its inputs by itself"
    if thresholds(causal.config):
        return "the model changes with the length"
    config = causal.config.get_text_config(decoder=True)
    if "past_key_values" not in _parameters(causal):
        return "the model keeps another state than keys and values"
    if any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
    ):
        return "the model keeps another state than keys and values"
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            return "the adapter adds tokens of its own"
    return None


@torch.no_grad()
def complete(
    model: nn.Module, prompts: Sequence[Sequence[int]], draw: Draw, length: int, ends: Sequence[int], pad: int
) -> list[list[int]]:
    """Completes prompts (token ids) with the tokens that ``draw`` takes.

    Args:
        model: a causal language model, with or without adapters; its training mode is as before afterwards.
        prompts: one a completion; equal ones are read once.
        draw: chooses tokens.
        length: maximum number of tokens.
        ends: tokens that end a completion.
        pad: any token, for places that nobody sees.

    Returns:
        Tokens up to and with the end token, in the prompts' order.
    """
    was_training = model.training
    model.eval()
    forget_lengths(model)
    try:
        decode = _loop if reason_for_generate(model) is None else _generated
        tokens = decode(model, prompts, draw, length, list(ends), pad).tolist()
    finally:
        model.train(was_training)
    return [_until(row, set(ends)) for row in tokens]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens


def _loop(model: Any, prompts: Sequence[Sequence[int]], draw: Draw, length: int, ends: list[int], pad: int) -> Tensor:
    device = next(model.parameters()).device
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: number for number, prompt in enumerate(distinct)}
    ids, mask = _padded(distinct, pad, device)
    rows = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    state = _Forward(model, length, mask)
    logits = state.read(ids)[rows]
    state.take(rows)
    ending = torch.tensor(ends, device=device)
    tokens = torch.full((len(prompts), length), pad, dtype=torch.long, device=device)
    active = torch.arange(len(prompts), device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for position in range(length):
        chosen = draw(logits, active, position)
        tokens[active, position] = torch.where(running, chosen, pad)
        running = running & ~torch.isin(chosen, ending)
        left = int(running.sum())
        if left == 0 or position + 1 == length:
            break
        if len(active) - left >= _LEAVE * len(active):
            kept = running.nonzero()[:, 0]
            active, chosen, running = active[kept], chosen[kept], running[kept]
            state.take(kept)
        logits = state.next(chosen)
    return tokens


class _Forward:
    """Forward passes of a batch of rows: the prompts, then a token of each at a time."""

    def __init__(self, model: Any, length: int, mask: Tensor) -> None:
        causal = causal_part(model)
        self._model, self._takes = model, _parameters(causal)
        self._cache = DynamicCache(config=causal.config.get_text_config(decoder=True))
        self._cache.layers = [_Growing() if type(layer) is DynamicLayer else layer for layer in self._cache.layers]
        self._width = mask.shape[1]
        # Without padding no mask is needed, and attention has a faster kernel.
        self._mask = None if bool(mask.all()) else torch.cat([mask, mask.new_ones(len(mask), length)], dim=1)
        self._lengths = mask.sum(1)
        self._at = 0

    def read(self, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids) if self._mask is None else self._mask[:, : self._width]
        return self._pass(ids, (mask.cumsum(1) - 1).clamp(min=0))

    def next(self, chosen: Tensor) -> Tensor:
        self._at += 1
        return self._pass(chosen[:, None], (self._lengths + self._at - 1)[:, None])

    def take(self, rows: Tensor) -> None:
        """Goes on with these rows, which may occur several times."""
        self._lengths = self._lengths[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        self._cache.batch_select_indices(rows)

    def _pass(self, ids: Tensor, positions: Tensor) -> Tensor:
        more = {"position_ids": positions, "logits_to_keep": 1}
        return self._model(
            input_ids=ids,
            attention_mask=None if self._mask is None else self._mask[:, : self._width + self._at],
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in more.items() if name in self._takes},
        ).logits[:, -1]


class _Growing(DynamicLayer):
    """Keys and values in a buffer that grows by blocks: a token costs no copy of those before it."""

    _space: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = self.get_seq_length(), key_states.shape[-2]
        if self._space is None or before + new > self._space[0].shape[-2]:
            self._space = self._enlarged(key_states, before + new), self._enlarged(value_states, before + new)
            if before and self.keys is not None and self.values is not None:
                self._space[0][..., :before, :] = self.keys
                self._space[1][..., :before, :] = self.values
        keys, values = self._space
        keys[..., before : before + new, :] = key_states
        values[..., before : before + new, :] = value_states
        self.keys, self.values = keys[..., : before + new, :], values[..., : before + new, :]
        return self.keys, self.values

    @staticmethod
    def _enlarged(like: Tensor, tokens: int) -> Tensor:
        return like.new_empty(*like.shape[:-2], -(-tokens // _BLOCK) * _BLOCK, like.shape[-1])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._space = None


class _Drawn(LogitsProcessor):
    """Leaves one token a row, the one drawn: greedy decoding then takes it."""

    def __init__(self, draw: Draw, rows: Tensor) -> None:
        self._draw, self._rows, self._step = draw, rows, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._draw(scores, self._rows, self._step)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


def _generated(
    model: Any, prompts: Sequence[Sequence[int]], draw: Draw, length: int, ends: list[int], pad: int
) -> Tensor:
    device = next(model.parameters()).device
    ids, mask = _padded(prompts, pad, device)
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=ends)
    with bare_generation(model):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Drawn(draw, torch.arange(len(prompts), device=device))]),
        )[:, ids.shape[1] :]


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, P), padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _parameters(causal: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(type(causal).forward).parameters)


@contextmanager
def decoding_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, LoRA adapters are merged and linear layers have weights in ``dtype``; afterwards all is as before.

    Adapters are not merged into weights of 16 bits. A weight that 16 bits can hold, as those of most checkpoints are,
    swallows whatever is below half of its last digit: early in training, the whole adapter.

    Args:
        model: whose parameters are restored to the same tensors, bit for bit.
        dtype: that of autocast, which would cast the weights again for every token; None without autocast.
    """
    undo: list[Callable[[], None]] = []
    try:
        _merge(model, dtype, undo)
        if dtype is not None:
            for module in model.modules():
                if type(module) is nn.Linear and module.weight.is_floating_point():
                    _cast(module, dtype, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def _cast(module: nn.Linear, dtype: torch.dtype, undo: list[Callable[[], None]]) -> None:
    # The module's entry changes, not the parameter: an output layer may share its own with the embedding.
    for name in ("weight", "bias"):
        parameter = module._parameters[name]
        if parameter is not None and parameter.dtype != dtype:
            module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            undo.append(partial(module._parameters.__setitem__, name, parameter))


def _merge(model: nn.Module, dtype: torch.dtype | None, undo: list[Callable[[], None]]) -> None:
    if not is_peft_available():
        return
    from peft.tuners.lora import Linear as LoraLinear

    for layer in model.modules():
        if not isinstance(layer, LoraLinear) or layer.disable_adapters or layer.merged:
            continue
        base = layer.get_base_layer()
        if type(base) is not nn.Linear or not base.weight.is_floating_point():
            continue
        if (dtype or base.weight.dtype).itemsize < _MERGED:
            continue
        # Subtracting a merged adapter again would leave rounding errors: the weights before are kept instead.
        weight, bias = base.weight.data, None if base.bias is None else base.bias.data
        base.weight.data = weight.clone()
        if bias is not None:
            base.bias.data = bias.clone()
        layer.merge()

        def restore(layer: Any = layer, base: Any = base, weight: Tensor = weight, bias: Tensor | None = bias) -> None:
            layer.merged_adapters.clear()
            base.weight.data = weight
            if bias is not None:
                base.bias.data = bias

        undo.append(restore)


__all__ = ["Draw", "complete", "decoding_weights", "pick", "reason_for_generate"]
