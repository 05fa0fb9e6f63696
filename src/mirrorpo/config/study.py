"""Keys of a study file: one base recipe, arms that change keys of it, seeds and a baseline.

.. code-block:: yaml

    base: arithmetic                     # a recipe's name or path, or its keys
    baseline: dr_grpo
    seeds: {first: 0, count: 10}         # or a list
    arms:
      dr_grpo: {objective: {preset: dr_grpo}}
      wide: {objective: {preset: atr_grpo, radius: 0.1}, train.learning_rate: 5.0e-5}

An arm is merged into the base by the rule of ``mirrorpo.config.yaml``: key by key, and where it names another kind
(``objective.preset``, ``task.name``) without the base's options of that group. An arm may name a ``base`` of its own.
``grid`` instead of ``arms`` takes lists of values for dotted keys and makes an arm of each combination.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mirrorpo.config.measure import MatchedSpec, MeasureSpec, PlanRecord, read_plan
from mirrorpo.config.train import Recipe, check_keys, recipe_from
from mirrorpo.config.yaml import explain, load, merge, nested, overridden, parse_override, with_bases
from mirrorpo.errors import InputError, unknown_name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]{0,79}")
# What a key with several forms may be, for the message when it is none of them.
_FORMS = {
    "base": "must be a recipe's name, its path, or a mapping with its keys",
    "arms": "must be a mapping from names to changed keys, or a list of presets",
    "grid": "must be a mapping from dotted keys to lists of values",
    "seeds": "must be a list of integers >= 0, or first and count, such as {first: 0, count: 10}",
}
MAX_RUNS = 10_000
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class SeedRange(BaseModel):
    """Consecutive seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: Seed = 0
    count: int = Field(ge=1, le=MAX_RUNS)


_SEEDS: TypeAdapter[list[int] | SeedRange] = TypeAdapter(list[Seed] | SeedRange)


class StudySpec(BaseModel):
    """The keys of a study file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: dict[str, Any] | str = Field(description="a recipe: name, path or keys")
    arms: dict[str, dict[str, Any] | None] | list[str] | None = Field(default=None, description="name to changed keys")
    grid: dict[str, list[Any]] | None = Field(default=None, description="key to values, instead of arms")
    seeds: list[Seed] | SeedRange = Field(description="a list, or first and count")
    baseline: str | None = Field(default=None, description="the arm that the others are compared with")
    target: float = Field(default=0.9, gt=0.0, description="reward whose first step is reported")
    keep_models: bool = Field(default=False, description="keep model/ and checkpoints/ of every run")
    margin: float = Field(default=0.02, gt=0.0, le=1.0, description="accuracy differences within this count as none")
    measure_divergence: bool = Field(default=True, description="exact KL from the start after each run")
    measure: MeasureSpec | None = Field(default=None, description="further measures of each trained policy")
    matched: MatchedSpec | None = Field(default=None, description="curves that are compared at the same distance")
    plan: str | None = Field(default=None, min_length=1, description="a file, written before the first run")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a study."""

    arm: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its folder below ``runs/``, and its key in the record."""
        return f"{self.arm}/seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A checked study.

    Attributes:
        arms: name to recipe; the recipe's own seed is replaced in each job.
        seeds: name to seeds, each sharing at least one with the baseline's.
        changes: name to the keys it changes, for the report.
        baseline: an arm.
        target: reward whose first step is reported.
        margin: accuracy differences within this count as none.
        keep_models: whether runs keep their weights.
        measure_divergence: whether the exact KL from the start is measured after each run.
        measure: what else is measured.
        matched: which curves are compared at the same distance.
        plan: what was decided before the first run.
    """

    arms: Mapping[str, Recipe]
    seeds: Mapping[str, tuple[int, ...]]
    changes: Mapping[str, Mapping[str, Any]]
    baseline: str
    target: float
    margin: float
    keep_models: bool
    measure_divergence: bool
    measure: MeasureSpec | None = None
    matched: MatchedSpec | None = None
    plan: PlanRecord | None = None

    def jobs(self) -> list[Job]:
        """Every run, seed by seed: a study that is stopped half-way has whole seeds."""
        order = sorted({seed for seeds in self.seeds.values() for seed in seeds})
        return [
            Job(arm=arm, seed=seed, recipe=_with_seed(recipe, seed))
            for seed in order
            for arm, recipe in self.arms.items()
            if seed in self.seeds[arm]
        ]

    def to_yaml(self) -> str:
        """The resolved study: every arm with every key of its recipe."""
        arms = {
            arm: {"seeds": list(self.seeds[arm]), "changes": dict(self.changes[arm]), **recipe.model_dump(mode="json")}
            for arm, recipe in self.arms.items()
        }
        settings = {
            "baseline": self.baseline,
            "target": self.target,
            "margin": self.margin,
            "keep_models": self.keep_models,
            "measure_divergence": self.measure_divergence,
        }
        for name, value in (("measure", self.measure), ("matched", self.matched), ("plan", self.plan)):
            settings |= {} if value is None else {name: value.model_dump(mode="json")}
        return yaml.safe_dump({**settings, "arms": arms}, sort_keys=False, allow_unicode=True)


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """A study file with ``key=value`` overrides.

    Args:
        path: the YAML file.
        overrides: such as ``seeds=[0,1]`` or ``base.train.steps=5``.

    Returns:
        The checked study.

    Raises:
        InputError: no such file, an unknown key, a recipe that does not check, a baseline that is no arm, arms
            without a common seed; one line.

    Example:
        >>> load_study(Path("recipes/studies/embedded.yaml")).baseline  # doctest: +SKIP
        'dr_grpo'
    """
    return study_from(load(path, "study"), overrides, str(path), path)


