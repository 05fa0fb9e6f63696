"""Generation from the policy itself, without the settings of its ``generation_config.json``.

transformers fills whatever a call leaves open from the model's own file: a repetition penalty, tokens that are
suppressed, a minimum length, beams. An evaluation would then measure, and a rollout would draw from, another
distribution than the one that is trained. Only the tokens that begin, end and pad a text are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.import_utils import is_peft_available

logger = logging.get_logger(__name__)

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# What decides no token: where the file came from, memory, what a call returns, and lengths, which every call sets.
_HARMLESS = (
    "_from_model_config",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "return_legacy_cache",
    "transformers_version",
    "use_cache",
)
# Values that leave the model's distribution as it is.
_NEUTRAL: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
}


def causal_part(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself, adapters inside; it is what holds the generation config."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            model = model.get_base_model()
    assert isinstance(model, PreTrainedModel)
    return model


def ignored_settings(config: GenerationConfig) -> dict[str, Any]:
    """Settings of a generation config that would change what is drawn, and are left out here.

    Example:
        >>> ignored_settings(GenerationConfig(eos_token_id=2, repetition_penalty=1.1, top_p=1.0))
        {'repetition_penalty': 1.1}
    """
    out = (*_KEPT, *_HARMLESS, "do_sample")
    found = {key: value for key, value in config.to_diff_dict().items() if key not in out and value is not None}
    return {
        key: value
        for key, value in sorted(found.items())
        if value is not False and not (key in _NEUTRAL and value == _NEUTRAL[key])
    }


def say_what_is_ignored(model: nn.Module) -> None:
    """Logs one line with the settings that are not used, once in a process; nothing where there are none."""
    own = causal_part(model).generation_config
    found = {} if own is None else ignored_settings(own)
    if found:
        named = ", ".join(f"{key}={value}"[:60] for key, value in found.items())
        line = f"of the model's generation_config.json only the end tokens are used; ignored: {named}"
        logger.warning_once(line)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def bare_generation(model: nn.Module) -> Iterator[None]:
    """Within it, ``model`` generates as the call says and in no other way; its own settings are back afterwards."""
    model = causal_part(model)
    own = model.generation_config
    kept = {} if own is None else {key: value for key in _KEPT if (value := getattr(own, key)) is not None}
    model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = own


class CannotGenerateError(ValueError):
    """A model fails inside its own generation."""


def check_generates(model: nn.Module) -> None:
    """Raises ``CannotGenerateError`` in one line for a model that cannot generate at all; a step of it is tried.

    Some architectures of a release of transformers fail inside their own cache (xLSTM in 5.23).
    """
    causal = causal_part(model)
    ids = torch.ones(1, 3, dtype=torch.long, device=causal.device)
    try:
        with torch.no_grad(), bare_generation(causal):
            causal.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    # Untrusted: the code of any architecture.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        name = type(causal).__name__
        raise CannotGenerateError(
            f"{name} cannot generate with transformers {transformers.__version__} ({reason})"
        ) from error


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and all that the model's generation config names.

    Raises:
        ValueError: neither names one.
    """
    own = causal_part(model).generation_config
    named = None if own is None else own.eos_token_id
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise ValueError("neither the tokenizer nor the generation config has an end token")
    return sorted(int(token) for token in ends if token is not None)


__all__ = [
    "CannotGenerateError",
    "bare_generation",
    "causal_part",
    "check_generates",
    "end_tokens",
    "ignored_settings",
    "say_what_is_ignored",
]
