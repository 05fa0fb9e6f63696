"""Objective files: what is optimised, written once for every framework.

A YAML or JSON file with the keys of a recipe's ``objective`` group: ``preset``, and the overrides of
``mirrorpo.objective``. TRL (``MirrorConfig(objective="objective.yaml")``, ``mirrorpo train RECIPE
objective=objective.yaml``), verl, prime-rl and slime read the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirrorpo.config.yaml import OBJECTIVE_SUFFIXES as SUFFIXES
from mirrorpo.config.yaml import read_spec
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


__all__ = ["SUFFIXES", "read_objective", "read_spec"]