def study_from(data: Any, overrides: Sequence[str] = (), where: str = "study", path: Path = Path("study")) -> Study:
    """A study from plain data; see ``load_study``. Bases start from the folder of ``path``."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: must be a mapping with the keys {', '.join(StudySpec.model_fields)}")
    if "base" not in data and "task" in data:
        raise InputError(f"{where}: is a recipe, not a study; a study has the keys {', '.join(StudySpec.model_fields)}")
    data = copy.deepcopy(data)
    assignments = [parse_override(override) for override in overrides]
    data |= {key: value for key, value in assignments if key == "base"}
    data["base"] = _base(data.get("base"), path)  # read now, so that an override can reach into it
    assignments = [(key, value) for key, value in assignments if key != "base"]
    for key, _ in assignments:  # an override reaches into an arm's dotted keys too
        arms, _, arm = key.rpartition("arms.")
        name = next((n for n in _mapping(data.get("arms")) if arm.startswith(f"{n}.")), None) if not arms else None
        if name is not None:
            data["arms"][name] = nested(_mapping(data["arms"][name]).items())
    data = overridden(data, assignments) if assignments else data
    try:
        spec = StudySpec.model_validate(
            {key: value for key, value in data.items() if key != "base" or value is not None}
        )
    except ValidationError as error:
        raise InputError(f"{where}: {_complaint(error, data)}") from None
    return _resolve(spec, where, path, [key for key, _ in assignments])


def _base(base: Any, path: Path) -> Any:
    """The recipe that a ``base`` names or spells out, as plain data; anything else as it is, to be refused."""
    if not isinstance(base, str | dict):
        return base
    if isinstance(base, dict):
        return with_bases(base, path)
    if not (path.parent / base).is_file() and Path(base).is_file():  # studies also take paths from the working folder
        base = str(Path(base).resolve())
    recipe = with_bases({"base": base}, path)
    return {
        key: value for key, value in recipe.items() if key not in ("evolution", "learning")
    }  # what a search has in addition


def _complaint(error: ValidationError, data: Mapping[str, Any]) -> str:
    """One line for the first complaint."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    if key not in _FORMS or (first["type"] in ("missing", "extra_forbidden") and len(first["loc"]) == 1):
        return explain(error, StudySpec)
    value = data[key]
    for part in first["loc"][1:]:  # down to what the complaint is about, as far as the file goes
        value = value[part] if isinstance(value, dict) and part in value else value
    return f"{key}: {_FORMS[key]}, got {value!r:.80}"


