"""The template process: it isolates itself first, then forks a copy for each job.

It is told to fork and to kill, and reports how copies ended. It never reads a program, a test or a result: those travel
on descriptors that it passes on and closes, so a copy finds nothing of other jobs in its memory.

Standard library only; started by ``boot.command``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from typing import Any, NoReturn

from mirrorpo.rewards.sandbox import landlock, libc, namespaces, syscalls, worker
from mirrorpo.rewards.sandbox.fair_clock import TICK_SECONDS, FairClock

# Loaded once, shared by all copies. Those that are missing here and need no further shared library are still found.
_PRELOADED = [
    "abc",
    "array",
    "ast",
    "base64",
    "binascii",
    "bisect",
    "bz2",
    "calendar",
    "cmath",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "csv",
    "ctypes",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "enum",
    "fractions",
    "functools",
    "gc",
    "hashlib",
    "heapq",
    "inspect",
    "io",
    "itertools",
    "json",
    "keyword",
    "locale",
    "lzma",
    "math",
    "numbers",
    "operator",
    "os",
    "pprint",
    "queue",
    "random",
    "re",
    "secrets",
    "select",
    "socket",
    "statistics",
    "string",
    "struct",
    "sys",
    "textwrap",
    "threading",
    "time",
    "timeit",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "unittest",
    "uuid",
    "warnings",
    "weakref",
    "zlib",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.ascii",
]
_MAX_MESSAGE = 4096


def main(control: int, layers: list[str], preload: bool) -> NoReturn:
    """Isolates this process, says what was reached, serves until the other side closes.

    Args:
        control: descriptor of a SOCK_SEQPACKET socket.
        layers: which to use of "namespaces", "landlock", "seccomp".
        preload: import much of the standard library first.
    """
    libc.die_with_parent()
    os.umask(0o022)
    for name in _PRELOADED if preload else ():
        importlib.import_module(name)
    sock = socket.socket(fileno=control)
    reached: dict[str, Any] = {"layers": [], "errors": {}}
    sys.argv[:] = [""]
    sys.orig_argv[:] = ["python"]  # the command line names folders of the user
    try:
        if "namespaces" in layers:
            _into_namespaces(reached)
        _lock(layers, reached)
    except OSError as error:
        sock.send(json.dumps({"failed": str(error)}).encode())
        os._exit(1)
    os.environ.clear()
    gc.collect()
    gc.freeze()
    gc.disable()
    sock.send(json.dumps(reached).encode())
    Zygote(sock, "seccomp" in reached["layers"]).serve()
    os._exit(0)


def _into_namespaces(reached: dict[str, Any]) -> None:
    """Enters new namespaces; the rest of this process's life is that of their first process."""
    _make_preferred_victim()
    namespaces.enter()
    child = os.fork()
    if child:
        _wait_as_outer(child)
    reached["layers"].append("namespaces")


