"""The sampler's mismatch is corrected as TRL defines it: recorded log-probabilities, TRL's trainer and ours, one loss.

What vLLM hands to TRL, completions with the log-probabilities under which it drew them, is recorded here and played
back through TRL's own code to both trainers. vLLM itself runs in tests/real/test_real_vllm.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from trl.generation import vllm_generation
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError
from mirrorpo.training import MirrorConfig, MirrorTrainer, rollouts, setup
from mirrorpo.training.nonfinite import NonFiniteError
from mirrorpo.training.rollouts import check_logprobs_mode, other_precision, truncation, vllm_as_trained
from mirrorpo.training.setup import trainer_config
from trl_pair import PAIRS, dataset, loss_and_gradient, settings, trainer

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
OBJECTIVES = ("grpo", "dr_grpo with k3", "dapo", "gspo", "cispo")
LOW, HIGH = 0.8, 1.3


class Recorded:
    """What vLLM gave: token ids, and of each token its log-probability; ``logprobs[i][t]`` is a list of one."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        lengths = (12, 5, 1, 8, 12, 3, 7, 2)
        self.completions = [torch.randint(32, 120, (n,), generator=g).tolist() for n in lengths]
        self.noise = [(0.15 * torch.randn(n, generator=g)).tolist() for n in lengths]
        self.logprobs: list[list[list[Any]]] = []

    def sync_weights(self) -> None:
        """Nothing to send."""

    def generate(self, **_: Any) -> tuple[Any, list[list[int]], list[list[list[Any]]], Any]:
        return None, self.completions, self.logprobs, None


def pair(folder: Path, name: str, mode: str, fast: str = "off") -> tuple[Any, Any, Recorded]:
    objective, theirs = PAIRS[name]
    more = {
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": LOW,
        "vllm_importance_sampling_clip_max": HIGH,
    }
    built = (
        trainer(GRPOTrainer, GRPOConfig(**settings(folder, **more), **{"use_bias_correction_kl": False, **theirs})),
        trainer(MirrorTrainer, MirrorConfig(**settings(folder, **more), objective=objective, fast=fast)),
    )
    recorded = Recorded()
    for one in built:
        one.current_gradient_accumulation_steps = 1
        one.use_vllm, one.vllm_generation, one._last_loaded_step = True, recorded, 0
        one.model.train()
    # Log-probabilities of a sampler that is near the model: its own, and noise.
    recorded.logprobs = [[[-1.0] for _ in row] for row in recorded.completions]
    first = generate(built[0])
    own, mask = first["old_per_token_logps"], first["completion_mask"]
    recorded.logprobs = [
        [[min(-1e-3, own[row, t].item() + noise)] for t, noise in enumerate(noises)]
        for row, noises in enumerate(recorded.noise)
    ]
    recorded.logprobs[3][2] = [None]  # vLLM's NaN, as TRL hands it on: no correction there
    assert mask.sum(-1).tolist() == [len(row) for row in recorded.completions]
    return *built, recorded


def generate(built: Any) -> dict[str, Any]:
    rows = [dict(row) for row in dataset(2) for _ in range(4)]
    return built._generate_and_score_completions(rows)


def by_hand(inputs: dict[str, Any], mode: str) -> torch.Tensor:
    """The weight of each token, (B, T), written out."""
    old, sampler = inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
    weights = torch.ones_like(old)
    for row, length in enumerate(inputs["completion_mask"].sum(-1).tolist()):
        difference = [0.0 if math.isnan(s) else o - s for o, s in zip(old[row], sampler[row].tolist(), strict=True)]
        total = sum(float(d) for d in difference[:length])
        for t in range(old.shape[1]):
            log = total if mode.startswith("sequence") else float(difference[t]) if t < length else 0.0
            ratio = math.exp(log)
            if mode.endswith("truncate"):
                weights[row, t] = min(max(ratio, LOW), HIGH)
            else:
                weights[row, t] = ratio if LOW <= ratio <= HIGH else 0.0
    return weights


# Padded rows are computed as TRL computes them, packed rows by other products of the same numbers.
TOLERANCE = {"off": 1e-6, "auto": 2e-5}


