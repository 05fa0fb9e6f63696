"""Evaluation of a policy on problems it has not seen."""

from mirrorpo.evaluation.sampling import Sampler, evaluate
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.statistics import clustered_interval, pass_at_k, wilson_interval

__all__ = [
    # engines: how completions are drawn
    "Sampler",
    # sampling: draw and grade
    "evaluate",
    # statistics
    "clustered_interval",
    "pass_at_k",
    "wilson_interval",
    # summary: graded samples and what they say
    "Evaluation",
    "Sample",
]
