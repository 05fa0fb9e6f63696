"""Checks of a model's files before anything is loaded from them: no code, no pickles, no absurd sizes.

A model folder is a stranger's: nothing in it is run unless the recipe says ``model.trust_remote_code: true``. What is
checked here is text and names; ``mirrorpo.models.weights`` checks that the weights are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mirrorpo.errors import InputError
from mirrorpo.models.builtin import PREFIX, builtin_path

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_MAX_JSON = 10_000_000  # bytes of a configuration file
# Ways to compute attention that are in transformers itself; any other name is a repository whose code is downloaded.
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "paged|eager")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# The largest value of each size: about ten times that of any public model. Beyond it, building the model without
# memory takes hours, or a size no longer fits an integer of 64 bits.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LARGEST = {
    2_000: ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "num_encoder_layers"),
    10_000: ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim", *_EXPERTS),
    1_000_000: ("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "d_ff", "moe_intermediate_size"),
    100_000_000: ("vocab_size",),
    2**40: ("max_position_embeddings", "n_positions", "sliding_window"),
}
_LIMIT = {name: limit for limit, names in _LARGEST.items() for name in names}
_MAY_BE_ZERO = (*_EXPERTS, "sliding_window")
_MAX_MODULES = 400_000  # layers times experts


def loading(trust_remote_code: bool = False) -> dict[str, Any]:
    """Arguments for every ``from_pretrained`` of a model, of the hub's too: ``False`` never asks at a prompt."""
    return {"use_safetensors": True, "trust_remote_code": trust_remote_code}


def check_path(path: str, key: str = "model.path") -> None:
    """Refuses a path that can be neither a folder, nor a GGUF file, nor a name of the hub; looks at names alone.

    Args:
        path: what a recipe says.
        key: the key that named it, for the message.

    Raises:
        InputError: no such built-in model, file or folder.

    Example:
        >>> check_path("Qwen/Qwen3-0.6B"), check_path("builtin:tiny")
        (None, None)
    """
    if path.startswith(PREFIX):
        try:
            builtin_path(path.removeprefix(PREFIX))
        except ValueError as error:
            raise InputError(f"{key} {path!r}: {error}") from error
    elif path.lower().endswith(".gguf"):
        if not Path(path).expanduser().exists():
            raise InputError(
                f"{key} {path!r}: no such file; download the GGUF file first, a name of the hub has no effect here"
            )
    elif _names_a_folder(path) and not os.path.isdir(path):  # False, not an exception, for a name too long
        raise InputError(f"{key} {path!r}: no such folder")


def _names_a_folder(path: str) -> bool:
    """Whether a path cannot be meant as a hub name, such as ``Qwen/Qwen3-0.6B``: ``runs/model`` beside a ``runs/``."""
    first, slash, _ = path.partition("/")
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or (bool(slash) and os.path.isdir(first))


def check_model_folder(path: str, key: str = "model.path", *, trust_remote_code: bool = False) -> None:
    """Refuses a folder with code, pickled weights, or settings that cannot be a model's; a hub name passes.

    Args:
        path: of the recipe, after ``resolve_model``.
        key: the key that named it, for the message.
        trust_remote_code: code in the folder is accepted.

    Raises:
        InputError: one line that names the file and says what to do.

    Example:
        >>> check_model_folder("Qwen/Qwen3-0.6B")
    """
    folder = Path(path)
    if "\0" in path or not folder.is_dir():
        return
    try:
        _check_weights(folder)
        config = read_json(folder / "config.json")
        if config is not None:
            check_config(config, trust_remote_code=trust_remote_code)
        read_json(folder / "tokenizer_config.json")
        check_generation_config(read_json(folder / "generation_config.json"))
        adapter = read_json(folder / "adapter_config.json")
    except (ValueError, OSError) as error:
        raise InputError(f"{key} {path!r}: {error}") from None
    base = None if adapter is None else adapter.get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).resolve() != folder.resolve() and not (folder / "config.json").exists():
        check_model_folder(base, key, trust_remote_code=trust_remote_code)


def _check_weights(folder: Path) -> None:
    wanted = "adapter_model*.safetensors" if (folder / "adapter_config.json").is_file() else "*.safetensors"
    if any(folder.glob(wanted)):
        return
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{pickled[0]} is a pickle, which may run any code, and is not loaded; "
            "save the model as safetensors (save_pretrained does)"
        )
    if packed := sorted(file.name for file in folder.glob("*.gguf")):
        raise ValueError(f"the folder has no safetensors, but {packed[0]}: give the path of that file")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a configuration file; None if there is no such file.

    Raises:
        ValueError: not a file, too large, not a JSON object; one line that names the file.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{path.name} is not a file")
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path.name} has more than {_MAX_JSON:,} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(value).__name__}")
    return value


def check_config(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> None:
    """Refuses a model's configuration that needs code of its author, or has sizes that no model has.

    Args:
        config: the content of ``config.json``.
        trust_remote_code: code is accepted.

    Raises:
        ValueError: names the key, its value and the legal ones.

    Example:
        >>> check_config({"num_hidden_layers": 10**9})
        Traceback (most recent call last):
        ValueError: config.json: num_hidden_layers must be an integer in [1, 2000], got 1000000000
    """
    _check_code(config, trust_remote_code)
    for group in _groups(config, 0):
        for name, limit in _LIMIT.items():
            smallest = 0 if name in _MAY_BE_ZERO else 1
            values = group.get(name)
            for value in values if isinstance(values, list) else [values]:
                if value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= limit:
                    raise ValueError(
                        f"config.json: {name} must be an integer in [{smallest}, {limit}], got {value!r:.60}"
                    )
        for name in _ATTENTION_KEYS:
            value = group.get(name)
            if isinstance(value, str) and value not in ATTENTION and not trust_remote_code:
                raise ValueError(
                    f"config.json: {name} {value!r:.80} is code that would be downloaded. Legal: {', '.join(ATTENTION)}"
                )
        layers = max(_integer(group, name) for name in _LARGEST[2_000])
        experts = max(_integer(group, name) for name in _EXPERTS)
        if layers * experts > _MAX_MODULES:
            raise ValueError(f"config.json: {layers} layers of {experts} experts; legal: {_MAX_MODULES:,} in all")


def _integer(group: Mapping[str, Any], name: str) -> int:
    value = group.get(name)
    return value if isinstance(value, int) else 1


def _groups(config: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """The configuration and those nested in it, such as ``text_config``."""
    yield config
    if depth < 4:
        for value in config.values():
            if isinstance(value, Mapping):
                yield from _groups(value, depth + 1)


def _check_code(config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuses code of the author's where transformers has no class of its own for the model."""
    if trust_remote_code or not config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            "config.json names code of its author (auto_map), which is not run; "
            "model.trust_remote_code=true accepts it, after reading it"
        )


def check_generation_config(config: Mapping[str, Any] | None) -> None:
    """Refuses token ids that are none; every other setting in the file has no effect (``mirrorpo.models.generation``).

    Raises:
        ValueError: names the key.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = None if config is None else config.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and (isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31):
                raise ValueError(
                    f"generation_config.json: {name} must be a token id or a list of them, got {token!r:.60}"
                )


__all__ = [
    "ATTENTION",
    "check_config",
    "check_generation_config",
    "check_model_folder",
    "check_path",
    "loading",
    "read_json",
]
