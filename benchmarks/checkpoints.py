"""What do checkpoints cost, and how long until the first step? Measured on the demo's recipe (1 min).

Overhead: the seconds of one checkpoint over those of the steps between two at the default interval. Start: from the
launch of ``mirrorpo train`` to the first line of ``metrics.jsonl``, evaluation before training included.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import parser, show

DEFAULT_INTERVAL = 20


def start_to_first_step(folder: Path) -> float:
    """Seconds from launch to the first line of metrics; the process is ended behind it."""
    command = [sys.executable, "-m", "mirrorpo.cli", "train", "arithmetic", "--out", str(folder)]
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    spent = time.monotonic() - started
    process.kill()
    process.wait()
    return spent


def overhead(folder: Path, steps: int) -> float:
    """Median seconds of a checkpoint over those of the steps between two."""
    from rich.console import Console

    from mirrorpo.config.objective_file import find_recipe
    from mirrorpo.config.train import load_recipe
    from mirrorpo.training.resuming import ResumableTrainer
    from mirrorpo.training.run import train

    spent: list[float] = []
    save = ResumableTrainer._save_checkpoint

    def timed(self: ResumableTrainer, model: object, trial: object) -> None:
        started = time.perf_counter()
        save(self, model, trial)
        spent.append(time.perf_counter() - started)

    ResumableTrainer._save_checkpoint = timed
    recipe = load_recipe(find_recipe("arithmetic"), [f"train.steps={steps}", "train.save_every=1", "eval.problems=0"])
    train(recipe, folder, resume=False, console=Console(stderr=True, quiet=True), command="mirrorpo train arithmetic")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(spent) / (DEFAULT_INTERVAL * statistics.median(line["step_time"] for line in lines))


def main() -> None:
    args = parser(__doc__).parse_args()
    folder = Path(tempfile.mkdtemp())
    show("start to first step", {"mirrorpo train arithmetic": start_to_first_step(folder / "start")}, "s", args.json)
    share = 100 * overhead(folder / "run", 4 if args.quick else 20)
    show("checkpoints at the default interval", {"share of the steps' time": share}, "%", args.json)


if __name__ == "__main__":
    main()
