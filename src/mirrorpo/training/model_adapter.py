"""Transformers models as packed rows need them: attention, head, comparison with padded rows, and the reference.

Attention: transformers looks attention functions up by name (``AttentionInterface``) and hands keyword arguments of a
forward pass down to them. ``install`` wraps the registered functions once: given ``packed_row`` they compute
``prefix_attention``, without it they are what they were, so generation and other models see no change. The argument
travels with the call, hence gradient checkpointing recomputes the same attention.

Head: its matrix, and what the config says is done to the logits after it. The config has a different key in each
family; whether the reading is right is asked of the model itself (``check_head``).

Comparison: small groups cannot show a feature that begins at a length (``mirrorpo.models.thresholds``). So the first
batch of a run is read both ways, and every batch twice as long as any before; no random state is touched.
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
from transformers.utils import logging
from transformers.utils.import_utils import is_peft_available

from mirrorpo.kernels.attention import prefix_attention
from mirrorpo.kernels.fused import token_logps
from mirrorpo.kernels.head import Head
from mirrorpo.kernels.idle import without_activations
from mirrorpo.kernels.packing import Packing, Row, Segments, pack
from mirrorpo.models.thresholds import count_positions, counts_by_mask, noise_of
from mirrorpo.training.checkpoints import random_states, set_random_states

logger = logging.get_logger(__name__)

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
    """The last hidden states of every token of every row, (M, H), rows one after the other; differentiable.

    With several rows a backward pass recomputes them one by one, so that the activations of one row are in memory at a
    time: that is what a token budget is for. A model that checkpoints its layers already does without. Idle rows keep
    none, and are left out of the backward pass.
    """
    several = sum(not row.idle for row in packing.rows) > 1
    apart = several and torch.is_grad_enabled() and not model.is_gradient_checkpointing
    busy = partial(checkpoint, _read, use_reentrant=False) if apart else _read
    parameters = list(model.parameters())
    states = []
    for row in packing.rows:
        read = partial(_read if row.idle else busy, model, row, PackedRow(row.segments))
        states.append(without_activations(read, parameters) if row.idle else read())
    return states[0] if len(states) == 1 else torch.cat(states)


def _read(model: PreTrainedModel, row: Row, packed: PackedRow) -> Tensor:
    output = model.base_model(
        input_ids=row.ids.unsqueeze(0),
        # A mask of four dimensions is handed through as it is, and never looked at: the row says what is seen.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.ids.device),
        position_ids=(row.positions if counts_by_mask(model) else row.columns).unsqueeze(0),
        use_cache=False,
        packed_row=packed,
    )
    return output.last_hidden_state[0]


def probe(model: PreTrainedModel) -> str | None:
    """Why this model cannot read packed rows, None if it can.

    Two small groups are read both ways: every layer must have attended to the packed row, and the hidden states of the
    completions must agree.
    """
    count_positions(model)
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


def say_noise(model: PreTrainedModel) -> None:
    """Logs one line if two passes of a training model over the same tokens differ."""
    named = noise_of(model.config)
    if not named:
        return
    device = next(model.parameters()).device
    ids, mask = (x.to(device) for x in _probe_batch(model.config.get_text_config().vocab_size))
    with undisturbed(model, training=True):
        one, other = (model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0] for _ in range(2))
    if torch.equal(one, other):
        return
    logger.warning(
        "two passes of the policy over the same tokens differ while it trains (%s): ratios are not 1 and the "
        "divergence is not 0 before it has moved. Set them to 0 in its config: model_init_kwargs={%s}",
        ", ".join(f"{key} {value:g}" for key, value in named.items()),
        ", ".join(f"'{key}': 0.0" for key in named),
    )


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


# Config keys and the scale that they mean, given the key's value and the model's type.
_SCALES: dict[str, Any] = {
    "logit_scale": lambda value, _: value,  # Cohere
    "output_multiplier": lambda value, _: value,  # Muse
    "lm_head_multiplier": lambda value, _: value,  # Falcon-H1
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    "logits_scaling": lambda value, kind: value if kind == "hyperclovax" else 1.0 / value,
}
# Of a float32 model and of a 16-bit one, relative to the largest logit: other rounding, the same function.
_HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HEAD_TOLERANCE_16_BIT = 3e-2


def head_of(model: nn.Module, temperature: float = 1.0) -> Head:
    """The head of a causal language model of transformers, as its config describes it.

    Args:
        model: with ``get_output_embeddings`` and ``config``; the parameters are the model's own, not copies.
        temperature: the logits are divided by it, as in sampling.

    Returns:
        A ``Head``.

    Raises:
        ValueError: the model has no output embeddings with a 2-D weight.
    """
    embeddings: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    weight = None if embeddings is None else embeddings.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{type(model).__name__} has no output embeddings with a weight (V, H)")
    config: Any = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    settings = config.to_dict()
    scale = 1.0
    for key, meaning in _SCALES.items():
        if settings.get(key) is not None:
            scale = float(meaning(settings[key], settings.get("model_type")))
            break
    softcap = settings.get("final_logit_softcapping")
    bias = vars(embeddings)["_parameters"].get("bias")
    return Head(weight, bias, None if softcap is None else float(softcap), scale, temperature)


@torch.no_grad()
def check_head(model: nn.Module, head: Head) -> str | None:
    """Why this head is not the model's, in a few words; None if it is.

    Three tokens go through the backbone (``base_model``) and ``head``, and through the model itself.

    Args:
        model: a causal language model of transformers, not wrapped.
        head: of ``head_of``; its temperature is left out.
    """
    was_training = model.training
    model.eval()  # dropout would differ between the two passes
    try:
        ids = torch.arange(1, 4, device=head.weight.device).unsqueeze(0) % head.vocabulary
        # The class's own pass: an instance's may be wrapped in mixed precision, which is no difference of the head.
        expected = type(model).forward(model, input_ids=ids, use_cache=False).logits[0]
        backbone: Any = model.base_model
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        model.train(was_training)
    if hidden.shape[-1] != head.weight.shape[1] or expected.shape[-1] != head.vocabulary:
        return f"its hidden states have {hidden.shape[-1]} numbers, its head takes {head.weight.shape[1]}"
    got = head.logits(hidden) * head.temperature
    error = ((got - expected.to(got.dtype)).abs().amax() / expected.abs().amax().clamp(min=1e-6)).item()
    allowed = _HEAD_TOLERANCE.get(head.weight.dtype, _HEAD_TOLERANCE_16_BIT)
    if error > allowed:
        return f"its logits are not those of its head and config (relative error {error:.1g})"
    return None


# Root mean square of the differences within a completion, relative to that of its log-probabilities (at least 1): the
# rounding of a deep model's forward pass, a factor of ten above what is seen. A feature that takes effect moves it by
# more than the largest of these (0.3 and above for rotary frequencies of another length).
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
# Logits in memory at once.
_NUM_LOGITS = 2**26


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a failed allocation; a CPU's allocator has no class of its own, only a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def disagreement(
    causal: PreTrainedModel, head: Head, packing: Packing, ids: Tensor, attention: Tensor, keep: int, at_once: int = 0
) -> str | None:
    """How packed and padded log-probabilities differ, in a few words; None if by no more than rounding.

    Args:
        causal: a causal language model that reads packed rows, in the precision of the surrounding autocast.
        head: its head.
        packing: the batch's.
        ids: (B, P + T).
        attention: (B, P + T).
        keep: T.
        at_once: padded rows in a pass; 0 for as many as a packed row has tokens for.
    """
    with undisturbed(causal, training=False):
        padded = _padded(
            causal, packing, ids, attention, keep, at_once
        )  # first: an error of the model itself is its own
        try:
            packed = hidden_states(causal, packing).index_select(0, packing.predictors)
            logp, _ = token_logps(packed, head, packing.tokens)
        # Untrusted: the code of any model somebody wrote for transformers.
        except Exception as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            return f"packed rows cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        expected = _plain_logps(head, padded, packing.tokens)
    # A model that has diverged has no log-probability to compare with; where only packed rows have none, they differ.
    apart, expected = (torch.where(expected.isfinite(), x, 0.0) for x in (logp - expected, expected))
    worst = _worst(packing.unpack(apart), packing.unpack(expected), packing)
    allowed = TOLERANCES[_precision(packed)]
    if worst <= allowed:
        return None
    return f"packed and padded log-probabilities differ by {worst:.1e} (relative, {allowed:g} is rounding)"


def _padded(
    causal: PreTrainedModel, packing: Packing, ids: Tensor, attention: Tensor, keep: int, at_once: int
) -> Tensor:
    """(N, H): what predicts each token of the completions, from padded rows; so many at once as a packed row holds."""
    size = at_once or max(1, max(row.segments.length for row in packing.rows) // ids.shape[1])
    parts = []
    for first in range(0, ids.shape[0], size):
        part = slice(first, first + size)
        states = causal.base_model(
            input_ids=ids[part], attention_mask=attention[part], use_cache=False
        ).last_hidden_state
        parts.append(states[:, -keep - 1 : -1])
    return torch.cat(parts).flatten(0, 1).index_select(0, packing.slots)


def _plain_logps(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities by plain operations: the sweeps over the vocabulary, too, are compared with something else."""
    size = max(1, _NUM_LOGITS // head.vocabulary)
    with torch.autocast(hidden.device.type, enabled=False):
        parts = [
            head.logits(states).log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
            for states, wanted in zip(hidden.split(size), tokens.split(size), strict=True)
        ]
    return torch.cat(parts)


def _worst(difference: Tensor, expected: Tensor, packing: Packing) -> float:
    counts = packing.unpack(torch.ones_like(packing.slots, dtype=difference.dtype)).sum(1).clamp(min=1.0)
    apart, scale = ((x.square().sum(1) / counts).sqrt() for x in (difference, expected))
    worst = (apart / scale.clamp(min=1.0)).max().item()
    return worst if worst == worst else float("inf")  # NaN: as far apart as can be


def _precision(states: Tensor) -> torch.dtype:
    """What the passes were computed in."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if states.dtype == torch.float32 and kind == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return torch.float16  # TF32 has its ten bits
    return states.dtype


class ReferenceMismatchError(ValueError):
    """The reference is the policy itself, or does not agree with it at the start."""


def check_reference(policy: nn.Module, reference: nn.Module) -> None:
    """Raises unless ``reference`` has storage of its own and the policy's values.

    TRL loads the reference from the policy's *path*. A policy that was changed after loading therefore gets a reference
    that never was its start, and every penalty is measured from the wrong place.

    Args:
        policy: the model that is trained, before the first step.
        reference: the frozen one.

    Raises:
        ReferenceMismatchError: shared storage, other parameter names or shapes, or other values; names the parameter.
    """
    theirs = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            raise ReferenceMismatchError(
                f"reference has no parameter {name!r} of shape {tuple(parameter.shape)}: another model"
            )
        if other.data_ptr() == parameter.data_ptr():
            raise ReferenceMismatchError(
                f"the reference is the policy itself (parameter {name!r} is shared): its divergence would always be 0"
            )
        if not torch.equal(other.detach().to(parameter.device, parameter.dtype), parameter.detach()):
            raise ReferenceMismatchError(
                f"reference and policy differ before the first step (parameter {name!r}): the reference is loaded from "
                "the policy's path. Save the changed policy and pass its path as the model"
            )


@contextmanager
def budget_advice(path: Any, model: nn.Module) -> Iterator[None]:
    """A failed allocation while a packed micro-batch is trained on becomes an error that says which budget fits.

    The micro-batch is read again, forward and backward, with budgets of half its longest row, a quarter, ... until one
    fits; the gradients of the failed step are dropped. Not with several processes: the others would wait for this one's
    gradients.

    Args:
        path: whose last micro-batch it was.
        model: the policy.
    """
    failed: RuntimeError | None = None
    try:
        yield
    except RuntimeError as error:
        if path.last is None or not is_out_of_memory(error) or "chunk=" in str(error):
            raise  # not ours, or advised on already
        failed = error.with_traceback(None)  # its frames hold the activations
    if failed is None:
        return
    model.zero_grad(set_to_none=True)
    tokens, shortest = path.last_tokens, path.last_shortest
    failure = f"out of memory with packed rows of {tokens} tokens"
    if path.accelerator.num_processes > 1:
        raise torch.OutOfMemoryError(f"{failure}; try a token_budget from {shortest} to {tokens // 2}") from failed
    budget = fitting_budget(path.read_last, tokens, shortest)
    model.zero_grad(set_to_none=True)
    advice = (
        f"token_budget={budget} fits"
        if budget is not None
        else "no token_budget fits: use a smaller per_device_train_batch_size, activation_checkpointing or LoRA"
    )
    raise torch.OutOfMemoryError(f"{failure}; {advice}") from failed


def fitting_budget(read: Callable[[int], None], tokens: int, shortest: int) -> int | None:
    """The first of tokens / 2, tokens / 4, ... that ``read`` survives; None if none of at least ``shortest`` does."""
    budget = tokens // 2
    while budget >= shortest:
        try:
            read(budget)
            return budget
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget //= 2
    return None


__all__ = [
    "budget_advice",
    "fitting_budget",
    "IMPLEMENTATIONS",
    "PackedRow",
    "ReferenceMismatchError",
    "TOLERANCES",
    "UnsupportedAttentionError",
    "check_head",
    "check_reference",
    "disagreement",
    "head_of",
    "hidden_states",
    "install",
    "is_out_of_memory",
    "say_noise",
    "probe",
    "prompt_adapter",
    "undisturbed",
]
