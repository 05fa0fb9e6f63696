"""How good is a policy on problems it has not seen?"""

from mirrorpo.evaluation.sampling import Evaluation, Sample, Sampler, evaluate
from mirrorpo.evaluation.statistics import pass_at_k, wilson_interval

__all__ = ["Evaluation", "Sample", "Sampler", "evaluate", "pass_at_k", "wilson_interval"]
