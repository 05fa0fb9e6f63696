"""The model that comes with the package: ``tiny``, enough to run the real path on a CPU without a download.

``tiny`` is a Qwen3-architecture causal language model over bytes, taught small sums by ``scripts/build_tiny_model.py``;
its folder holds plain transformers files, so ``AutoModelForCausalLM.from_pretrained`` and
``AutoTokenizer.from_pretrained`` load it without network and without remote code.
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "builtin:"

BUILTIN_MODELS: dict[str, Path] = {
    "tiny": Path(__file__).parent / "tiny",
}


def builtin_path(name: str) -> Path:
    """Find the folder of a model that comes with the package.

    Args:
        name: a key of ``BUILTIN_MODELS``.

    Returns:
        The folder with configuration, weights and tokenizer.

    Example:
        >>> builtin_path("tiny").name
        'tiny'
    """
    if name not in BUILTIN_MODELS:
        legal = ", ".join(repr(known) for known in BUILTIN_MODELS)
        raise ValueError(f"name of the built-in model is {name!r}; legal values: {legal}")
    return BUILTIN_MODELS[name]


def resolve_model(path: str) -> str:
    """The folder of ``builtin:<name>`` or of a GGUF file's converted model; any other path or hub name as it is.

    Args:
        path: what a recipe says, such as ``builtin:tiny``, ``Qwen/Qwen3-0.6B``, ``model-Q4_1.gguf`` or a folder.

    Returns:
        What transformers' ``from_pretrained`` accepts.

    Raises:
        ValueError: no such built-in model, or a GGUF file that cannot be converted.

    Example:
        >>> resolve_model("Qwen/Qwen3-0.6B")
        'Qwen/Qwen3-0.6B'
    """
    if path.lower().endswith(".gguf") and not Path(path).is_dir():
        from mirrorpo.models.gguf import from_gguf

        return from_gguf(path)
    if not path.startswith(PREFIX):
        return path
    return str(builtin_path(path.removeprefix(PREFIX)))
