"""Evaluation and rollouts draw from the policy, whatever its generation_config.json says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PrinterCallback, set_seed

from mirrorpo.evaluation.sampling import Completion, Sampler, TransformersEngine
from mirrorpo.models.generation import bare_generation, end_tokens, ignored_settings
from mirrorpo.training import MirrorConfig, MirrorTrainer
from trl_pair import TINY, dataset, reward, settings

# Settings that model authors ship; each changes greedy or sampled text.
SHIPPED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 12},
    {"min_length": 40},
    {"suppress_tokens": list(range(48, 54))},
    {"begin_suppress_tokens": list(range(48, 58))},
    {"bad_words_ids": [[43], [61]]},
    {"num_beams": 3, "length_penalty": 2.0},
    {"forced_eos_token_id": 50},
    {"sequence_bias": [[[50], -10.0]]},
    {"exponential_decay_length_penalty": [1, 3.0]},
    {"stop_strings": ["1"]},
    {"max_time": 1e-9},
    {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "do_sample": True},
    {"num_return_sequences": 2, "num_beams": 2},
    {"guidance_scale": 3.0},
    {"prompt_lookup_num_tokens": 2},
    {"return_dict_in_generate": True, "output_scores": True},
]


def completions(generation: dict[str, Any], temperature: float) -> list[Completion]:
    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    model.generation_config = GenerationConfig(eos_token_id=257, pad_token_id=256, **generation)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    prompts = [list(f"{i}*3+{i + 7}=?".encode()) for i in range(6)]
    sampler = Sampler(temperature=temperature, max_completion_length=16)
    found = TransformersEngine(model, tokenizer).complete(prompts, list(range(6)), sampler)
    for key, value in generation.items():
        assert vars(model.generation_config)[key] == value
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("generation", SHIPPED, ids=lambda g: ", ".join(g))
def test_an_evaluation_is_that_of_the_bare_policy(generation: dict[str, Any], temperature: float) -> None:
    assert completions(generation, temperature) == completions({}, temperature)


def test_end_tokens_of_the_file_are_kept() -> None:
    plain = completions({}, 0.0)
    first = plain[0].tokens[2]
    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    model.generation_config = GenerationConfig(eos_token_id=[first, 257])
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    engine = TransformersEngine(model, tokenizer)
    found = engine.complete([list(b"0*3+7=?")], [0], Sampler(temperature=0.0, max_completion_length=16))
    assert found[0] == Completion(tokens=plain[0].tokens[: plain[0].tokens.index(first) + 1], truncated=False)


def test_a_model_without_any_end_token_is_refused() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    assert end_tokens(model, tokenizer) == [257]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [257]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither the tokenizer nor the generation config has an end token"):
        end_tokens(model, tokenizer)


def trained(folder: Path, lora: bool, **generation: Any) -> tuple[MirrorTrainer, torch.Tensor]:
    """A step on a model with these settings: the trainer and the weights after it."""
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    set_seed(0)
    built = MirrorTrainer(
        str(folder),
        reward_funcs=reward,
        args=MirrorConfig(**settings(folder / "out", max_steps=2, objective="dr_grpo")),
        train_dataset=dataset(),
        processing_class=AutoTokenizer.from_pretrained(TINY, padding_side="left"),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    built.remove_callback(PrinterCallback)
    set_seed(1)
    built.train()
    return built, torch.cat([p.detach().reshape(-1) for p in built.model.parameters()])


@pytest.mark.parametrize("lora", [False, True])
def test_rollouts_are_those_of_the_bare_policy_and_the_file_stays(
    lora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    generation: dict[str, Any] = {"no_repeat_ngram_size": 1 + lora, "min_new_tokens": 12}
    built, weights = trained(tmp_path / "a", lora, **generation)
    lines = [r.getMessage() for r in caplog.records if "generation_config.json" in r.getMessage()]
    assert lines == [
        "of the model's generation_config.json only the end tokens are used; ignored: min_new_tokens=12, "
        f"no_repeat_ngram_size={1 + lora}"
    ]
    _, plain = trained(tmp_path / "b", lora)
    assert torch.equal(weights, plain)
    if not lora:
        built.save_model(str(tmp_path / "saved"))
        kept = GenerationConfig.from_pretrained(tmp_path / "saved")
        assert (kept.no_repeat_ngram_size, kept.min_new_tokens) == (1, 12)


def test_settings_without_an_effect_are_not_reported() -> None:
    neutral = {"top_p": 1.0, "top_k": 0, "temperature": 1.0, "do_sample": True, "use_cache": True, "num_beams": 1}
    assert ignored_settings(GenerationConfig(eos_token_id=[1, 2], max_length=90, **neutral)) == {}
    assert ignored_settings(AutoModelForCausalLM.from_pretrained(TINY).generation_config) == {}


def test_the_settings_are_back_after_an_error() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    own = model.generation_config
    manager = bare_generation(model)
    with manager:
        assert model.generation_config is not own
    assert model.generation_config is own
    with pytest.raises(AttributeError), bare_generation(model):
        model.generate("no ids")
    assert model.generation_config is own
