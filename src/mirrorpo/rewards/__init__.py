"""When is an answer right? Verifiers for plain data, maths and code, each loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirrorpo.rewards.answer_position import final_answer
    from mirrorpo.rewards.code import CodeVerifier, extract_code
    from mirrorpo.rewards.match import VERIFIERS, Verifier, exact, last_number, numeric
    from mirrorpo.rewards.maths import MathVerifier
    from mirrorpo.rewards.user_function import RewardError, UserReward
    from mirrorpo.rewards.verdict import Grade

_HOME = {
    "CodeVerifier": "code",
    "Grade": "verdict",
    "MathVerifier": "maths",
    "RewardError": "user_function",
    "UserReward": "user_function",
    "VERIFIERS": "match",
    "Verifier": "match",
    "exact": "match",
    "extract_code": "code",
    "final_answer": "answer_position",
    "last_number": "match",
    "numeric": "match",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


__all__ = [
    # verdict: what a verifier or a reward function returns
    "Grade",
    # match: plain comparisons, and the user's own function
    "VERIFIERS",
    "RewardError",
    "UserReward",
    "Verifier",
    "exact",
    "last_number",
    "numeric",
    # maths: the final answer, exact or by algebra
    "MathVerifier",
    "final_answer",
    # code: programs, in the sandbox
    "CodeVerifier",
    "extract_code",
]
