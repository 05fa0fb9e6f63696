"""The template process: it isolates itself first, then forks a copy for each job. The three roles of a copy.

The template is told to fork and to kill, and reports how copies ended. It never reads a program, a test or a result:
those travel on descriptors that it passes on and closes, so a copy finds nothing of other jobs in its memory.

A copy runs a program, or it judges one; never both. ``values``: run the program, make the calls that the tests make,
return plain data. ``server``: run the program, then answer a judge. ``judge``: run the tests against a server. The
program's process holds neither the tests nor the expected values nor the channel on which a verdict travels.

Standard library only; started by ``template``.
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
import time
import types
from collections.abc import Iterable
from typing import Any, NoReturn

from mirrorpo.rewards.sandbox import kernel, running
from mirrorpo.rewards.sandbox.limits import Limits, apply
from mirrorpo.rewards.sandbox.link import Link
from mirrorpo.rewards.sandbox.messages import (
    ChannelClosed,
    Decoder,
    Encoder,
    NotPlain,
    from_bytes,
    read_frame,
    to_bytes,
    write_frame,
)
from mirrorpo.rewards.sandbox.server import Server

# Loaded once, shared by all copies. Those that are missing here and need no further shared library are still found.
_PRELOADED = (
    "abc array ast base64 binascii bisect bz2 calendar cmath collections collections.abc contextlib copy csv "
    "ctypes dataclasses datetime decimal difflib enum fractions functools gc hashlib heapq inspect io "
    "itertools json keyword locale lzma math numbers operator os pprint queue random re secrets select socket "
    "statistics string struct sys textwrap threading time timeit traceback types typing unicodedata unittest "
    "uuid warnings weakref zlib encodings.idna encodings.latin_1 encodings.ascii"
)
_MAX_MESSAGE = 4096


def main(control: int, layers: list[str], preload: bool) -> NoReturn:
    """Isolates this process, says what was reached, serves until the other side closes.

    Args:
        control: descriptor of a SOCK_SEQPACKET socket.
        layers: which to use of "namespaces", "landlock", "seccomp".
        preload: import much of the standard library first.
    """
    kernel.die_with_parent()
    os.umask(0o022)
    for name in _PRELOADED.split() if preload else ():
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
    kernel.enter_namespaces()
    child = os.fork()
    if child:
        _wait_as_outer(child)
    reached["layers"].append("namespaces")


def _wait_as_outer(child: int) -> NoReturn:
    """Outside the new process namespace nothing is left to do but to end with it."""
    os.closerange(0, 1024)
    # The same user as inside: the kernel lets it take the inner process with it only then.
    kernel.become_nobody()
    kernel.forget_privileges()
    kernel.die_with_parent()
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
    nobody = kernel.become_nobody()
    reached["uid"] = os.getuid() if nobody else 0
    kernel.forget_privileges()
    if "landlock" in layers:
        try:
            reached["landlock"] = kernel.restrict_files(kernel.library_parts())
            reached["layers"].append("landlock")
        except OSError as error:
            reached["errors"]["landlock"] = str(error)
    if "seccomp" in layers:
        _try_filter(reached)
    # Last: the kernel forgets it when the user changes. A killed trainer takes this process with it, stopped or not.
    kernel.die_with_parent()


def _try_filter(reached: dict[str, Any]) -> None:
    """Copies install the filter, not this process, which has to fork: one copy tries it out."""
    if kernel.machine() is None:
        reached["errors"]["seccomp"] = "no system call table for this machine"
        return
    child = os.fork()
    if child == 0:
        try:
            kernel.install_filter()
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
            # First: a copy that is ordered now has not had the time that has passed.
            if self._jobs and self._clock.advance(self._jobs):
                self._say({"alive": True})
            if self._sock.fileno() in ready and not self._take():
                break
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
            kernel.die_with_parent()
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
            _work(self._use_filter)
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


TICK_SECONDS = 0.5
# A process that used less than this part of all recent ticks waits for something else than a core. One tick does not
# tell: a starved process may get nothing in it.
_BUSY = 0.005
_RECENT_TICKS = 5
# However busy the machine is, no limit lasts longer than so many times its length.
_SLOWEST = 1 / 32


def _processor_seconds(pid: int) -> float:
    """Processor time of another process: the kernel's clock of it (``man 3 clock_getcpuclockid``)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:  # it has just ended
        return 0.0


