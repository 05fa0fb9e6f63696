"""Training with any objective of this library: TRL's trainer, the recipe, the run."""

from mirrorpo.training.config import MirrorConfig
from mirrorpo.training.trainer import MirrorTrainer, NonFiniteError

__all__ = ["MirrorConfig", "MirrorTrainer", "NonFiniteError"]
