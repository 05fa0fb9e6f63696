"""Is a mathematical answer right? Find the final answer, compare exact numbers, else ask a computer algebra system.

Reasons: ``match``, ``mismatch``, ``no answer`` (nothing marks one), ``malformed`` (what is marked is no single
mathematical object), ``timeout``. Not scorable (reward None): ``bad reference``. No text is ever evaluated as code.

`mirrorpo.rewards.answer_position` says where the answer is, `mirrorpo.rewards.numbers` what a number is,
`mirrorpo.rewards.equality` what is equal to what.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from mirrorpo.rewards.algebra import Algebra
from mirrorpo.rewards.answer_position import TAIL_CHARACTERS, final_answer, find_answer
from mirrorpo.rewards.latex import has_words
from mirrorpo.rewards.notation import tidy
from mirrorpo.rewards.numbers import MAX_DIGITS, Number, agree, bare_chain, number_in_sentence, read_number
from mirrorpo.rewards.units import conflict
from mirrorpo.rewards.verdict import Grade

MAX_SYMBOLIC_CHARACTERS = 1_000
_MAX_BRACKETS = 60
# "Area = 12": a name in words says nothing that 12 does not.
_NAME_IN_WORDS = re.compile(r"\A[A-Za-z][A-Za-z ]{2,40}=\s*(?=[^=]+\Z)")
_RATIO = re.compile(r"[0-9]+(?:\s*:\s*[0-9]+)+")
_OR = re.compile(r"\s+or\s+")
_OFFERED = re.compile(r"\b(?:or|and)\b")
_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_OPTION = re.compile(
    r"\(?\s*([A-J])\s*(?:[).:]+(?:\s.*)?)?|(?:option|choice)\s+\(?([A-J])\)?", re.DOTALL | re.IGNORECASE
)
_LABEL = re.compile(r"(?:\(\s*[A-Ja-j]\s*\)|[A-Ja-j]\s*[).])\s+(?=[-$0-9.\\])")  # "(C) 29": the option and what it says
_LETTER = re.compile(r"\(?\s*([A-J])\s*\)?[.:]?")
_DRESS_OF_WORDS = re.compile(r"\\[A-Za-z]+|[^\w\s]|_")
_ARTICLE = re.compile(r"(?:the|a|an)\s+")

_MATCH, _MISMATCH = Grade(reward=1.0, reason="match"), Grade(reward=0.0, reason="mismatch")
_NO_ANSWER, _MALFORMED = Grade(reward=0.0, reason="no answer"), Grade(reward=0.0, reason="malformed")
_TIMEOUT, _BAD_REFERENCE = Grade(reward=0.0, reason="timeout"), Grade(reward=None, reason="bad reference")
_VERDICTS = {"match": _MATCH, "mismatch": _MISMATCH, "timeout": _TIMEOUT, "bad reference": _BAD_REFERENCE}

__all__ = ["MathVerifier", "final_answer"]


@dataclass(frozen=True)
class Reference:
    """The right answer: what is marked in it, or all of it.

    Attributes:
        text: tidy; empty if it states nothing.
        number: if it is one.
        words: its words, if it is a text such as "yes" and no mathematics.
        letter: of a multiple choice.
    """

    text: str
    number: Number | None = None
    words: str = ""
    letter: str = ""


@lru_cache(maxsize=65536)
def reference(answer: str) -> Reference:
    """What a right answer states, alone or marked as in a completion."""
    if answer.isdecimal() and answer.isascii() and len(answer) <= MAX_DIGITS:
        return Reference(answer, read_number(answer))
    marked = find_answer(answer)
    text = tidy(answer[:TAIL_CHARACTERS] if marked is None else ", ".join(marked.parts))
    if "=" in text:
        text = _NAME_IN_WORDS.sub("", text, count=1)
    number = read_number(text, trusted=not text[:1].isalpha())  # "Seven Samurai" is a name
    letter = _LETTER.fullmatch(text)
    words = _words(text) if number is None and not letter and has_words(text) else ""
    return Reference(text, number, words, letter[1] if letter else "")


def _words(text: str) -> str:
    text = " ".join(_DRESS_OF_WORDS.sub(" ", text).casefold().split())
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text


class MathVerifier:
    """Grades mathematical answers.

    Args:
        last_number: a completion without a mark answers with its last number.
        seconds: time limit of an answer that needs algebra.
        processes: how many of those may be compared side by side; by default up to four, as the machine has cores.

    Example:
        >>> MathVerifier().grade("6 * 12 = 72 #### 72", "#### 72")
        Grade(reward=1.0, reason='match')
    """

    def __init__(self, *, last_number: bool = False, seconds: float = 5.0, processes: int | None = None) -> None:
        self.last_number = last_number
        self._algebra = Algebra(seconds=seconds, processes=processes)
        self._threads: ThreadPoolExecutor | None = None

    def grade(self, completion: str, answer: str) -> Grade:
        """The verdict on one completion; never raises on any text.

        Args:
            completion: the model's text.
            answer: the right answer, alone or marked as in a completion (GSM8K's ``answer`` field).

        Returns:
            Reward and reason.
        """
        verdict = self._at_once(completion, answer)
        return verdict if isinstance(verdict, Grade) else self._by_algebra(*verdict)

    def begin(self, completion: str, answer: str) -> Grade | Future[Grade]:
        """The verdict on one completion, or its promise if it needs algebra: those are compared side by side."""
        verdict = self._at_once(completion, answer)
        if isinstance(verdict, Grade):
            return verdict
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=self._algebra.processes)
        return self._threads.submit(self._by_algebra, *verdict)

    def grade_many(self, completions: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """The verdicts on many completions, in their order; slow ones run side by side."""
        begun = [self.begin(*pair) for pair in zip(completions, answers, strict=True)]
        return [verdict if isinstance(verdict, Grade) else verdict.result() for verdict in begun]

    def _at_once(self, completion: str, answer: str) -> Grade | tuple[tuple[str, ...], Reference]:
        """The verdict where no algebra is needed; else the texts to compare."""
        wanted = reference(answer)
        if not wanted.text:
            return _BAD_REFERENCE
        found = find_answer(completion, last_number=self.last_number)
        if found is None:
            return _NO_ANSWER
        for part in found.parts:
            if len(part) > 2 * MAX_SYMBOLIC_CHARACTERS or "\0" in part:
                return _MALFORMED
        if len(found.parts) == 1 and not found.exclaimed:
            text = tidy(found.parts[0])
            return _plain_verdict(text, wanted) or ((text,), wanted)
        parts = tuple(tidy(f"{part}!" if found.exclaimed and "!" in wanted.text else part) for part in found.parts)
        verdicts = [_plain_verdict(part, wanted) for part in parts]
        if len(parts) == 1:
            return verdicts[0] or (parts, wanted)
        if all(verdict == _MATCH for verdict in verdicts):
            return _MATCH
        if wanted.number is not None and any(verdict is not None and verdict != _MATCH for verdict in verdicts):
            return _MALFORMED  # several answers offered at once
        return parts, wanted

    def _by_algebra(self, parts: tuple[str, ...], wanted: Reference) -> Grade:
        """The verdict on one text, or on several offered at once: each equals the reference, or it lists them all."""
        verdicts = [_plain_verdict(part, wanted) or self._compared(part, wanted) for part in parts]
        if len(parts) == 1 or all(verdict == _MATCH for verdict in verdicts):
            return verdicts[0]
        return self._compared(", ".join(parts), wanted)

    def _compared(self, given: str, wanted: Reference) -> Grade:
        return _VERDICTS.get(self._algebra.compare(given, wanted.text), _MALFORMED)

    def close(self) -> None:
        """Ends the algebra processes, if any were started."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        self._algebra.close()


def _plain_verdict(given: str, wanted: Reference) -> Grade | None:
    """The verdict on a tidy text by its letters or as a number; None if it takes algebra."""
    if given == wanted.text:
        return _MATCH if given else _MALFORMED
    if "=" in given:
        given = _NAME_IN_WORDS.sub("", given, count=1)
    if not given:
        return _MALFORMED
    number = read_number(given)
    if number is None and wanted.number is not None and (labelled := _LABEL.match(given)):
        number = read_number(given[labelled.end() :])
    if number is None and wanted.number is not None and "=" in given:
        given, unit = bare_chain(given)
        if conflict(unit, wanted.number.unit):
            return _MISMATCH
    if number is not None and wanted.number is not None:
        return _MATCH if agree(number, wanted.number) else _MISMATCH
    if wanted.letter and (option := _OPTION.fullmatch(given)):
        return _MATCH if (option[1] or option[2]).upper() == wanted.letter else _MISMATCH
    if wanted.words:
        return _MATCH if _words(given) == wanted.words else _MISMATCH
    if _RATIO.fullmatch(wanted.text) and " to " in given:
        given = given.replace(" to ", ":")
    if number is None and wanted.number is not None and (has_words(given) or _OFFERED.search(given)):
        if said := number_in_sentence(given):
            return _MATCH if agree(said, wanted.number) else _MISMATCH
        offered = [read_number(part) for part in _OR.split(given)]
        right = len(offered) == 2 and all(one is not None and agree(one, wanted.number) for one in offered)
        return _MATCH if right else _MALFORMED  # the right answer is a number, this is a sentence, or offers several
    if _SPACE.sub("", given) == _SPACE.sub("", wanted.text):
        return _MATCH
    if max(len(given), len(wanted.text)) > MAX_SYMBOLIC_CHARACTERS or _too_deep(given):
        return _MALFORMED
    return None


def _too_deep(text: str) -> bool:
    """The grammar's time grows fast with the depth of brackets."""
    return text.count("{") != text.count("}") or sum(map(text.count, "([{")) > _MAX_BRACKETS
