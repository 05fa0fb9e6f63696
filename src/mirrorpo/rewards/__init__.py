"""When is an answer right? Verifiers for plain data, maths and code."""

from mirrorpo.rewards.match import VERIFIERS, RewardError, UserReward, Verifier, exact, last_number, numeric

__all__ = [
    # match: plain comparisons, and the user's own function
    "VERIFIERS",
    "RewardError",
    "UserReward",
    "Verifier",
    "exact",
    "last_number",
    "numeric",
]
