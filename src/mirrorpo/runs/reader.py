"""What does a run folder say? Its files, read and checked, as frozen values.

Every complaint is one line that names the file, and the line or key in it. Numbers that are missing stay missing
(None): nothing is filled in. A number that is not finite cannot be drawn: it becomes None and is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LARGEST = 1e300  # differences of drawable numbers must not overflow; beyond this a number counts as not finite
_SMALLEST = 1e-280  # their ratios must not underflow: anything nearer to zero is zero


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on the unseen problems at one moment; None where it was not."""

    accuracy: float | None
    interval: tuple[float, float] | None  # 95 %, Wilson
    mean_length: float | None  # tokens
    reasons: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`summary.json`. None where an optional key is absent or null."""

    task: str
    objective: str
    objective_line: str | None
    model: str | None
    seed: int
    steps: int
    seconds: float
    problems: int | None
    before: Evaluation
    after: Evaluation
    command: str | None
    commit: str | None
    versions: dict[str, str]
    mirrorpo_version: str


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """`metrics.jsonl`, by column; every column is as long as `steps`."""

    steps: tuple[int, ...]
    columns: dict[str, tuple[float | None, ...]]
    num_not_finite: int
    torn: bool  # the last line was cut off and is left out


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of `samples.jsonl`. `prompt` and `completion` are whatever a model wrote: hostile text."""

    when: str
    prompt: str
    completion: str
    answer: str | None
    reward: float | None
    reason: str


def read_summary(run_dir: Path) -> Summary:
    """Read and check `summary.json`.

    Args:
        run_dir: the run folder.

    Returns:
        The summary; keys it does not know are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object, or a key is absent or of the wrong kind; the key is named.

    Example:
        >>> import tempfile
        >>> read_summary(Path(tempfile.mkdtemp()))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        FileNotFoundError: summary.json: no such file in the run folder ...
    """
    path = _existing(run_dir, "summary.json")
    try:
        table = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(table).__name__}")
    where = str(path)
    return Summary(
        task=_text(table, "task", where),
        objective=_text(table, "objective", where),
        objective_line=_optional_text(table, "objective_line", where),
        model=_optional_text(table, "model", where),
        seed=_whole(table, "seed", where),
        steps=_whole(table, "steps", where),
        seconds=_required_number(table, "seconds", where),
        problems=None if table.get("problems") is None else _whole(table, "problems", where),
        before=_evaluation(table, "before", where),
        after=_evaluation(table, "after", where),
        command=_optional_text(table, "command", where),
        commit=_optional_text(table, "commit", where),
        versions={key: str(value) for key, value in _table(table, "versions", where).items()},
        mirrorpo_version=_text(table, "mirrorpo_version", where),
    )


def read_metrics(run_dir: Path) -> Metrics:
    """Read `metrics.jsonl` into columns.

    A step at or below an earlier one means that the run was resumed there: what it had written from that step on is
    dropped. A last line that is cut off is left out.

    Args:
        run_dir: the run folder.

    Returns:
        The columns; a key that a line lacks, or a value that is null or not finite, is None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is broken, lacks `step`, or holds something that is no number.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "lo')
        >>> read_metrics(folder).columns
        {'loss': (0.5,)}
    """
    lines = _Lines(_existing(run_dir, "metrics.jsonl"))
    rows: list[tuple[int, dict[str, float | None]]] = []
    num_not_finite = 0
    for where, table in lines:
        step = _whole(table, "step", where)
        row: dict[str, float | None] = {}
        for key, value in table.items():
            if key == "step":
                continue
            row[key] = _number(value, key, where)
            num_not_finite += row[key] is None and value is not None
        while rows and rows[-1][0] >= step:
            rows.pop()
        rows.append((step, row))
    names = dict.fromkeys(name for _, row in rows for name in row)
    return Metrics(
        steps=tuple(step for step, _ in rows),
        columns={name: tuple(row.get(name) for _, row in rows) for name in names},
        num_not_finite=num_not_finite,
        torn=lines.torn,
    )