def _resolve(spec: StudySpec, where: str, path: Path, overrides: Sequence[str]) -> Study:
    assert isinstance(spec.base, dict)  # study_from has read it
    changes = _arms(spec, where)
    shared = _seeds(spec.seeds, f"{where}: seeds")
    data, blame, seeds = {}, {}, {}
    for arm, change in changes.items():
        at = f"{where}: arms.{arm}"
        if not _NAME.fullmatch(arm):
            raise InputError(
                f"{where}: arms: name {arm!r} must be letters, digits and _.+=- (at most 80): it names a folder"
            )
        own = change.pop("seeds", None)
        seeds[arm] = shared if own is None else _seeds(_own_seeds(own, at), at)
        starts = ("base.", f"arms.{arm}.")
        blame[arm] = {key.removeprefix(start): key for key in overrides for start in starts if key.startswith(start)}
        data[arm] = _arm(spec.base, change, path, at)
        check_keys(data[arm], at, blame[arm])
    arms = {arm: recipe_from(data[arm], (), f"{where}: arms.{arm}", blame=blame[arm]) for arm in data}
    if spec.baseline is None and len(arms) > 1:
        raise InputError(f"{where}: baseline: missing; the arm that the others are compared with: {', '.join(arms)}")
    baseline = next(iter(arms)) if spec.baseline is None else spec.baseline
    if baseline not in arms:
        raise InputError(f"{where}: baseline: {unknown_name('arm', baseline, arms)}")
    for arm, own in seeds.items():
        if not set(own) & set(seeds[baseline]):
            raise InputError(
                f"{where}: arms.{arm}: no seed in common with the baseline {baseline!r}: "
                f"{_listed(own)} and {_listed(seeds[baseline])}"
            )
    total = sum(len(own) for own in seeds.values())
    if total > MAX_RUNS:
        raise InputError(f"{where}: {total:,} runs; a study has at most {MAX_RUNS:,}")
    return Study(
        arms=arms,
        seeds=seeds,
        changes=changes,
        baseline=baseline,
        target=spec.target,
        margin=spec.margin,
        keep_models=spec.keep_models,
        measure_divergence=spec.measure_divergence,
        measure=spec.measure,
        matched=_matched(spec.matched, arms, where),
        plan=None if spec.plan is None else read_plan(spec.plan, path.parent, where),
    )


def _matched(spec: MatchedSpec | None, arms: Mapping[str, Recipe], where: str) -> MatchedSpec | None:
    """The curves with their patterns replaced by the arms that they mean."""
    if spec is None:
        return None
    try:
        return spec.resolved(list(arms))
    except ValueError as error:
        raise InputError(f"{where}: matched.{error}") from None


def _arms(spec: StudySpec, where: str) -> dict[str, dict[str, Any]]:
    """Name to changed keys, from whichever of the three forms was used."""
    if (spec.arms is None) == (spec.grid is None):
        raise InputError(f"{where}: give either arms (name to changed keys) or grid (key to values)")
    if isinstance(spec.arms, dict):
        arms = {name: dict(change or {}) for name, change in spec.arms.items()}
    elif spec.arms is not None:
        twice = next((name for name in spec.arms if spec.arms.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{where}: arms: duplicate arm {twice!r}")
        arms = {name: {"objective": {"preset": name}} for name in spec.arms}
    else:
        arms = _combinations(spec.grid or {}, where)
    if not arms:
        raise InputError(f"{where}: a study has at least 1 arm, got 0")
    return arms


def _combinations(grid: Mapping[str, list[Any]], where: str) -> dict[str, dict[str, Any]]:
    for key, values in grid.items():
        if not values:
            raise InputError(f"{where}: grid.{key}: must list at least one value")
    arms: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*grid.values()):
        change = dict(zip(grid, values, strict=True))
        name = "+".join(
            value if isinstance(value, str) else f"{key.rpartition('.')[2]}={value}" for key, value in change.items()
        )
        if name in arms:
            raise InputError(f"{where}: grid: duplicate arm {name!r}")
        arms[name] = change
    return arms


def _own_seeds(own: Any, where: str) -> list[int] | SeedRange:
    try:
        return _SEEDS.validate_python(own)
    except ValidationError:
        raise InputError(f"{where}: seeds: {_FORMS['seeds']}, got {own!r:.80}") from None


def _seeds(spec: list[int] | SeedRange, where: str) -> tuple[int, ...]:
    found = list(range(spec.first, spec.first + spec.count)) if isinstance(spec, SeedRange) else spec
    if not found:
        raise InputError(f"{where}: must list at least one seed")
    if len(set(found)) < len(found):
        raise InputError(f"{where}: duplicate seed {next(s for s in found if found.count(s) > 1)}")
    return tuple(found)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds[:6])) + (", ..." if len(seeds) > 6 else "")


def _arm(base: dict[str, Any], change: Mapping[str, Any], path: Path, where: str) -> dict[str, Any]:
    """The recipe of an arm: its base's keys with its changes."""
    if "train.seed" in change or "seed" in _mapping(change.get("train")):
        raise InputError(f"{where}: train.seed: the study's seeds decide it")
    if change.get("base") is not None:
        base = merge(base, _base(change["base"], path))
    try:
        return overridden(base, [(key, value) for key, value in change.items() if key != "base"], "key")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


__all__ = ["Job", "MatchedSpec", "MeasureSpec", "Study", "StudySpec", "load_study", "study_from"]
