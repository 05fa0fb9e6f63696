"""Lengths at which a model changes, and contexts, as configs of transformers say them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DogeConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

from mirrorpo.models.thresholds import context_of, forget_lengths, thresholds
from small_models import SIZES, small_model

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 1e4}


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def found(config: Any) -> list[tuple[str, int]]:
    return [(t.feature, t.length) for t in thresholds(config)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MistralConfig(sliding_window=7), [("sliding_window 7", 7)]),
        (MistralConfig(sliding_window=None), []),
        (Qwen2Config(sliding_window=7, use_sliding_window=False), []),
        (Qwen2Config(sliding_window=7, use_sliding_window=True, max_window_layers=32), []),  # no layer has it
        (Qwen2Config(sliding_window=7, use_sliding_window=True, max_window_layers=1), [("sliding_window 7", 7)]),
        (Gemma3TextConfig(sliding_window=9), [("sliding_window 9", 9)]),
        (Gemma3Config(text_config={"sliding_window": 9}), [("sliding_window 9", 9)]),  # multimodal: of its text
        (DogeConfig(keep_window_size=11), [("keep_window_size 11", 11)]),
        (LlamaConfig(), []),
        (
            Phi3Config(
                **SIZES,
                rope_parameters=dict(LONGROPE),
                original_max_position_embeddings=20,
                max_position_embeddings=80,
                sliding_window=30,
            ),
            [("rope_type 'longrope'", 20), ("sliding_window 30", 30)],
        ),
        (
            LlamaConfig(max_position_embeddings=50, rope_parameters=dict(DYNAMIC)),
            [("rope_type 'dynamic'", 50)],
        ),
        (
            Gemma3TextConfig(
                sliding_window=90,
                max_position_embeddings=60,
                rope_parameters={
                    "full_attention": dict(DYNAMIC),
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            [("rope_type 'dynamic'", 60), ("sliding_window 90", 90)],
        ),
    ],
)  # fmt: skip
def test_thresholds_are_those_that_the_config_names(config: Any, expected: list[tuple[str, int]]) -> None:
    assert found(config) == expected


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=300), 300),
        (Qwen2Config(max_position_embeddings=100, rope_parameters=YARN), 400),  # 4 x 100
        (Qwen2Config(max_position_embeddings=500, rope_parameters=YARN), 500),
        (LlamaConfig(max_position_embeddings=50, rope_parameters=dict(DYNAMIC)), None),
        (MambaConfig(), None),
        (BloomConfig(), None),
    ],
)  # fmt: skip
def test_a_rotary_context_is_what_its_scaling_reaches(config: Any, limit: int | None) -> None:
    context = context_of(config)
    assert (context.limit, context.hard) == (limit, False)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=24, bos_token_id=1, eos_token_id=2),
        OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=32,
                  vocab_size=100, max_position_embeddings=24),
        GPTJConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=24, rotary_dim=8, bos_token_id=1,
                   eos_token_id=2),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_a_table_of_positions_is_a_hard_limit(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    context = context_of(config, model)
    assert (context.limit, context.hard) == (24, True)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 24, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, 25, dtype=torch.long))


def logits(model: PreTrainedModel, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(length).unsqueeze(0) % 50).logits


@pytest.mark.parametrize("layered", [False, True])
def test_dynamic_frequencies_are_forgotten_between_batches(layered: bool) -> None:
    # Reported for transformers in 2023 (issue 25306): a long pass changes what a shorter one gives.
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    if layered:
        nested = {"full_attention": dynamic, "sliding_attention": dynamic}
        config: Any = Gemma3TextConfig(**SIZES, max_position_embeddings=16, rope_parameters=nested)
    else:
        config = LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=dynamic)
    model = small_model(config).eval()
    first = {length: logits(model, length) for length in (16, 20)}
    long = logits(model, 60)
    assert not torch.equal(logits(model, 20), first[20])
    for length in (20, 16):
        forget_lengths(model)
        assert torch.equal(logits(model, length), first[length])
        logits(model, 60)
    forget_lengths(model)
    assert torch.equal(logits(model, 60), long)