class FairClock:
    """Seconds as a process sees them that has a core for itself.

    It runs at the part of a core that the busy processes got, on average: none is ended for what runs beside it, in
    this pool or elsewhere on the machine. Sleeping processes do not slow it down; if all sleep it runs as any clock.
    """

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._used: dict[int, float] = {}
        self._ticks = 0
        self._busy_at: dict[int, int] = {}
        self.now = 0.0

    def start(self) -> None:
        """Goes on from here: nothing has run in the meantime."""
        self._looked = time.monotonic()

    def advance(self, pids: Iterable[int]) -> bool:
        """Moves on; False if it is not yet time."""
        passed = time.monotonic() - self._looked
        if passed < TICK_SECONDS:
            return False
        self._looked += passed
        used = {pid: _processor_seconds(pid) for pid in pids}
        shares = {pid: (seconds - self._used.get(pid, 0.0)) / passed for pid, seconds in used.items()}
        self._used = used
        self._ticks += 1
        last = {pid: self._ticks if share > _BUSY else self._busy_at.get(pid, 0) for pid, share in shares.items()}
        self._busy_at = last
        busy = [share for pid, share in shares.items() if last[pid] and self._ticks - last[pid] < _RECENT_TICKS]
        # Whoever looks later than that was itself kept from a core, as were the others.
        passed = min(passed, 2 * TICK_SECONDS)
        self.now += passed * min(1.0, max(_SLOWEST, sum(busy) / len(busy) if busy else 1.0))
        return True


CHANNEL, RPC = 3, 4
_MAX_REQUEST = 200_000_000

Job = dict[str, Any]
# Bound here, before a program can replace them in their modules.
_exit = os._exit


def _work(use_filter: bool) -> NoReturn:
    """Takes the job from the channel, locks the process, does the job, ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGPIPE else signal.SIG_IGN)
    status = 1
    try:
        job = from_bytes(read_frame(CHANNEL, _MAX_REQUEST))
        apply(Limits(**job["limits"]))
        if use_filter:
            kernel.install_filter()
        answer = {"values": _values, "server": _server, "judge": _judge}[job["role"]](job)
        if answer is not None:
            write_frame(CHANNEL, to_bytes(answer))
        status = 0
    except ChannelClosed:
        pass
    except BaseException:  # noqa: BLE001  (nothing above this frame could report it; the status does)
        status = 3
    finally:
        _exit(status)


def _load(job: Job, names: dict[str, Any]) -> None:
    """Runs the imports that the tests bring, then the program."""
    for part in ("imports", "code"):
        exec(_compiled(job[part], part), names)


def _module() -> dict[str, Any]:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    return module.__dict__


def _compiled(text: str, name: str) -> types.CodeType:
    try:
        return compile(text, f"<{name}>", "exec", dont_inherit=True)
    except ValueError:  # a NUL byte, a lone surrogate: no Python either
        raise SyntaxError(name) from None


def _values(job: Job) -> dict[str, Any]:
    limit = job["limits"]["result_bytes"]
    names = _module()
    try:
        _load(job, names)
        encode, decode = Encoder().encode, Decoder().decode
        trees = []
        for name, arguments, named in job["calls"]:
            given = [decode(tree) for tree in arguments]
            trees.append(encode(names[name](*given, **{key: decode(tree) for key, tree in named.items()})))
        if len(to_bytes(trees)) > limit:
            return {"status": "too large"}
        return {"status": "values", "values": trees}
    except NotPlain:
        return {"status": "too large"}
    except BaseException as error:  # noqa: BLE001  (whatever the program raises, SystemExit included)
        return {"status": "raised", "kind": type(error).__name__[:80]}


def _server(job: Job) -> None:
    names = _module()
    Server(RPC, job["limits"]["result_bytes"], job["stubs"], names).run(lambda: _load(job, names))


def _judge(job: Job) -> dict[str, Any]:
    """The word of the judge, preceded by one on when the program has its first say."""
    told = to_bytes({"status": "used"})
    return running.verdict(job, Link(RPC, job["limits"]["result_bytes"], job, lambda: write_frame(CHANNEL, told)))
