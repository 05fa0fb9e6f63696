"""The neural mirror map: a divergence whose generator is learned (GBMPO, arXiv 2602.04380)."""

from mirrorpo.divergences.neural.generator import GROUPS, NUM_PARAMETERS, SLICES, UNITS_PER_GROUP, project
from mirrorpo.divergences.neural.map import MirrorMap, NeuralDivergence, checked

__all__ = [
    # map: the parameters, and the divergence they define
    "MirrorMap",
    "NeuralDivergence",
    "checked",
    # units: how the parameters are laid out
    "GROUPS",
    "NUM_PARAMETERS",
    "SLICES",
    "UNITS_PER_GROUP",
    "project",
]
