"""A checkpoint is trusted if every byte is the one that was written; nothing in it is ever run."""

from __future__ import annotations

import json
import pickle
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import get_scheduler
from transformers.trainer_pt_utils import safe_globals

from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.checkpoints import (
    CheckpointError,
    all_checkpoints,
    clean,
    fault_of,
    foreign_state,
    newest_whole,
    publish,
    read_progress,
    rotate,
    seal,
    write_progress,
    writing_folder,
)
from trl_pair import settings, trainer


def checkpoint(root: Path, step: int) -> Path:
    folder = writing_folder(root, step)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1000))
    (folder / "state.json").write_text("{}")
    seal(folder, step)
    publish(folder, root / f"checkpoint-{step}")
    return root / f"checkpoint-{step}"


def test_a_checkpoint_as_it_was_written_has_no_fault(tmp_path: Path) -> None:
    assert fault_of(checkpoint(tmp_path, 3)) is None
    assert newest_whole(tmp_path).path == tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda p: (p / "weights").write_bytes(bytes(999)), "weights has 999 bytes, 1,000 were written"),
        (lambda p: (p / "weights").write_bytes(bytes(999) + b"x"), "weights is not what was written (sha256)"),
        (lambda p: (p / "weights").unlink(), "weights is missing"),
        (lambda p: (p / "more").write_bytes(b""), "more does not belong to it"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not a manifest"),
        (lambda p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json is not a manifest"),
        (lambda p: (p / "manifest.json").write_text('{"files": 3, "format": 1, "step": 3}'), "is not a manifest"),
        (lambda p: ((p / "state.json").unlink(), (p / "state.json").symlink_to("/etc/passwd")), "is not a manifest"),
    ],
)
def test_each_harm_is_found_and_the_checkpoint_before_is_taken(
    harm: Callable[[Path], Any], fault: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 3)
    harm(newest)
    found = newest_whole(tmp_path)
    assert found.path == tmp_path / "checkpoint-2"
    assert found.damaged[0][0] == newest
    assert fault in found.damaged[0][1]


def test_only_the_newest_are_kept_by_step_and_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        checkpoint(tmp_path, step)
    writing_folder(tmp_path, 12).mkdir()
    (tmp_path / ".old-checkpoint-8").mkdir()
    rotate(tmp_path, 2)
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert all_checkpoints(tmp_path)[0].name == "checkpoint-11"


def test_a_checkpoint_of_a_later_format_is_refused_in_one_line_and_stays(tmp_path: Path) -> None:
    newest = checkpoint(tmp_path, 3)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(CheckpointError, match=r"checkpoint-3: written in format 3, this version reads 1 to 2; resume"):
        newest_whole(tmp_path)
    assert newest.is_dir()


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    progress = {
        "buffer": [{"a": shared[:3], "b": shared[3:]}],
        "metrics": {"train": {"reward": [np.float64(0.5)], "tokens": deque([1, 2])}},
        "none": None,
        "t": (1, 2.5, True),
    }
    write_progress(tmp_path, 1, progress)
    again = read_progress(tmp_path, 1, torch.device("cpu", 0))
    assert again is not None
    assert torch.equal(again["buffer"][0]["b"], shared[3:])
    assert again["metrics"] == {"train": {"reward": [0.5], "tokens": [1, 2]}}
    assert (again["none"], again["t"]) == (None, (1, 2.5, True))
    assert read_progress(tmp_path, 0, torch.device("cpu")) is None
    with pytest.raises(TypeError, match=r"progress\.f\[1\]: a function cannot be kept"):
        write_progress(tmp_path, 0, {"f": [0, lambda: 0]})


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (self.path, "w"))


def built(folder: Path) -> MirrorTrainer:
    config = MirrorConfig(**settings(folder, max_steps=2, save_strategy="steps", save_steps=1), objective="dr_grpo")
    return trainer(MirrorTrainer, config)


