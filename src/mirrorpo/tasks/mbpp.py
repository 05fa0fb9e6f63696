"""Small Python programs from a sentence and three tests: MBPP, 974 problems, graded by running them in a sandbox.

Its own split, by task id: 1-10 prompt, 11-510 test, 511-600 validation, 601-974 train.

Reference: Austin et al., "Program Synthesis with Large Language Models", arXiv 2108.07732.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mirrorpo.tasks.jsonl import numbered_rows
from mirrorpo.tasks.task import Grade, Part, Row, Settings, check_test_part, load_from_hub

if TYPE_CHECKING:
    from mirrorpo.rewards.code import CodeVerifier
    from mirrorpo.rewards.sandbox.limits import Level

HUB_NAME = "google-research-datasets/mbpp"
# First and last task id of each part.
IDS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
INSTRUCTION = "Answer with one Python code block."


class SandboxSettings(Settings):
    """Where programs run, and what they may use."""

    require: Literal["limits", "filtered", "confined", "isolated"] = Field(
        default="confined", description="the least level (`mirrorpo doctor` says which this machine reaches)"
    )
    in_flight: int | None = Field(default=None, ge=1, le=1024, description="programs at once; empty: 4 a core")
    wall_seconds: float = Field(default=10.0, ge=0.05, le=3600, description="time limit of a program")
    cpu_seconds: int = Field(default=5, ge=1, le=3600, description="processor time of a program")
    memory_mb: int = Field(default=512, ge=64, le=1_000_000, description="address space of a program")


class MbppSettings(Settings):
    """MBPP."""

    name: Literal["mbpp"]
    path: str | None = Field(default=None, description="the original mbpp.jsonl; empty: from the hub")
    test_part: Literal["auto", "test", "validation"] = Field(default="auto", description="what evaluation sees")
    train_size: int | None = Field(default=None, ge=1, description="maximum number of training problems")
    shown_tests: int = Field(default=3, ge=0, le=3, description="tests in the prompt")
    instruction: str = Field(default=INSTRUCTION, description="the prompt's last line")
    sandbox: SandboxSettings = SandboxSettings()


class Mbpp:
    """MBPP, as a `mirrorpo.tasks.task.Task`.

    Args:
        path: the original ``mbpp.jsonl``; None loads ``google-research-datasets/mbpp`` from the hub.
        test_part: "test", "validation", or "auto": the former where the source has it.
        train_size: maximum number of training problems.
        shown_tests: how many of the tests stand in the prompt. 3 is the usual prompt; fewer leave some unseen, which a
            program that only knows the shown results fails.
        instruction: the prompt's last line.
        sandbox: ``require`` (the least level), ``in_flight``, and the fields of ``Limits``.

    Raises:
        ValueError: no such part, a broken row, the hub cannot be reached, the machine does not reach the required
            level; says what to set.
        FileNotFoundError: no such file.

    Warns:
        UserWarning: rows whose tests assert nothing, or use what nothing defines: their completions get no reward.
    """

    name = "mbpp"

    def __init__(
        self,
        *,
        path: str | None = None,
        test_part: Literal["auto", "test", "validation"] = "auto",
        train_size: int | None = None,
        shown_tests: int = 3,
        instruction: str = INSTRUCTION,
        sandbox: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(shown_tests, bool) or not 0 <= shown_tests <= 3:
            raise ValueError(f"shown_tests must be in [0, 3], got {shown_tests}")
        self._shown, self._instruction = shown_tests, instruction
        rows = numbered_rows(Path(path), "text", None) if path is not None else list(enumerate(_from_hub(), 1))
        where = path or HUB_NAME
        self._unusable: list[str] = []
        unit = "row" if path is None else "line"
        checked = [self._row(row, f"{where}: {unit} {number}") for number, row in rows]
        self._tell_unusable(where, len(checked))
        parts: dict[Part, list[Row]] = {
            "train": _between(checked, *IDS["train"])[:train_size],
            "validation": _between(checked, *IDS["validation"]),
            "test": _between(checked, *IDS["test"]),
        }
        if not parts["train"]:
            raise ValueError(f"{where}: no training rows (task_id {IDS['train'][0]} to {IDS['train'][1]})")
        self.test_part: Part = check_test_part(test_part, parts, "set task.path to a file with task ids 11 to 510")
        self._rows = parts
        from mirrorpo.rewards.sandbox.template import SandboxError

        self._verifier = _verifier(sandbox or {})
        try:
            self._verifier.reached()  # a machine below the required level is refused before anything is trained
        except SandboxError as error:
            raise ValueError(str(error)) from error

    def _row(self, row: dict[str, Any], where: str) -> Row:
        from mirrorpo.rewards.sandbox.tests_of import BadTests, plan

        number, tests = row.get("task_id"), row.get("test_list")
        text, setup = row.get("text", row.get("prompt")), row.get("test_setup_code") or ""
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{where}: task_id must be an integer, got {number!r:.60}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: field 'text' must be a text that is not empty, got {text!r:.60}")
        try:
            plan(tests if isinstance(tests, list) else [], setup)
        except BadTests as error:
            if error.malformed:
                raise ValueError(f"{where}: task {number}: {error} (field test_list)") from None
            self._unusable.append(f"{where.rpartition(': ')[2]} (task {number}): {error}")
        assert isinstance(tests, list)
        shown = [test.strip() for test in tests[: self._shown]]
        lines = [f"You are an expert Python programmer. {text.strip()}"]
        if shown:
            lines += ["Your code should pass these tests:", "", *shown, ""]
        prompt = "\n".join([*lines, self._instruction]).strip()
        return {"prompt": prompt, "answer": row.get("code", ""), "tests": tests, "setup": setup, "task_id": number}

    def _tell_unusable(self, where: str, total: int) -> None:
        """Says how many rows can give no reward, and why the first of them cannot.

        Raises:
            ValueError: all of them.
        """
        count = len(self._unusable)
        if count and count == total:
            raise ValueError(f"{where}: no row has tests that can be used; {self._unusable[0]}")
        if count:
            warnings.warn(
                f"{where}: {count} of {total} rows give no reward, the first of them is {self._unusable[0]}",
                stacklevel=3,
            )

    def rows(self, split: Part) -> list[Row]:
        """The problems of "train", "validation" or "test" (see ``test_part``)."""
        part: Part = self.test_part if split == "test" else split
        if part not in self._rows:
            raise ValueError(f"split is {split!r}; legal values: 'train', 'validation', 'test'")
        return self._rows[part]

    def grade(self, completion: str, row: Row) -> Grade:
        """The code verifier's verdict (`mirrorpo.rewards.code`)."""
        return self._verifier.grade(completion, row["tests"], row["setup"])

    def grade_many(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
        """The verdicts on many completions, tens at a time."""
        return self._verifier.grade_many(
            (text, row["tests"], row["setup"]) for text, row in zip(completions, rows, strict=True)
        )

    def close(self) -> None:
        """Ends the sandbox; it starts again when needed."""
        self._verifier.close()


def _verifier(options: dict[str, Any]) -> CodeVerifier:
    from mirrorpo.rewards.code import CodeVerifier
    from mirrorpo.rewards.sandbox.limits import Limits

    rest = dict(options)
    require: Level = rest.pop("require", "confined")
    in_flight = rest.pop("in_flight", None)
    try:
        return CodeVerifier(limits=Limits(**rest), require=require, in_flight=in_flight)
    except TypeError:
        legal = ", ".join(("require", "in_flight", *Limits.__dataclass_fields__))
        unknown = sorted(set(rest) - set(Limits.__dataclass_fields__))
        raise ValueError(f"sandbox does not take {unknown[0]!r}. Legal: {legal}") from None


def _between(rows: list[Row], low: int, high: int) -> list[Row]:
    return [row for row in rows if low <= row["task_id"] <= high]


def _from_hub() -> list[dict[str, Any]]:
    """All four splits; the ids say which row belongs where."""
    return [row for split in IDS for row in load_from_hub(HUB_NAME, "full", split)]
