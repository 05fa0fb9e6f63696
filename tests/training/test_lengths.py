"""Models that change with the length of a batch: a first step has no divergence, and nothing is silently different."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PrinterCallback,
    set_seed,
)

from mirrorpo.config.train import recipe_from
from mirrorpo.models.thresholds import noise_of
from mirrorpo.training import MirrorConfig, MirrorTrainer, model_adapter
from mirrorpo.training.setup import prepare
from small_models import SIZES, VOCABULARY, small_folder
from trl_pair import dataset, reward, settings

LONGROPE = Phi3Config(
    **SIZES,
    sliding_window=None,
    original_max_position_embeddings=20,
    max_position_embeddings=80,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0, 16.0, 32.0, 64.0],
    },
)
DYNAMIC = LlamaConfig(
    **SIZES, max_position_embeddings=20, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
)
WINDOWED = MistralConfig(**SIZES, sliding_window=20)
PLAIN = LlamaConfig(**SIZES, max_position_embeddings=16)


def build(folder: Path, config: Any, **more: Any) -> MirrorTrainer:
    path = folder / "model"
    if not path.exists():
        small_folder(path, config)
    built = MirrorTrainer(
        str(path),
        reward_funcs=reward,
        args=MirrorConfig(**settings(folder / "out", **more), objective="grpo"),
        train_dataset=dataset(),
        processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
    )
    built.remove_callback(PrinterCallback)
    return built


@pytest.fixture
def caught(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = "completions are padded, not packed: "
    return [r.getMessage().removeprefix(said) for r in caplog.records if r.getMessage().startswith(said)]


def first_step(built: MirrorTrainer) -> dict[str, float]:
    set_seed(3)
    built.train()
    return built.state.log_history[0]


@pytest.mark.parametrize("length", [6, 60])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LONGROPE, "rope_type 'longrope'"),
        (DYNAMIC, "rope_type 'dynamic'"),
        (WINDOWED, "sliding_window 20"),
        (PLAIN, None),  # beyond its context a model runs, as it does with `fast: off`
    ],
    ids=["longrope", "dynamic", "windowed", "beyond the context"],
)
def test_policy_and_reference_are_equal_in_the_first_step_at_every_length(
    config: Any, said: str | None, length: int, tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    # Prompts have about 10 tokens: with 6 more below the threshold of 20, with 60 beyond it. Random weights seldom end.
    # Two updates of a batch: old log-probabilities are scored too; at a learning rate of 0 the policy is its reference.
    built = build(
        tmp_path, config, max_completion_length=length, steps_per_generation=2, max_steps=2, learning_rate=0.0
    )
    set_seed(3)
    built.train()
    for log in built.state.log_history[:2]:
        assert abs(log["kl"]) < 1e-6
        assert log["ratio/max"] == pytest.approx(1.0, abs=1e-4)
        assert log["ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    lines = reasons(caught)
    beyond = length == 60 and said is not None
    assert len(lines) == beyond
    assert not beyond or said in lines[0]


def test_the_policys_longer_generation_does_not_move_it_from_its_reference(tmp_path: Path) -> None:
    # Frequencies of `dynamic` stay as the longest pass left them: a policy that has generated 80 tokens for an
    # evaluation would differ from a reference that has not.
    built = build(tmp_path, DYNAMIC, max_completion_length=12, max_steps=1, learning_rate=0.0, fast="off")
    with torch.no_grad():
        built.model(input_ids=torch.ones(1, 80, dtype=torch.long))
    assert abs(first_step(built)["kl"]) < 1e-6


# Noise


GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96, eos_token_id=257, pad_token_id=256
)
OPT = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    word_embed_proj_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=64,
    max_position_embeddings=96,
    eos_token_id=257,
    pad_token_id=256,
)


@pytest.mark.parametrize(("config", "keys"), [(GPT2, ("attn_pdrop", "resid_pdrop")), (OPT, ("dropout",))])
def test_dropout_that_moves_a_policy_from_itself_is_said_and_a_recipe_switches_it_off(
    config: Any, keys: tuple[str, ...], tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    noisy = build(tmp_path, config, steps_per_generation=2, max_steps=2, learning_rate=0.0)
    assert first_step(noisy)["ratio/max"] > 1.5  # of a policy that has not moved
    (line,) = (r.getMessage() for r in caught.records if "two passes of the policy" in r.getMessage())
    assert all(f"'{key}': 0.0" in line for key in keys)
    caught.clear()
    off = dict.fromkeys(noise_of(config), 0.0)
    quiet = build(tmp_path, config, steps_per_generation=2, max_steps=2, learning_rate=0.0, model_init_kwargs={**off})
    assert first_step(quiet)["ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert not any("two passes" in r.getMessage() for r in caught.records)
    recipe = recipe_from(
        {
            "task": {"name": "arithmetic"},
            "model": {"path": str(tmp_path / "model")},
            "train": {"max_completion_length": 16},
        }
    )
    prepared = prepare(recipe)
    assert prepared.noise == noise_of(config)
    assert set(keys) <= set(prepared.noise)


# The comparison on real batches


@pytest.mark.parametrize("compares", [False, True])
def test_the_comparison_alone_finds_longrope_too(
    compares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mirrorpo.training.scoring.thresholds", lambda _: ())
    if not compares:
        monkeypatch.setattr("mirrorpo.training.scoring.disagreement", lambda *_: None)
    built = build(tmp_path, LONGROPE)
    ids, mask, keep = batch(5, 30)
    mask[:4, 10:] = 0  # four completions of 5 tokens, four of 30: packed by fours, the first have other frequencies
    with torch.no_grad():
        logp, truth = (
            built._get_per_token_logps_and_entropies(built.model, ids, mask, keep, batch_size=size)[0] * mask[:, 5:]
            for size in (4, 8)
        )
    apart = (logp - truth)[:4].abs().max().item()
    assert (apart < 1e-5) == compares, apart
    assert len(reasons(caught)) == compares


class Crooked:
    """Adds to the keys of a model whose mask is a packed row's, if the row is long: a difference nobody declared."""

    def __init__(self, model: Any, length: int) -> None:
        self.own, self.length = model.base_model.forward, length

    def __call__(self, *args: Any, packed_row: Any = None, **kwargs: Any) -> Any:
        output = self.own(*args, packed_row=packed_row, **kwargs) if packed_row else self.own(*args, **kwargs)
        if packed_row is not None and int(kwargs["position_ids"].max()) >= self.length:
            output.last_hidden_state = output.last_hidden_state * 1.01
        return output


