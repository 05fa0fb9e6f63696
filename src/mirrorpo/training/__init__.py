"""Training with any objective of this library: TRL's trainer, the recipe, the run.

The trainer is imported on first use: TRL takes seconds to import, and a recipe can be checked without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mirrorpo.errors import missing, needs_train

if TYPE_CHECKING:
    from mirrorpo.training.config import MirrorConfig
    from mirrorpo.training.preference_trainer import MirrorDPOConfig, MirrorDPOTrainer
    from mirrorpo.training.trainer import MirrorTrainer, NonFiniteError

_HOME = {
    "MirrorConfig": "config",
    "MirrorDPOConfig": "preference_trainer",
    "MirrorDPOTrainer": "preference_trainer",
    "MirrorTrainer": "trainer",
    "NonFiniteError": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    absent = missing()
    if absent:
        raise ImportError(needs_train("mirrorpo.training", absent))
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


__all__ = ["MirrorConfig", "MirrorDPOConfig", "MirrorDPOTrainer", "MirrorTrainer", "NonFiniteError"]
