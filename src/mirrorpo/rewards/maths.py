"""Is a mathematical answer right? Find the final answer, compare exact numbers, else ask a computer algebra system.

Reasons: ``match``, ``mismatch``, ``no answer`` (nothing marks one), ``malformed`` (what is marked is no single
mathematical object), ``timeout``. Not scorable (reward None): ``bad reference``. No text is ever evaluated as code.

The final answer is what follows ``####``, stands in ``\\boxed{}`` or follows "the answer is", whichever comes last;
with ``last_number`` a text without such a mark answers with its last number.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from mirrorpo.rewards.numbers import MAX_CHARACTERS, Number, agree, read_number, tidy
from mirrorpo.rewards.symbolic import Symbolic
from mirrorpo.rewards.verdict import Grade

# A final answer stands at the end; the rest of a long text is not looked at.
TAIL_CHARACTERS = 100_000
MAX_SYMBOLIC_CHARACTERS = 1_000
# The grammar's time grows fast with the depth of brackets.
_MAX_BRACKETS = 60
_MARKER = "####"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PHRASE = re.compile(r"\banswers?\b(?:[^.\n:=]{0,80}?\b(?:is|are)\b\s*:?|\s*[:=])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$|\*)|,\s+(?=[a-z])|\n")
_ANY_NUMBER = re.compile(
    r"[-+]?(?:\$\s?)?(?:[0-9]{1,3}(?:,[0-9]{3}){1,6}|[0-9]{1,30})(?:\.[0-9]{1,30})?(?:\s?/\s?[0-9]{1,30})?%?"
)
_PROSE = re.compile(r"\b(?:or|to)\b|(?<![\\A-Za-z])(?!sqrt|sin|cos|tan|log|exp|inf|pi\b)[A-Za-z]{3,}")
_SPACE = re.compile(r"\s+")

_MATCH, _MISMATCH = Grade(reward=1.0, reason="match"), Grade(reward=0.0, reason="mismatch")
_NO_ANSWER, _MALFORMED = Grade(reward=0.0, reason="no answer"), Grade(reward=0.0, reason="malformed")
_TIMEOUT, _BAD_REFERENCE = Grade(reward=0.0, reason="timeout"), Grade(reward=None, reason="bad reference")


def final_answer(completion: str, *, last_number: bool = False) -> str | None:
    """The text of the final answer, as it stands.

    Args:
        completion: any text; its last 100 000 characters are looked at.
        last_number: without a mark, take the last number.

    Returns:
        The text, empty if a mark is followed by nothing (or a box is not closed); None without a mark.

    Example:
        >>> final_answer(r"so \\\\boxed{\\\\frac{1}{2}} it is")
        '\\\\\\\\frac{1}{2}'
        >>> final_answer("The answer is $72. Done.")
        '$72'
    """
    text = completion[-TAIL_CHARACTERS:]
    hashes = text.rfind(_MARKER)
    boxed = _last_match(_BOXED, text) if "\\" in text else None
    phrase = _last_match(_PHRASE, text) if "nswer" in text or "NSWER" in text else None
    at_box = -1 if boxed is None else boxed.start()
    at_phrase = -1 if phrase is None else phrase.start()
    last = max(hashes, at_box, at_phrase)
    if last < 0:
        return _last_number(text) if last_number else None
    if last == hashes:
        return text[hashes + len(_MARKER) :].lstrip("# \t\r\n").partition("\n")[0].strip()
    if boxed is not None and last == at_box:
        return _in_braces(text, boxed.end())
    assert phrase is not None
    return _SENTENCE_END.split(
        text[phrase.end() : phrase.end() + 2 * MAX_SYMBOLIC_CHARACTERS].lstrip("* \t\r\n"), maxsplit=1
    )[0]


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0] if last else None


def _in_braces(text: str, start: int) -> str:
    """From after an opening brace to its closing one; empty if there is none."""
    depth = 1
    for position in range(start, min(len(text), start + 10 * MAX_SYMBOLIC_CHARACTERS)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
    return ""


def _last_number(text: str) -> str | None:
    found = _ANY_NUMBER.findall(text[-2_000:])
    return found[-1] if found else None


@dataclass(frozen=True)
class _Reference:
    text: str
    number: Number | None
    measured: Number | None = None


@lru_cache(maxsize=65536)
def _reference(answer: str) -> _Reference:
    """The right answer: what is marked in it, or all of it."""
    marked = final_answer(answer)
    text = tidy(answer[:TAIL_CHARACTERS] if marked is None else marked)
    number = read_number(text)
    # "5m" may be a length or a product: a single letter is left to algebra, unless the other side has a unit as well.
    if number is not None and len(number.unit) == 1 and number.unit.isalpha():
        return _Reference(text, None, number)
    return _Reference(text, number)


class MathVerifier:
    """Grades mathematical answers.

    Args:
        last_number: a completion without a mark answers with its last number.
        seconds: time limit of an answer that needs algebra.

    Example:
        >>> MathVerifier().grade("6 * 12 = 72 #### 72", "#### 72")
        Grade(reward=1.0, reason='match')
    """

    def __init__(self, *, last_number: bool = False, seconds: float = 5.0) -> None:
        self.last_number = last_number
        self._symbolic = Symbolic(seconds=seconds)

    def grade(self, completion: str, answer: str) -> Grade:
        """The verdict on one completion; never raises on any text.

        Args:
            completion: the model's text.
            answer: the right answer, alone or marked as in a completion (GSM8K's ``answer`` field).

        Returns:
            Reward and reason.
        """
        wanted = _reference(answer)
        if not wanted.text:
            return _BAD_REFERENCE
        found = final_answer(completion, last_number=self.last_number)
        if found is None:
            return _NO_ANSWER
        if len(found) > 2 * MAX_SYMBOLIC_CHARACTERS or "\0" in found:
            return _MALFORMED
        given = tidy(found)
        if not given:
            return _MALFORMED
        if given == wanted.text:
            return _MATCH
        number = read_number(given if len(given) <= MAX_CHARACTERS else "")
        if number is not None and wanted.number is not None:
            return _MATCH if agree(number, wanted.number) else _MISMATCH
        if number is not None and number.unit and wanted.measured is not None:
            return _MATCH if agree(number, wanted.measured) else _MISMATCH
        return self._by_algebra(given, number, wanted)

    def _by_algebra(self, given: str, number: Number | None, wanted: _Reference) -> Grade:
        if _SPACE.sub("", given).lower() == _SPACE.sub("", wanted.text).lower():
            return _MATCH
        if wanted.number is not None and _PROSE.search(given):
            return _MALFORMED  # the right answer is a number, this is a sentence
        if len(given) > MAX_SYMBOLIC_CHARACTERS or len(wanted.text) > MAX_SYMBOLIC_CHARACTERS:
            return _MALFORMED
        if given.count("{") != given.count("}") or sum(map(given.count, "([{")) > _MAX_BRACKETS:
            return _MALFORMED
        left = str(number.value) if number is not None and not number.unit else given
        right = str(wanted.number.value) if wanted.number is not None else wanted.text
        verdict = self._symbolic.compare(left, right)
        return {
            "match": _MATCH,
            "mismatch": _MISMATCH,
            "timeout": _TIMEOUT,
            "bad reference": _BAD_REFERENCE,
        }.get(verdict, _MALFORMED)

    def close(self) -> None:
        """Ends the algebra process, if one was started."""
        self._symbolic.close()
