"""Plain comparisons for any data set: ``exact`` (to the letter) and ``numeric`` (the final number).

None of them evaluates text of the model. `numeric` finds and reads the final number as `math` does.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from mirrorpo.rewards.answer_position import TAIL_CHARACTERS, find_answer
from mirrorpo.rewards.notation import tidy
from mirrorpo.rewards.numbers import Number, agree, number_in_sentence, read_number, without_name
from mirrorpo.rewards.user_function import RewardError, UserReward
from mirrorpo.rewards.verdict import Grade

Verifier = Callable[[str, str], Grade]

_MARKER = "####"

__all__ = ["VERIFIERS", "RewardError", "UserReward", "Verifier", "exact", "last_number", "numeric", "reference_number"]


def last_number(text: str) -> Fraction | None:
    """The number that a text's final answer states, else its last number; None without one that can be read whole.

    Example:
        >>> last_number("so 1,000 + 2.5 is #### 1,002.5"), last_number("it is 5 or 6")
        (Fraction(2005, 2), None)
    """
    found = find_answer(text, last_number=True)
    if found is None or len(found.parts) != 1:
        return None
    number = _number(found.parts[0])
    return None if number is None else number.value


def _number(text: str, *, trusted: bool = False) -> Number | None:
    text = without_name(tidy(text))
    return read_number(text, trusted=trusted) or number_in_sentence(text)


def exact(completion: str, answer: str) -> Grade:
    """The completion, or what follows its last ``####``, is the answer to the letter (outer blanks aside)."""
    given = completion.rpartition(_MARKER)[2].strip()
    if not given:
        return Grade(reward=0.0, reason="no answer")
    wanted = answer.rpartition(_MARKER)[2].strip()
    return Grade(reward=1.0, reason="match") if given == wanted else Grade(reward=0.0, reason="mismatch")


def reference_number(answer: str) -> Number | None:
    """The number that a right answer states, after a mark or alone; None if it states none, or several.

    Example:
        >>> reference_number("3 + 4 = 7 #### 7").value, reference_number("5 or 6")
        (Fraction(7, 1), None)
    """
    found = find_answer(answer)
    if found is None:
        return _number(answer[:TAIL_CHARACTERS], trusted=True)
    return None if len(found.parts) != 1 else _number(found.parts[0], trusted=True)


def numeric(completion: str, answer: str) -> Grade:
    """The final number of the completion equals that of the answer, as exact fractions; read whole or not at all.

    Example:
        >>> numeric("That makes 2.5 million.", "2500000").reason, numeric("It is 5 or 6.", "6").reason
        ('match', 'malformed')
    """
    wanted = reference_number(answer)
    if wanted is None:
        return Grade(reward=None, reason="bad reference")
    found = find_answer(completion, last_number=True)
    if found is None:
        return Grade(reward=0.0, reason="no answer")
    numbers = [_number(part) for part in found.parts]
    if any(number is None for number in numbers):
        return Grade(reward=0.0, reason="malformed")
    right = all(number is not None and agree(number, wanted) for number in numbers)
    return Grade(reward=1.0, reason="match") if right else Grade(reward=0.0, reason="mismatch")


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric}