def batch(prompt: int, completion: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    g = torch.Generator().manual_seed(prompt + completion)
    ids = torch.randint(32, 120, (8, prompt + completion), generator=g)
    ids[:, :prompt] = ids[:1, :prompt]
    return ids, torch.ones_like(ids), completion


def scored(built: MirrorTrainer, prompt: int, completion: int) -> torch.Tensor:
    ids, mask, keep = batch(prompt, completion)
    with torch.no_grad():
        return built._get_per_token_logps_and_entropies(built.model, ids, mask, keep)[0]


def test_a_difference_that_no_config_names_is_found_on_the_first_batch_of_that_length(
    tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    built = build(tmp_path, LlamaConfig(**SIZES))
    truth = {length: scored(built, 5, length) for length in (10, 40)}
    built = build(tmp_path, LlamaConfig(**SIZES))
    built.model.base_model.forward = Crooked(built.model, 30)
    assert (scored(built, 5, 10) - truth[10]).abs().max() < 1e-5
    assert not reasons(caught)
    for _ in range(2):  # 45 columns: more than twice 15, beyond where packed rows are crooked
        assert (scored(built, 5, 40) - truth[40]).abs().max() < 1e-5
        assert (scored(built, 5, 10) - truth[10]).abs().max() < 1e-5
    assert len(reasons(caught)) == 1
    assert "a batch of 45 columns: packed and padded log-probabilities differ by" in reasons(caught)[0]


def test_only_the_first_batch_and_those_twice_as_long_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, widths = build(tmp_path, LlamaConfig(**SIZES)), []
    compare = model_adapter.disagreement

    def counted(causal: Any, head: Any, packing: Any, ids: Any, *rest: Any) -> str | None:
        widths.append(ids.shape[1])
        return compare(causal, head, packing, ids, *rest)

    monkeypatch.setattr("mirrorpo.training.scoring.disagreement", counted)
    for completion in (10, 12, 25, 26, 5, 60):  # and 5 of the prompt
        scored(built, 5, completion)
    assert widths == [15, 31, 65]
    state = torch.get_rng_state()
    scored(built, 5, 200)
    assert widths[-1] == 205
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_fails_on_packed_rows_of_a_length_is_padded_from_there(
    tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    built = build(tmp_path, LlamaConfig(**SIZES))
    own = built.model.base_model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("packed_row") is not None and kwargs["input_ids"].shape[1] > 60:
            raise IndexError("no such row")
        return own(*args, **kwargs)

    built.model.base_model.forward = failing
    assert scored(built, 5, 40).isfinite().all()
    assert "packed rows cannot be read (IndexError: no such row)" in reasons(caught)[0]


def test_dropout_of_attention_weights_is_found_before_anything_is_packed(
    tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    built = build(tmp_path, LlamaConfig(**SIZES, attention_dropout=0.1), max_steps=1, learning_rate=0.0)
    first_step(built)
    assert reasons(caught) == ["LlamaForCausalLM: attention with dropout"]


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), LlamaConfig(**SIZES, attention_dropout=0.1), DYNAMIC])
def test_a_resumed_run_goes_the_way_of_the_unbroken_one(config: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "max_steps": 4,
        "max_completion_length": 20,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    whole = build(tmp_path, config, **common)
    set_seed(5)
    whole.train()
    half = build(tmp_path, config, **common)
    half.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert half.packed.state() == whole.packed.state()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, half.model.get_parameter(name)), name


def test_what_was_found_before_a_checkpoint_holds_after_it(tmp_path: Path) -> None:
    built = build(tmp_path, LlamaConfig(**SIZES))
    scored(built, 5, 40)
    assert built.packed.state()["found"] is None
    assert list(built.packed.state()["compared"].values()) == [45]
    built.packed.give_up("a test")
    other = build(tmp_path, LlamaConfig(**SIZES))
    other.packed.take_up(built.packed.state())
    assert other.packed.reason == "a test"
    assert other.packed.state() == built.packed.state()
    settled = build(tmp_path, LlamaConfig(**SIZES), fast="off")
    settled.packed.take_up(built.packed.state())
    assert settled.packed.reason == "fast is 'off'"
