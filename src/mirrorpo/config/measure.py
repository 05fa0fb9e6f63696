"""Keys of a study that say what is measured, what is compared at the same distance, and which plan was registered."""

from __future__ import annotations

import fnmatch
import hashlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mirrorpo.errors import InputError, unknown_name
from mirrorpo.losses.facts import UnknownPart, divergence_facts
from mirrorpo.tasks import TaskSettings

TRAINED = "trained"  # the task of the recipe itself, among the tasks that are measured


class MeasureSpec(BaseModel):
    """What is measured of each trained policy, on the same problems for all, beside the run's own evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problems: int = Field(default=256, ge=1, le=100_000, description="unseen problems of each task")
    samples: int = Field(default=1, ge=1, le=10_000, description="completions per problem, at temperature 1")
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(default=[1], min_length=1, description="the k of pass@k")
    distances: list[str | dict[str, Any]] = Field(
        default=["reverse_kl", "forward_kl"], description="divergences from the start, over the vocabulary"
    )
    responses: int = Field(default=128, ge=1, le=100_000, description="responses that a distance is measured on")
    tasks: dict[str, TaskSettings] = Field(default={}, description="name to further tasks; `trained` is always there")
    begin: dict[str, str] = Field(
        default={},
        description="task to how each response begins, with fields of its row such as {prompt[0]}",
    )

    @model_validator(mode="before")
    @classmethod
    def _enough_samples(cls, data: Any) -> Any:
        """``samples`` left out is the largest ``pass_at``."""
        if isinstance(data, dict) and "samples" not in data and isinstance(data.get("pass_at"), list):
            whole = [k for k in data["pass_at"] if type(k) is int]
            return {**data, "samples": max(whole, default=1)} if whole else data
        return data

    @field_validator("distances")
    @classmethod
    def _known(cls, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for one in value:
            with suppress(UnknownPart):
                divergence_facts(one)
        labels = [label_of_divergence(one) for one in value]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"duplicate divergence {twice!r}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> MeasureSpec:
        if max(self.pass_at) > self.samples:
            raise ValueError(f"pass_at must be at most samples = {self.samples}, got {max(self.pass_at)}")
        if self.responses > self.problems * self.samples:
            raise ValueError(
                f"responses must be at most problems * samples = {self.problems * self.samples}, got {self.responses}"
            )
        for name in self.begin:
            if name not in (TRAINED, *self.tasks):
                raise ValueError(f"begin: {unknown_name('task', name, (TRAINED, *self.tasks))}")
        for name in self.tasks:
            if name == TRAINED or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
                raise ValueError(
                    f"tasks: name {name!r} must be lower-case letters, digits and _ (at most 40), and not {TRAINED!r}"
                )
        return self


def label_of_divergence(spec: str | Mapping[str, Any]) -> str:
    """The name of a divergence as a column: its options behind it.

    Example:
        >>> label_of_divergence({"name": "alpha", "alpha": 0.5})
        'alpha_0.5'
    """
    if isinstance(spec, str):
        return spec
    return "_".join(str(value) for value in (spec.get("name"), *(v for k, v in spec.items() if k != "name")))


class MatchedSpec(BaseModel):
    """Curves of arms, each over a measured distance, that are compared where they went equally far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    curves: dict[str, str | list[str]] = Field(
        min_length=2, description="name to its arms: a list, or a pattern with *"
    )
    reference: str = Field(description="the curve that the others are compared with")
    shared: list[str] = Field(
        default=[], description="arms that are points of every curve, such as one without penalty"
    )
    distance: str = Field(
        default=f"{TRAINED}.policy.reverse_kl_sum", description="a measure; curves run over its logarithm"
    )
    value: str = Field(default="accuracy", description="accuracy (after training), or a measure")

    @model_validator(mode="after")
    def _has_reference(self) -> MatchedSpec:
        if self.reference not in self.curves:
            raise ValueError(f"reference: {unknown_name('curve', self.reference, self.curves)}")
        return self

    def resolved(self, arms: Sequence[str]) -> MatchedSpec:
        """With lists of arms in place of patterns; raises ``ValueError`` for what no arm or one curve alone has."""
        curves = {
            name: [arm for arm in arms if fnmatch.fnmatchcase(arm, found)] if isinstance(found, str) else found
            for name, found in self.curves.items()
        }
        for name, found in {**curves, "shared": self.shared}.items():
            at = "shared" if name == "shared" else f"curves.{name}"
            for arm in found:
                if arm not in arms:
                    raise ValueError(f"{at}: {unknown_name('arm', arm, arms)}")
            if len({*found, *self.shared}) < 2 and name != "shared":
                raise ValueError(f"{at}: must have at least 2 arms (with shared ones), got {found}")
        return self.model_copy(update={"curves": curves})


class PlanRecord(BaseModel):
    """A plan that was written down before the first run.

    Attributes:
        path: as the study names it.
        sha256: of the file when the study began.
        commit: the last one that changed the file; None where the file is not as committed, or there is no repository.
        later: hashes of the file when the study went on, where they differ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{7,64}$")
    later: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = []


def read_plan(name: str, beside: Path, where: str) -> PlanRecord:
    """The plan that a study names: its hash, and the commit it stands in.

    Args:
        name: a path, from the working folder or from the study file.
        beside: the folder of the study file.
        where: of the study, for messages.

    Raises:
        InputError: no such file.
    """
    path = next((found for found in (Path(name), beside / name) if found.is_file()), None)
    if path is None:
        raise InputError(
            f"{where}: plan: no file {name!r}, from the working folder or beside the study file (plan=null: none)"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: plan: {name!r} cannot be read ({error.strerror})") from None
    return PlanRecord(path=name, sha256=hashlib.sha256(content).hexdigest(), commit=_commit_of(path.resolve()))


def plan_since(begun: PlanRecord | None, now: PlanRecord | None) -> PlanRecord | None:
    """The plan that a study began with, and the hashes it has had since.

    Raises:
        InputError: it began without one.
    """
    if now is None:
        return begun
    if begun is None:
        raise InputError(
            "plan: the study in the folder began without one, and none is registered afterwards; leave it out"
        )
    since = dict.fromkeys((*begun.later, now.sha256, *now.later))
    return begun.model_copy(update={"later": [sha for sha in since if sha != begun.sha256]})


_Part = TypeVar("_Part", MeasureSpec, MatchedSpec, PlanRecord)


def kept_part(model: type[_Part], data: Any, where: str) -> _Part | None:
    """What a study's folder says of its measures or its plan; raises ``InputError`` for what no study wrote."""
    try:
        return None if data is None else model.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {error.errors(include_url=False)[0]['msg']}") from None


def _commit_of(path: Path) -> str | None:
    """The last commit that changed a file, None if the file differs from it or is in no repository."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(path.parent), *arguments, "--", path.name]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # no git
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    return None if git("status", "--porcelain") != "" else git("log", "-1", "--format=%H") or None
