"""mirrorpo: choose how far a language-model policy may move, and from what.

The core (every name here) is pure: torch only, no I/O, no trainer. ``mirrorpo.training`` holds the TRL trainer,
``mirrorpo.cli`` the command line. Importing the package is free; each name is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mirrorpo import _moved

if TYPE_CHECKING:
    from mirrorpo.divergences import Divergence, divergence
    from mirrorpo.losses.advantages import advantages
    from mirrorpo.losses.aggregation import aggregate
    from mirrorpo.losses.future_kl import FutureKL
    from mirrorpo.losses.objective import Objective, Output, Penalty
    from mirrorpo.losses.optimum import optimum
    from mirrorpo.losses.preference import preference_loss
    from mirrorpo.losses.presets import objective, objective_from
    from mirrorpo.losses.regions import TrustRegion, trust_region

    __version__: str

_moved.install()

# The module that each public name is loaded from; a test compares it with the imports above and with ``__all__``.
_HOME = {
    "Divergence": "mirrorpo.divergences",
    "divergence": "mirrorpo.divergences",
    "TrustRegion": "mirrorpo.losses.regions",
    "trust_region": "mirrorpo.losses.regions",
    "advantages": "mirrorpo.losses.advantages",
    "aggregate": "mirrorpo.losses.aggregation",
    "FutureKL": "mirrorpo.losses.future_kl",
    "Objective": "mirrorpo.losses.objective",
    "Output": "mirrorpo.losses.objective",
    "Penalty": "mirrorpo.losses.objective",
    "objective": "mirrorpo.losses.presets",
    "objective_from": "mirrorpo.losses.presets",
    "optimum": "mirrorpo.losses.optimum",
    "preference_loss": "mirrorpo.losses.preference",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("mirrorpo")
    elif name in _HOME:
        try:
            import_module("torch")  # first, so that a broken build is reported in one line
        except (ImportError, OSError) as error:  # a build for another system, or a missing library
            raise ImportError(
                f"mirrorpo needs torch, which cannot be imported ({error}): pip install --force-reinstall torch"
            ) from error
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


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
    # optimum, preference: what a penalised reward aims at, and the loss that aims there from preferences
    "optimum",
    "preference_loss",
]
