"""An asyncio pool over a template process: tens of programs at once, and the caller waits for none of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mirrorpo.rewards.sandbox.limits import LAYERS, Level, Limits, satisfies
from mirrorpo.rewards.sandbox.messages import HEADER, NotPlain, frame, from_bytes, to_bytes
from mirrorpo.rewards.sandbox.template import Reached, SandboxError, Template

# What the judge may use beyond the candidate, whose answers it waits for.
_JUDGE_GRACE_SECONDS = 1.0
# The template process ends what is late, and says that it lives. If it does not (a program stopped it), it is replaced.
_SILENCE_SECONDS = 20.0
_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a copy ended: exit status (negative: the signal), whether its time was up, processor time used."""

    status: int
    timeout: bool
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came back from a copy.

    Attributes:
        answer: the message, if there was one that can be read; from a candidate, nothing in it can be trusted.
        ended: how the copy ended, if it did so before answering.
        problem: "too large" or "garbled" if what came back is no message.
        used: of a judge: whether the program has had a say.
    """

    answer: dict[str, Any] | None = None
    ended: Ended | None = None
    problem: str = ""
    used: bool = False


class Pool:
    """Runs jobs, each in a fresh copy of an isolated template process.

    Args:
        limits: of each program.
        require: the least level; a machine that does not reach it is refused.
        in_flight: programs at once; by default 4 a core, at least 8.
        layers: which may be used (for tests of lower levels).

    Example:
        >>> import asyncio
        >>> job = {"role": "values", "imports": "", "code": "x = 6", "setup": "", "calls": ["x * 7"]}
        >>> async def main():
        ...     async with Pool() as pool:
        ...         return await pool.run(job)
        >>> asyncio.run(main()).answer
        {'status': 'values', 'values': [42]}
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        require: Level = "confined",
        in_flight: int | None = None,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        satisfies("isolated", require)  # the name is checked at once
        if in_flight is not None and not 1 <= in_flight <= 1024:
            raise ValueError(f"in_flight must be in [1, 1024], got {in_flight}")
        self.limits = limits or Limits()
        self.require: Level = require
        self.in_flight = in_flight or max(8, 4 * (os.cpu_count() or 1))
        self._layers = tuple(layers)
        self._template: Template | None = None
        self._numbers = itertools.count(1)
        self._ends: dict[int, asyncio.Future[Ended]] = {}
        self._slots = asyncio.Semaphore(self.in_flight)
        self._alone = asyncio.Lock()
        self._heard = 0.0

    async def __aenter__(self) -> Pool:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> Reached:
        """Starts the template process, if none runs; call it inside the event loop.

        Raises:
            SandboxError: it does not start, or the machine does not reach the required level.
        """
        if self._template is None:
            self.adopt(Template(self._layers))
        assert self._template is not None
        return self._template.reached

    def adopt(self, template: Template) -> None:
        """Uses a template process that runs already; call it inside the event loop.

        Raises:
            SandboxError: it does not reach the required level; it is ended.
        """
        reached = template.reached
        if not satisfies(reached.level, self.require):
            template.close()
            why = "; ".join(f"{layer}: {error}" for layer, error in reached.errors.items())
            raise SandboxError(
                f"sandbox.require is {self.require!r}, this machine reaches {reached.level!r} ({why or 'by choice'})"
            )
        self._template = template
        asyncio.get_running_loop().add_reader(template.sock, self._take_reports, template)

    async def close(self) -> None:
        """Ends every program and the template process."""
        template, self._template = self._template, None
        if template is not None:
            self._lose(template)
            await asyncio.to_thread(template.close)

    def _take_reports(self, template: Template) -> None:
        while True:
            try:
                data = template.sock.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                if self._template is template:
                    self._template = None
                self._lose(template)
                template.close()
                return
            report = json.loads(data)
            self._heard = asyncio.get_running_loop().time()
            if "alive" in report:
                continue
            future = self._ends.pop(report["id"], None)
            if future is not None and not future.done():
                future.set_result(Ended(status=report["status"], timeout=report["timeout"], cpu_seconds=report["cpu"]))

    def _replace(self, template: Template) -> None:
        """Ends a template process that does not do its work."""
        template.end_now()
        if self._template is template:
            self._template = None
            self._lose(template)
            template.close()

    def _lose(self, template: Template) -> None:
        """The template process is gone: so are its copies."""
        asyncio.get_running_loop().remove_reader(template.sock)
        lost, self._ends = self._ends, {}
        for future in lost.values():
            if not future.done():
                future.set_exception(ConnectionError("the template process is gone"))

    async def run(self, job: dict[str, Any]) -> Outcome:
        """Runs one job in a fresh copy.

        Args:
            job: as ``zygote`` describes.

        Raises:
            SandboxError: the template process cannot be started again.
        """
        async with self._slots:
            return await self._again(self._one, job)

    async def judge(self, job: dict[str, Any], judge: dict[str, Any]) -> tuple[Outcome, Outcome]:
        """Runs a candidate as a server and a judge that talks to it; the outcomes of both."""
        async with self._slots:
            return await self._again(self._two, job, judge)

    async def _again(self, function: Any, *jobs: dict[str, Any]) -> Any:
        """A template process that was killed (for want of memory; by a program, on a low level) is replaced.

        What was running is run again, one program after the other; the one on which the process is lost again and again
        has crashed, and takes no other with it.
        """
        for attempt in range(_ATTEMPTS):
            with contextlib.suppress(ConnectionError):
                async with self._alone if attempt else contextlib.nullcontext():
                    self.start()
                    return await function(*jobs)
        crashed = Outcome(ended=Ended(status=-signal.SIGKILL, timeout=False, cpu_seconds=0.0))
        return crashed if len(jobs) == 1 else (crashed, Outcome(answer={"status": "gone"}))

    async def _one(self, job: dict[str, Any]) -> Outcome:
        return await self._copy(job, self.limits.wall_seconds, None)

    async def _two(self, job: dict[str, Any], judge: dict[str, Any]) -> tuple[Outcome, Outcome]:
        left, right = socket.socketpair()
        wall = self.limits.wall_seconds
        with left, right:  # a copy closes its end, unless it never came to begin
            candidate = asyncio.ensure_future(self._copy(job, wall, left))
            judging = asyncio.ensure_future(self._copy(judge, wall + _JUDGE_GRACE_SECONDS, right))
            try:
                verdict = await judging
                if verdict.answer is not None and verdict.answer.get("status") != "gone":
                    return Outcome(), verdict
                return await candidate, verdict
            finally:
                for task in (candidate, judging):
                    task.cancel()
                await asyncio.gather(candidate, judging, return_exceptions=True)

    async def _copy(self, job: dict[str, Any], wall_seconds: float, rpc: socket.socket | None) -> Outcome:
        """One copy: hands over the job, takes the answer, sees to its end."""
        template = self._template
        if template is None:
            raise ConnectionError("the template process is gone")
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        ended: asyncio.Future[Ended] = loop.create_future()
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            # The copy alone keeps the far ends: its death is then seen as an end of file.
            with theirs, rpc or contextlib.nullcontext(), open(os.devnull, "r+b", buffering=0) as null:
                # A null device of its own: flags that a program sets on it are seen by no other.
                descriptors = [null.fileno(), theirs.fileno(), *([] if rpc is None else [rpc.fileno()])]
                self._ends[number] = ended
                await template.fork(number, wall_seconds, descriptors)
            talk = asyncio.ensure_future(self._converse(ours, {**job, "limits": self.limits.to_dict()}, ended))
            try:
                await self._watch(talk, template)
                return await talk
            finally:
                talk.cancel()
                await template.kill(number)
                with contextlib.suppress(ConnectionError):
                    await self._watch(ended, template)
                    await ended

    async def _watch(self, wanted: asyncio.Future[Any], template: Template) -> None:
        """Waits, as long as the template process gives signs of life.

        Raises:
            ConnectionError: it does not; it is ended.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not (await asyncio.wait((wanted,), timeout=_SILENCE_SECONDS / 4))[0]:
            if loop.time() - max(self._heard, began) > _SILENCE_SECONDS:
                self._replace(template)
                raise ConnectionError("the template process does not answer")

    async def _converse(self, sock: socket.socket, job: dict[str, Any], ended: asyncio.Future[Ended]) -> Outcome:
        loop = asyncio.get_running_loop()
        used = False
        try:
            await loop.sock_sendall(sock, frame(to_bytes(job)))
            while True:
                header = await _exactly(sock, HEADER.size)
                size = HEADER.unpack(header)[0]
                if size > self.limits.result_bytes + 1000:
                    return Outcome(problem="too large")
                answer = from_bytes(await _exactly(sock, size))
                if type(answer) is not dict:
                    return Outcome(problem="garbled")
                if job["role"] != "judge" or answer.get("status") != "used":
                    return Outcome(answer=answer, used=used)
                used = True
        except (OSError, EOFError):  # it died, perhaps with our message unread
            return Outcome(ended=await asyncio.shield(ended), used=used)
        except NotPlain:
            return Outcome(problem="garbled")


async def _exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: there are no more.
    """
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        part = await loop.sock_recv(sock, min(size - len(data), 1 << 16))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
