"""How is a process kept from files? Landlock: only the given folders stay readable, nothing stays writable.

``man 7 landlock``. Newer kernels also take away TCP, device controls, abstract sockets and signals to outside.
Landlock does not hide that a file exists, nor its size and dates.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from mirrorpo.rewards.sandbox import libc

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_O_PATH = 0o10000000
_VERSION_FLAG, _RULE_PATH_BENEATH = 1, 1


def version() -> int:
    """The kernel's Landlock version; 0 without Landlock."""
    try:
        return libc.call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


def _handled(abi: int) -> bytes:
    """struct landlock_ruleset_attr: everything that this version can take away."""
    files = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        if abi >= since:
            files |= 1 << bit
    if abi < 4:
        return struct.pack("Q", files)
    network = 0b11
    return struct.pack("QQ", files, network) if abi < 6 else struct.pack("QQQ", files, network, 0b11)


def restrict(readable: Iterable[str]) -> int:
    """Takes everything but reading beneath these paths away from this process and its children, for good.

    Returns:
        The Landlock version in force.

    Raises:
        OSError: no Landlock, or the kernel refuses.
    """
    abi = version()
    if abi < 1:
        raise OSError("this kernel has no Landlock")
    attributes = _handled(abi)
    ruleset = libc.call("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for path in readable:
            allowed = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
            beneath = os.open(path, _O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", allowed, beneath)
                libc.call(
                    "landlock_add_rule",
                    ctypes.c_int(ruleset),
                    ctypes.c_int(_RULE_PATH_BENEATH),
                    rule,
                    ctypes.c_uint32(0),
                )
            finally:
                os.close(beneath)
        libc.call("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return abi
