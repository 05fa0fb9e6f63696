"""Where do programs that nobody has read run? In processes that can reach nothing, and that judge nothing."""

from mirrorpo.rewards.sandbox.limits import LEVELS, Level, Limits
from mirrorpo.rewards.sandbox.pool import Outcome, Pool
from mirrorpo.rewards.sandbox.template import Reached, SandboxError, Template

__all__ = [
    # levels
    "LEVELS",
    "Level",
    # limits
    "Limits",
    # pool: many programs at once
    "Outcome",
    "Pool",
    # template: the process they are forked from
    "Reached",
    "SandboxError",
    "Template",
]
