"""Reader of run folders: their files, checked, as frozen values.

Every complaint is one line that names the file, and the line or key in it. Numbers that are missing stay missing
(None): nothing is filled in. A number that is not finite cannot be drawn: it becomes None and is counted. A folder may
come from a stranger: only plain files are read, no symbolic link is followed, and sizes have limits.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_FILE = 64_000_000  # bytes of a file that is read whole
MAX_LINE = 16_000_000  # bytes of a line of a .jsonl file
_LARGEST_WHOLE = 2.0**53  # beyond this a float cannot tell neighbouring whole numbers apart
_LARGEST = 1e300  # differences of drawable numbers must not overflow; beyond this a number counts as not finite
_VERSION_LETTERS = 200
_SMALLEST = 1e-280  # their ratios must not underflow: anything nearer to zero is zero


_EVALUATED = ("accuracy", "mean_length", "reasons")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on the unseen problems at one moment; None where it was not."""

    accuracy: float | None
    interval: tuple[float, float] | None  # 95 %, Wilson
    mean_length: float | None  # tokens
    reasons: dict[str, int]


NOT_EVALUATED = Evaluation(accuracy=None, interval=None, mean_length=None, reasons={})


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
    path = Path(run_dir) / "summary.json"
    table = read_json(Path(run_dir), "summary.json")
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(table).__name__}")
    where = str(path)
    return Summary(
        task=_text(table, "task", where),
        objective=_text(table, "objective", where),
        objective_line=_optional_text(table, "objective_line", where),
        model=_optional_text(table, "model", where),
        seed=_whole(table, "seed", where),
        steps=count_at(table, "steps", where),
        seconds=_required_number(table, "seconds", where),
        problems=None if table.get("problems") is None else count_at(table, "problems", where),
        before=_evaluation(table, "before", where),
        after=_evaluation(table, "after", where),
        command=_optional_text(table, "command", where),
        commit=_optional_text(table, "commit", where),
        versions={key: str(value)[:_VERSION_LETTERS] for key, value in table_at(table, "versions", where).items()},
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
        ValueError: a line other than the last is broken, lacks `step`, or holds something that is not a number.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "lo')
        >>> read_metrics(folder).columns
        {'loss': (0.5,)}
    """
    rows: list[tuple[int, dict[str, float | None]]] = []
    num_not_finite = 0
    with Lines(Path(run_dir), "metrics.jsonl") as lines:
        for where, table in lines:
            step = _whole(table, "step", where)
            row: dict[str, float | None] = {}
            for key, value in table.items():
                if key == "step":
                    continue
                row[key] = number_of(value, key, where)
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
    with Lines(Path(run_dir), "samples.jsonl") as lines:
        return tuple(sample_of(table, where) for where, table in lines)


def sample_of(table: dict[str, Any], where: str) -> Sample:
    when = _text(table, "when", where)
    if when not in ("before", "after"):
        raise ValueError(f"{where}: key 'when' must be 'before' or 'after', got {when!r:.60}")
    return Sample(
        when=when,
        prompt=_text(table, "prompt", where),
        completion=_text(table, "completion", where),
        answer=_optional_text(table, "answer", where),
        reward=number_of(_required(table, "reward", where), "reward", where),
        reason=_text(table, "reason", where),
    )


def evaluation_of(numbers: dict[str, Any], when: str, where: str) -> Evaluation:
    """The evaluation in the summary that `before.json` or a line of `evaluations.jsonl` holds."""
    table = {f"{key}_{when}": numbers[key] for key in _EVALUATED if key in numbers}
    return _evaluation({**table, f"accuracy_{when}_interval": numbers.get("accuracy_interval")}, when, where)


def read_before(run_dir: Path) -> dict[str, Any] | None:
    """Read `before.json`, the evaluation of the policy before training.

    Args:
        run_dir: the run folder.

    Returns:
        Its content, None if the file is missing or the recipe asks for no evaluation.

    Raises:
        ValueError: it is not what a run writes; the key is named.
    """
    where = str(Path(run_dir) / "before.json")
    try:
        table = read_json(Path(run_dir), "before.json")
    except FileNotFoundError:
        return None
    if table is None:
        return None
    if not isinstance(table, dict) or not isinstance(table.get("samples"), list):
        raise ValueError(f"{where}: must be a JSON object with the keys summary and samples")
    numbers = table_at(table, "summary", where)
    evaluation_of(numbers, "before", where)
    count_at(numbers, "problems", where)
    for n, sample in enumerate(table["samples"]):
        if not isinstance(sample, dict):
            raise ValueError(f"{where}, sample {n}: expected a JSON object, found {type(sample).__name__}")
        sample_of({**sample, "when": "before"}, f"{where}, sample {n}")
    return table


def recorded_steps(run_dir: Path) -> list[tuple[str, float]]:
    """The lines of `metrics.jsonl` that a resumed run can keep: those of the steps 1, 2, 3, ..., none missing.

    Args:
        run_dir: the run folder.

    Returns:
        Each line without its end, and the seconds that its step took; they end before the first line that is torn,
        damaged or not the next step. Empty if there is no such file.

    Raises:
        ValueError: it is not a plain file, or a symbolic link.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 2}\\n{"step": 3}\\n{"st')
        >>> recorded_steps(folder)
        [('{"step": 1, "seconds": 2}', 2.0)]
    """
    kept: list[tuple[str, float]] = []
    try:
        with _opened(Path(run_dir), "metrics.jsonl") as file:
            for line in iter(lambda: file.readline(MAX_LINE), b""):
                text = line.decode("utf-8")
                table = json.loads(text)
                if not line.endswith(b"\n") or _whole(table, "step", "") != len(kept) + 1:
                    break
                kept.append((text.rstrip("\n"), number_of(table.get("seconds"), "seconds", "") or 0.0))
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, _NotPlain):
            raise
        # Torn by a kill, or damaged: everything before it is whole.
    return kept


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
    return read_plain(Path(run_dir), "recipe.yaml").decode("utf-8", "replace")


def reverse_kl(table: Any, where: str) -> float | None:
    """The number of a run's `divergence.json`, None where it was not measured.

    Raises:
        ValueError: it is not what a run writes.
    """
    if not isinstance(table, dict) or "reverse_kl" not in table:
        raise ValueError(f"{where}: expected a JSON object with the number 'reverse_kl'")
    return number_of(table["reverse_kl"], "reverse_kl", where)


class _NotPlain(ValueError):
    """A file that is not read: a folder, a symbolic link, a device, or too large."""


def _opened(folder: Path, name: str) -> BinaryIO:
    """A plain file of a folder, open for reading; a link is not followed, and a pipe does not block."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{name}: no such file in the run folder {folder}") from None
    except OSError as error:
        reason = "is a symbolic link, which is not followed" if error.errno == errno.ELOOP else error.strerror
        raise _NotPlain(f"{path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _NotPlain(f"{path}: is not a plain file")
    return os.fdopen(descriptor, "rb")


def read_plain(folder: Path, name: str) -> bytes:
    """The bytes of a plain file of a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a symbolic link, a folder or a device, or larger than ``MAX_FILE``.
    """
    with _opened(folder, name) as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise _NotPlain(f"{folder / name}: must have at most {MAX_FILE:,} bytes")
    return data


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or nested too deeply, or not a plain file.
    """
    data = read_plain(folder, name)
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"{folder / name}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{folder / name}: not JSON: {error}") from None


class Lines:
    """The JSON objects of a .jsonl file with "file, line n"; `torn` is known once they are all read."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path, self._file = folder / name, _opened(folder, name)
        self.torn = False

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        # Bytes, split at the newline alone: a cut may fall inside a character, and U+2028 within a text ends no line.
        broken: str | None = None
        for n, line in enumerate(iter(lambda: self._file.readline(MAX_LINE + 1), b""), start=1):
            if not line.strip():
                continue
            if broken is not None:  # and not the last line
                raise ValueError(broken)
            where = f"{self._path}, line {n}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{where}: longer than {MAX_LINE:,} bytes")
            try:
                table = json.loads(line.decode("utf-8"))
                if not isinstance(table, dict):
                    raise ValueError(f"expected a JSON object, found {type(table).__name__}")
            except RecursionError:
                raise ValueError(f"{where}: nested too deeply") from None
            except ValueError as error:
                broken = f"{where}: {error}"
                continue
            yield where, table
        self.torn = broken is not None


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


