"""Import paths of earlier versions: a table from old module names to new ones, and the import hook that serves it.

An old path keeps working with a ``DeprecationWarning`` that names the new one. The old name stands for a small module
that looks every attribute up in its new home, so classes and functions are the same objects under both paths.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module to new one, both below `mirrorpo.`; several where its content was divided.
MOVED: dict[str, tuple[str, ...]] = {
    "_shapes": ("_checks",),
    "advantages": ("losses.advantages",),
    "aggregation": ("losses.aggregation",),
    "control": ("losses.coefficient",),
    "diagnostics": ("losses.metrics",),
    "divergences.custom": ("divergences",),
    "divergences.neural_fit": ("divergences.neural.generator",),
    "divergences.neural_table": ("divergences.neural.table",),
    "divergences.neural_units": ("divergences.neural.generator",),
    "divergences.power": ("divergences.bregman",),
    "doctor": ("cli.machine",),
    "escape": ("wording",),
    "evaluation.draws": ("evaluation.sampling",),
    "evaluation.engines": ("evaluation.sampling",),
    "evaluation.folder": ("evaluation.eval_run",),
    "evaluation.run": ("evaluation.eval_run",),
    "evaluation.statistics": ("statistics",),
    "evolution": ("search",),
    "evolution.command": ("search.evolve_run",),
    "evolution.comparison": ("search.evolve_run",),
    "evolution.member": ("search.member",),
    "evolution.picture": ("reports.curve",),
    "evolution.recipe": ("config.search",),
    "evolution.run": ("search.evolve_run",),
    "evolution.search": ("search.evolution",),
    "evolution.strategy": ("search.strategy",),
    "future_kl": ("losses.future_kl",),
    "grade": ("rewards.verdict",),
    "jsonlines": ("files",),
    "listing": ("cli.listing",),
    "mirror_maps": ("divergences.neural.file",),
    "objective": ("losses.objective",),
    "objective_file": ("config.objective_file",),
    "objective_parts": ("losses.penalties",),
    "plain_yaml": ("config.yaml",),
    "presets": ("losses.presets",),
    "quiet": ("interrupts",),
    "recipes": ("config.shipped",),
    "reporting": ("reports",),
    "reporting.assets": ("reports.templates",),
    "reporting.charts": ("reports.charts",),
    "reporting.curve": ("reports.curve",),
    "reporting.examples": ("reports.run_page",),
    "reporting.page": ("reports.run_page",),
    "reporting.panels": ("reports.run_page",),
    "reporting.reading": ("runs.reader",),
    "reporting.scales": ("reports.charts",),
    "reporting.text": ("reports.templates", "wording"),
    "reporting.words": ("reports.conclusions", "wording"),
    "rewards.symbolic": ("rewards.algebra",),
    "solver": ("losses.solver",),
    "studies.charts": ("reports.study_charts",),
    "studies.commands": ("cli.study_commands",),
    "studies.learning": ("studies.compare",),
    "studies.page": ("reports.study_page",),
    "studies.progress": ("studies.runner",),
    "studies.recipe": ("config.study",),
    "studies.report": ("reports.study_page",),
    "studies.run": ("studies.runner",),
    "studies.runs": ("studies.collection",),
    "studies.statistics": ("statistics",),
    "studies.tables": ("reports.tables",),
    "studies.words": ("reports.conclusions",),
    "surrogate": ("losses.surrogates",),
    "tasks.base": ("tasks.task",),
    "tasks.parts": ("tasks.task",),
    "training.agreement": ("training.model_adapter",),
    "training.backbone": ("training.model_adapter",),
    "training.budget": ("training.model_adapter",),
    "training.callbacks": ("training.monitors", "training.records"),
    "training.control": ("training.resuming",),
    "training.fast": ("training.scoring",),
    "training.folder": ("runs.folder",),
    "training.gradient_share": ("training.loss",),
    "training.grouping": ("training.loss",),
    "training.head": ("training.model_adapter",),
    "training.inherit": ("config.yaml",),
    "training.logits": ("training.scoring",),
    "training.memory": ("training.plan",),
    "training.packed_loss": ("training.loss",),
    "training.packed_scoring": ("training.scoring",),
    "training.padded_loss": ("training.loss",),
    "training.recipe": ("config.train", "config.yaml"),
    "training.reduction": ("training.distributed",),
    "training.reference": ("training.model_adapter",),
    "training.reward": ("training.rewards",),
    "training.reward_guard": ("training.rewards",),
    "training.specs": ("config.train",),
    "training.statefile": ("training.checkpoints",),
    "training.stopping": ("training.monitors",),
    "training.watch": ("training.monitors",),
    "training.world": ("training.distributed",),
    "training.wrapped": ("training.distributed",),
    "trust_region": ("losses.regions",),
    "workers.record": ("workers.jobs",),
}
# Old modules with the name of a public function: importing a submodule sets it as an attribute of its package, so the
# stand-in must be callable as the function is.
_FUNCTIONS = {
    "advantages": ("losses.advantages", "advantages"),
    "objective": ("losses.presets", "objective"),
    "trust_region": ("losses.regions", "trust_region"),
}
_PACKAGE = __name__.partition(".")[0]


def _old_name(full_name: str) -> str | None:
    """The table's key for a module's name, or None if it has not moved."""
    package, _, name = full_name.partition(".")
    return name if package == _PACKAGE and name in MOVED else None


class _StandIn(ModuleType):
    """A module under its old name; attributes are those of the new ones."""

    def __getattr__(self, name: str) -> Any:
        # Dunder names are asked for by the import system and by inspection: the new module's would mislead them.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        old = self.__name__.removeprefix(f"{_PACKAGE}.")
        for home in MOVED[old]:
            module = import_module(f"{_PACKAGE}.{home}")
            if name in vars(module) or name in dir(module):
                return getattr(module, name)
        if f"{old}.{name}" in MOVED:
            return import_module(f"{self.__name__}.{name}")
        raise AttributeError(f"module {self.__name__!r} (now {_new_names(old)}) has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        homes = MOVED[self.__name__.removeprefix(f"{_PACKAGE}.")]
        return sorted({name for home in homes for name in dir(import_module(f"{_PACKAGE}.{home}"))})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        old = self.__name__.removeprefix(f"{_PACKAGE}.")
        if old not in _FUNCTIONS:
            raise TypeError(f"module {self.__name__!r} is not callable")
        home, function = _FUNCTIONS[old]
        return getattr(import_module(f"{_PACKAGE}.{home}"), function)(*args, **kwargs)


def _new_names(old: str) -> str:
    return " and ".join(f"{_PACKAGE}.{home}" for home in MOVED[old])


class _Finder:
    """Finds and loads the stand-ins."""

    @staticmethod
    def find_spec(full_name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        old = _old_name(full_name)
        if old is None:
            return None
        has_children = any(name.startswith(f"{old}.") for name in MOVED)
        return ModuleSpec(full_name, _Finder, is_package=has_children)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{_PACKAGE}.")
        # Frames of the import system are not counted: the warning points at the import statement.
        warnings.warn(
            f"{module.__name__} has moved to {_new_names(old)}; the old path will go in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )


def install() -> None:
    """Adds the import hook; a second call has no effect.

    It goes first: a folder that an older version left behind (with its byte code) would be found as an empty package.
    """
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # pyright: ignore[reportArgumentType]


__all__ = ["MOVED", "install"]
