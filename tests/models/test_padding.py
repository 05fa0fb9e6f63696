"""Padding on the left: positions that count it, states that read it; models that cannot generate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from mirrorpo.models.generation import CannotGenerateError, check_generates
from mirrorpo.models.thresholds import count_positions, reads_padding, say_padding
from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.model_adapter import install, probe
from small_models import VOCABULARY, small_folder

_V = 64
_HEADS: dict[str, Any] = {"vocab_size": _V, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
_OLD: dict[str, Any] = {"vocab_size": _V, "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
_SILENT: dict[str, Any] = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
_GPT2 = GPT2Config(**_OLD, **_SILENT)
_BIGCODE = GPTBigCodeConfig(**_OLD, **_SILENT)
_CTRL = CTRLConfig(**_OLD, dff=32, embd_pdrop=0.0, resid_pdrop=0.0)
_NEO = GPTNeoConfig(
    vocab_size=_V, num_layers=2, hidden_size=32, num_heads=2, attention_types=[[["global"], 2]],
    max_position_embeddings=64,
)  # fmt: skip
_OPT = OPTConfig(**_HEADS, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0)
_QWEN3 = Qwen3Config(**_HEADS, num_key_value_heads=2, head_dim=16, intermediate_size=32)
TABLES = [
    (GPT2LMHeadModel, _GPT2),
    (GPTBigCodeForCausalLM, _BIGCODE),
    (CTRLLMHeadModel, _CTRL),
    (GPTNeoForCausalLM, _NEO),
]


def built(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough that a position makes a difference
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def last_logits(model: Any, ids: torch.Tensor, num_padding: int) -> torch.Tensor:
    row = torch.cat([torch.zeros(1, num_padding, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(row)
    mask[:, :num_padding] = 0
    return model(input_ids=row, attention_mask=mask, use_cache=False).logits[0, -4:]


@pytest.mark.parametrize(("kind", "config"), TABLES)
def test_behind_padding_a_text_has_the_logits_that_it_has_alone(kind: Any, config: Any) -> None:
    model, ids = built(kind, config), torch.arange(3, 12).unsqueeze(0)
    alone = last_logits(model, ids, 0)
    assert (last_logits(model, ids, 6) - alone).abs().max() > 0.5, "the architecture counts padding by itself"
    assert reads_padding(model)
    count_positions(model)
    count_positions(model)
    assert len(model.base_model._forward_pre_hooks) == 1
    torch.testing.assert_close(last_logits(model, ids, 6), alone, rtol=0, atol=1e-4)
    assert not reads_padding(model)


@pytest.mark.parametrize(("kind", "config"), [(GPT2LMHeadModel, _GPT2), (OPTForCausalLM, _OPT)])
def test_a_model_with_a_table_of_positions_reads_packed_rows(kind: Any, config: Any) -> None:
    install()
    assert probe(built(kind, config)) is None


def test_drawn_tokens_have_the_probabilities_that_padded_rows_give_them() -> None:
    model = built(GPT2LMHeadModel, _GPT2)
    count_positions(model)
    ids, mask = torch.tensor([[0, 0, 0, 7, 9], [4, 5, 6, 8, 3]]), torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    drawn = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    with torch.no_grad():
        scored = model(input_ids=drawn.sequences, attention_mask=whole, use_cache=False).logits[:, -5:-1]
    torch.testing.assert_close(scored, torch.stack(drawn.logits, dim=1), rtol=0, atol=1e-4)


def test_a_recurrent_model_that_reads_padding_is_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = built(RwkvForCausalLM, RwkvConfig(vocab_size=_V, hidden_size=32, num_hidden_layers=2))
    count_positions(model)
    with caplog.at_level(logging.WARNING):
        say_padding(model)
        say_padding(built(Qwen3ForCausalLM, _QWEN3))
    (record,) = caplog.records
    assert record.getMessage().startswith("RwkvForCausalLM reads padding: ")


def test_a_model_whose_generation_fails_is_refused_in_one_line() -> None:
    check_generates(built(Qwen3ForCausalLM, _QWEN3))
    broken = built(xLSTMForCausalLM, xLSTMConfig(vocab_size=_V, hidden_size=64, num_hidden_layers=2, num_heads=2))
    with pytest.raises(CannotGenerateError, match=r"^xLSTMForCausalLM cannot generate with transformers 5\.\S+ \("):
        check_generates(broken)


def test_a_trainer_scores_a_completion_behind_a_shorter_prompt_as_it_was_drawn(tmp_path: Path) -> None:
    """Old log-probabilities, from packed and from padded rows, against those of each text alone."""
    folder = small_folder(
        tmp_path / "model", GPT2Config(**{**_OLD, "vocab_size": VOCABULARY}, bos_token_id=None, eos_token_id=257)
    )
    for fast in ("auto", "off"):
        args = MirrorConfig(
            str(tmp_path / fast), fast=fast, per_device_train_batch_size=4, num_generations=2, report_to="none",
            bf16=False, use_cpu=True, max_completion_length=4, activation_checkpointing=False,
            model_init_kwargs=_SILENT,
        )  # fmt: skip
        trainer = MirrorTrainer(
            folder, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=Dataset.from_list([{"prompt": "1"}, {"prompt": "12345678"}]),
        )  # fmt: skip
        ids = torch.tensor([[0, 0, 0, 7, 9, 3, 2], [4, 5, 6, 8, 3, 1, 9]])
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
        with torch.no_grad():
            found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 2)
            assert (trainer.packed.reason is None) == (fast == "auto")
            for row, length in ((0, 4), (1, 7)):
                alone = ids[row : row + 1, -length:]
                logits = trainer.model(input_ids=alone, use_cache=False).logits[0, -3:-1].log_softmax(-1)
                wanted = logits.gather(-1, alone[0, -2:, None]).squeeze(-1)
                torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-4)
