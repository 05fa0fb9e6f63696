"""When is an answer right? Verifiers for plain data, maths and code."""

from mirrorpo.rewards.answer_position import final_answer
from mirrorpo.rewards.code import CodeVerifier, extract_code
from mirrorpo.rewards.match import VERIFIERS, Verifier, exact, last_number, numeric
from mirrorpo.rewards.maths import MathVerifier
from mirrorpo.rewards.user_function import RewardError, UserReward
from mirrorpo.rewards.verdict import Grade

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
