"""Can a model's folder be loaded without running code of its author? Weights as safetensors, no Python of its own."""

from __future__ import annotations

from pathlib import Path

from mirrorpo.errors import InputError

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# Arguments for every ``from_pretrained`` of a model, of the hub's too.
SAFE_LOADING = {"use_safetensors": True, "trust_remote_code": False}


def check_model_folder(path: str, key: str = "model.path") -> None:
    """Refuses a folder whose weights are pickled; what is no folder (a hub name) passes.

    Args:
        path: of the recipe, after ``resolve_model``.
        key: the key that named it, for the message.

    Raises:
        InputError: one line that names the file and says what to do.

    Example:
        >>> check_model_folder("Qwen/Qwen3-0.6B")
    """
    folder = Path(path)
    if "\0" in path or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{key} {path!r}: {pickled[0]} is a pickle, which may run any code, and is not loaded; "
            "save the model as safetensors (save_pretrained does)"
        )
