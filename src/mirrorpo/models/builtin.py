"""The model that comes with the package: ``tiny``, enough to run the real path on a CPU without a download.

``tiny`` is a Qwen3-architecture causal language model over bytes, taught small sums by ``scripts/build_tiny_model.py``;
its folder holds plain transformers files, so ``AutoModelForCausalLM.from_pretrained`` and
``AutoTokenizer.from_pretrained`` load it without network and without remote code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

PREFIX = "builtin:"
# The heads of the tiny model, and the next ones that every attention of vLLM has a kernel for.
_HEAD, _WIDE = 24, 32

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


def cache_folder() -> Path:
    """What is converted once: ``$XDG_CACHE_HOME/mirrorpo``, or below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirrorpo"


def for_vllm(path: str) -> str:
    """The folder that vLLM can run: of the tiny model, and of what was trained from it, a copy with wider heads.

    vLLM's attention on a CPU has no heads of 24 numbers. The copy is made once, in the cache; a line says so.

    Args:
        path: after ``resolve_model``.
    """
    from transformers.utils import logging

    folder = Path(path)
    if not (folder / "model.safetensors").is_file() or not (folder / "config.json").is_file():
        return path
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = config["model_type"], config["head_dim"], config["rope_parameters"]["rope_type"]
    except (ValueError, KeyError, TypeError):  # another model, or a broken file, which is said where it is loaded
        return path
    if kind != ("qwen3", _HEAD, "default"):
        return path
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    wide = cache_folder() / "wide" / f"{folder.name}-{digest}"
    if not wide.is_dir():
        logger = logging.get_logger(__name__)
        logger.warning("for vLLM the heads of %s are padded from %d to %d, once, into %s", path, _HEAD, _WIDE, wide)
        _write_wide(folder, config, wide)
    return str(wide)


def _write_wide(folder: Path, config: dict[str, Any], wide: Path) -> None:
    from safetensors.torch import load_file, save_file

    writing = wide.parent / f".{wide.name}.{secrets.token_hex(6)}.tmp"
    try:
        shutil.copytree(folder, writing)
        weights = {
            name: _with_wide_heads(name.split(".")[-2], value).contiguous()
            for name, value in load_file(folder / "model.safetensors").items()
        }
        save_file(weights, writing / "model.safetensors", {"format": "pt"})
        context, rope = config["max_position_embeddings"], config["rope_parameters"]
        # LongRoPE divides frequency i, theta ** (-2 i / 32), by factor i: the first twelve become theta ** (-2 i / 24).
        theta = rope["rope_theta"]
        factors = [theta ** (2 * i / _HEAD - 2 * i / _WIDE) for i in range(_HEAD // 2)]
        factors += [1.0] * ((_WIDE - _HEAD) // 2)
        rope = {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": context,
        }
        (writing / "config.json").write_text(json.dumps({**config, "head_dim": _WIDE, "rope_parameters": rope}))
        try:
            writing.rename(wide)
        except OSError:
            if not wide.is_dir():  # another process was first
                raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _with_wide_heads(part: str, weight: Any) -> Any:
    """The weight of a part of the attention, zeros where the head is wider; any other as it is.

    The padded numbers stay 0 in training: each gradient there has a factor that is 0. A norm over 32 numbers, 8 of them
    0, gives sqrt(32 / 24) times the norm over 24: taken back in the key's weight. In the query's it stays, for the
    scores are divided by sqrt(32).
    """
    half, wide_half = _HEAD // 2, _WIDE // 2
    # Rotary embeddings turn the numbers i and i + half together.
    first, second = slice(half), slice(wide_half, wide_half + half)
    columns = part == "o_proj"
    rows = weight.T if columns else weight
    if part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        heads = rows.reshape(-1, _HEAD, rows.shape[1])
        wide = heads.new_zeros(heads.shape[0], _WIDE, heads.shape[2])
    elif part in ("q_norm", "k_norm"):
        heads = rows.reshape(1, _HEAD, 1) * (1.0 if part == "q_norm" else math.sqrt(_HEAD / _WIDE))
        wide = heads.new_zeros(1, _WIDE, 1)
    else:
        return weight
    wide[:, first], wide[:, second] = heads[:, :half], heads[:, half:]
    if part in ("q_norm", "k_norm"):
        return wide.reshape(_WIDE)
    return wide.reshape(-1, heads.shape[2]).T if columns else wide.reshape(-1, heads.shape[2])
