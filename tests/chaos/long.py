"""The long form of the chaos tests (``make chaos``): 50 kills, full disk, jumping clock, slow disk; prints a table.

Each fault hits a run of its own; the run is then resumed to its end and compared, byte for byte, with the unbroken one.
``--quick`` makes 6 kills. Exit status 1 if one run differs.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos import harness, recipes
from chaos.harness import Ended, Fault


def faults_of(done: Ended, seconds: float, kills: int, draw: random.Random) -> list[tuple[str, Fault]]:
    """Kills at numbered places and at random moments in turn, then the other kinds."""
    found = []
    for number in range(kills):
        if number % 2:
            found.append(("kill at a moment", Fault(kill_after=draw.uniform(0.1, seconds))))
        else:
            found.append(("kill at a place", Fault(kill_at=draw.randint(1, len(done.places)))))
    found.append(("full disk", Fault(file_bytes=1_400_000)))
    found.append(("jumping clock", Fault(clock_shift=1e6, kill_at=len(done.places) // 2)))
    found.append(("slow disk", Fault(slow_disk=0.02, kill_at=len(done.places) // 2)))
    found.append(("SIGTERM", Fault(signal_at=(len(done.places) // 2, signal.SIGTERM))))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="6 kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, root = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="chaos-"))
    counts: dict[tuple[str, str], list[int]] = {}
    for recipe in recipes.RECIPES:
        whole = root / recipe / "whole"
        harness.run(recipes.train(recipe, whole), whole, root / recipe / "scratch")  # imports, once
        whole = root / recipe / "unbroken"
        started = time.monotonic()
        done = harness.run(recipes.train(recipe, whole), whole, root / recipe / "scratch")
        seconds = time.monotonic() - started
        kills = (6 if options.quick else 50) // len(recipes.RECIPES)
        plan = faults_of(done, seconds, kills, draw)
        console = Console(stderr=True)
        for number, (kind, fault) in enumerate(track(plan, recipe, console=console, disable=not console.is_terminal)):
            run, scratch = root / recipe / f"run-{number}", root / recipe / f"scratch-{number}"
            arguments = recipes.train(recipe, run)
            hit = harness.run(arguments, run, scratch, fault)
            ended = harness.to_the_end(arguments, run, scratch)
            differ = [f"status {ended.status}"] if ended.status else differences(kind, whole, run)
            cell = counts.setdefault((recipe, kind), [0, 0, 0])
            cell[0] += not differ
            cell[1] += 1
            cell[2] += hit.status == 0
            if differ:
                print(f"{recipe}, {kind}, {fault}: {differ} ({run})")
    print("| run | fault | equal to the unbroken run | came behind its end |\n|---|---|---|---|")
    for (recipe, kind), (equal, total, late) in counts.items():
        print(f"| {recipe} | {kind} | {equal} of {total} | {late} |")
    return int(any(equal != total for equal, total, _ in counts.values()))


def differences(kind: str, whole: Path, run: Path) -> list[str]:
    """As in the harness; a signal's own checkpoint stands among the kept ones in place of an older one."""
    found = harness.differences(whole, run)
    return [line for line in found if not (kind == "SIGTERM" and line.startswith("only in one: checkpoints/"))]


if __name__ == "__main__":
    sys.exit(main())
