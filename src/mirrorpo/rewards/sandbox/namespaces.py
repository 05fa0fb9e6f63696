"""How does a process get a machine of its own? Namespaces: no network, no other processes, a root with one folder.

Root may make them directly and then becomes nobody; an ordinary user makes a user namespace first. In both cases the
new root holds Python's standard library, read-only, and nothing else: no ``/proc``, ``/dev``, ``/home``, ``/tmp``.
"""

from __future__ import annotations

import os

from mirrorpo.rewards.sandbox import libc

NOBODY = 65534
_ALL = ("mount", "pid", "net", "ipc", "uts")
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
# A mount that came from outside the user namespace keeps these; a remount has to name them again.
_KEPT = (_NOSUID, _NODEV, _NOEXEC, 1024, 2048, 1 << 21)
# The new root is built on top of one of these, in a mount namespace of its own; none is ever a source of a mount.
_STAGES = ("/proc", "/sys", "/mnt")


def standard_library() -> str:
    """The folder of Python's standard library."""
    return os.path.dirname(os.path.realpath(os.__file__))


def library_parts() -> list[str]:
    """What in the standard library's folder belongs to it: everything but installed packages."""
    packages = ("site-packages", "dist-packages")
    with os.scandir(standard_library()) as entries:
        # Distributions leave links in it that lead nowhere.
        return [entry.path for entry in entries if entry.name not in packages and os.path.exists(entry.path)]


def enter() -> None:
    """Moves this process into new namespaces; children live in the new process namespace.

    Raises:
        OSError: the kernel, or the container around, refuses; the process must then be thrown away.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        if uid != 0:
            raise PermissionError
        libc.unshare(*_ALL)
    except OSError:
        libc.unshare("user", *_ALL)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _new_root([standard_library()])


def become_nobody() -> bool:
    """Root gives itself up, if the interpreter's files stay readable; True if it did or had nothing to give."""
    if os.geteuid() != 0:
        return True
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    except OSError:  # a user namespace maps one user only, a container may forbid it
        return False
    if not os.access(standard_library(), os.R_OK | os.X_OK, effective_ids=True):
        os.seteuid(0)
        return False
    os.seteuid(0)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return True


def _new_root(sources: list[str]) -> None:
    libc.mount(None, "/", None, _REC | _PRIVATE)
    stage = next((path for path in _STAGES if os.path.isdir(path)), None)
    if stage is None:
        raise OSError(f"none of {', '.join(_STAGES)} exists")
    libc.mount("tmpfs", stage, "tmpfs", _NOSUID | _NODEV, "size=64k,nr_inodes=64,mode=755")
    for source in sources:
        target = stage + source
        os.makedirs(target)
        libc.mount(source, target, None, _BIND | _REC)
        libc.mount(None, target, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | _locked_flags(target))
        for name in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{target}/{name}"):
                libc.mount("tmpfs", f"{target}/{name}", "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k,mode=755")
    libc.mount(None, stage, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    os.chdir(stage)
    libc.call("pivot_root", b".", b".")
    libc.detach(".")
    os.chdir("/")


def _locked_flags(path: str) -> int:
    found = os.statvfs(path).f_flag
    # statvfs uses the same bits as mount for these, except relatime (4096 there).
    flags = sum(flag for flag in _KEPT[:-1] if found & flag)
    return flags | (_KEPT[-1] if found & 4096 else 0)
