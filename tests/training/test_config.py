"""MirrorConfig beside TRL's fields: what was passed and what follows, through parsers, copies and files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser
from trl import TrlParser
from trl.trainer.grpo_config import GRPOConfig

import mirrorpo
from mirrorpo.config.objective_file import objective_data
from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError
from mirrorpo.losses.presets import PRESETS
from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.setup import prepare
from mirrorpo.training.trl_loss import TRL_FIELDS, trl_settings
from trl_pair import dataset, reward, settings

COMMON = {"report_to": "none", "bf16": False, "use_cpu": True, "activation_checkpointing": False}
FLAGS = [
    "--output_dir",
    "out",
    "--report_to",
    "none",
    "--bf16",
    "false",
    "--use_cpu",
    "--activation_checkpointing",
    "0",
]
DAPO_KL3 = {"preset": "dapo", "region": {"name": "kl3", "radius": 0.03}}


def config(**given: Any) -> MirrorConfig:
    return MirrorConfig("out", **COMMON, **given)


def from_parser(*flags: str) -> MirrorConfig:
    (found,) = HfArgumentParser(MirrorConfig).parse_args_into_dataclasses([*FLAGS, *flags], look_for_args_file=False)
    return found


def from_yaml(folder: Path, *flags: str, **given: Any) -> MirrorConfig:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "out", **COMMON, **given}))
    (found,) = TrlParser(MirrorConfig).parse_args_and_config(["--config", str(path), *flags])
    return found


# Without an objective


def test_without_an_objective_every_field_of_the_loss_has_trls_default() -> None:
    ours, theirs = config(), GRPOConfig("out", **COMMON)
    assert {name: getattr(ours, name) for name in TRL_FIELDS} == {name: getattr(theirs, name) for name in TRL_FIELDS}
    chosen = ours.resolved_objective()
    assert (chosen.name, chosen.penalties, chosen.aggregation) == ("TRL's dapo", (), "token_mean")


def test_every_loss_type_that_trl_knows_is_reproduced_or_refused_by_its_name() -> None:
    text = next(f for f in dataclasses.fields(GRPOConfig) if f.name == "loss_type").metadata["help"]
    for kind in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        assert kind in text
        if kind in ("bnpo", "vespo"):
            with pytest.raises(ValueError, match=f"loss_type '{kind}' is not supported: .*Legal: cispo, dapo"):
                config(loss_type=kind)
        else:
            assert config(loss_type=kind).loss_type == kind


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"loss_type": "dappo"}, "unknown loss_type 'dappo'; did you mean 'dapo'"),
        ({"scale_rewards": "batch"}, "scale_rewards 'batch' is not supported"),
        ({"scale_rewards": "groups"}, "unknown scale_rewards 'groups'; did you mean 'group'"),
        ({"importance_sampling_level": "word"}, "unknown importance_sampling_level 'word'"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "is not supported with loss_type 'cispo'"),
        ({"importance_sampling_level": "sequence", "beta": 0.1}, "use_bias_correction_kl must be False"),
        ({"delta": 0.9}, "delta must be greater than 1, got 0.9"),
        ({"beta": -0.1}, "coefficient must be a number"),
    ],
)
def test_what_no_objective_reproduces_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        config(**given)
    assert "\n" not in str(caught.value)


# With an objective


@pytest.mark.parametrize("preset", PRESETS)
def test_the_fields_that_an_objective_implies_agree_with_it(preset: str) -> None:
    made = config(objective=preset)
    implied = trl_settings(mirrorpo.objective(preset))
    assert {name: getattr(made, name) for name in implied} == implied
    # passed by hand they are accepted, and change nothing
    given = {name: value for name, value in implied.items() if value is not None}
    assert config(objective=preset, **given).resolved_objective().describe() == made.resolved_objective().describe()


CONTRADICTIONS = [
    ("dapo", "epsilon_high", 0.2),
    ("gspo", "epsilon", 0.2),  # TRL's default
    ("grpo", "loss_type", "dapo"),  # TRL's default
    ("grpo", "use_bias_correction_kl", True),  # TRL's default
    ("dr_grpo", "scale_rewards", "group"),  # TRL's default
    ("dr_grpo", "scale_rewards", True),
    ("gspo", "importance_sampling_level", "token"),  # TRL's default
    ("dapo", "delta", 4.0),
    ("atr_grpo", "epsilon", 0.2),  # TRL's default; kl3 has a radius
    ("dapo", "sapo_temperature_pos", 1.0),  # TRL's default; not a sigmoid
    ("sapo", "sapo_temperature_neg", 1.5),
    ("cispo", "epsilon_high", 4.0),
    ("dapo", "vespo_k_pos", 2.0),  # TRL's default
]


@pytest.mark.parametrize(("objective", "name", "value"), CONTRADICTIONS)
def test_a_field_that_contradicts_the_objective_is_refused_however_it_was_passed(
    objective: str, name: str, value: Any, tmp_path: Path
) -> None:
    reason = f"{name}=.*has no effect: it contradicts objective '{objective}'.*'{TRL_FIELDS[name]}'"
    ways: list[Callable[[], Any]] = [
        lambda: config(objective=objective, **{name: value}),
        lambda: from_yaml(tmp_path, objective=objective, **{name: value}),
        lambda: dataclasses.replace(config(**{name: value}), objective=objective),
        lambda: from_parser("--objective", objective, f"--{name}", str(value)),
    ]
    for make in ways:
        with pytest.raises(ValueError, match=reason):
            make()


def test_the_flag_that_switches_a_boolean_off_works_as_in_trl() -> None:
    for flag in ("--no_use_bias_correction_kl", "--no-use-bias-correction-kl"):
        made = from_parser(flag, "--beta", "0.1")
        assert made.use_bias_correction_kl is False
        assert made.resolved_objective().penalties[0].estimator == "sampled"
    assert from_parser("--use_bias_correction_kl").use_bias_correction_kl is True
    with pytest.raises(ValueError, match="use_bias_correction_kl=False has no effect"):
        from_parser("--objective", '{"preset": "grpo", "estimator": "weighted"}', "--no_use_bias_correction_kl")


def test_the_help_of_the_parser_shows_the_objective_and_hides_what_is_internal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(MirrorConfig).parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--objective" in text
    assert "--implied" not in text


# Ways to write an objective


@pytest.mark.parametrize(
    "text", ["dapo", '"dapo"', json.dumps(DAPO_KL3), "{preset: dapo, region: {name: kl3, radius: 3e-2}}"]
)
def test_an_objective_on_the_command_line_is_a_name_or_json(text: str, tmp_path: Path) -> None:
    expected = mirrorpo.objective("dapo") if text in ("dapo", '"dapo"') else mirrorpo.objective_from(DAPO_KL3)
    for made in (from_parser("--objective", text), from_yaml(tmp_path, "--objective", text, objective="grpo")):
        assert objective_data(made.resolved_objective()) == objective_data(expected)


@pytest.mark.parametrize("given", ["dapo", DAPO_KL3])
def test_an_objective_in_a_config_file_is_a_name_or_a_mapping(given: Any, tmp_path: Path) -> None:
    made = from_yaml(tmp_path, objective=given, fast=False)
    assert objective_data(made.resolved_objective()) == objective_data(mirrorpo.objective_from(given))
    assert made.fast == "off"


def test_numbers_in_a_config_file_may_have_an_exponent(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"  # YAML 1.1 reads 1e-4 as a text
    path.write_text("output_dir: out\nreport_to: none\nbf16: false\nuse_cpu: true\nactivation_checkpointing: false\n")
    with path.open("a") as file:
        file.write("objective: {preset: dapo, region: {name: kl3, radius: 3e-2}, divergence: kl, coefficient: 1e-4}\n")
    (made,) = TrlParser(MirrorConfig).parse_args_and_config(["--config", str(path)])
    chosen = made.resolved_objective()
    assert chosen.penalties[0].coefficient == 1e-4
    assert objective_data(chosen.region) == objective_data(mirrorpo.trust_region("kl3", radius=0.03))


def test_an_objective_file_is_read_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "objective.yaml"
    path.write_text(yaml.safe_dump(DAPO_KL3))
    for made in (from_parser("--objective", str(path)), config(objective=path)):
        assert made.resolved_objective().region.name == "kl3"


def test_an_objective_that_was_built_is_taken_as_it_is() -> None:
    chosen = mirrorpo.objective("prob_l2_grpo", coefficient=0.5)
    made = config(objective=chosen)
    assert made.resolved_objective() is chosen
    assert made.objective == {"preset": "prob_l2_grpo", "coefficient": 0.5}
    assert (made.beta, made.loss_type) == (0.5, "dr_grpo")
    assert config(objective=chosen, beta=0.1).resolved_objective().penalties[0].coefficient == 0.1


# Copies

BY_HAND = mirrorpo.objective("dr_grpo", divergence=lambda x: x**3, coefficient=0.1)
COPIES: dict[str, Callable[[MirrorConfig], MirrorConfig]] = {
    "replace": dataclasses.replace,
    "deepcopy": copy.deepcopy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "asdict": lambda c: MirrorConfig(**dataclasses.asdict(c)),
    "to_dict": lambda c: MirrorConfig(**c.to_dict()),
    "json": lambda c: MirrorConfig(**json.loads(c.to_json_string())),
    "parse_dict": lambda c: HfArgumentParser(MirrorConfig).parse_dict(c.to_dict())[0],
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1},
        {"objective": "gspo"},
        {"objective": DAPO_KL3},
        {"objective": "prob_l2_grpo", "beta": 0.5},
        {"objective": BY_HAND},
        {"objective": dataclasses.replace(mirrorpo.objective("dapo"), level="sequence")},
    ],
    ids=["TRL's defaults", "TRL's fields", "preset", "mapping", "beta", "a function", "changed by hand"],
)
def test_a_copy_has_the_same_objective_and_forgets_what_it_implied(given: dict[str, Any], how: str) -> None:
    made = config(**given)
    copied = COPIES[how](made)
    assert objective_data(copied.resolved_objective()) == objective_data(made.resolved_objective())
    assert {name: getattr(copied, name) for name in TRL_FIELDS} == {name: getattr(made, name) for name in TRL_FIELDS}
    if "beta" not in given:
        other = dataclasses.replace(copied, objective="sapo", loss_type=None)
        assert (other.loss_type, other.beta) == ("sapo", 0.0)
    larger = dataclasses.replace(copied, per_device_train_batch_size=16)
    assert (larger.generation_batch_size, larger.steps_per_generation) == (16, 1)


def test_what_was_passed_is_still_known_after_a_copy() -> None:
    made = copy.deepcopy(dataclasses.replace(config(epsilon=0.2)))
    with pytest.raises(ValueError, match=r"epsilon=0\.2 has no effect"):
        dataclasses.replace(made, objective="gspo")


def test_a_function_cannot_come_from_another_process_and_that_is_said() -> None:
    kept = config(objective=BY_HAND).to_dict()
    kept["objective"]["by_hand"] = "of another process"
    with pytest.raises(ValueError, match=r"built by hand in another process \(dr_grpo: .*pass it again"):
        config(objective=kept["objective"])


def test_a_field_that_is_changed_later_changes_the_objective() -> None:
    made = config(epsilon_high=0.28)
    made.loss_type = "grpo"
    assert made.resolved_objective().aggregation == "sequence_mean"
    made.objective = "gspo"
    with pytest.raises(ValueError, match="epsilon_high"):
        made.resolved_objective()


def test_objective_data_tells_objectives_apart_and_equal_ones_not() -> None:
    found = {name: json.dumps(objective_data(mirrorpo.objective(name)), sort_keys=True) for name in PRESETS}
    assert len(set(found.values())) == len(PRESETS)
    for name in PRESETS:
        assert found[name] == json.dumps(objective_data(mirrorpo.objective(name)), sort_keys=True)
    powers = [mirrorpo.objective("dapo", divergence=f, coefficient=1) for f in (lambda x: x**2, lambda x: x**3)]
    powers += [mirrorpo.objective("dapo", divergence=lambda x, n=n: x**n, coefficient=1) for n in (2, 3)]
    assert len({json.dumps(objective_data(power)) for power in powers}) == 4


# The trainer


def test_the_trainer_takes_a_built_in_model_by_its_name_and_a_card_names_the_objective(tmp_path: Path) -> None:
    chosen = mirrorpo.objective("dapo", epsilon_high=0.3)
    args = MirrorConfig(**settings(tmp_path))
    built = MirrorTrainer("builtin:tiny", reward_funcs=reward, args=args, train_dataset=dataset(), objective=chosen)
    assert built.args.objective == {"preset": "dapo", "epsilon_high": 0.3}
    assert built.policy_objective is chosen is built.args.resolved_objective()
    built.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for piece in (
        chosen.describe(),
        "arxiv.org/abs/2503.14476",
        "@software{mirrorpo",
        "huggingface.co/papers/2503.14476",
        "trained with mirrorpo, by the objective of [DAPO]",
        "- mirrorpo: ",
    ):
        assert piece in card
    paper, library = card.index("eprint        = {2503.14476}"), card.index("@software{mirrorpo")
    assert card.index("Cite the objective as:") < paper < card.index("Cite mirrorpo as:") < library
    assert "DeepSeekMath" not in card


def test_an_objective_for_the_trainer_that_contradicts_its_configuration_is_refused(tmp_path: Path) -> None:
    args = MirrorConfig(**settings(tmp_path, beta=0.3))
    with pytest.raises(ValueError, match=r"beta=0\.3 has no effect: it contradicts objective 'dapo', which has 0\.0"):
        MirrorTrainer("builtin:tiny", reward_funcs=reward, args=args, objective=mirrorpo.objective("dapo"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernels": "cuda"}, r"unknown kernels 'cuda'\. Legal: auto, torch, triton"),
        ({"kernels": "triton", "fast": "off"}, "kernels 'triton' has no effect with fast='off'"),
    ],
)
def test_kernels_that_would_have_no_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**given)


def test_triton_without_a_gpu_ends_the_trainers_construction_and_a_recipes_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = MirrorConfig(**settings(tmp_path), objective="dapo", kernels="triton")
    with pytest.raises(ValueError, match="kernels must be 'torch' or 'auto' here, got 'triton'"):
        MirrorTrainer("builtin:tiny", reward_funcs=reward, args=args, train_dataset=dataset())
    with pytest.raises(InputError, match=r"train\.kernels: 'triton' cannot run here: .*Legal: torch, auto"):
        prepare(recipe_from({"task": {"name": "arithmetic"}}, ["train.kernels=triton"]))
    with pytest.raises(InputError, match="kernels 'triton' has no effect with fast: off"):
        recipe_from({"task": {"name": "arithmetic"}}, ["train.kernels=triton", "train.fast=off"])
