"""Checks that a model's weights are complete and fit its config: read as a trainer reads them, without their memory.

Only the files' headers are read, which hold each tensor's name, shape and place: milliseconds, whatever the size. What
transformers would start at random numbers, with a notice, is an error here: a policy with a random layer trains, too.
"""

from __future__ import annotations

from typing import Any

from mirrorpo.models.folder import check_config, loading


def without_memory(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder or of the hub on torch's ``meta`` device, its weights files found and checked.

    Args:
        path: after ``resolve_model``.
        trust_remote_code: code in the folder is accepted.

    Returns:
        The model as the trainer would load it; its parameters have shapes and no numbers.

    Raises:
        ValueError: no weights as safetensors, a torn file, a tensor that is missing or has another shape, a config that
            transformers cannot use; one line.

    Example:
        >>> from mirrorpo.models import resolve_model
        >>> {p.device.type for p in without_memory(resolve_model("builtin:tiny")).parameters()}
        {'meta'}
    """
    from transformers import AutoConfig, PretrainedConfig
    from trl.trainer.utils import create_model_from_path

    try:
        # The text first: a class may make lists as long as the sizes in it.
        written, _ = PretrainedConfig.get_config_dict(path)
        check_config(written, trust_remote_code=trust_remote_code)
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if not config.architectures:
            raise ValueError("its config.json names no architectures")
        options = {**loading(trust_remote_code), "output_loading_info": True, "ignore_mismatched_sizes": True}
        made: Any = create_model_from_path(path, device_map="meta", **options)
        model, found = made
    except KeyError as error:  # an index that is not one: it is the author's text
        raise ValueError(f"its files have no key {error}") from error
    except Exception as error:  # whatever broken files lead to, in transformers, torch and safetensors
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error
    for what, names in (("are missing", found["missing_keys"]), ("have another shape", found["mismatched_keys"])):
        if names:
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise ValueError(f"weights {what} that its config.json asks for: {first} ({len(names)} in all)")
    return model
