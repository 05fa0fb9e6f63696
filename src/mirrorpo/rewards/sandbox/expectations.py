"""What tests of single functions use of pytest: ``raises``, ``warns``, ``approx``, ``parametrize``, ``fail``.

pytest itself is no part of the standard library, which is all that the judge has.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

# All that tests may take from here; of its marks, those that change nothing, and ``parametrize``.
NAMES = frozenset(("raises", "warns", "deprecated_call", "approx", "mark", "param", "fail", "main"))
MARKS = frozenset(("parametrize", "slow", "timeout", "unit", "asyncio"))
_RELATIVE, _ABSOLUTE = 1e-6, 1e-12
_NUMBERS = (int, float, complex, Decimal, Fraction)


class raises:
    """Expects an exception: of the statements below, or of a function that is called with what follows it."""

    value: BaseException
    type: type[BaseException]

    def __init__(self, expected: Any, *call: Any, match: str | None = None, **named: Any) -> None:
        self._expected, self._match = expected, match
        if call:
            with self:
                call[0](*call[1:], **named)

    def __enter__(self) -> raises:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert error is not None, f"did not raise {self._expected}"
        if not isinstance(error, self._expected):
            return False
        self.value, self.type = error, kind
        self.match(self._match or "")
        return True

    def match(self, pattern: str) -> bool:
        """Whether the message has the pattern; fails if not."""
        assert re.search(pattern, str(self.value)), f"{pattern!r} not in {self.value}"
        return True


class warns:
    """Expects a warning of the statements below."""

    def __init__(self, expected: Any = Warning, *, match: str | None = None) -> None:
        self._expected, self._match = expected, match or ""
        self._catch = warnings.catch_warnings(record=True)
        self.list: list[Any] = []

    def __enter__(self) -> warns:
        caught = self._catch.__enter__()
        assert caught is not None  # as they are recorded
        self.list = caught
        warnings.simplefilter("always")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._catch.__exit__(kind, error, trace)
        found = (one for one in self.list if issubclass(one.category, self._expected))
        assert error or any(re.search(self._match, str(one.message)) for one in found), f"did not warn {self._expected}"

    def __len__(self) -> int:
        return len(self.list)

    def __getitem__(self, index: int) -> Any:
        return self.list[index]


def deprecated_call(*, match: str | None = None) -> warns:
    """Expects a warning that something is deprecated."""
    return warns((DeprecationWarning, PendingDeprecationWarning, FutureWarning), match=match)


class approx:
    """Equal to numbers that are near, alone or in lists, tuples and dictionaries."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: Any = None, abs: Any = None, nan_ok: bool = False) -> None:
        self._expected, self._options, self._nan_ok = expected, (rel, abs, nan_ok), nan_ok
        relative = rel if rel is not None else 0 if abs is not None else _RELATIVE
        self._tolerances = relative, abs if abs is not None else _ABSOLUTE

    def __eq__(self, actual: object) -> bool:
        wanted = self._expected
        if isinstance(wanted, dict) and isinstance(actual, dict):
            return wanted.keys() == actual.keys() and all(self._near(actual[key], wanted[key]) for key in wanted)
        if isinstance(wanted, list | tuple) and isinstance(actual, list | tuple):
            return len(wanted) == len(actual) and all(map(self._near, actual, wanted))
        if not isinstance(wanted, _NUMBERS) or not isinstance(actual, _NUMBERS) or actual == wanted:
            return bool(actual == wanted)
        if wanted != wanted:  # not a number
            return self._nan_ok and actual != actual
        relative, absolute = (float(tolerance) for tolerance in self._tolerances)
        limit = max(relative * float(builtins.abs(wanted)), absolute)
        return limit != float("inf") and float(builtins.abs(_binary(actual) - _binary(wanted))) <= limit

    def _near(self, actual: Any, wanted: Any) -> bool:
        return approx(wanted, *self._options) == actual


def _binary(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value


class param(tuple[Any, ...]):
    """The values of one run of a parametrised test."""

    def __new__(cls, *values: Any, **_: Any) -> param:
        return super().__new__(cls, values)


class _Marks:
    """``mark.parametrize``, and marks that change nothing."""

    def __getattr__(self, name: str) -> Any:
        if name not in MARKS:
            raise AttributeError(name)
        return lambda *given, **_: given[0] if len(given) == 1 and callable(given[0]) else lambda test: test

    def parametrize(self, names: Any, rows: Iterable[Any], **_: Any) -> Callable[[Any], Any]:
        """Runs the test once for each row of values."""
        found = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        runs = [row if len(found) > 1 or isinstance(row, param) else (row,) for row in rows]

        def decorate(test: Any) -> Any:
            def run(*fixed: Any, **named: Any) -> None:
                for row in runs:
                    value = test(*fixed, **named, **dict(zip(found, row, strict=True)))
                    if inspect.iscoroutine(value):
                        importlib.import_module("asyncio").run(value)

            return run

        return decorate


mark = _Marks()


def fail(reason: str = "", **_: Any) -> NoReturn:
    """Fails the test."""
    raise AssertionError(reason)


def main(*_: Any, **__: Any) -> int:
    """Nothing: the judge is the runner."""
    return 0
