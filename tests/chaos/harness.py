"""What happens to runs, on purpose: a command in a process of its own, and a fault at a chosen place in it.

A process is forked from a server that has imported everything once (``multiprocessing``'s forkserver), so that a run of
the embedded recipe takes a second. Faults come from Python's audit events: each time the program opens, renames or
removes something inside the run folder is a numbered place, the same one in every run, and the process can kill itself
there. Nothing in the program is replaced.
"""

from __future__ import annotations

import io
import json
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
from pathlib import Path
from typing import Any

# Fields of metrics.jsonl, summary.json and before.json that are times.
TIMES = ("seconds", "step_time", "tokens_per_second", "generation_seconds")
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
_PRELOAD = ["mirrorpo.cli", "mirrorpo.training.run", "mirrorpo.reporting", "peft"]
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
    """

    kill_at: int = 0
    signal_at: tuple[int, int] | None = None
    kill_after: float = 0.0
    file_bytes: int | None = None
    clock_shift: float = 0.0
    slow_disk: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended: exit status (negative: the signal), what it printed, the places that it passed."""

    status: int
    stdout: str
    stderr: str
    places: tuple[str, ...] = field(default=(), repr=False)


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
    if fault.kill_after:
        process.join(fault.kill_after)
        if process.is_alive():
            process.kill()
    process.join()
    places = (scratch / _STATUS_FILE).read_text().splitlines() if (scratch / _STATUS_FILE).exists() else []
    texts = [(scratch / name).read_text() if (scratch / name).exists() else "" for name in (_OUT_FILE, _ERR_FILE)]
    assert process.exitcode is not None
    return Ended(status=process.exitcode, stdout=texts[0], stderr=texts[1], places=tuple(places))


def _child(arguments: list[str], folder: Path, scratch: Path, fault: Fault) -> None:
    import torch

    from mirrorpo.cli import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["mirrorpo", *arguments]
    with ExitStack() as stack:
        # Unbuffered files, so that what a killed process printed is there.
        out = stack.enter_context((scratch / _OUT_FILE).open("w", buffering=1))
        err = stack.enter_context((scratch / _ERR_FILE).open("w", buffering=1))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        _rebind_console(err)
        _install(fault, folder, (scratch / _STATUS_FILE).open("w", buffering=1))
        main()


def _rebind_console(err: io.TextIOBase) -> None:
    """The command line's console was made when the server imported it, with the server's stderr."""
    from rich.console import Console

    import mirrorpo.cli

    mirrorpo.cli.console = Console(file=err, width=200)  # pyright: ignore[reportArgumentType]


def _install(fault: Fault, folder: Path, log: Any) -> None:
    inside = str(folder)
    count = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not isinstance(path, str) or not path.startswith(inside):
            return
        count += 1
        log.write(f"{event} {path.removeprefix(inside)}\n")
        if fault.slow_disk:
            time.sleep(fault.slow_disk)
        if count == fault.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.signal_at is not None and count == fault.signal_at[0]:
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
    more = ["--resume"] if (folder / "recipe.yaml").exists() else []
    return run([*arguments, *more], folder, scratch)


def differences(unbroken: Path, resumed: Path) -> list[str]:
    """What two finished run folders do not have in common, byte for byte; times, paths and pictures aside."""
    found = []
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (unbroken, resumed)]
    found += [f"only in one: {name}" for name in sorted(set(names[0]) ^ set(names[1]))]
    for name in sorted(set(names[0]) & set(names[1])):
        one, two = (_comparable(root / name) for root in (unbroken, resumed))
        if one != two:
            found.append(name)
    return found


def _comparable(path: Path) -> Any:
    """A file's content without what may differ: times, and the folder's own name."""
    if path.name in (".lock", "curve.png", "report.html", "manifest.json", "training_args.json", "README.md"):
        return None
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("__kind__") == "dict":  # a kept state: pairs
            return [[key, _without_times(item)] for key, item in value["items"] if key not in TIMES]
        return {key: _without_times(item) for key, item in value.items() if key not in (*TIMES, "command", "commit")}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def copy_of(folder: Path, target: Path) -> Path:
    """A run folder under another name."""
    shutil.copytree(folder, target)
    return target
