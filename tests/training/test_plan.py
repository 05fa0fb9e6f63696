"""What a plan says is what a run does: counts from the recipe, memory from the trainer's own tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import refused, run
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MptConfig,
    OPTConfig,
)

from mirrorpo.config.shipped import shipped_recipes
from mirrorpo.config.train import load_recipe, recipe_from
from mirrorpo.kernels.packing import pack
from mirrorpo.models import builtin_path
from mirrorpo.training.model_adapter import hidden_states, install
from mirrorpo.training.plan import KNOWN, memory, model_facts, plan, render
from mirrorpo.training.setup import adapt, build_trainer, prepare
from rewards.data import GSM8K, rows_of
from small_models import small_folder

SMALL = ("train.steps=1", "train.prompts_per_step=2", "train.group_size=4", "train.max_completion_length=6")


def test_a_plan_counts_what_the_recipe_says() -> None:
    data = {
        "task": {"name": "arithmetic", "train_size": 160},
        "objective": {"preset": "prob_l2_grpo"},
        "train": {
            "steps": 20, "prompts_per_step": 16, "group_size": 8, "updates_per_batch": 4, "passes_per_batch": 2,
            "micro_batch_size": 16, "schedule": "cosine", "warmup_ratio": 0.1, "max_completion_length": 10,
        },
        "eval": {"problems": 30, "samples": 2},
    }  # fmt: skip
    result = plan(recipe_from(data))
    assert result["task"] == {"name": "arithmetic", "train_problems": 160, "test_problems": 30}
    assert result["prompts"]["completions_a_step"] == 128
    assert result["prompts"]["times_each_problem"] == 20 * 16 / 160
    # The tiny model's tokens are bytes; its chat template puts three marks around the question.
    rows = prepare(recipe_from(data)).train_rows
    lengths = [len(row["prompt"]) + 3 for row in rows]
    assert result["prompts"]["longest_tokens"] == max(lengths)
    assert result["prompts"]["mean_tokens"] == pytest.approx(sum(lengths) / 160, abs=0.05)
    assert result["tokens"]["generated_a_step_at_most"] == 128 * 10
    assert result["tokens"]["generated_in_all_at_most"] == 128 * 10 * 20
    updates = result["updates"]
    assert (updates["updates_a_step"], updates["updates"], updates["warmup_updates"]) == (8, 160, 16)
    assert (updates["completions_an_update"], updates["completions_at_once"]) == (32, 16)
    assert result["objective"].startswith("prob_l2_grpo: clip surrogate, region ratio")
    assert "frozen copy" in result["reference"]
    assert "30 problems x 2" in render(result)


@pytest.mark.parametrize(
    "overrides",
    [
        ("objective.preset=prob_l2_grpo",),
        ("objective.preset=dr_grpo",),
        ("objective.preset=prob_l2_grpo", "model.lora.r=4"),
        ("objective.preset=dr_grpo", "model.dtype=bfloat16"),
        ("objective.preset=dr_grpo", "model.dtype=bfloat16", "model.lora.r=4"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_weights_gradients_optimiser_and_reference_take_what_the_plan_says(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = recipe_from({"task": {"name": "arithmetic", "train_size": 8}}, [*SMALL, *overrides])
    parts = memory(recipe, model_facts(recipe), 10)
    trainer = build_trainer(prepare(recipe), tmp_path, [])
    # Rewards that differ within a group: without an advantage the first update is left out, and has no gradient.
    trainer.reward_funcs = [lambda completions, **_: [float(i % 2) for i in range(len(completions))]]
    gradients: list[int] = []
    trainer.create_optimizer()
    optimizer: Any = trainer.optimizer
    optimizer.register_step_pre_hook(
        lambda opt, *_: gradients.append(sum(nbytes(p.grad) for g in opt.param_groups for p in g["params"]))
    )
    trainer.train()
    assert parts["weights"] == sum(nbytes(p) for p in trainer.model.parameters())
    assert parts["gradients"] == gradients[0]
    state = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert parts["optimiser"] == sum(nbytes(v) for v in state)
    reference = trainer.ref_model
    assert parts["reference"] == (0 if reference is None else sum(nbytes(p) for p in reference.parameters()))


def nbytes(tensor: Any) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_a_forward_pass_keeps_to_a_fifth(precision: str) -> None:
    recipe = recipe_from(
        {"task": {"name": "arithmetic"}},
        [
            *("train.micro_batch_size=8", "train.max_completion_length=100", "train.fast=off"),
            f"train.precision={precision}",
        ],
    )
    parts = memory(recipe, model_facts(recipe), 28)
    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny"))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage: a view keeps nothing of its own

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        model.model(input_ids=torch.zeros((8, 128), dtype=torch.long))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - parts["casts"]
    assert 0.8 <= parts["activations"] / measured <= 1.2, (parts["activations"], measured)


WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
WIDE |= {"num_hidden_layers": 6, "vocab_size": 64, "head_dim": 16}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_packed_rows_keep_what_the_plan_says_with_and_without_adapters(dtype: str, precision: str, lora: bool) -> None:
    """2 prompts of 28 tokens and 8 completions of 50, whose last is not read: 448; padded rows have 8 x 78."""
    overrides = ["train.micro_batch_size=8", "train.group_size=4", "train.prompts_per_step=2", f"model.dtype={dtype}"]
    overrides += [
        "train.max_completion_length=50",
        f"train.precision={precision}",
        *(["model.lora.r=4"] if lora else []),
    ]
    recipe = recipe_from({"task": {"name": "arithmetic"}, "objective": "dr_grpo"}, overrides)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE), dtype=getattr(torch, dtype))
    facts = replace(
        model_facts(recipe), hidden=96, inner=256, query=96, key=32, layers=6, vocabulary=64, normed_keys=False
    )
    parts = memory(recipe, facts, 28)
    policy = adapt(recipe, model)
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        weight = tensor.untyped_storage().data_ptr() in own or (tensor.dim() == 2 and len(tensor) not in (448, 1))
        if not weight:  # nor a cast of one
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    install()
    ids = torch.cat([torch.arange(2).repeat_interleave(4)[:, None].expand(8, 28), torch.ones(8, 50)], 1).long()
    rows = pack(ids, torch.ones_like(ids), num_completion=50)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        hidden_states(model, rows)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 0.85 <= parts["activations"] / measured <= 1.15, (parts["activations"], measured)


def test_the_sizes_kept_for_a_plan_without_network_are_those_of_the_published_models() -> None:
    # The model cards: 0.6 and 1.7 billion parameters, without the embedding 0.44 and 1.4 billion.
    for path, total, rest in (("Qwen/Qwen3-0.6B", 0.6e9, 0.44e9), ("Qwen/Qwen3-1.7B", 1.7e9, 1.4e9)):
        recipe = recipe_from({"task": {"name": "arithmetic"}, "model": {"path": path}})
        facts = model_facts(recipe)
        assert facts.parameters == pytest.approx(total, rel=0.02)
        embedding = facts.vocabulary * facts.hidden
        assert facts.parameters - embedding == pytest.approx(rest, rel=0.01)
    assert {load_recipe(p).model.path for n, p in shipped_recipes().items() if n.startswith("gsm8k")} <= set(KNOWN)


def test_the_plan_of_a_shipped_recipe_needs_neither_weights_nor_network_and_writes_nothing(tmp_path: Path) -> None:
    rows_of(GSM8K)
    arguments = ("train", "gsm8k/prob_l2_grpo_1.7b", f"task.path={GSM8K}", "--plan")
    result = json.loads(run(*arguments, "--json", cwd=tmp_path).stdout)
    assert result["model"]["parameters"] == 1_720_574_976
    # Four numbers of 4 bytes a parameter (weight, gradient, two averages), and the reference.
    assert sum(result["memory"][k] for k in ("weights", "gradients", "optimiser", "reference")) == 20 * 1_720_574_976
    assert 30e9 < result["memory"]["total"] < result["memory"]["device"] < 80e9
    text = run(*arguments, cwd=tmp_path).stdout
    assert "objective   prob_l2_grpo: clip surrogate" in text
    assert "cosine after 80 updates of warm-up" in text
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_leaves_the_memory_open_and_says_why(tmp_path: Path) -> None:
    arguments = ("train", "arithmetic", "model.path=nobody/nothing", "--plan")
    result = json.loads(run(*arguments, "--json", cwd=tmp_path).stdout)
    assert result["memory"] is None
    assert any(note.startswith("memory is unknown: the model is not on this machine") for note in result["notes"])
    assert "memory is unknown" in run(*arguments, cwd=tmp_path).stdout
    assert "model.path './absent'" in refused("train", "arithmetic", "model.path=./absent", "--plan", cwd=tmp_path)


def test_a_plan_says_that_a_sequence_is_longer_than_the_model_is_made_for() -> None:
    data = {"task": {"name": "arithmetic"}, "train": {"max_completion_length": 4090}}
    longest = plan(recipe_from(data))["prompts"]["longest_tokens"]
    assert plan(recipe_from(data))["notes"] == [
        f"the longest prompt has {longest} tokens, with the completion {longest + 4090}; the model is made for 4096 "
        "and may be worse beyond"
    ]


S = {"vocab_size": 261, "eos_token_id": 257, "pad_token_id": 256, "bos_token_id": 257}
OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OLDER = {"n_embd": 32, "n_layer": 2, "n_head": 4}
KINDS = {
    "gpt2": GPT2Config(**OLDER, **S),
    "neox": GPTNeoXConfig(**OLD, intermediate_size=64, **S),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **S),
    "bigcode": GPTBigCodeConfig(**OLDER, **S),
    "gptj": GPTJConfig(**OLDER, rotary_dim=8, **S),
    "opt": OPTConfig(**OLD, ffn_dim=64, word_embed_proj_dim=32, **S),
    "falcon": FalconConfig(**OLD, **S),
    "mpt": MptConfig(d_model=32, n_layers=2, n_heads=4, **S),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **S),
    "mamba2": Mamba2Config(
        hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=4, n_groups=1, **S
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_has_a_plan(kind: str, tmp_path: Path) -> None:
    path = small_folder(tmp_path / kind, KINDS[kind])
    recipe = recipe_from({"task": {"name": "arithmetic", "train_size": 64}, "model": {"path": path}}, [*SMALL])
    result = plan(recipe)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert result["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    if kind.startswith("mamba"):
        note = f"memory is unknown: the estimate is made for layers of attention, and a {kind} model has others"
        assert (result["memory"], result["notes"]) == (None, [note])
    else:
        assert result["notes"] == []
        # Keys and values of both layers, 8 completions; BigCode and this Falcon share one head of 8 between 4.
        tokens = 8 * (result["prompts"]["longest_tokens"] + 6)
        assert result["memory"]["cache"] == 2 * 4 * 2 * (8 if kind in ("bigcode", "falcon") else 32) * tokens
    assert render(result)


def test_a_plan_says_that_there_is_no_chat_template(tmp_path: Path) -> None:
    path = small_folder(tmp_path / "m", KINDS["neox"])
    (tmp_path / "m" / "chat_template.jinja").unlink()
    result = plan(recipe_from({"task": {"name": "arithmetic", "train_size": 64}, "model": {"path": path}}, [*SMALL]))
    assert result["notes"] == ["the tokenizer has no chat template: prompts are given to the model as plain text"]


def test_a_plan_refuses_what_the_run_would_refuse(tmp_path: Path) -> None:
    assert "training rows" in refused("train", "arithmetic", "train.prompts_per_step=9000", "--plan")
    assert "Set task.path" in refused("train", "gsm8k/dr_grpo_0.6b", "--plan")
    assert "--out: missing" in refused("train", "arithmetic")


@pytest.mark.parametrize(("lora", "share"), [(False, 0.5), (True, 0.9)])
def test_on_a_cpu_the_whole_process_is_planned_and_nothing_comes_on_top(
    lora: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/performance.md: 0.55 GB of packages, and a share of the activations that glibc does not give back."""
    recipe = recipe_from({"task": {"name": "arithmetic"}}, ["model.lora.r=4"] if lora else [])
    parts = memory(recipe, model_facts(recipe), 10)
    assert parts["process"] == round(0.55e9 + share * parts["activations"])
    assert "no GPU, the whole process is counted" in render(plan(recipe))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert memory(recipe, model_facts(recipe), 10)["total"] == parts["total"] - parts["process"]
    assert "and 1 to 2 GB for its libraries" in render(plan(recipe))


