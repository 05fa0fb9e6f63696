"""Objective files: what is optimised, written once for every framework.

A YAML or JSON file with the keys of a recipe's ``objective`` group: ``preset``, and the overrides of
``mirrorpo.objective``. TRL (``MirrorConfig(objective="objective.yaml")``, ``mirrorpo train RECIPE
objective=objective.yaml``), verl, prime-rl and slime read the same file.
"""

from __future__ import annotations

import hashlib
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
        >>> same == objective_data(read_objective("dapo")), same["region"]["high"]
        (True, 1.28)
    """
    if objective is None or isinstance(objective, bool | int | float | str):
        return objective
    if isinstance(objective, Mapping):
        return {str(key): objective_data(value) for key, value in objective.items()}
    if isinstance(objective, list | tuple):
        return [objective_data(value) for value in objective]
    if isinstance(objective, Tensor):
        values = objective.detach().cpu().double().numpy()
        return {"shape": list(values.shape), "digest": _digest(values.tobytes())}
    if isinstance(objective, partial):
        return [
            objective_data(objective.func),
            *map(objective_data, objective.args),
            objective_data(objective.keywords),
        ]
    if is_dataclass(objective) and not isinstance(objective, type):
        values = {f.name: getattr(objective, f.name) for f in fields(objective) if f.compare}
        return {"type": type(objective).__qualname__, **objective_data(values)}
    if isinstance(objective, Divergence):
        return {"type": type(objective).__qualname__, **objective_data(vars(objective))}
    name = f"{getattr(objective, '__module__', '')}:{getattr(objective, '__qualname__', type(objective).__qualname__)}"
    return f"{name}#{_digest(_function_text(objective))}" if isinstance(objective, FunctionType) else name


def _function_text(function: FunctionType, seen: tuple[FunctionType, ...] = ()) -> bytes:
    """What a function does: its code, with the numbers, texts and functions that it was defined with."""
    text = _code_text(function.__code__)
    for value in (*(cell.cell_contents for cell in function.__closure__ or ()), *(function.__defaults__ or ())):
        if isinstance(value, FunctionType) and value not in seen:
            text += _function_text(value, (*seen, function))
        elif isinstance(value, int | float | str):
            text += repr(value).encode()
    return text


def _code_text(code: CodeType) -> bytes:
    inner = b"".join(_code_text(value) for value in code.co_consts if isinstance(value, CodeType))
    plain = [value for value in code.co_consts if not isinstance(value, CodeType)]
    return code.co_code + repr((code.co_names, plain)).encode() + inner


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


__all__ = ["SUFFIXES", "objective_data", "read_objective", "read_spec"]
