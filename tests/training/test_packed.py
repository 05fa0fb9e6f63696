"""The packed path gives what the padded path gives: loss, every metric, every gradient, whole runs."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from mirrorpo.training import MirrorConfig, MirrorTrainer, model_adapter
from mirrorpo.training.loss import regroup
from mirrorpo.training.model_adapter import install, probe
from mirrorpo.training.scoring import PackedPath, gather_ids
from trl_pair import MAX_COMPLETION, TINY, fill, loss_and_gradient, settings, trainer

SIZES = {
    "ragged": [12, 5, 1, 8, 12, 3, 7, 2],
    "empty completions": [12, 0, 1, 0, 0, 0, 0, 0],
    "one token each": [1] * 8,
    "all alike": [6] * 8,
}


def build(folder: Path, objective: Any = "grpo", **more: Any) -> MirrorTrainer:
    extra = {key: more.pop(key) for key in ("peft_config",) if key in more}
    built = trainer(MirrorTrainer, MirrorConfig(**settings(folder, **more), objective=objective), **extra)
    built.current_gradient_accumulation_steps = more.get("gradient_accumulation_steps", 1)
    return built


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def micro_batch(sizes: list[int], group: int = 4, *, tool_mask: bool = False, seed: int = 0) -> dict[str, Any]:
    """Completions of shared prompts, ragged on both sides, off-policy; log-probabilities still to be filled in."""
    g = torch.Generator().manual_seed(seed)
    rows = len(sizes)
    prompts = torch.randint(32, 120, (rows // group, 9), generator=g).repeat_interleave(group, 0)
    pad = torch.arange(rows).div(group, rounding_mode="floor").unsqueeze(1) % 3 * 2
    mask = (torch.arange(MAX_COMPLETION) < torch.tensor(sizes).unsqueeze(1)).long()
    inputs: dict[str, Any] = {
        "prompt_ids": prompts,
        "prompt_mask": (torch.arange(9) >= pad).long(),
        "completion_ids": torch.randint(32, 120, (rows, MAX_COMPLETION), generator=g),
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=g),
        "old_noise": 0.3 * torch.randn(rows, MAX_COMPLETION, generator=g),
        "ref_noise": 0.5 * torch.randn(rows, MAX_COMPLETION, generator=g),
        "num_items_in_batch": mask.sum(),
    }
    if tool_mask:
        inputs["tool_mask"] = (torch.rand(rows, MAX_COMPLETION, generator=g) < 0.7).long()
    return inputs


Found = tuple[Tensor, dict[str, Tensor], dict[str, float]]


def both_ways(built: MirrorTrainer, inputs: dict[str, Any]) -> dict[str, Found]:
    """Loss, gradient of every parameter and metrics, packed and padded; fails if nothing was packed."""
    found = {}
    for way, reason in (("packed", None), ("padded", "a test")):
        built.packed.reason = reason
        built._metrics["train"].clear()
        loss, _ = loss_and_gradient(built, inputs)
        gradients = {name: p.grad.clone() for name, p in built.model.named_parameters() if p.grad is not None}
        found[way] = (loss, gradients, {key: values[-1] for key, values in built._metrics["train"].items()})
    assert not built.packed._said, built.packed._said
    return found


def assert_same(found: dict[str, Found], tolerance: float = 1e-5) -> None:
    (loss, gradients, metrics), (padded_loss, padded_gradients, padded_metrics) = found["packed"], found["padded"]
    whole = torch.stack([g.norm() for g in padded_gradients.values()]).norm()
    assert whole > 1e-5
    assert abs(loss - padded_loss) <= tolerance * max(1.0, abs(padded_loss))
    assert gradients.keys() == padded_gradients.keys()
    # A gradient of nothing but rounding (an adapter's, say) has no digits to compare.
    real = {name: g for name, g in padded_gradients.items() if g.norm() > 1e-6 * whole}
    apart = {name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in real.items()}
    # Both are a float32 rounding away from the truth, TRL's more (below): a single parameter gets twice the room.
    assert max(apart.values()) <= 2 * tolerance, max(apart, key=lambda name: apart[name])
    assert torch.stack([(gradients[n] - g).norm() for n, g in padded_gradients.items()]).norm() <= tolerance * whole
    assert metrics.keys() == padded_metrics.keys()
    # A share of tokens moves by whole tokens where one lies on a bound; none does here.
    for key, value in padded_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_packed_and_padded_agree_over_lengths_and_groups(sizes: str, group: int, tmp_path: Path) -> None:
    built = build(tmp_path)
    assert_same(both_ways(built, fill(micro_batch(SIZES[sizes], group), built)))


@pytest.mark.parametrize(
    "objective",
    [
        "dr_grpo",
        "dapo",
        "gspo",
        "gmpo",
        {"preset": "a_star_po", "tau": 0.5},
        "fipo",
        "prob_l2_kl_grpo",
        {"preset": "grpo", "estimator": "exact", "divergence": "js"},
        {"preset": "grpo", "estimator": "top_k"},
        {"preset": "grpo", "estimator": "score"},
        {"preset": "dapo", "region": {"name": "binary_tv", "radius": 0.15}},
    ],
    ids=str,
)
def test_packed_and_padded_agree_for_every_kind_of_objective(objective: Any, tmp_path: Path) -> None:
    built = build(tmp_path, objective, gradient_accumulation_steps=2)
    with torch.no_grad():  # the policy has left its reference
        for p in built.model.parameters():
            p.mul_(1.01)
    assert_same(both_ways(built, fill(micro_batch(SIZES["ragged"], tool_mask=True), built)))


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.7},
        {"activation_checkpointing": True},
        {"token_budget": 30},
        {"token_budget": 30, "activation_checkpointing": True},
        {"gradient_accumulation_steps": 4},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.1},
        {"entropy_coef": 0.1},
        {"gradient_share_every": 1},
        {"lora": True},
        {"lora": True, "activation_checkpointing": True, "token_budget": 30},
        {"lora": True, "exact": True},
    ],
    ids=lambda more: ", ".join(more),
)
def test_packed_and_padded_agree_under_every_setting(more: dict[str, Any], tmp_path: Path) -> None:
    settings_ = dict(more)
    objective = {"preset": "grpo", "estimator": "exact"} if settings_.pop("exact", False) else "grpo"
    if settings_.pop("lora", False):
        settings_["peft_config"] = lora()
    built = build(tmp_path, objective, **settings_)
    assert_same(both_ways(built, fill(micro_batch(SIZES["ragged"]), built)))


def test_in_float64_packed_and_padded_are_the_same_function(tmp_path: Path) -> None:
    built = build(tmp_path)
    built.model.double()
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    found = both_ways(built, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    # TRL's head works in float32 whatever it is given; the rest agrees to the last digits.
    assert_same(found, 2e-6)


def test_parameters_gradients_are_on_average_no_further_from_the_truth_than_on_the_padded_path(tmp_path: Path) -> None:
    errors = []
    for seed in range(4):
        built = build(tmp_path)
        inputs = fill(micro_batch(SIZES["ragged"], seed=seed), built)
        found = both_ways(built, inputs)
        built.packed.reason = None
        built.model.double()
        loss_and_gradient(built, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        for name, p in built.model.named_parameters():
            assert p.grad is not None
            gradients = (found[way][1][name] for way in ("packed", "padded"))
            errors.append([((g - p.grad).norm() / p.grad.norm()).item() for g in gradients])
    packed, padded = torch.tensor(errors).square().mean(0).sqrt()
    assert packed <= 1e-5
    assert packed <= padded, (packed, padded)


def test_in_bfloat16_packed_rows_are_no_further_from_float32_than_padded_ones(tmp_path: Path) -> None:
    full, half = build(tmp_path), build(tmp_path, bf16=True)
    errors: dict[str, list[tuple[float, float, float]]] = {"packed": [], "padded": []}
    for seed in range(40):
        inputs = fill(micro_batch(SIZES["ragged"], seed=seed), full)
        ids, mask, keep = gather_ids(inputs)
        full.packed.reason = "a test"
        loss, gradient = loss_and_gradient(full, inputs)
        with torch.no_grad():
            logp = full._get_per_token_logps_and_entropies(full.model, ids, mask, keep)[0]
        for way, reason in (("packed", None), ("padded", "a test")):
            half.packed.reason = reason
            found_loss, found_gradient = loss_and_gradient(half, inputs)
            with torch.no_grad():
                found = half._get_per_token_logps_and_entropies(half.model, ids, mask, keep)[0]
            apart = ((found_gradient - gradient).norm() / gradient.norm(), (found - logp).norm(), (found_loss - loss))
            errors[way].append(tuple(x.item() for x in apart))
    assert not half.packed._said
    packed, padded = (torch.tensor(errors[way]).square().mean(0).sqrt() for way in ("packed", "padded"))
    assert padded[0] > 1e-3  # bfloat16 was used
    assert bool((packed[:2] <= 1.1 * padded[:2]).all()), (packed, padded)
    # The loss is one number a batch, its error a draw of either sign; 500 batches give 0.97 +- 0.04, 40 vary by 0.15.
    assert packed[2] <= 1.3 * padded[2], (packed, padded)


def test_old_and_reference_log_probabilities_are_packed_too(tmp_path: Path) -> None:
    built = build(tmp_path, temperature=0.7)
    inputs = micro_batch(SIZES["ragged"])
    ids, mask, _ = gather_ids(inputs)
    # TRL asks for entropies of the policy alone.
    for model, with_entropy in ((built.model, False), (built.model, True), (built.ref_model, False)):
        scores = {}
        for name, reason in (("packed", None), ("padded", "a test")):
            built.packed.reason = reason
            with torch.no_grad():
                # rows of 5 at a time: chunks that cut a group
                scores[name] = built._get_per_token_logps_and_entropies(
                    model, ids, mask, MAX_COMPLETION, batch_size=5, compute_entropy=with_entropy
                )
        for one, two in zip(scores["packed"][: 1 + with_entropy], scores["padded"], strict=False):
            assert (one - two).abs().max() < 1e-5 * max(1.0, two.abs().max().item())
        assert (scores["packed"][1] is None) == (not with_entropy)


def test_a_completion_that_changes_moves_no_other_log_probability(tmp_path: Path) -> None:
    built = build(tmp_path)
    inputs = micro_batch(SIZES["ragged"])

    def scores() -> Tensor:
        ids, mask, _ = gather_ids(inputs)
        with torch.no_grad():
            return built._get_per_token_logps_and_entropies(built.model, ids, mask, MAX_COMPLETION)[0]

    before = scores()
    for changed in (0, 3, 6):
        inputs["completion_ids"][changed, 0] = 33 if inputs["completion_ids"][changed, 0] != 33 else 34
        after = scores()
        others = torch.arange(8) != changed
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[changed], after[changed])
        before = after
    assert not built.packed._said


@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 1, "steps_per_generation": 4, "max_steps": 6},
        {"gradient_accumulation_steps": 4, "max_steps": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 4},
    ],
    ids=["four updates per generation", "accumulation 4", "accumulation 2, two updates, two passes"],
)
@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_whole_runs_end_in_the_same_weights(objective: str, more: dict[str, int], tmp_path: Path) -> None:
    ends, packs = [], []
    for fast in ("auto", "off"):
        # Plain gradient descent: AdamW would turn the rounding of a near-zero gradient into a whole step.
        built = build(tmp_path, objective, fast=fast, seed=5, optim="sgd", **{**more, "learning_rate": 0.05})
        start = torch.cat([p.detach().reshape(-1).clone() for p in built.model.parameters()])
        set_seed(5)
        built.train()
        ends.append(torch.cat([p.detach().reshape(-1) for p in built.model.parameters()]))
        packs.append(built.packed._said)
    assert (ends[1] - start).abs().max() > 1e-4
    assert (ends[0] - ends[1]).abs().max() <= 1e-5
    assert not packs[0]


@pytest.mark.parametrize("dropped", ["completion_mask", "tool_mask"])
def test_a_micro_batch_without_tokens_that_count_is_a_zero_with_a_gradient(dropped: str, tmp_path: Path) -> None:
    built = build(tmp_path)
    inputs = fill(micro_batch(SIZES["ragged"], tool_mask=True), built)
    inputs[dropped] = torch.zeros_like(inputs[dropped])
    loss, gradient = loss_and_gradient(built, inputs)
    assert loss == 0.0
    assert gradient.abs().max() == 0.0


# Groups in micro-batches


def test_a_window_keeps_its_completions_and_puts_groups_side_by_side() -> None:
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 9, (4, 5), generator=g).repeat_interleave(4, 0)
    shuffled = torch.randperm(16, generator=g)
    batches = [
        {
            "prompt_ids": prompts[rows],
            "prompt_mask": torch.ones(4, 5),
            "advantages": rows.float(),
            "num_items_in_batch": torch.tensor(7),
            "nothing": None,
            "names": rows.tolist(),
        }
        for rows in shuffled.view(4, 4)
    ]
    whole = regroup(batches, 4)
    assert all(len(set(map(tuple, b["prompt_ids"].tolist()))) == 1 for b in whole)
    assert sorted(i for b in whole for i in b["names"]) == list(range(16))
    assert whole[0]["names"][0] == shuffled[0]  # TRL's shuffle says which group comes first
    halves = regroup(batches, 2)
    for first in (0, 2):
        ours, theirs = halves[first : first + 2], batches[first : first + 2]
        assert {i for b in ours for i in b["names"]} == {i for b in theirs for i in b["names"]}
    for b in (*whole, *halves):
        assert b["advantages"].tolist() == [float(i) for i in b["names"]]
        assert torch.equal(b["prompt_ids"], prompts[b["names"]])
        assert b["nothing"] is None
        assert b["num_items_in_batch"] == 7
    with pytest.raises(ValueError, match="must divide the number of micro-batches, 4, got 3"):
        regroup(batches, 3)


@pytest.mark.parametrize(("more", "together"), [({}, True), ({"top_entropy_quantile": 0.5}, False)])
def test_training_keeps_groups_together_where_no_number_depends_on_it(
    more: dict[str, Any], together: bool, tmp_path: Path
) -> None:
    built = build(tmp_path, max_steps=1, gradient_accumulation_steps=4, **more)
    batch = next(iter(built.get_train_dataloader()))
    built.model.train()
    built._prepare_inputs(batch)
    assert built._buffered_inputs is not None
    prompts = [len(set(map(tuple, b["prompt_ids"].tolist()))) for b in built._buffered_inputs]
    assert (prompts == [2, 2, 2, 2]) == together  # 8 completions in groups of 4


# Reasons for the padded path


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "padded, not packed" in r.getMessage()]


@pytest.fixture
def caught(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


def test_fast_off_pads_and_says_nothing(tmp_path: Path, caught: pytest.LogCaptureFixture) -> None:
    built = build(tmp_path, fast="off")
    loss_and_gradient(built, fill(micro_batch(SIZES["ragged"]), built))
    assert built.packed.reason == "fast is 'off'"
    assert not reasons(caught)


def test_eager_attention_falls_back_with_one_line(tmp_path: Path, caught: pytest.LogCaptureFixture) -> None:
    built = build(tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    for _ in range(2):
        loss_and_gradient(built, inputs)
    assert reasons(caught) == [
        "completions are padded, not packed: attention 'eager'; packed rows need one of sdpa, flash_attention_2, "
        "flash_attention_3"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_values": torch.zeros(8, 3)}, "multimodal input"),
        ({"prompt_mask": torch.ones(8, 9).long().index_fill(1, torch.tensor([4]), 0)}, "without holes"),
    ],
    ids=["multimodal", "holes"],
)
def test_a_batch_that_cannot_be_packed_says_why(
    change: dict[str, Tensor], said: str, tmp_path: Path, caught: pytest.LogCaptureFixture
) -> None:
    built = build(tmp_path)
    inputs = {**fill(micro_batch(SIZES["ragged"]), built), **change}
    for _ in range(2):
        assert built.loss_computer.packed(built.model, inputs, inputs["completion_mask"], built._moment(True)) is None
    assert len(reasons(caught)) == 1
    assert said in reasons(caught)[0]


def test_a_region_over_the_vocabulary_falls_back(tmp_path: Path, caught: pytest.LogCaptureFixture) -> None:
    objective = {"preset": "dapo", "region": {"name": "exact", "radius": 0.1, "divergence": "js"}}
    built = build(tmp_path, objective, max_steps=1, steps_per_generation=2)
    built.train()
    assert [line.split(": ")[1] for line in reasons(caught)] == ["region 'exact' needs the rollout policy's logits"]


@pytest.mark.parametrize(
    ("kind", "stage", "compiled", "aux", "said"),
    [
        (DistributedType.MULTI_GPU, 0, False, False, None),
        (DistributedType.FSDP, 0, False, False, "the model is sharded (fsdp)"),
        (DistributedType.DEEPSPEED, 2, False, False, None),
        (DistributedType.DEEPSPEED, 3, False, False, "the model is sharded (deepspeed)"),
        (DistributedType.NO, 0, True, False, "torch_compile"),
        (DistributedType.NO, 0, False, True, "load-balancing loss"),
        (DistributedType.NO, 0, False, False, None),
    ],
)
def test_settings_that_rule_packing_out_are_said_at_the_start(
    kind: DistributedType, stage: int, compiled: bool, aux: bool, said: str | None, caught: pytest.LogCaptureFixture
) -> None:
    args = SimpleNamespace(
        fast="auto", kernels="torch", token_budget=None, torch_compile=compiled, n_gpu=1, entropy_coef=0.0
    )
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    path = PackedPath(args, SimpleNamespace(distributed_type=kind, is_main_process=True, state=state), 1.0, aux)
    assert (path.reason is None) == (said is None)
    assert len(reasons(caught)) == (said is not None)
    assert said is None or said in reasons(caught)[0]


def test_the_probe_finds_a_model_whose_layers_do_not_attend_to_the_row() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    install()
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = Gemma2Config(**small, vocab_size=100, num_key_value_heads=2, head_dim=8, attn_implementation="eager")
    assert "0 of 2 layers attend" in (probe(Gemma2ForCausalLM(config)) or "")


def test_the_probe_finds_a_model_with_other_positions_and_one_that_knows_no_rows() -> None:
    from transformers import BartConfig, BartForCausalLM, MambaConfig, MambaForCausalLM

    install()
    # Learned positions, counted from the first column, padding or not.
    layers = {"encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    bart = BartConfig(**layers, d_model=32, vocab_size=100, attention_dropout=0.0, forced_eos_token_id=None)
    model = BartForCausalLM(bart)
    assert "differ from the padded ones" in (probe(model) or "")
    assert model.training == BartForCausalLM(bart).training
    mamba = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100)
    assert "does not read packed rows" in (probe(MambaForCausalLM(mamba)) or "")


def test_the_probe_passes_the_embedded_model_in_every_dtype() -> None:
    install()
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.train()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert probe(model.to(dtype)) is None
    assert model.training


# Bad input


def test_a_budget_below_a_batch_pads_it_and_says_so(tmp_path: Path, caught: pytest.LogCaptureFixture) -> None:
    built = build(tmp_path, token_budget=20)
    for seed in range(2):  # a prompt of 9 and a completion of 12
        assert loss_and_gradient(built, fill(micro_batch(SIZES["ragged"], seed=seed), built))[0].isfinite()
    assert reasons(caught) == ["completions are padded, not packed: a batch has more columns than token_budget, 20"]


@pytest.mark.parametrize(
    ("fits", "advice"),
    [(50, r"rows of 97 tokens; token_budget=48 fits"), (40, r"token_budget=24 fits"), (19, r"no token_budget fits")],
)
def test_out_of_memory_says_which_budget_would_have_fitted(
    fits: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(tmp_path, "dr_grpo", max_steps=1)
    read = model_adapter._read

    def limited(model: Any, row: Any, packed: Any) -> Tensor:  # a machine with room for so many tokens at once
        if torch.is_grad_enabled() and row.segments.length > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(model, row, packed)

    monkeypatch.setattr(model_adapter, "_read", limited)
    inputs = fill(micro_batch([12] * 8, 8), built)  # 9 + 8 x 11 = 97 tokens, at least 9 + 12
    monkeypatch.setattr(built, "_prepare_inputs", lambda _: inputs)
    with pytest.raises(torch.OutOfMemoryError, match=advice) as caught:
        built.training_step(built.model, [], None)
    assert "CUDA" in str(caught.value.__cause__)
    assert all(p.grad is None for p in built.model.parameters())


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(tmp_path, "dr_grpo", max_steps=1)
    inputs = fill(micro_batch([12] * 8, 8), built)
    monkeypatch.setattr(built, "_prepare_inputs", lambda _: inputs)
    monkeypatch.setattr(built, "_record", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        built.training_step(built.model, [], None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"fast": "on"}, "unknown fast 'on'.*auto, off"),
        ({"token_budget": 0}, "token_budget must be an integer >= 1 or None, got 0"),
        ({"token_budget": 1.5}, "token_budget must be an integer >= 1 or None, got 1.5"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MirrorConfig(**settings(tmp_path), **bad)