def _wait_as_outer(child: int) -> NoReturn:
    """Outside the new process namespace nothing is left to do but to end with it."""
    os.closerange(0, 1024)
    # The same user as inside: the kernel lets it take the inner process with it only then.
    namespaces.become_nobody()
    libc.forget_privileges()
    libc.die_with_parent()
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _make_preferred_victim() -> None:
    """If memory runs out, these processes go first."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # a container may forbid it; the limits hold anyway
        return


def _lock(layers: list[str], reached: dict[str, Any]) -> None:
    if "namespaces" not in reached["layers"]:
        _make_preferred_victim()
    nobody = namespaces.become_nobody()
    reached["uid"] = os.getuid() if nobody else 0
    libc.forget_privileges()
    if "landlock" in layers:
        try:
            reached["landlock"] = landlock.restrict(namespaces.library_parts())
            reached["layers"].append("landlock")
        except OSError as error:
            reached["errors"]["landlock"] = str(error)
    if "seccomp" in layers:
        _try_filter(reached)
    # Last: the kernel forgets it when the user changes. A killed trainer takes this process with it, stopped or not.
    libc.die_with_parent()


def _try_filter(reached: dict[str, Any]) -> None:
    """Copies install the filter, not this process, which has to fork: one copy tries it out."""
    if syscalls.machine() is None:
        reached["errors"]["seccomp"] = "no system call table for this machine"
        return
    child = os.fork()
    if child == 0:
        try:
            worker.seccomp.install()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        reached["layers"].append("seccomp")
    else:
        reached["errors"]["seccomp"] = os.strerror(code) if code > 0 else f"killed by signal {-code}"


class Zygote:
    """Forks, kills, reports.

    Messages in: ``{"fork": id, "wall": seconds}`` with two or three descriptors (a null device, its channel, perhaps
    one to another copy), ``{"kill": id}``. Messages out: ``{"id", "status", "timeout", "cpu"}``; a negative status is
    the signal that ended the copy; ``{"alive": true}`` now and then, while copies run.
    """

    def __init__(self, sock: socket.socket, use_filter: bool) -> None:
        self._sock = sock
        self._clock = FairClock()
        self._use_filter = use_filter
        self._jobs: dict[int, tuple[int, float]] = {}  # pid: (id, deadline)
        self._late: set[int] = set()
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Until the other side closes; then kills what still runs."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        selector = selectors.DefaultSelector()
        selector.register(self._sock, selectors.EVENT_READ)
        selector.register(self._wake, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select(self._patience())}
            if self._wake in ready:
                os.read(self._wake, 4096)
            if self._sock.fileno() in ready and not self._take():
                break
            if self._jobs and self._clock.advance(self._jobs):
                self._say({"alive": True})
            self._kill_late()
            if not self._reap():
                break
        for pid in self._jobs:
            _kill(pid)

    def _patience(self) -> float | None:
        return TICK_SECONDS if self._jobs else None

    def _take(self) -> bool:
        """One message; False at the end."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _MAX_MESSAGE, 4)
        except ConnectionError:
            return False
        if not data:
            return False
        message = json.loads(data)
        if "kill" in message:
            for pid, (number, _) in self._jobs.items():
                if number == message["kill"]:
                    _kill(pid)
            return True
        if not self._jobs:
            self._clock.start()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(descriptors, parent)
        for descriptor in descriptors:
            os.close(descriptor)
        self._jobs[pid] = (message["fork"], self._clock.now + message["wall"])
        return True

    def _become_worker(self, descriptors: list[int], parent: int) -> NoReturn:
        """The copy: a process group of its own; it keeps the job's descriptors, nothing else."""
        try:
            os.setpgid(0, 0)
            libc.die_with_parent()
            if os.getppid() != parent:  # it ended before that
                os._exit(1)
            signal.set_wakeup_fd(-1)
            high = [os.dup(d) if d < 16 else d for d in descriptors]
            while min(high) < 16:
                high = [os.dup(d) if d < 16 else d for d in high]
            null, *rest = high
            for target, source in ((0, null), (1, null), (2, null), *zip((3, 4), rest, strict=False)):
                os.dup2(source, target)
            os.closerange(3 + len(rest), max(1024, max(high) + 64))
            worker.run(self._use_filter)
        finally:
            os._exit(1)

    def _kill_late(self) -> None:
        for pid, (_, deadline) in self._jobs.items():
            if deadline <= self._clock.now and pid not in self._late:
                self._late.add(pid)
                _kill(pid)

    def _reap(self) -> bool:
        """Reports copies that ended; False if nobody listens."""
        while self._jobs:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return True
            number, _ = self._jobs.pop(pid, (None, 0.0))
            if number is None:
                continue
            report = {"id": number, "status": os.waitstatus_to_exitcode(status), "timeout": pid in self._late}
            report["cpu"] = usage.ru_utime + usage.ru_stime
            self._late.discard(pid)
            if not self._say(report):
                return False
        return True

    def _say(self, report: dict[str, Any]) -> bool:
        """Sends a report; False if nobody listens."""
        try:
            self._sock.send(json.dumps(report).encode())
        except OSError:
            return False
        return True


def _kill(pid: int) -> None:
    """Ends a copy and its group."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except OSError:  # not yet a group, or gone
            continue


if __name__ == "__main__":
    sys.exit("started by mirrorpo.rewards.sandbox.pool")
