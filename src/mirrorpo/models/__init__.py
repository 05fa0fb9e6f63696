"""Models shipped with the package, and how a recipe's model path is read."""

from mirrorpo.models.builtin import BUILTIN_MODELS, builtin_path, resolve_model

__all__ = ["BUILTIN_MODELS", "builtin_path", "resolve_model"]