def number_of(value: Any, key: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: key {key!r} must be a number or null, got {value!r:.60}")
    if not abs(value) <= _LARGEST:  # NaN compares false
        return None
    return float(value) if abs(value) >= _SMALLEST else 0.0


def _required_number(table: dict[str, Any], key: str, where: str) -> float:
    number = number_of(_required(table, key, where), key, where)
    if number is None:
        raise ValueError(f"{where}: key {key!r} must be a finite number, got {table[key]!r:.60}")
    return number


def _whole(table: dict[str, Any], key: str, where: str) -> int:
    number = _required_number(table, key, where)
    if number != int(number) or abs(number) > _LARGEST_WHOLE:
        raise ValueError(f"{where}: key {key!r} must be a whole number, got {table[key]!r:.60}")
    return int(number)


def count_at(table: dict[str, Any], key: str, where: str) -> int:
    number = _whole(table, key, where)
    if number < 0:
        raise ValueError(f"{where}: key {key!r} must be at least 0, got {number}")
    return number


def table_at(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = table.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: key {key!r} must be an object, got {value!r:.60}")
    return value


def _evaluation(table: dict[str, Any], when: str, where: str) -> Evaluation:
    accuracy_key = f"accuracy_{when}"
    accuracy = number_of(_required(table, accuracy_key, where), accuracy_key, where)
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"{where}: key {accuracy_key!r} must lie in [0, 1], got {accuracy}")
    length_key, reasons_key = f"mean_length_{when}", f"reasons_{when}"
    reasons = table_at(table, reasons_key, where)
    return Evaluation(
        accuracy=accuracy,
        interval=_interval(table, f"{accuracy_key}_interval", where),
        mean_length=number_of(_required(table, length_key, where), length_key, where),
        reasons={reason: count_at(reasons, reason, f"{where}, {reasons_key}") for reason in reasons},
    )


def _interval(table: dict[str, Any], key: str, where: str) -> tuple[float, float] | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where}: key {key!r} must be [low, high], got {value!r:.60}")
    low, high = (number_of(end, key, where) for end in value)
    if low is None or high is None or not 0 <= low <= high <= 1:
        raise ValueError(f"{where}: key {key!r} must be 0 <= low <= high <= 1, got {value!r:.60}")
    return low, high
