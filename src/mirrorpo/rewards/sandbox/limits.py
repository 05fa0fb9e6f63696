"""Levels of isolation, from what the kernel grants, and limits of what one program may use.

============ ========================================== =======================================================
level        made of                                    what it guarantees
============ ========================================== =======================================================
``isolated`` namespaces (own or bubblewrap's), seccomp, no network, no other processes, new processes or
             Landlock where the kernel has it, limits   threads; no files but Python's standard library, read-only
``confined`` seccomp, Landlock, limits                  the same, but that files exist, and when they were
                                                        changed, can be seen
``filtered`` seccomp, limits                            no network, no new processes, nothing written; what the
                                                        user may read can be read
``limits``   resource limits, empty environment,        CPU, memory, descriptors and time are bounded; files
             closed descriptors                         and network are open
============ ========================================== =======================================================

Comparison outside the candidate's process holds on every level.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Level = Literal["limits", "filtered", "confined", "isolated"]
LEVELS: tuple[Level, ...] = get_args(Level)
LAYERS = ("bubblewrap", "namespaces", "landlock", "seccomp")


def level_of(layers: Sequence[str]) -> Level:
    """The level that these layers amount to.

    Example:
        >>> level_of(["landlock", "seccomp"])
        'confined'
    """
    if "seccomp" not in layers:
        return "limits"
    if "namespaces" in layers or "bubblewrap" in layers:
        return "isolated"
    return "confined" if "landlock" in layers else "filtered"


def satisfies(reached: str, required: str) -> bool:
    """Whether a level is at least another.

    Raises:
        ValueError: ``required`` is no level.
    """
    if required not in LEVELS:
        raise ValueError(f"sandbox.require must be one of {', '.join(LEVELS)}, got {required!r}")
    return LEVELS.index(reached) >= LEVELS.index(required)  # pyright: ignore[reportArgumentType]


_MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_seconds: time on the clock, from start to kill, for a program that has a core for itself; longer where
            several programs share the cores.
        cpu_seconds: processor time.
        memory_mb: address space.
        open_files: descriptors.
        result_bytes: size of what it returns.
        stack_mb: stack of C code.

    Raises:
        ValueError: names the field and the legal range.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mb: int = 512
    open_files: int = 64
    result_bytes: int = 1_000_000
    stack_mb: int = 8

    def __post_init__(self) -> None:
        for name, low, high in (
            ("wall_seconds", 0.05, 3600),
            ("cpu_seconds", 1, 3600),
            ("memory_mb", 64, 1_000_000),
            ("open_files", 8, 4096),
            ("result_bytes", 1_000, 100_000_000),
            ("stack_mb", 1, 1024),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """For the message to the isolated side."""
        return asdict(self)


def apply(limits: Limits) -> None:
    """Tells the kernel; cannot be undone by the process.

    No core dump, no file that grows, no locked memory, no message queue; the number of processes is set to 0 more,
    which the kernel does not apply to root: the system call filter is what forbids new processes.
    """
    memory = limits.memory_mb * _MB
    stack = limits.stack_mb * _MB
    wanted = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),
        resource.RLIMIT_NOFILE: (limits.open_files, limits.open_files),
        resource.RLIMIT_STACK: (stack, stack),
        resource.RLIMIT_AS: (memory, memory),
        # The soft limit's signal can be caught or ignored, the hard limit's cannot.
        resource.RLIMIT_CPU: (int(limits.cpu_seconds), int(limits.cpu_seconds) + 1),
    }
    for what, (soft, hard) in wanted.items():
        _, ceiling = resource.getrlimit(what)
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(what, (soft, hard))
