"""The pool's side of the template process: starting it on the best level there is, orders, reports.

It is a bare interpreter that imports this folder and the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mirrorpo.rewards.match import RewardError
from mirrorpo.rewards.sandbox.kernel import standard_library
from mirrorpo.rewards.sandbox.limits import LAYERS, Level, level_of

_START_SECONDS = 30.0


class SandboxError(RewardError):
    """The sandbox cannot be started, or not on the required level."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What the template process says about itself.

    Attributes:
        level: by ``limits.level_of``.
        layers: in force.
        errors: why a layer is not.
        uid: the user that programs run as.
    """

    level: Level
    layers: tuple[str, ...]
    errors: dict[str, str]
    uid: int


class Template:
    """A running template process.

    Args:
        layers: which may be used; see ``limits.LAYERS``.
        preload: import much of the standard library, for all copies (a process for one program does without).

    Raises:
        SandboxError: the interpreter does not start.
        ValueError: an unknown layer.
    """

    def __init__(self, layers: Sequence[str] = LAYERS, *, preload: bool = True) -> None:
        self._preload = preload
        unknown = set(layers) - set(LAYERS)
        if unknown:
            raise ValueError(f"layers must be of {', '.join(LAYERS)}, got {', '.join(sorted(unknown))}")
        errors: dict[str, str] = {}
        base = [layer for layer in ("landlock", "seccomp") if layer in layers]
        # Namespaces of one's own first; a machine that forbids them may still let bubblewrap make them.
        for way in [way for way in ("namespaces", "bubblewrap") if way in layers] + [None]:
            try:
                self._start(base if way is None else [way, *base])
            except OSError as error:
                if way is None:
                    raise SandboxError(f"the sandbox does not start: {error}") from error
                errors[way] = str(error)
                continue
            self.reached = self._describe(way, errors)
            return

    def _start(self, layers: list[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    _command(theirs.fileno(), layers, self._preload),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                    cwd="/",
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise
        self.sock = ours
        try:
            self._hello = self._read_hello()
        except OSError:
            self.close()
            raise

    def _read_hello(self) -> dict[str, Any]:
        readable, _, _ = select.select([self.sock], [], [], _START_SECONDS)
        data = self.sock.recv(65536) if readable else b""
        if not data:
            raise OSError("the template process ended at once" if readable else "the template process does not answer")
        hello = json.loads(data)
        if "failed" in hello:
            raise OSError(hello["failed"])
        self.sock.setblocking(False)
        return hello

    def _describe(self, way: str | None, errors: dict[str, str]) -> Reached:
        found: list[str] = self._hello["layers"]
        layers = (way, *found) if way and way not in found else tuple(found)
        return Reached(
            level=level_of(layers),
            layers=layers,
            errors={**errors, **self._hello["errors"]},
            uid=self._hello["uid"],
        )

    async def fork(self, number: int, wall_seconds: float, descriptors: list[int]) -> None:
        """Orders a copy; the descriptors become its standard ones (a null device), 3 and 4.

        Raises:
            ConnectionError: the template process is gone.
        """
        await self._send({"fork": number, "wall": wall_seconds}, descriptors)

    async def kill(self, number: int) -> None:
        """Orders the end of a copy, if it still runs."""
        with contextlib.suppress(ConnectionError):
            await self._send({"kill": number}, [])

    async def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        data = json.dumps(message).encode()
        while True:
            try:
                if descriptors:
                    socket.send_fds(self.sock, [data], descriptors)
                else:
                    self.sock.send(data)
                return
            except BlockingIOError:  # it has many orders already
                await asyncio.sleep(0.005)
            except OSError as error:
                raise ConnectionError(f"the template process is gone: {error}") from error

    def end_now(self) -> None:
        """Ends the process at once, even if it is stopped; its copies end with it."""
        self.process.kill()

    def close(self) -> None:
        """Ends the process and all its copies."""
        self.sock.close()
        try:
            self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_FOLDER = os.path.dirname(os.path.realpath(__file__))
# Empty packages stand in for the real ones: to import those, the interpreter would need the folder of all installed
# packages on its path and in its root, where programs could read them. None of them would load torch.
_PROGRAM = """
import sys, types
for name in ("mirrorpo", "mirrorpo.rewards", "mirrorpo.rewards.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules[name].__path__ = [{folder!r}]
from mirrorpo.rewards.sandbox.zygote import main
main({control}, {layers!r}, {preload})
"""


def interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _command(control: int, layers: list[str], preload: bool) -> list[str]:
    """The command line of the template process.

    Args:
        control: the inherited descriptor on which it takes orders.
        layers: which of "bubblewrap", "namespaces", "landlock", "seccomp" to use.
        preload: import much of the standard library, for all copies.

    Raises:
        OSError: bubblewrap is asked for and not installed.
    """
    inside = [layer for layer in layers if layer != "bubblewrap"]
    program = _PROGRAM.format(folder=_FOLDER, control=control, layers=inside, preload=preload)
    # No site packages, no environment, no current folder, nothing written; UTF-8.
    python = [interpreter(), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", program]
    if "bubblewrap" not in layers:
        return python
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise OSError("bubblewrap (bwrap) is not installed")
    return [bwrap, *_bubblewrap_options(), "--", *python]


def _environment() -> dict[str, str]:
    """Of the template process, which clears it: a fixed hash seed makes sets print alike on every run."""
    return {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _bubblewrap_options() -> list[str]:
    """A root that holds the interpreter, the system's shared libraries and this folder."""
    library = standard_library()
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in _environment().items():
        options += ["--setenv", name, value]
    prefix = os.path.dirname(os.path.dirname(interpreter()))
    for path in ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            options += ["--ro-bind", path, path]
    seen = {"/usr/lib"}
    for path in (interpreter(), os.path.join(prefix, "lib"), library, _FOLDER):
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in seen):
            options += ["--ro-bind", path, path]
            seen.add(path)
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(os.path.join(library, name)):
            options += ["--tmpfs", os.path.join(library, name)]
    return [*options, "--dev-bind", "/dev/null", "/dev/null", "--chdir", "/"]
