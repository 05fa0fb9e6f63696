"""Grade-school maths in words: GSM8K, 7 473 training problems and 1 319 for testing, graded by the final number.

Reference: Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mirrorpo.tasks.jsonl import read_rows
from mirrorpo.tasks.task import Grade, Part, Row, Settings, check_test_part, load_from_hub, split_off

HUB_NAME = "openai/gsm8k"
INSTRUCTION = "Think step by step. Write the final answer as a number on a line of its own, after ####."


def _has_answer(answer: str) -> bool:
    from mirrorpo.rewards.maths import reference

    return bool(reference(answer).text)


class Gsm8kSettings(Settings):
    """GSM8K."""

    name: Literal["gsm8k"]
    path: str | None = Field(default=None, description="the original train.jsonl; empty: openai/gsm8k from the hub")
    test_path: str | None = Field(default=None, description="the original test.jsonl, with path")
    test_part: Literal["auto", "test", "validation"] = Field(default="auto", description="what evaluation sees")
    validation_size: int = Field(default=500, ge=0, description="problems that training never sees")
    train_size: int | None = Field(default=None, ge=1, description="maximum number of training problems")
    seed: int = Field(default=0, ge=0, description="which problems are held out")
    instruction: str = Field(default=INSTRUCTION, description="follows every question")
    last_number: bool = Field(default=False, description="without ####, \\boxed or 'the answer is': the last number")


class Gsm8k:
    """GSM8K, as a `mirrorpo.tasks.task.Task`.

    A part of the training problems is held out by a digest of question and seed: ``validation``, which training never
    sees. The rows for testing are GSM8K's test split where the source has it, else that part.

    Args:
        path: the original ``train.jsonl`` (fields question, answer); None loads ``openai/gsm8k`` from the hub.
        test_path: the original ``test.jsonl``; only together with ``path``.
        test_part: "test", "validation", or "auto": the former where it is available.
        validation_size: problems held out of training.
        train_size: maximum number of training problems.
        seed: which problems are held out, and the order of the training problems.
        instruction: follows every question, in training and evaluation alike.
        last_number: a completion without a mark answers with its last number.

    Raises:
        ValueError: no such part, a broken line, the hub cannot be reached; says what to set.
        FileNotFoundError: no such file.
    """

    name = "gsm8k"

    def __init__(
        self,
        *,
        path: str | None = None,
        test_path: str | None = None,
        test_part: Literal["auto", "test", "validation"] = "auto",
        validation_size: int = 500,
        train_size: int | None = None,
        seed: int = 0,
        instruction: str = INSTRUCTION,
        last_number: bool = False,
    ) -> None:
        if test_path is not None and path is None:
            raise ValueError("test_path goes with path: set task.path to the training file, or leave both out")
        from mirrorpo.rewards.maths import MathVerifier  # a grader is loaded with its task, not with the table of tasks

        self._instruction = instruction
        self._verifier = MathVerifier(last_number=last_number)
        if path is not None:
            train = read_rows(Path(path), "question", "answer", _has_answer)
            test = [] if test_path is None else read_rows(Path(test_path), "question", "answer", _has_answer)
        else:
            train, test = (load_from_hub(HUB_NAME, "main", split) for split in ("train", "test"))
        train, validation = split_off(train, "question", validation_size, seed)
        seen = {str(row["question"]).strip() for row in test}
        train = [row for row in train if str(row["question"]).strip() not in seen]
        if not train:
            raise ValueError(f"no training rows are left: validation_size is {validation_size}, make it smaller")
        parts: dict[Part, list[dict[str, Any]]] = {"train": train[:train_size], "validation": validation, "test": test}
        self.test_part: Part = check_test_part(test_part, parts, "set task.test_path to GSM8K's test.jsonl")
        self._rows: dict[Part, list[Row]] = {part: [self._row(row) for row in rows] for part, rows in parts.items()}

    def _row(self, row: dict[str, Any]) -> Row:
        question, answer = str(row["question"]).strip(), str(row["answer"])
        return {"prompt": f"{question}\n{self._instruction}".strip(), "question": question, "answer": answer}

    def rows(self, split: Part) -> list[Row]:
        """The problems of "train", "validation" or "test" (see ``test_part``)."""
        part: Part = self.test_part if split == "test" else split
        if part not in self._rows:
            raise ValueError(f"split is {split!r}; legal values: 'train', 'validation', 'test'")
        return self._rows[part]

    def grade_many(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
        """The verdicts on many completions; those that take algebra run side by side."""
        return self._verifier.grade_many(completions, [row["answer"] for row in rows])

    def grade(self, completion: str, row: Row) -> Grade:
        """The maths verifier's verdict (`mirrorpo.rewards.maths`)."""
        return self._verifier.grade(completion, row["answer"])