def test_packed_weights_are_said_to_take_less_than_is_counted(tmp_path: Path) -> None:
    """A config of 4 bits has the number format of the passes in it, 16 bits: four times what its weights take."""
    model = {**LlamaConfig(**{**WIDE, "vocab_size": 300}).to_dict(), "dtype": "bfloat16"}
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for name, settings in (("whole", {}), ("packed", packed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**model, **settings}))
    facts = {
        name: model_facts(
            recipe_from({"task": {"name": "arithmetic"}}, [f"model.path={tmp_path / name}", "model.lora.r=4"])
        )
        for name in ("whole", "packed")
    }
    assert (facts["whole"].quantised, facts["packed"].quantised) == (None, "bitsandbytes")
    assert facts["whole"].parameters == facts["packed"].parameters


def test_every_parameter_of_a_model_of_70_billion_is_counted(tmp_path: Path) -> None:
    """Sizes beyond 32 bits: Llama 3's 70B, whose layers' parameters are added up here."""
    hidden, inner, layers, keys, words = 8192, 28672, 80, 1024, 128256
    settings = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=words, tie_word_embeddings=False, dtype="float16",
    )  # fmt: skip
    settings.save_pretrained(tmp_path)
    recipe = recipe_from({"task": {"name": "arithmetic"}}, [f"model.path={tmp_path}"])
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    expected = layers * layer + 2 * words * hidden + hidden
    assert memory(recipe, model_facts(recipe), 10)["weights"] == 2 * expected
