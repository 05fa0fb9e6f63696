"""The long form of the chaos tests (``make chaos``): 50 kills over train, evolve and study, and other faults; a table.

Each fault hits a run of its own; the run is then resumed to its end and compared, byte for byte, with the unbroken one.
``--kills N`` makes another number, ``--only evolve,study`` takes some of the runs. Exit status 1 if one run differs.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos import comparing, harness, recipes
from chaos.harness import Ended, Fault
from chaos.outside import Strike

Planned = list[tuple[str, Fault]]
# No file may grow beyond: less than an optimiser's state, less than a report or a picture.
_DISK = {"full": 1_400_000, "lora": 1_400_000, "evolve": 30_000, "study": 30_000}


def faults_of(name: str, done: Ended, seconds: float, kills: int, draw: random.Random) -> Planned:
    """Kills at numbered places and at random moments in turn, then the other kinds."""
    found: Planned = []
    for number in range(kills):
        if number % 2:
            found.append(("kill at a moment", Fault(kill_after=draw.uniform(0.1, seconds))))
        else:
            found.append(("kill at a place", Fault(kill_at=draw.randint(1, len(done.places)))))
    middle = len(done.places) // 2
    found.append(("full disk", Fault(file_bytes=_DISK[name])))
    found.append(("jumping clock", Fault(clock_shift=1e6, kill_at=middle)))
    found.append(("slow disk", Fault(slow_disk=0.02, kill_at=middle)))
    found.append(("SIGTERM", Fault(signal_at=(middle, signal.SIGTERM))))
    return [*found, *(faults_of_workers() if name in recipes.COORDINATED else [])]


def faults_of_workers() -> Planned:
    """What can only happen where workers do the work."""
    return [
        ("worker killed", Fault(strike=Strike(behind=0, at="worker"))),
        ("worker killed", Fault(strike=Strike(behind=1, at="worker"))),
        ("worker killed", Fault(strike=Strike(behind=1, at="worker"), spawned=True)),
        ("SIGTERM to a worker", Fault(strike=Strike(behind=1, at="worker", number=signal.SIGTERM))),
        ("Ctrl-C to all", Fault(strike=Strike(behind=1, at="group", number=signal.SIGINT), spawned=True)),
    ]


@dataclass
class Cell:
    """What came of a kind of fault."""

    equal: int = 0
    total: int = 0
    late: int = 0


def suffer(name: str, kind: str, fault: Fault, whole: Path, root: Path, cell: Cell) -> None:
    """One run, its fault, its end, and what is different then."""
    run, scratch = root / "run", root / "scratch"
    arguments = recipes.arguments(name, run)
    hit = harness.run(arguments, run, scratch, fault)
    struck_worker = fault.strike is not None and fault.strike.at == "worker"
    cell.late += not hit.workers if struck_worker else hit.status == 0
    ended = hit if struck_worker else harness.to_the_end(arguments, run, scratch)
    differ = [f"status {ended.status}: {ended.stderr[-300:]}"] if ended.status else differences(kind, whole, run)
    if hit.left and (fault.strike is None or fault.strike.number != signal.SIGKILL):
        differ.append(f"workers left: {sorted(hit.left)}")
    cell.equal += not differ
    cell.total += 1
    if differ:
        print(f"{name}, {kind}, {fault}: {differ} ({run})", flush=True)


def differences(kind: str, whole: Path, run: Path) -> list[str]:
    """As in general; a signal's own checkpoint stands among the kept ones in place of an older one."""
    found = comparing.differences(whole, run)
    return [line for line in found if not (kind == "SIGTERM" and line.startswith("only in one: checkpoints/"))]


def unbroken(name: str, root: Path) -> tuple[Path, Ended, float]:
    """The folder of the unbroken run, how it ended, and its seconds; the first run pays for the imports."""
    for folder in (root / "first", root / "unbroken"):
        started = time.monotonic()
        done = harness.run(recipes.arguments(name, folder), folder, root / "scratch")
        if done.status:
            raise SystemExit(f"{name}: the unbroken run ended with status {done.status}\n{done.stderr}")
    return folder, done, time.monotonic() - started


def table(cells: dict[tuple[str, str], Cell]) -> str:
    """In Markdown."""
    lines = ["| run | fault | equal to the unbroken run | came behind its end |", "|---|---|---|---|"]
    lines += [f"| {name} | {kind} | {c.equal} of {c.total} | {c.late} |" for (name, kind), c in cells.items()]
    return "\n".join(lines)


def shares(kills: int, names: Sequence[str]) -> list[int]:
    """The kills of each run: as many, and one more for the first ones.

    Example:
        >>> shares(50, ("a", "b", "c", "d"))
        [13, 13, 12, 12]
    """
    return [kills // len(names) + (number < kills % len(names)) for number in range(len(names))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="over all runs (default 50)")
    parser.add_argument("--only", default=",".join(recipes.ALL), help="runs, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.only.split(",")
    if not set(names) <= set(recipes.ALL):
        parser.error(f"--only {options.only}: must be of {', '.join(recipes.ALL)}")
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    cells: dict[tuple[str, str], Cell] = {}
    console = Console(stderr=True)
    for name, kills in zip(names, shares(options.kills, names), strict=True):
        whole, done, seconds = unbroken(name, root / name)
        plan = faults_of(name, done, seconds, kills, random.Random(f"{options.seed} {name}"))
        for number, (kind, fault) in enumerate(track(plan, name, console=console, disable=not console.is_terminal)):
            cell = cells.setdefault((name, kind), Cell())
            suffer(name, kind, fault, whole, root / name / str(number), cell)
        console.print(f"{name}: {len(plan)} faults", highlight=False)
    print(table(cells))
    return int(any(cell.equal != cell.total for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
