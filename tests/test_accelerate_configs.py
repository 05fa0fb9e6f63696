"""accelerate reads the shipped configurations, and what they ask for is what their first lines say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import nn

from mirrorpo.config.train import Recipe, recipe_from
from mirrorpo.errors import InputError
from mirrorpo.training import MirrorConfig, distributed, run
from mirrorpo.training.nonfinite import NonFinite

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "accelerate"
EXPECTED = {
    "gpus": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


def environment(name: str) -> dict[str, str]:
    """What ``accelerate launch --config_file`` hands to each process."""
    file = str(FOLDER / f"{name}.yaml")
    args = launch_command_parser().parse_args(["--config_file", file, "--main_process_port", "0", "-m", "mirrorpo.cli"])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == 8
    assert args.mixed_precision == "no"
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(args)[1]
    assert args.use_fsdp or args.multi_gpu
    return prepare_multi_gpu_env(args)


def recipe(**more: object) -> Recipe:
    return recipe_from({"task": {"name": "arithmetic"}, **more})


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(name)
    assert EXPECTED[name].items() <= found.items()
    for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(key, raising=False)
        if key in found:
            monkeypatch.setenv(key, found[key])
    assert distributed.shards_parameters() == (name in ("fsdp2", "zero3"))
    notice = distributed.unsharded_notice("MULTI_CPU")
    assert (notice is not None) == (name != "gpus")  # with ACCELERATE_USE_CPU it leaves DeepSpeed out too
    assert distributed.unsharded_notice("FSDP" if name == "fsdp2" else "DEEPSPEED") is None
    if distributed.shards_parameters():
        with pytest.raises(InputError, match=r"eval\.problems: must be 0 with FSDP and ZeRO-3.*got 512"):
            run.check_processes(recipe())
    run.check_processes(recipe(eval={"problems": 0}))


REFUSED = "on_nonfinite must be 'raise' with DeepSpeed"


@pytest.mark.parametrize("name", EXPECTED)
def test_leaving_out_numbers_is_refused_where_accelerate_uses_deepspeed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", environment(name).get("ACCELERATE_USE_DEEPSPEED", "false"))
    skipping = recipe(train={"on_nonfinite": "skip"}, eval={"problems": 0})
    if name in ("zero2", "zero3"):
        assert distributed.uses_deepspeed()
        with pytest.raises(InputError, match=r"train\.on_nonfinite: must be raise with DeepSpeed.*got skip"):
            run.check_processes(skipping)
        with pytest.raises(ValueError, match=REFUSED):
            MirrorConfig(str(tmp_path), on_nonfinite="skip")
    else:
        run.check_processes(skipping)
        MirrorConfig(str(tmp_path), on_nonfinite="skip", report_to="none", bf16=False, activation_checkpointing=False)
    run.check_processes(recipe(eval={"problems": 0}))


def test_a_deepspeed_configuration_of_the_trainer_itself_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        MirrorConfig(str(tmp_path), on_nonfinite="skip", deepspeed={"zero_optimization": {"stage": 2}})


def test_a_plugin_made_by_hand_is_seen_as_accelerate_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    plugin = DeepSpeedPlugin(hf_ds_config={"train_batch_size": "auto", "zero_optimization": {"stage": 2}})
    monkeypatch.setattr("accelerate.accelerator.is_deepspeed_available", lambda: False)
    with pytest.raises(ImportError, match="DeepSpeed is not installed"):
        Accelerator(deepspeed_plugin=plugin)
    assert distributed.uses_deepspeed(), "accelerate has said so before it looked for the package"
    with pytest.raises(ValueError, match=REFUSED):
        MirrorConfig(str(tmp_path), on_nonfinite="skip")


def test_an_accelerator_that_came_after_the_configuration_is_refused_at_the_first_step() -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=REFUSED):
        NonFinite("skip", 1).settle(nn.Linear(1, 1), accelerator, 1.0, "tokens", 1)


@pytest.mark.parametrize(
    ("processes", "train", "reason"),
    [
        (3, {}, "the 256 completions of an update .* must divide by the 3 processes"),
        (2, {"micro_batch_size": 256}, "train.micro_batch_size: must divide the 128 completions per process, got 256"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_before_a_folder_is_made(
    processes: int, train: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "world_size", lambda: processes)
    with pytest.raises(InputError, match=reason):
        run.check_processes(recipe(train=train))


def test_processes_that_were_given_different_recipes_are_told_which_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(value: object) -> list[object]:
        if not isinstance(value, dict):
            return [value, value]
        return [value, {**value, "train.seed": 1}]

    monkeypatch.setattr(distributed, "gather", with_another)
    with pytest.raises(InputError, match=r"train.seed must be the same on all 2 processes.* process 1: 1"):
        run.check_processes(recipe())


def test_what_fails_on_one_process_ends_the_others_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "gather", lambda value: ["--out run: is a file, not a folder", value])
    with pytest.raises(SystemExit) as ended:
        distributed.together(lambda: 1, main_only=True)
    assert ended.value.code == 2
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="is a file, not a folder"):
        distributed.together(lambda: 1)