@pytest.mark.parametrize(
    ("name", "mode", "fast"),
    [*((name, mode, "off") for name in OBJECTIVES for mode in MODES), *(("grpo", mode, "auto") for mode in MODES)],
)
def test_the_correction_gives_the_loss_and_gradient_of_trl(name: str, mode: str, fast: str, tmp_path: Path) -> None:
    theirs, ours, _ = pair(tmp_path, name, mode, fast)
    inputs, again = generate(theirs), generate(ours)
    weight = again["importance_sampling_ratio"]
    assert (weight - inputs["importance_sampling_ratio"]).abs().max() < 1e-4  # two ways of the forward pass
    assert (weight.expand_as(again["completion_ids"]) - by_hand(again, mode)).abs().max() < 1e-5
    assert len(weight.unique()) > 2  # something is corrected, and something held or left out
    # The loss is compared, so both get the same numbers; the advantages are ours.
    names = ("importance_sampling_ratio", "sampling_per_token_logps", "old_per_token_logps", "ref_per_token_logps")
    again |= {name: inputs[name] for name in names if name in inputs}
    inputs["advantages"] = again["advantages"]
    their_loss, their_gradient = loss_and_gradient(theirs, inputs)
    our_loss, our_gradient = loss_and_gradient(ours, again)
    assert their_gradient.abs().max() > 1e-5
    scale = max(1.0, their_gradient.abs().max().item())
    assert abs(our_loss - their_loss) < TOLERANCE[fast]
    assert (our_gradient - their_gradient).abs().max() < TOLERANCE[fast] * scale


@pytest.mark.parametrize("fast", ["auto", "off"])
@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_the_sampler_calls_impossible_never_makes_the_loss_nan(
    mode: str, fast: str, tmp_path: Path
) -> None:
    _, ours, recorded = pair(tmp_path, "grpo", mode, fast)
    recorded.logprobs[1][0] = [-math.inf]  # a ratio of infinity: at the upper bound, or left out
    inputs = generate(ours)
    weight = inputs["importance_sampling_ratio"].expand_as(inputs["completion_ids"])
    assert weight[1, 0] == (HIGH if mode.endswith("truncate") else 0.0)
    loss, gradient = loss_and_gradient(ours, inputs)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    inputs["importance_sampling_ratio"] = inputs["importance_sampling_ratio"] * math.nan
    with pytest.raises(NonFiniteError, match="importance_sampling_ratio"):
        loss_and_gradient(ours, inputs)


