"""How well is a program locked in on this machine? Four levels, from what the kernel grants.

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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

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
