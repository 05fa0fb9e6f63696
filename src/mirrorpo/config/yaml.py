"""Configuration files as plain data: load, merge, override, validate, and errors of one line.

Recipes of trainings, studies and searches and objective files are all read here.

``base: dr_grpo_1.7b.yaml`` in a recipe names a file beside it, ``base: gsm8k/dr_grpo_1.7b`` (without suffix) a shipped
recipe; the recipe then says only what is different. One rule merges a recipe into its base, an arm into its study's
base, and ``key=value`` overrides into either:

- a group of keys is merged key by key, every other value is replaced;
- a group that names another kind (``task.name``, ``objective.preset``, and within an objective the name of a region,
  divergence or control) replaces the group below whole: a radius chosen for one trust region says nothing about
  another;
- a text for ``objective`` is a preset's name or an objective file;
- a new ``objective.region`` drops radius and epsilons below it, ``objective.divergence: none`` the whole penalty.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import yaml

from mirrorpo.config.shipped import find_recipe
from mirrorpo.errors import InputError
from mirrorpo.losses.keys import ObjectiveKeys, is_none, preset_names

if TYPE_CHECKING:  # an objective file is read without pydantic, inside other frameworks
    from pydantic import BaseModel, ValidationError

MAX_BYTES = 1_000_000
MAX_BASES = 8
OBJECTIVE_SUFFIXES = (".yaml", ".yml", ".json")


# Load


def read_text(path: Path, what: str) -> str:
    """The text of a configuration file.

    Args:
        path: the file.
        what: it is, for the message: "recipe", "objective".

    Returns:
        Its content.

    Raises:
        InputError: no such file, more than ``MAX_BYTES`` bytes, not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such {what} file")
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        article = "an" if what[0] in "aeiou" else "a"
        raise InputError(f"{path}: {article} {what} has at most {MAX_BYTES:,} bytes, this has {len(data):,}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags, no anchors (a few lines of aliases can describe gigabytes), no duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise InputError(f"line {self.peek_event().start_mark.line + 1}: YAML aliases are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise InputError(f"line {node.start_mark.line + 1}: duplicate key {key.value!r}")
            seen.add(key.value)
            # Keys are names: YAML would make a boolean of an arm called `off`, a number of one called `0.1`.
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a text; everybody means the number.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The data of a YAML (or JSON) text; keys are texts.

    Raises:
        InputError: not YAML, or YAML beyond plain data; one line.
    """
    try:
        return yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: not valid YAML ({reason})") from None


def load(path: Path, what: str = "recipe") -> Any:
    """The data of one file; its ``base`` is not followed.

    Raises:
        InputError: as in ``read_text`` and ``parse_yaml``.
    """
    return parse_yaml(read_text(path, what), str(path))


def read_spec(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The mapping that an objective file, a text or a preset's name stands for; the objective is not built.

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
        return _with_preset({str(key): _number(value) for key, value in source.items()}, "objective")
    text = str(source).strip()
    if text.startswith('"') and text.endswith('"'):  # a preset's name as JSON
        text = str(parse_yaml(text, "objective")).strip()
    if text.startswith("{"):
        return _with_preset(parse_yaml(text, "objective"), "objective")
    if isinstance(source, Path) or text.endswith(OBJECTIVE_SUFFIXES):
        return _with_preset(load(Path(text), "objective"), text)
    return {"preset": text}


def _number(value: Any) -> Any:
    """A value with its texts such as 1e-4 as numbers: another YAML reader has left them."""
    if isinstance(value, str) and _EXPONENT.match(value):
        return float(value)
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return [_number(item) for item in value] if isinstance(value, list) else value


def _with_preset(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        keys = ", ".join(ObjectiveKeys.__annotations__)
        raise InputError(f"{where}: must be a mapping with the keys preset, {keys}, got {data!r:.80}")
    if "preset" not in data:
        raise InputError(f"{where}: needs the key 'preset'. Legal: {', '.join(preset_names())}")
    return data


# Merge

# The key of a group that says what its other keys mean.
_KINDS = {
    ("task",): "name",
    ("objective",): "preset",
    ("objective", "region"): "name",
    ("objective", "divergence"): "name",
    ("objective", "control"): "kind",
}
# Keys of an objective that go with the one below them that is replaced.
_REGION_KEYS = ("radius", "epsilon_low", "epsilon_high")
_PENALTY_KEYS = ("divergence", "penalties", "coefficient", "estimator", "k", "placement", "control")
# Mappings from names of the user's own: an override replaces one whole, where it would be merged into a group of keys.
_WHOLE = ("arms", "grid", "seeds")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with the keys of ``above``, by the rule of this module; neither is changed.

    Raises:
        InputError: an objective file that cannot be read; nested too deeply.

    Example:
        >>> base = {"objective": {"preset": "atr_grpo", "radius": 0.1}, "train": {"steps": 9, "seed": 1}}
        >>> merge(base, {"objective": "dapo", "train": {"steps": 2}})
        {'objective': {'preset': 'dapo'}, 'train': {'steps': 2, 'seed': 1}}
    """
    try:
        return _merge(below, above, ())
    except RecursionError:
        raise InputError("nested too deeply") from None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    dropped = _dropped(above) if _group(place) == ("objective",) else ()
    result = {key: copy.deepcopy(value) for key, value in below.items() if key not in dropped}
    for key, value in above.items():
        result[key] = _placed(result.get(key), value, (*place, str(key)))
    return result


def _placed(under: Any, value: Any, place: tuple[str, ...]) -> Any:
    """The result at a place where ``value`` comes over ``under``."""
    group = _group(place)
    kind = _KINDS.get(group)
    if group == ("objective",):
        under, value = (read_spec(text) if isinstance(text, str) else text for text in (under, value))
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    if isinstance(under, str) and kind is not None and kind not in value:
        under = {kind: under}  # `region: kl3` is the short form of `region: {name: kl3}`
    if not isinstance(under, Mapping) or (kind in value and value[kind] != under.get(kind)):
        under = {}
    return _merge(under, value, place)


def _group(place: tuple[str, ...]) -> tuple[str, ...]:
    """A place within the recipe, wherever the recipe stands: alone, as a study's base or as the changes of an arm."""
    if place[:1] == ("base",):
        return place[1:]
    return place[2:] if place[:1] == ("arms",) else place


def _dropped(objective: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the objective below that one above makes meaningless."""
    dropped: tuple[str, ...] = ()
    region = objective.get("region")
    if isinstance(region, str) or (isinstance(region, Mapping) and "name" in region) or "regions" in objective:
        dropped += _REGION_KEYS
    if "regions" in objective:
        dropped += ("region",)
    if "penalties" in objective or ("divergence" in objective and is_none(objective["divergence"])):
        dropped += _PENALTY_KEYS
    return dropped


def with_bases(data: Any, path: Path) -> Any:
    """The data of a recipe with everything that it takes from its bases.

    Args:
        data: of the recipe at ``path``; if it is not a mapping it is returned as it is, for the caller to refuse.
        path: where it was read; relative bases start from its folder.

    Returns:
        Plain data without the key ``base``.

    Raises:
        InputError: a base that is not a text, cannot be read, is not a mapping, leads back to itself or has too many
            bases.
    """
    seen = [path.resolve()]
    layers = [data]
    while isinstance(layers[-1], dict) and layers[-1].get("base") is not None:
        path = _locate(layers[-1]["base"], path)
        if path.resolve() in seen:
            raise InputError(f"{path}: base leads back to this file")
        seen.append(path.resolve())
        if len(layers) > MAX_BASES:
            raise InputError(f"{path}: more than {MAX_BASES} bases, one below the other")
        layers.append(load(path))
        if not isinstance(layers[-1], dict):
            raise InputError(f"{path}: must be a mapping to be a base")
        if "arms" in layers[-1] or "grid" in layers[-1]:
            raise InputError(f"{path}: is a study; a base must be a recipe")
    if not isinstance(data, dict):
        return data
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        merged = merge(merged, {key: value for key, value in layer.items() if key != "base"})
    return merged


def _locate(base: Any, path: Path) -> Path:
    if not isinstance(base, str) or not base.strip():
        raise InputError(f"{path}: base must be a file beside it or the name of a shipped recipe, got {base!r:.80}")
    if Path(base).suffix in (".yaml", ".yml"):
        found = path.parent / base
        if not found.is_file():
            raise InputError(f"{path}: base {base!r}: no such recipe file beside it")
        return found
    try:
        return find_recipe(base)
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None


# Override


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of a ``key=value`` text; the value is read as YAML.

    Raises:
        InputError: not of this form.

    Example:
        >>> parse_override("train.learning_rate=1e-4")
        ('train.learning_rate', 0.0001)
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise InputError(f"override {override!r}: must be key=value, such as train.steps=5")
    return key, parse_yaml(text, f"override {key}")


def nested(assignments: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Dotted keys and their values as one nested mapping; the order of different keys has no effect.

    Example:
        >>> nested([("objective.coefficient", 0.1), ("objective.preset", "grpo"), ("train.steps", 5)])
        {'objective': {'preset': 'grpo', 'coefficient': 0.1}, 'train': {'steps': 5}}
    """
    result: dict[str, Any] = {}
    for key, value in sorted(assignments, key=lambda item: _rank(item[0])):
        *groups, last = key.split(".")
        layer: dict[str, Any] = {last: value}
        for group in reversed(groups):
            layer = {group: layer}
        result = merge(result, layer)
    return result


def _rank(key: str) -> tuple[int, int]:
    """Whole groups come before their keys; of a group first its kind, then keys that drop others, then the others."""
    *groups, last = key.split(".")
    group = _group(tuple(groups))
    if _KINDS.get(group) == last:
        return len(groups), 0
    drops = group == ("objective",) and ((*group, last) in _KINDS or last in ("penalties", "regions"))
    return len(groups), 1 if drops else 2


def overridden(data: Mapping[str, Any], assignments: Sequence[tuple[str, Any]], where: str = "override") -> Any:
    """``data`` with values at dotted keys.

    Raises:
        InputError: a key that descends into a value that is not a group of keys.

    Example:
        >>> overridden({"train": {"steps": 9, "seed": 1}}, [("train.steps", 2)])
        {'train': {'steps': 2, 'seed': 1}}
    """
    changes = nested(assignments)
    for key, _ in assignments:
        for side in (data, dict(assignments)):
            _check_descends(side, key, where)
    replaced = {key for key, _ in assignments if key in _WHOLE}
    return merge({key: value for key, value in data.items() if key not in replaced}, changes)


def _check_descends(data: Mapping[str, Any], key: str, where: str) -> None:
    place: tuple[str, ...] = ()
    value: Any = data
    for group in key.split(".")[:-1]:
        place = (*place, group)
        value = value.get(group)
        if isinstance(value, str) and _group(place) in _KINDS:
            return  # a short form
        if value is None:
            return
        if not isinstance(value, Mapping):
            raise InputError(f"{where} {key!r}: {group} is not a group of keys")


# Validate

Model = TypeVar("Model", bound="BaseModel")


def validated(
    kind: type[Model], data: Any, where: str, overrides: Mapping[str, str] | None = None, context: Any = None
) -> Model:
    """``data`` as a model.

    Args:
        kind: of the model.
        data: plain data.
        where: it comes from, for messages.
        overrides: keys that were typed rather than read, each with the words in which it was typed.
        context: for the validators of ``kind``.

    Raises:
        InputError: the first thing that is wrong, as ``explain`` has it; an override is blamed as one.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate(data, context=context)
    except ValidationError as error:
        line = explain(error, kind)
        first = error.errors(include_url=False)[0]
        key = ".".join(_resolved(kind, first["loc"])[0])
        typed = _blamed(key, line, overrides or {})
        if typed is None:
            raise InputError(f"{where}: {line}") from None
        hint = line.removeprefix(f"unknown key {key!r}; ")
        if hint != line and "." in key:  # name the whole key, to be typed as it stands
            group = key.rpartition(".")[0]
            start = typed.removesuffix(key)
            hint = hint.replace("did you mean '", f"did you mean '{start}{group}.", 1)
        raise InputError(f"override {typed!r}: {hint}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def _blamed(key: str, line: str, overrides: Mapping[str, str]) -> str | None:
    """The override that a complaint about a key is about; None if it is about the file."""
    for own, typed in overrides.items():
        if own == key or key.startswith(f"{own}.") or (own.startswith(f"{key}.") and own.rpartition(".")[2] in line):
            return typed
    return None


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for the first error: the key, what is wrong, the legal values, the nearest name."""
    first = error.errors(include_url=False)[0]
    parts, models = _resolved(root, first["loc"])
    key = ".".join(parts) or "recipe"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        legal = [name for model in models for name in model.model_fields]
        elsewhere = _keys_named(parts[-1], root) if len(parts) == 1 else []
        if elsewhere:
            return f"unknown key {key!r}; did you mean {elsewhere[0]!r}? Legal: {', '.join(legal)}{more}"
        return f"unknown key {key!r}{_nearest(parts[-1], legal)}{more}"
    if first["type"] == "missing":
        return f"{key}: missing{more}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        group = parts[-1] if parts else key
        given = first["input"].get("name") if isinstance(first["input"], dict) else first["input"]
        legal = _nearest(str(given), [tag for model in models for tag in _tags(model)])
        return f"{key}.name: unknown {group} {given!r:.80}{legal}{more}"
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    got = (
        "" if isinstance(value, dict) or hasattr(value, "model_fields") or "got" in message else f", got {value!r:.80}"
    )
    if isinstance(value, float) and not math.isfinite(value):
        got = f", got {value}"
    return " ".join(f"{key}: {message[0].lower() + message[1:]}{got}{more}".split())


def _keys_named(name: str, root: type[BaseModel]) -> list[str]:
    """Where in the groups of a recipe a key of this name is."""
    groups = ((group, _models_in(field.annotation)) for group, field in root.model_fields.items())
    return [f"{group}.{name}" for group, models in groups if any(name in model.model_fields for model in models)]


def _nearest(name: str, legal: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Legal: {', '.join(legal)}"


def _resolved(root: type[BaseModel], loc: Sequence[Any]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys of an error's location, and the models that may stand there (without the last key if it is unknown).

    A location also holds the tag of a union's member (``task, arithmetic, difficulty``) and the names of types that
    were tried (``target_modules, str``), which are not keys.
    """
    keys: list[str] = []
    models: list[type[BaseModel]] = [root]
    typed = False  # below a field that holds no model
    for part in loc:
        tagged = [model for model in models if len(models) > 1 and part in _tags(model)]
        if tagged:
            models = tagged
        elif typed and isinstance(part, str) and re.fullmatch(r"(bool|int|float|str|list|dict)(\[.*\])?", part):
            continue
        else:
            keys.append(str(part))
            owner = next((model for model in models if part in model.model_fields), None)
            if owner is not None:
                found = _models_in(owner.model_fields[part].annotation)
                models, typed = found or models, not found
    return keys, models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The names that choose a member of a union."""
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