def test_the_weight_is_on_the_policy_term_and_not_on_the_penalty(tmp_path: Path) -> None:
    _, ours, _ = pair(tmp_path, "grpo", "token_truncate")
    inputs = generate(ours)
    with_weight, _ = loss_and_gradient(ours, inputs)
    values = {name: values[-1] for name, values in ours._metrics["train"].items()}
    del inputs["importance_sampling_ratio"]  # as TRL hands it over without the correction
    without, _ = loss_and_gradient(ours, inputs)
    plain = {name: values[-1] for name, values in ours._metrics["train"].items()}
    assert with_weight != without
    assert values["penalty_loss/mean"] == plain["penalty_loss/mean"]
    assert values["policy_loss/mean"] != plain["policy_loss/mean"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"correction": "none", "ratio_max": 2.0}, "ratio_max and ratio_min have no effect with correction 'none'"),
        ({"ratio_min": 4.0}, "ratio_min must be at most ratio_max, 3, got 4"),
        ({"correction": "token"}, "train.vllm.correction"),
    ],
)
def test_a_correction_that_means_nothing_is_refused(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        recipe_from({"task": {"name": "arithmetic"}, "train": {"vllm": spec}})


def test_a_recipe_says_which_correction_is_used(tmp_path: Path) -> None:
    data = {"task": {"name": "arithmetic"}, "train": {"vllm": {"correction": "token_truncate", "ratio_max": 2.0}}}
    config = trainer_config(recipe_from(data), tmp_path)
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert config.vllm_importance_sampling_clip_max == 2.0
    data["train"] = {"vllm": {"correction": "none"}}
    assert not trainer_config(recipe_from(data), tmp_path).vllm_importance_sampling_correction
    assert trainer_config(recipe_from({"task": {"name": "arithmetic"}}), tmp_path).vllm_importance_sampling_correction


# The same corrections as regions of an objective


PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "mismatch.md"
ROWS = re.findall(r"^\| TRL 1.16 \| `(\w+)`, 0.8 to 1.3 \| `(\[.+\])` \|$", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("mode", "regions", "fast"),
    [*((*row, "off") for row in ROWS), *((*row, "auto") for row in ROWS if row[0].endswith("mask"))],
)
def test_trls_corrections_are_the_regions_that_the_page_names(
    mode: str, regions: str, fast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {mode for mode, _ in ROWS} == set(MODES)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL's name for an engine of the user's own
    theirs, _, recorded = pair(tmp_path, "dapo", mode)
    recorded.logprobs[3][2] = [-1.0]  # a value: without one the token has no policy term here, and the weight 1 there
    inputs = generate(theirs)
    clip = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28}
    objective = {"preset": "dapo", "regions": [clip, *yaml.safe_load(regions)]}
    args = MirrorConfig(
        **settings(tmp_path, use_vllm=False, vllm_importance_sampling_correction=False), objective=objective, fast=fast
    )
    ours = trainer(MirrorTrainer, args, rollout_func=lambda *_: None)
    ours.current_gradient_accumulation_steps = 1
    assert "sampler" in ours.policy_objective.needs
    own = {key: value for key, value in inputs.items() if key != "importance_sampling_ratio"}
    their_loss, their_gradient = loss_and_gradient(theirs, inputs)
    our_loss, our_gradient = loss_and_gradient(ours, own)
    weight = inputs["importance_sampling_ratio"]
    outside = (weight == 0) if mode.endswith("mask") else (weight == LOW) | (weight == HIGH)
    assert 0 < outside.sum() < outside.numel()
    assert abs(our_loss - their_loss) < TOLERANCE[fast]
    assert (our_gradient - their_gradient).abs().max() < TOLERANCE[fast] * max(1.0, their_gradient.abs().max().item())


def test_a_server_that_gets_no_weights_or_is_not_there_is_named_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "check_vllm", lambda _: None)
    vllm = {"mode": "server", "server_url": "http://127.0.0.1:9"}
    recipe = recipe_from({"task": {"name": "arithmetic"}, "train": {"use_vllm": True, "vllm": vllm}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^train.vllm.mode: 'server' .* needs a CUDA GPU\. Legal: colocate$"):
        setup.prepare(recipe)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prepared = setup.prepare(recipe)
    monkeypatch.undo()

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("The vLLM server can't be reached at http://127.0.0.1:9 after 240.0 seconds.")

    with pytest.raises(InputError, match=r"^train.vllm.server_url 'http://127.0.0.1:9': .*can't be reached"):
        setup.build_trainer(prepared, tmp_path, [], unreachable)


def test_the_bias_of_truncated_sampling_is_said_with_its_size() -> None:
    assert truncation(SimpleNamespace(top_p=1.0, top_k=0, min_p=None)) is None
    line = truncation(SimpleNamespace(top_p=0.8, top_k=50, min_p=0.1))
    assert line is not None
    assert "top_p 0.8: up to 1.25 times; top_k 50: " in line
    assert "min_p 0.1" in line


def test_an_engine_that_reports_other_probabilities_than_it_draws_from_is_refused() -> None:
    check_logprobs_mode("processed_logprobs")
    with pytest.raises(ValueError, match=r"must report processed_logprobs.* got logprobs_mode 'raw_logprobs'"):
        check_logprobs_mode("raw_logprobs")


def test_a_sampler_in_another_precision_is_said() -> None:
    assert other_precision("torch.bfloat16", torch.bfloat16) is None
    line = other_precision("torch.bfloat16", torch.float32)
    assert line is not None
    assert line.startswith("vLLM draws in bfloat16, the model is trained in float32")
    assert "--dtype float32" in line


@pytest.mark.parametrize(("mixed", "said"), [("no", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_vllm_in_this_process_computes_in_the_precision_of_the_trainer(
    mixed: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(rollouts, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", lambda **settings: started.append(settings), raising=False)
    whole = vllm_generation.LLM  # pyright: ignore[reportPrivateImportUsage]
    accelerator = SimpleNamespace(
        mixed_precision=mixed, unwrap_model=lambda model: model, device=SimpleNamespace(type="cuda")
    )
    built = SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(dtype=torch.float32), use_vllm=True, vllm_mode="colocate"
    )
    with vllm_as_trained(built):
        vllm_generation.LLM(model="x")  # pyright: ignore[reportPrivateImportUsage]
    assert started == [{"model": "x", "dtype": said}]
    assert vllm_generation.LLM is whole  # pyright: ignore[reportPrivateImportUsage]
