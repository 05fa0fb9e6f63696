"""Models: those shipped with the package, how a path is read, and what a folder or a config says about a model."""

from mirrorpo.models.builtin import BUILTIN_MODELS, builtin_path, for_vllm, resolve_model

__all__ = ["BUILTIN_MODELS", "builtin_path", "for_vllm", "resolve_model"]
