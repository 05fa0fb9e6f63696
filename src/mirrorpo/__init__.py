"""mirrorpo: choose how far a language-model policy may move, and from what.

The core (everything importable from here) is pure: torch only, no I/O, no trainer. ``mirrorpo.training`` holds the TRL
trainer, ``mirrorpo.cli`` the command line.
"""

from importlib.metadata import version

try:
    import torch as _torch  # noqa: F401  (first, so that a broken build is told in words)
except (ImportError, OSError) as error:  # a build for another system, or a library that is missing
    raise ImportError(
        f"mirrorpo needs torch, which cannot be imported ({error}): pip install --force-reinstall torch"
    ) from error

from mirrorpo import _moved
from mirrorpo.divergences import Divergence, divergence
from mirrorpo.losses.advantages import advantages
from mirrorpo.losses.aggregation import aggregate
from mirrorpo.losses.future_kl import FutureKL
from mirrorpo.losses.objective import Objective, Output, Penalty
from mirrorpo.losses.presets import objective, objective_from
from mirrorpo.losses.regions import TrustRegion, trust_region

__version__ = version("mirrorpo")
_moved.install()

__all__ = [
    # divergences: how far apart are two policies?
    "Divergence",
    "divergence",
    # trust_region: where may the policy move?
    "TrustRegion",
    "trust_region",
    # advantages, aggregation
    "advantages",
    "aggregate",
    # objective, presets: the loss
    "FutureKL",
    "Objective",
    "Output",
    "Penalty",
    "objective",
    "objective_from",
]
