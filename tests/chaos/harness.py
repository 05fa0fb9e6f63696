"""What happens to runs, on purpose: a command in a process of its own, and a fault at a chosen place in it.

A process is forked from a server that has imported everything once (``multiprocessing``'s forkserver), so that a run of
the embedded recipe takes a second. Faults come from Python's audit events: each time the program opens, renames or
removes something inside the run folder is a numbered place, the same one in every run, and the process can kill itself
there. Nothing in the program is replaced. Workers are forked from the same server; what they open is not counted, and
faults in between come from outside, by what is on record (``chaos.outside``).
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from chaos.outside import Strike, alive, strike

_EVENTS = (
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "sqlite3.connect",
)  # fmt: skip
_PRELOAD = [
    "mirrorpo.cli", "mirrorpo.training.run", "mirrorpo.reports", "peft",
    "mirrorpo.search.evolve_run", "mirrorpo.reports.curve", "mirrorpo.cli.study_commands",
    "mirrorpo.studies.job",
]  # fmt: skip
_STATUS_FILE, _OUT_FILE, _ERR_FILE = "status.json", "stdout.txt", "stderr.txt"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the process.

    Attributes:
        kill_at: SIGKILL at this numbered place; 0 for never.
        signal_at: (place, signal): the signal at this place.
        kill_after: SIGKILL from outside after so many seconds, wherever the process is; 0 for never.
        file_bytes: no file may grow beyond this (RLIMIT_FSIZE): what a full disk is like for a single file.
        clock_shift: seconds that ``time.time`` jumps back and forth at every call.
        slow_disk: seconds that every fsync and every open in the run folder takes longer.
        strike: a signal from outside, to the process or to a worker of it.
        spawned: the process leads a group of its own and its workers are new interpreters, as a user's are: their start
            takes seconds.
    """

    kill_at: int = 0
    signal_at: tuple[int, int] | None = None
    kill_after: float = 0.0
    file_bytes: int | None = None
    clock_shift: float = 0.0
    slow_disk: float = 0.0
    strike: Strike | None = None
    spawned: bool = False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended: exit status (negative: the signal), what it printed, the places that it passed.

    Of one that was struck also the workers that were seen, and those of them that outlived it.
    """

    status: int
    stdout: str
    stderr: str
    places: tuple[str, ...] = field(default=(), repr=False)
    workers: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()


def warm_server() -> Any:
    """The context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run(arguments: Sequence[str], folder: Path, scratch: Path, fault: Fault = Fault()) -> Ended:
    """Runs ``mirrorpo <arguments>``; the places are counted in ``folder``."""
    scratch.mkdir(parents=True, exist_ok=True)
    for name in (_STATUS_FILE, _OUT_FILE, _ERR_FILE):
        (scratch / name).unlink(missing_ok=True)
    process = warm_server().Process(target=_child, args=(list(arguments), folder, scratch, fault))
    process.start()
    workers: set[int] = set()
    if fault.strike is not None:
        workers = strike(process, folder, fault.strike)
    if fault.kill_after:
        process.join(fault.kill_after)
        if process.is_alive():
            process.kill()
    process.join()
    left = {worker for worker in workers if alive(worker)}
    places = (scratch / _STATUS_FILE).read_text().splitlines() if (scratch / _STATUS_FILE).exists() else []
    texts = [(scratch / name).read_text() if (scratch / name).exists() else "" for name in (_OUT_FILE, _ERR_FILE)]
    assert process.exitcode is not None
    return Ended(
        status=process.exitcode,
        stdout=texts[0],
        stderr=texts[1],
        places=tuple(places),
        workers=frozenset(workers),
        left=frozenset(left),
    )


def _child(arguments: list[str], folder: Path, scratch: Path, fault: Fault) -> None:
    import torch

    from mirrorpo.cli import main
    from mirrorpo.studies import runner
    from mirrorpo.training import records
    from mirrorpo.workers import local as workers

    records._PAUSE = math.inf  # the page of a run is written at the start alone, not by the clock: places stay the same
    runner._EVERY = 1e6  # and that of a study not at all

    if fault.spawned:
        os.setsid()
    else:
        workers.START_METHOD = "forkserver"
        # This process knows its server's address, but would start another server.
        forkserver._forkserver.ensure_running = lambda: None
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["mirrorpo", *arguments]
    with ExitStack() as stack:
        # Unbuffered files, so that what a killed process printed is there.
        out = stack.enter_context((scratch / _OUT_FILE).open("w", buffering=1))
        err = stack.enter_context((scratch / _ERR_FILE).open("w", buffering=1))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        os.dup2(err.fileno(), 2)  # spawned workers, and C code
        _install(fault, folder, (scratch / _STATUS_FILE).open("w", buffering=1))
        main()


def _install(fault: Fault, folder: Path, log: Any) -> None:
    inside = str(folder)
    numbers = itertools.count(1)  # whose next is a single step: threads open files too

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not isinstance(path, str) or not path.startswith(inside):
            return
        place = next(numbers)
        log.write(f"{event} {path.removeprefix(inside)}\n")
        if fault.slow_disk:
            time.sleep(fault.slow_disk)
        if place == fault.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.signal_at is not None and place == fault.signal_at[0]:
            signal.raise_signal(fault.signal_at[1])

    if fault.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, fault.file_bytes))
    if fault.clock_shift:
        _jumping_clock(fault.clock_shift)
    if fault.slow_disk:
        _slow_fsync(fault.slow_disk)
    sys.addaudithook(audit)


def _jumping_clock(shift: float) -> None:
    real, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return real() + (shift if calls % 2 else -shift)

    time.time = jumping


def _slow_fsync(seconds: float) -> None:
    real: Callable[[int], None] = os.fsync

    def slow(descriptor: Any) -> None:
        time.sleep(seconds)
        real(descriptor)

    os.fsync = slow


def to_the_end(arguments: Sequence[str], folder: Path, scratch: Path) -> Ended:
    """Goes on with a run as a user would: ``--resume`` if there is one to resume."""
    begun = (folder / "recipe.yaml").exists() or (folder / "study.yaml").exists()
    more = ["--resume"] if begun else []
    return run([*arguments, *more], folder, scratch)


def copy_of(folder: Path, target: Path) -> Path:
    """A run folder under another name."""
    shutil.copytree(folder, target)
    return target
