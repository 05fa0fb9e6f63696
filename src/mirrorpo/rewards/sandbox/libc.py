"""The C library's calls that Python's ``os`` does not have; a failure is an ``OSError``."""

from __future__ import annotations

import ctypes
import os

from mirrorpo.rewards.sandbox import syscalls

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAP_VERSION_3 = 0x2008_0522
_CLONE = {"mount": 0x0002_0000, "uts": 0x0400_0000, "ipc": 0x0800_0000, "user": 0x1000_0000}
_CLONE |= {"pid": 0x2000_0000, "net": 0x4000_0000}


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> int:
    """``man 2 prctl``."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    return _check(_LIBC.prctl(option, *(ctypes.c_ulong(a) for a in padded)), f"prctl {option}")


def call(name: str, *arguments: object) -> int:
    """A system call of ``syscalls.SETUP`` by name."""
    return _check(_LIBC.syscall(ctypes.c_long(syscalls.number(name)), *arguments), name)


def unshare(*namespaces: str) -> None:
    """Leaves the given namespaces for new ones."""
    flags = 0
    for name in namespaces:
        flags |= _CLONE[name]
    _check(_LIBC.unshare(ctypes.c_int(flags)), "unshare " + "+".join(namespaces))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """``man 2 mount``."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    extra = None if options is None else options.encode()
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), extra), f"mount {target}")


def detach(target: str) -> None:
    """Unmounts as soon as nobody uses it (MNT_DETACH)."""
    _check(_LIBC.umount2(os.fsencode(target), 2), f"umount {target}")


def die_with_parent() -> None:
    """This process is killed when its parent ends."""
    prctl(_PR_SET_PDEATHSIG, 9)


def forget_privileges() -> None:
    """No capabilities, now or through a later program; not readable by other processes of the user."""
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # not held, or beyond the last one this kernel knows
            continue
    header = (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_SET_DUMPABLE, 0)
