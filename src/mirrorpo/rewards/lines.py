"""How is a file of completions graded? One line in, one JSON line out, in order, without reading all of it first."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

from mirrorpo.errors import InputError
from mirrorpo.files import read_lines
from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.maths import MathVerifier
from mirrorpo.rewards.sandbox.limits import Limits
from mirrorpo.rewards.verdict import Grade

# Lines that wait for the one before them, at most.
_MAX_WAITING = 256


class _BrokenLine(ValueError):
    """What is wrong with a line."""


def check_file(path: Path) -> None:
    """Refuses what cannot be graded line by line, before the first verdict is out.

    Raises:
        InputError: no such file, one that cannot be read, or a line beyond the limit; names the file and the line.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        for _ in read_lines(path):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def graded(kind: str, lines: Iterable[bytes], require: str, wall_seconds: float, last_number: bool) -> Iterator[str]:
    """The verdicts on "math" or "code" lines; see ``grade_maths`` and ``grade_code``.

    Raises:
        InputError: an option out of its range.
        SandboxError: the machine does not reach the required level.
    """
    try:
        verifier = (
            MathVerifier(last_number=last_number)
            if kind == "math"
            else CodeVerifier(limits=Limits(wall_seconds=wall_seconds), require=require)  # pyright: ignore[reportArgumentType]
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        yield from grade_maths(lines, verifier) if isinstance(verifier, MathVerifier) else grade_code(lines, verifier)
    finally:
        verifier.close()


def grade_maths(lines: Iterable[bytes], verifier: MathVerifier) -> Iterator[str]:
    """Grades lines of ``{"completion", "answer"}``.

    Returns:
        A JSON line ``{"reward", "reason"}`` for each; a line that cannot be read earns 0 and its reason has its number.

    Example:
        >>> list(grade_maths([b'{"completion": "#### 4", "answer": "4"}', b"?"], MathVerifier()))[0]
        '{"reward": 1.0, "reason": "match"}'
    """

    def one(line: bytes) -> Grade | Future[Grade]:
        try:
            row = _row(line)
            return verifier.begin(_text(row, "completion"), _answer(row))
        except _BrokenLine as error:
            return Grade(reward=None, reason=str(error))

    waiting: deque[Grade | Future[Grade]] = deque()
    number = 0
    for line in lines:
        waiting.append(one(line))
        # A verdict that is there goes out; one that takes algebra lets others go on behind it.
        while waiting and (isinstance(waiting[0], Grade) or waiting[0].done() or len(waiting) > _MAX_WAITING):
            number += 1
            yield _line(_verdict(waiting.popleft()), number)
    for verdict in waiting:
        number += 1
        yield _line(_verdict(verdict), number)


def _verdict(begun: Grade | Future[Grade]) -> Grade:
    return begun if isinstance(begun, Grade) else begun.result()


def grade_code(lines: Iterable[bytes], verifier: CodeVerifier) -> Iterator[str]:
    """Grades lines of ``{"completion", "tests", "setup"}``, tens at a time; see ``grade_maths``."""
    ahead = 2 * verifier.pool.in_flight

    def one(line: bytes) -> Grade:
        try:
            row = _row(line)
            return verifier.grade(_text(row, "completion"), _tests(row), _text(row, "setup", default=""))
        except _BrokenLine as error:
            return Grade(reward=None, reason=str(error))

    verifier.reached()
    with ThreadPoolExecutor(max_workers=ahead) as threads:
        waiting: deque[Any] = deque()
        done = 0
        for line in lines:
            waiting.append(threads.submit(one, line))
            if len(waiting) >= ahead:
                done += 1
                yield _line(waiting.popleft().result(), done)
        for future in waiting:
            done += 1
            yield _line(future.result(), done)


def _line(grade: Grade, number: int) -> str:
    """What cannot be scored earns nothing, and its reason says which line it was."""
    reason = grade.reason if grade.reward is not None else f"line {number}: {grade.reason}"
    # ASCII but for the delete character, which JSON lets stand.
    return json.dumps({"reward": grade.reward or 0.0, "reason": reason}).replace("\x7f", "\\u007f")


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_float=Decimal, parse_constant=_not_a_number)
    except UnicodeDecodeError as error:
        raise _BrokenLine(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise _BrokenLine(f"not JSON ({str(error)[:80]})" if line.strip() else "empty") from None
    if not isinstance(row, dict):
        raise _BrokenLine(f"must be a JSON object, got {type(row).__name__}")
    return row


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _field(row: dict[str, Any], name: str, check: Callable[[Any], bool], legal: str) -> Any:
    if name not in row:
        raise _BrokenLine(f"no field {name!r}")
    if not check(row[name]):
        raise _BrokenLine(f"field {name!r} must be {legal}, got {type(row[name]).__name__}")
    return row[name]


def _text(row: dict[str, Any], name: str, default: str | None = None) -> str:
    if default is not None and row.get(name) is None:
        return default
    return _field(row, name, lambda value: isinstance(value, str), "a text")


def _answer(row: dict[str, Any]) -> str:
    """A number will do as well, with the digits it is written with."""
    value = _field(
        row, "answer", lambda v: isinstance(v, str | int | Decimal) and not isinstance(v, bool), "a text or a number"
    )
    return value if isinstance(value, str) else str(value)


def _tests(row: dict[str, Any]) -> list[Any]:
    return _field(row, "tests", lambda value: isinstance(value, list), "a list of texts")
