"""What should be optimised, written once for every framework? An objective file.

A YAML or JSON file with the keys of a recipe's ``objective`` group: ``preset``, and the overrides of
``mirrorpo.objective``. TRL (``MirrorConfig(objective="objective.yaml")``, ``mirrorpo train RECIPE
objective=objective.yaml``), verl, prime-rl and slime read the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirrorpo.config.yaml import parse_yaml, read_text
from mirrorpo.errors import InputError
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import OVERRIDES, PRESETS, objective_from

SUFFIXES = (".yaml", ".yml", ".json")


def read_spec(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The mapping that an objective file, a text or a preset's name stands for; not yet built.

    Args:
        source: a path that ends in ``.yaml``, ``.yml`` or ``.json``; a mapping, or its text in braces
            (``"{preset: dapo, region: {name: kl3, radius: 0.03}}"``); or the name of a preset.

    Returns:
        A mapping with the key ``preset``.

    Raises:
        InputError: no such file, not a mapping, no ``preset``.

    Example:
        >>> read_spec("{preset: dapo, coefficient: 0}")
        {'preset': 'dapo', 'coefficient': 0}
    """
    if isinstance(source, Mapping):
        return _checked({str(key): value for key, value in source.items()}, "objective")
    text = str(source).strip()
    if text.startswith("{"):
        return _checked(parse_yaml(text, "objective"), "objective")
    if isinstance(source, Path) or text.endswith(SUFFIXES):
        return _checked(parse_yaml(read_text(Path(text), "objective"), text), text)
    return {"preset": text}


def _checked(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InputError(f"{where}: must be a mapping with the keys preset, {', '.join(OVERRIDES)}, got {data!r:.80}")
    if "preset" not in data:
        raise InputError(f"{where}: needs the key 'preset'. Legal: {', '.join(sorted(PRESETS))}")
    return data


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