def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    built(tmp_path / "run").train()
    folder = tmp_path / "run" / "checkpoint-1"
    bomb = pickle.dumps(Bomb(str(tmp_path / "escaped")))

    # Put beside the others: it does not belong there.
    (folder / "more.pt").write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"more\.pt does not belong to it"):
        built(tmp_path / "run").train(resume_from_checkpoint=str(folder))
    (folder / "more.pt").unlink()

    # In place of a kept state, with a manifest that fits: it is read as data, and refused; as is any other object.
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "progress-0.pt"):
        whole = (folder / name).read_bytes()
        for harm in (lambda path: path.write_bytes(bomb), lambda path: torch.save(Path("x"), path)):
            harm(folder / name)
            seal(folder, 1)
            assert fault_of(folder) is None
            with pytest.raises(CheckpointError, match=f"{name} holds more than tensors and plain data"):
                built(tmp_path / "run").train(resume_from_checkpoint=str(folder))
        (folder / name).write_bytes(whole)

    # As the weights.
    (folder / "pytorch_model.bin").write_bytes(bomb)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        built(tmp_path / "run").train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "escaped").exists()
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "manifest.json").read_text())["step"] == 2


OPTIMIZERS = ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
SCHEDULES = {
    "linear": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {},
    "inverse_sqrt": {},
    "reduce_lr_on_plateau": {},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "greedy": {},
}


def test_the_states_of_optimisers_and_schedules_are_plain_data(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    for name in OPTIMIZERS:
        optimizer = getattr(torch.optim, name)([weight], lr=1e-3)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        assert foreign_state(tmp_path) is None, name
    for name, options in SCHEDULES.items():
        schedule = get_scheduler(name, optimizer, 2, 10, scheduler_specific_kwargs=options)
        torch.save(schedule.state_dict(), tmp_path / "scheduler.pt")
        assert foreign_state(tmp_path) is None, name
    # Its milestones are a Counter.
    milestones = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    torch.save(milestones.state_dict(), tmp_path / "scheduler.pt")
    assert foreign_state(tmp_path) is None


def write_format_1(folder: Path, name: str, state: Any) -> None:
    """A state as version 0.1 kept it: a JSON tree in which each container says its kind, and tensors beside it."""
    tensors: dict[str, torch.Tensor] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, torch.Tensor | np.ndarray):
            key = str(len(tensors))
            tensors[key] = torch.as_tensor(value).clone()
            return {"__kind__": "tensor" if isinstance(value, torch.Tensor) else "array", "name": key}
        if isinstance(value, dict):
            return {"__kind__": "dict", "items": [[key, packed(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"__kind__": "tuple", "items": [packed(item) for item in value]}
        return [packed(item) for item in value] if isinstance(value, list) else value

    (folder / f"{name}.json").write_text(json.dumps(packed(state)))
    save_file(tensors, folder / f"{name}.safetensors")


def test_a_checkpoint_of_version_0_1_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    built(tmp_path / "run").train()
    weights = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    unbroken = weights.read_bytes()
    folder = tmp_path / "run" / "checkpoint-1"
    with safe_globals():
        kept = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt*")}
    random = {"torch" if key == "cpu" else key: value for key, value in kept["rng_state"].items()}
    write_format_1(folder, "optimizer", {"optimizer": kept["optimizer"], "scheduler": kept["scheduler"]})
    write_format_1(folder, "rank-0", {"random": random, "progress": kept["progress-0"]})
    for path in folder.glob("*.pt*"):
        path.unlink()
    seal(folder, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    built(tmp_path / "run").train(resume_from_checkpoint=str(folder))
    assert weights.read_bytes() == unbroken
    assert sorted(path.name for path in (tmp_path / "run").glob(".*")) == []


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_resumed_run_says_what_it_takes_up_and_when_its_objective_is_another(
    tmp_path: Path, optimizer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def built(objective: Any) -> Any:
        more = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_only_model": not optimizer}
        made = trainer(MirrorTrainer, MirrorConfig(**settings(tmp_path, **more), objective=objective))
        monkeypatch.setattr(
            "mirrorpo.training.trainer.logger.warning", lambda text, *values: said.append(text % values)
        )
        return made

    built("grpo").train()
    said.clear()
    built("grpo").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [line for line in said if line.startswith("resumed")] == [
        "resumed from checkpoint-2: weights, optimiser, learning-rate schedule, random states and penalty coefficient"
        if optimizer
        else "resumed from checkpoint-2: weights and penalty coefficient; it holds no optimiser, whose moments start "
        "at 0"
    ]
    said.clear()
    built({"preset": "grpo", "coefficient": 0.5}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = [line for line in said if line.startswith("resumed with another objective")]
    assert len(other) == 1
    assert "0.04" in other[0]
    assert "0.5" in other[0]
