"""Models in parts, by the libraries themselves: two processes train, are taken up at a checkpoint, and end equal.

``python tests/real/sharded.py [fsdp2] [zero2] [zero3]`` in an environment with ``mirrorpo[train]``, and ``deepspeed``
for ZeRO. Each runs ``mirrorpo train`` under ``accelerate launch`` with two gloo processes: a whole run, and one that
goes on from the whole run's first checkpoint. The weights at the end must be equal to the bit, and loss and gradient
norm of every step are the same in every way, to 1e-5. (That they are those of one process: tests/training; sharded
models draw other completions, so whole runs cannot be compared with it.)

accelerate leaves its FSDP plug-in out where there is no accelerator; here it is put in. DeepSpeed would compile a
faster way between processes of one machine; here it is left out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

STEPS, SAVED = 3, 2
COMPARED = ("loss", "grad_norm")
RECIPE = ("arithmetic", f"train.steps={STEPS}", f"train.save_every={SAVED}", "eval.problems=0")
SMALL = ("train.prompts_per_step=4", "train.group_size=4", "train.updates_per_batch=1")
WAYS = {
    "fsdp2": (
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
    ),
    "zero2": ("--use_deepspeed", "--zero_stage", "2"),
    "zero3": ("--use_deepspeed", "--zero_stage", "3", "--zero3_init_flag", "true", "--zero3_save_16bit_model", "true"),
}


def inside(arguments: list[str]) -> None:
    """One of the processes: the command line, with the plug-in that was asked for."""
    from accelerate.state import AcceleratorState, DistributedType

    init, held = AcceleratorState.__init__, []

    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **given)
        held.extend([fsdp_plugin] if fsdp_plugin is not None else [])
        if held:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, held[0]

    AcceleratorState.__init__ = with_plugin
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch as comm  # pyright: ignore[reportMissingImports]

        comm.build_shm_op = lambda: None
    from mirrorpo.cli.start import main

    sys.argv = ["mirrorpo", *arguments]
    main()


def launched(way: tuple[str, ...], out: Path, *more: str) -> None:
    """A run with two processes; raises with the end of what it said if it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *way, "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(Path(__file__).resolve())]
    command += ["train", *RECIPE, *SMALL, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"status {done.returncode}: {(done.stdout + done.stderr)[:3000]}")


def weights(out: Path) -> str:
    return sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check(way: str, folder: Path, first: list[dict[str, Any]]) -> str:
    """One way: its line; raises ``AssertionError`` where something differs."""
    whole, again = folder / way, folder / f"{way}-again"
    launched(WAYS[way], whole)
    lines = metrics(whole)
    assert len(lines) == STEPS
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 1e-3 for line in lines)
    first.extend([] if first else lines)
    apart = max(abs(mine[key] - other[key]) for mine, other in zip(lines, first, strict=True) for key in COMPARED)
    assert apart < 1e-5, f"{way}: {apart:g} from the first way"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / f"checkpoint-{STEPS}")
    shutil.rmtree(again / "model")
    (again / "summary.json").unlink()
    launched(WAYS[way], again, "--resume")
    assert weights(again) == weights(whole), f"{way}: the resumed run ends elsewhere"
    assert metrics(whole)[-1]["loss"] == metrics(again)[-1]["loss"]
    return f"{way}: {apart:.1e} from the first way; resumed at step {SAVED}, equal to the bit"


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="mirrorpo-sharded-") as name:
        folder = Path(name)
        first: list[dict[str, Any]] = []
        for way in wanted or WAYS:
            sys.stdout.write(check(way, folder, first) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    if "RANK" in os.environ:
        inside(sys.argv[1:])
    else:
        main(sys.argv[1:])
