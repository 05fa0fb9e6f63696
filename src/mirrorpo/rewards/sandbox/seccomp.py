"""How is a process kept from making other system calls? A filter that it cannot take off again.

A list of what is allowed, so that a call nobody thought of is refused. Refused calls fail with EPERM (a program sees
``PermissionError``), a call of another machine's numbering kills. ``man 2 seccomp``; the instructions are classic BPF.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from mirrorpo.rewards.sandbox import syscalls
from mirrorpo.rewards.sandbox.libc import prctl

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_KILL, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Where struct seccomp_data keeps the call's number, the machine and the lower half of an argument.
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32_BIT = 0x4000_0000

# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND: the same on both machines. O_TMPFILE includes O_RDWR or O_WRONLY.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no F_SETOWN, which sends signals to others.
_FCNTLS = (0, 1, 2, 3, 4, 1030)
_AF_UNIX = 1

Instruction = tuple[int, int, int, int]


def _statement(code: int, value: int) -> Instruction:
    return code, 0, 0, value


def _argument(index: int) -> Instruction:
    return _statement(_LOAD, _ARGUMENTS_AT + 8 * index)


_YES = _statement(_RETURN, _ALLOW)
_NO = _statement(_RETURN, _ERRNO | errno.EPERM)


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allows the call if the argument's lower half is one of the values."""
    body = [_argument(index)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), _YES]
    return [*body, _NO]


def _rules(pid: int) -> dict[str, list[Instruction]]:
    """What decides about the calls that are allowed for some arguments."""
    return {
        "open": [_argument(1), (_ANY_BIT, 0, 1, _WRITING), _NO, _YES],
        "openat": [_argument(2), (_ANY_BIT, 0, 1, _WRITING), _NO, _YES],
        "ioctl": _one_of(1, _IOCTLS),
        "fcntl": _one_of(1, _FCNTLS),
        "prlimit64": _one_of(0, (0, pid)),
        "kill": _one_of(0, (pid,)),
        "tgkill": _one_of(0, (pid,)),
        "socketpair": _one_of(0, (_AF_UNIX,)),
        # An address to send to means a socket that is not connected: refused.
        "sendto": _one_of(4, (0,)),
        # Its arguments lie in memory, where a filter cannot look; "not there" makes the C library use clone, refused.
        "clone3": [_statement(_RETURN, _ERRNO | errno.ENOSYS)],
    }


def program(pid: int, audit: int, column: int) -> bytes:
    """The filter's instructions.

    Args:
        pid: the process, as it sees itself; signals to it alone are allowed.
        audit: the kernel's constant of the machine.
        column: of the tables of ``syscalls``.
    """
    body: list[Instruction] = [
        _statement(_LOAD, _MACHINE_AT),
        (_EQUAL, 1, 0, audit),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER_AT),
        (_GREATER_EQUAL, 0, 1, _X32_BIT),
        _statement(_RETURN, _KILL),
    ]
    for numbers in syscalls.ALLOWED.values():
        if numbers[column] is not None:
            body += [(_EQUAL, 0, 1, numbers[column] or 0), _YES]
    for name, rule in _rules(pid).items():
        call = syscalls.CONDITIONAL[name][column]
        if call is not None:
            body += [(_EQUAL, 0, len(rule), call), *rule]
    body.append(_NO)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in body)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def install() -> None:
    """Puts the filter on this process.

    Raises:
        OSError: the kernel refuses, or the machine is neither x86_64 nor aarch64.
    """
    found = syscalls.machine()
    if found is None:
        raise OSError(errno.ENOSYS, "no system call table for this machine")
    code = program(os.getpid(), *found)
    buffer = ctypes.create_string_buffer(code, len(code))
    wanted = _Filter(len(code) // 8, ctypes.addressof(buffer))
    prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(wanted))