def read_samples(run_dir: Path) -> tuple[Sample, ...]:
    """Read `samples.jsonl`, in its order.

    Args:
        run_dir: the run folder.

    Returns:
        The samples; a last line that is cut off is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is broken, or a key is absent or of the wrong kind.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> line = '{"when": "after", "prompt": "1+1", "completion": "2", "answer": "2", "reward": 1, "reason": "ok"}'
        >>> _ = (folder / "samples.jsonl").write_text(line)
        >>> read_samples(folder)[0].reward
        1.0
    """
    samples = []
    for where, table in _Lines(_existing(run_dir, "samples.jsonl")):
        when = _text(table, "when", where)
        if when not in ("before", "after"):
            raise ValueError(f"{where}: key 'when' must be 'before' or 'after', got {when!r}")
        samples.append(
            Sample(
                when=when,
                prompt=_text(table, "prompt", where),
                completion=_text(table, "completion", where),
                answer=_optional_text(table, "answer", where),
                reward=_number(_required(table, "reward", where), "reward", where),
                reason=_text(table, "reason", where),
            )
        )
    return tuple(samples)


def read_recipe(run_dir: Path) -> str:
    """Read `recipe.yaml` as text; it is shown, never interpreted.

    Args:
        run_dir: the run folder.

    Returns:
        The text; bytes that are not UTF-8 appear as U+FFFD.

    Raises:
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "recipe.yaml").write_text("task: {name: arithmetic}")
        >>> read_recipe(folder)
        'task: {name: arithmetic}'
    """
    return _existing(run_dir, "recipe.yaml").read_bytes().decode("utf-8", "replace")


class _Lines:
    """The JSON objects of a .jsonl file with "file, line n"; `torn` is known once they are all read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.torn = False

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        # Bytes, split at the newline alone: a cut may fall inside a character, and U+2028 within a text ends no line.
        lines = [(n, line) for n, line in enumerate(self._path.read_bytes().split(b"\n"), start=1) if line.strip()]
        for n, line in lines:
            where = f"{self._path}, line {n}"
            try:
                table = json.loads(line.decode("utf-8"))
                if not isinstance(table, dict):
                    raise ValueError(f"expected a JSON object, found {type(table).__name__}")
            except ValueError as error:
                if n == lines[-1][0]:
                    self.torn = True
                    return
                raise ValueError(f"{where}: {error}") from None
            yield where, table


def _existing(run_dir: Path, name: str) -> Path:
    path = Path(run_dir) / name
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file in the run folder {run_dir}")
    return path


def _required(table: dict[str, Any], key: str, where: str) -> Any:
    if key not in table:
        raise ValueError(f"{where}: key {key!r} is missing")
    return table[key]


def _text(table: dict[str, Any], key: str, where: str) -> str:
    value = _required(table, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: key {key!r} must be text, got {value!r:.60}")
    return value


def _optional_text(table: dict[str, Any], key: str, where: str) -> str | None:
    return None if table.get(key) is None else _text(table, key, where)


def _number(value: Any, key: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: key {key!r} must be a number or null, got {value!r:.60}")
    if not abs(value) <= _LARGEST:  # NaN compares false
        return None
    return float(value) if abs(value) >= _SMALLEST else 0.0


def _required_number(table: dict[str, Any], key: str, where: str) -> float:
    number = _number(_required(table, key, where), key, where)
    if number is None:
        raise ValueError(f"{where}: key {key!r} must be a finite number, got {table[key]!r:.60}")
    return number


def _whole(table: dict[str, Any], key: str, where: str) -> int:
    number = _required_number(table, key, where)
    if number != int(number):
        raise ValueError(f"{where}: key {key!r} must be a whole number, got {table[key]!r:.60}")
    return int(number)


def _table(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = table.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: key {key!r} must be an object, got {value!r:.60}")
    return value


def _evaluation(table: dict[str, Any], when: str, where: str) -> Evaluation:
    accuracy_key = f"accuracy_{when}"
    accuracy = _number(_required(table, accuracy_key, where), accuracy_key, where)
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"{where}: key {accuracy_key!r} must lie in [0, 1], got {accuracy}")
    length_key, reasons_key = f"mean_length_{when}", f"reasons_{when}"
    reasons = _table(table, reasons_key, where)
    return Evaluation(
        accuracy=accuracy,
        interval=_interval(table, f"{accuracy_key}_interval", where),
        mean_length=_number(_required(table, length_key, where), length_key, where),
        reasons={reason: _whole(reasons, reason, f"{where}, {reasons_key}") for reason in reasons},
    )


def _interval(table: dict[str, Any], key: str, where: str) -> tuple[float, float] | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where}: key {key!r} must be [low, high], got {value!r:.60}")
    low, high = (_number(end, key, where) for end in value)
    if low is None or high is None or not 0 <= low <= high <= 1:
        raise ValueError(f"{where}: key {key!r} must be 0 <= low <= high <= 1, got {value!r:.60}")
    return low, high
