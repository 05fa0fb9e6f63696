"""Objective files: what is optimised, written once for every framework.

A YAML or JSON file with the keys of a recipe's ``objective`` group: ``preset``, and the overrides of
``mirrorpo.objective``. TRL (``MirrorConfig(objective="objective.yaml")``, ``mirrorpo train RECIPE
objective=objective.yaml``), verl, prime-rl, slime and SkyRL read the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

from mirrorpo.config.yaml import OBJECTIVE_SUFFIXES as SUFFIXES
from mirrorpo.config.yaml import read_spec
from mirrorpo.divergences import Divergence
from mirrorpo.errors import InputError
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import objective_from


def read_objective(source: str | Path | Mapping[str, Any] | Objective) -> Objective:
    """The objective of an objective file (or of anything that ``read_spec`` takes).

    Raises:
        InputError: as in ``read_spec``; an unknown key or name, a value out of range; the message names the file.

    Example:
        >>> read_objective("{preset: atr_grpo, radius: 0.05}").region.name
        'kl3'
    """
    if isinstance(source, Objective):
        return source
    spec = read_spec(source)
    try:
        return objective_from(spec)
    except ValueError as error:
        where = f"{source}: " if str(source).endswith(SUFFIXES) else ""
        raise InputError(f"{where}{error}") from None


def objective_data(objective: Any) -> Any:
    """An objective as plain data: equal for objectives that are the same, whichever way they were asked for.

    Every part is named with its numbers; a tensor is a digest of its values, a function its name and a digest of its
    code. For comparison (may a run go on from this checkpoint?) and for logs; nothing is built from it.

    Example:
        >>> same = objective_data(read_objective("{preset: dapo, epsilon_low: 0.2}"))
        >>> same == objective_data(read_objective("dapo")), same["rules"][0]["region"]["high"]
        (True, 1.28)
    """
    return _data(objective, ())


def _data(value: Any, within: tuple[Any, ...]) -> Any:
    """Plain data of any part; ``within`` are the functions that hold it, so that one that holds itself ends."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _data(item, within) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_data(item, within) for item in value]
    if isinstance(value, Tensor):
        values = value.detach().cpu().double().numpy()
        return {"shape": list(values.shape), "digest": _digest(values.tobytes())}
    if isinstance(value, partial):
        return _data([value.func, *value.args, value.keywords], within)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
        return {"type": type(value).__qualname__, **_data(parts, within)}
    if isinstance(value, Divergence):
        return {"type": type(value).__qualname__, **_data(vars(value), within)}
    name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    if not isinstance(value, FunctionType) or value in within:
        return name
    # What a function does: its code, and the values that it was defined with.
    held = [*(cell.cell_contents for cell in value.__closure__ or ()), *(value.__defaults__ or ())]
    return f"{name}#{_digest(_code_text(value.__code__) + json.dumps(_data(held, (*within, value))).encode())}"


def _code_text(code: CodeType) -> bytes:
    inner = b"".join(_code_text(value) for value in code.co_consts if isinstance(value, CodeType))
    plain = [value for value in code.co_consts if not isinstance(value, CodeType)]
    return code.co_code + repr((code.co_names, plain)).encode() + inner


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


__all__ = ["SUFFIXES", "objective_data", "read_objective", "read_spec"]
