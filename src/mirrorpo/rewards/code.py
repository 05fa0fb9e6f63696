"""Verdicts on programs by their tests. The program runs isolated; every comparison is made outside of its process.

Reasons: ``passed``, ``failed`` (a test is false), ``error`` (the program raises), ``syntax error``, ``timeout``,
``memory``, ``crashed`` (it ended without an answer), ``opaque`` (a result is not plain data, so nothing can be
compared), ``too large`` (a result beyond the limit), ``no code``, ``code too long``. Not scorable (reward None): what
``BadTests`` says, and ``broken test``.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from mirrorpo.rewards.extraction import MAX_CODE_CHARACTERS, extract_code
from mirrorpo.rewards.sandbox.limits import LAYERS, Level, Limits
from mirrorpo.rewards.sandbox.messages import Decoder, NotPlain, to_bytes
from mirrorpo.rewards.sandbox.pool import Ended, Outcome, Pool
from mirrorpo.rewards.sandbox.template import Reached
from mirrorpo.rewards.sandbox.tests_of import BadTests, Check, Plan, plan
from mirrorpo.rewards.verdict import Grade

# Results above this size are compared by a judge: a set of colliding numbers must not keep this process busy.
_COMPARED_HERE_BYTES = 16_000
# What a judge has to know of the plan.
_FOR_THE_JUDGE = ("imports", "program", "classes", "instances", "attributes", "called", "entries", "stubs")

Program = tuple[str, Sequence[Any], str]


class CodeVerifier:
    """Grades programs, tens at once.

    Args:
        limits: of each program.
        require: the least level of isolation (``mirrorpo.rewards.sandbox.limits``); less is refused, not accepted.
        in_flight: programs at once.
        layers: which may be used (for tests of lower levels).

    Raises:
        SandboxError: on first use, if the machine does not reach the required level.

    Example:
        >>> verifier = CodeVerifier()
        >>> verifier.grade("def f(x): return x + 1", ["assert f(1) == 2"]).reason
        'passed'
        >>> verifier.close()
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        require: Level = "confined",
        in_flight: int | None = None,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        self.pool = Pool(limits=limits, require=require, in_flight=in_flight, layers=layers)
        self._loop: _Loop | None = None
        self._guard = threading.Lock()

    def grade(self, completion: str, tests: Sequence[Any], setup: str = "") -> Grade:
        """The verdict on one completion; never raises on any text."""
        return self.grade_many([(completion, tests, setup)])[0]

    def grade_many(self, programs: Iterable[Program]) -> list[Grade]:
        """The verdicts on (completion, tests, setup), in order; waits for all of them."""

        async def work() -> list[Grade]:
            return await asyncio.gather(*(self.grade_async(*program) for program in programs))

        return self._background().run(work())

    def reached(self) -> Reached:
        """What this machine grants; starts the sandbox.

        Raises:
            SandboxError: less than required.
        """

        async def work() -> Reached:
            return self.pool.start()

        return self._background().run(work())

    async def grade_async(self, completion: str, tests: Sequence[Any], setup: str = "") -> Grade:
        """The verdict on one completion, without blocking the event loop.

        A verifier belongs to one loop: use either this or the methods that wait.
        """
        try:
            planned = plan(tests, setup)
        except BadTests as error:
            return Grade(reward=None, reason=str(error))
        code = extract_code(completion, planned.program)
        if code is None or not code.strip():
            return _no("no code")
        if len(code) > MAX_CODE_CHARACTERS:
            return _no("code too long")
        job: dict[str, Any] = {"imports": planned.imports, "code": code}
        if planned.checks:
            grade = await self._by_values(job, planned)
            if grade is not None:
                return grade
        server = {**job, "role": "server", "stubs": planned.stubs}
        judge = {name: getattr(planned, name) for name in _FOR_THE_JUDGE}
        candidate, verdict = await self.pool.judge(
            server, {**judge, "role": "judge", "setup": setup, "tests": list(tests)}
        )
        if (verdict.answer or {}).get("status") == "gone":
            return _no(self._reason(candidate))
        return self._verdict(verdict)

    async def _by_values(self, job: dict[str, Any], planned: Plan) -> Grade | None:
        """The verdict by comparing plain results here; None if a judge has to look at them."""
        calls = [[call.name, call.arguments, call.named] for call in planned.calls]
        outcome = await self.pool.run({**job, "role": "values", "calls": calls})
        answer = outcome.answer
        if answer is None or answer.get("status") != "values":
            return _no(self._reason(outcome))
        trees = answer.get("values")
        if type(trees) is not list or len(trees) != len(planned.calls):
            return _no("opaque")
        if len(to_bytes(trees)) >= _COMPARED_HERE_BYTES:
            return None
        decoder = Decoder(further=False)
        try:
            values = [decoder.decode(tree) for tree in trees]
        except NotPlain:
            return _no("opaque")
        if decoder.opaque or not decoder.is_core:
            return None
        return _YES if all(_holds(check, values[check.index]) for check in planned.checks) else _no("failed")

    def _verdict(self, outcome: Outcome) -> Grade:
        """Of a judge, whose word counts."""
        answer = outcome.answer
        if answer is not None and answer.get("status") == "passed":
            return _YES
        if answer is None and not outcome.used:  # it never came to the program: too slow, too large, killed itself
            return Grade(reward=None, reason="broken test")
        if answer is not None and answer.get("status") == "broken test":
            return Grade(reward=None, reason="broken test")
        return _no(self._reason(outcome))

    def _reason(self, outcome: Outcome) -> str:
        answer = outcome.answer
        if answer is not None:
            kind, status = answer.get("kind"), answer.get("status")
            if status in ("failed", "opaque", "too large"):
                return str(status)
            if kind in ("SyntaxError", "IndentationError", "TabError"):
                return "syntax error"
            return "memory" if kind == "MemoryError" else "error"
        if outcome.problem:
            return "too large" if outcome.problem == "too large" else "opaque"
        return "crashed" if outcome.ended is None else self._reason_of_end(outcome.ended)

    def _reason_of_end(self, ended: Ended) -> str:
        out_of_time = ended.timeout or ended.status == -signal.SIGXCPU
        if out_of_time or (ended.status == -signal.SIGKILL and ended.cpu_seconds >= self.pool.limits.cpu_seconds):
            return "timeout"
        return "crashed"

    def _background(self) -> _Loop:
        with self._guard:
            if self._loop is None:
                self._loop = _Loop(self.pool)
            return self._loop

    def close(self) -> None:
        """Ends every program; the verifier starts anew when used again."""
        with self._guard:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()


_YES = Grade(reward=1.0, reason="passed")


def _no(reason: str) -> Grade:
    return Grade(reward=0.0, reason=reason)


def _holds(check: Check, value: Any) -> bool:
    """A comparison of plain data that this process built itself."""
    try:
        if check.comparison in ("true", "false"):
            return bool(value) is (check.comparison == "true")
        if check.comparison in ("is", "is not"):
            return (value is check.literal) is (check.comparison == "is")
        return bool(value == check.literal) is (check.comparison == "==")
    except (RecursionError, OverflowError):
        return False


class _Loop:
    """An event loop in a thread of its own, for callers that wait."""

    def __init__(self, pool: Pool) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mirrorpo-sandbox", daemon=True)
        self._thread.start()
        # Also at the end of the interpreter, before threads are gone.
        self._finalizer = weakref.finalize(self, _Loop._end, self._loop, self._thread, pool)

    def run(self, work: Any) -> Any:
        """The result of a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Ends the pool, the loop and the thread."""
        self._finalizer()

    @staticmethod
    def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, pool: Pool) -> None:
        asyncio.run_coroutine_threadsafe(pool.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
