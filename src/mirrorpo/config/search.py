"""Keys of recipes that search: those of a training recipe, and a group ``evolution`` or ``learning``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, model_validator

from mirrorpo.config.train import ObjectiveSpec, Recipe
from mirrorpo.tasks.task import Settings

if TYPE_CHECKING:
    from mirrorpo.divergences.neural.map import MirrorMap


class EvolutionSpec(Settings):
    """The search; the defaults are GBMPO's (with ``train.steps: 100``)."""

    generations: int = Field(default=15, ge=1, le=10_000, description="maximum number of generations")
    population: int = Field(default=10, ge=2, le=10_000, description="members of a generation, in antithetic pairs")
    sigma: float = Field(default=0.01, gt=0.0, le=10.0, description="standard deviation of the first generation")
    sigma_decay: float = Field(default=0.99, gt=0.0, le=1.0, description="factor on sigma after each generation")
    sigma_smallest: float = Field(default=0.0, ge=0.0, le=10.0, description="lower bound of sigma")
    step: float = Field(default=0.01, gt=0.0, le=100.0, description="step size of the centre")
    optimiser: Literal["sgd", "adam"] = Field(default="sgd", description="of the centre")
    fitness: Literal["raw", "centred_ranks"] = Field(default="raw", description="what the gradient estimate is made of")
    positivity: Literal["projection", "softplus"] = Field(
        default="projection", description="how parameters stay >= 0: cut off at 0, or by construction"
    )
    acceptance: bool = Field(
        default=False, description="undo a step that scores worse on validation problems with separate seeds"
    )
    elites: int = Field(default=0, ge=0, le=100, description="best maps so far, evaluated again in each generation")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="generations without a better mean fitness before it stops; empty: never",
    )
    min_improvement: float = Field(default=0.0, ge=0.0, le=1.0, description="smallest gain that counts, with patience")
    validation_problems: int = Field(default=256, ge=1, le=1_000_000, description="that fitness is measured on")
    validation_samples: int = Field(default=1, ge=1, le=1_000, description="completions per validation problem")
    final_seeds: int = Field(
        default=3, ge=1, le=100, description="trainings of the best and of the first map for the last comparison"
    )
    max_deaths: int = Field(default=3, ge=1, le=100, description="workers that may die on one member")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of the search's draws")

    @model_validator(mode="after")
    def _pairs(self) -> EvolutionSpec:
        if self.population % 2:
            raise ValueError(
                f"population must be even: members come in antithetic pairs, got {self.population}; "
                f"legal: {self.population - 1}, {self.population + 1}, ..."
            )
        if self.sigma_smallest > self.sigma:
            raise ValueError(f"sigma_smallest must be at most sigma = {self.sigma:g}, got {self.sigma_smallest:g}")
        if self.min_improvement > 0 and self.patience is None:
            raise ValueError("min_improvement has no effect without patience")
        return self


class MapObjectiveSpec(ObjectiveSpec):
    """An objective whose penalty is a neural mirror map."""

    preset: str = Field(default="nm_grpo", description="a name of `mirrorpo list objectives`")


class EvolveRecipe(Recipe):
    """A whole search. The objective's map is where it starts."""

    objective: MapObjectiveSpec = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=lambda: MapObjectiveSpec.model_construct(preset="nm_grpo")
    )
    evolution: EvolutionSpec = EvolutionSpec()

    @model_validator(mode="after")
    def _evaluates_at_the_end(self) -> EvolveRecipe:
        if self.eval.every:
            raise ValueError(
                "eval.every has no effect in a search, which evaluates each map behind its training: legal is 0, got "
                f"{self.eval.every}"
            )
        return self

    @model_validator(mode="after")
    def _evolvable(self, info: ValidationInfo) -> EvolveRecipe:
        parts = self.objective.parts(info.context)
        names = [] if parts is None else [penalty.divergence.name for penalty in parts.penalties]
        if parts is not None and names != ["neural"]:
            raise ValueError(
                f"objective must have one penalty, a neural mirror map (preset nm_grpo or nm_gspo, "
                f"or divergence: neural), got {', '.join(names) or 'no penalty'}"
            )
        if self.eval.problems < 1:
            raise ValueError("eval.problems must be at least 1: the best map is evaluated on them, got 0")
        return self

    def start(self) -> MirrorMap:
        """The map that the search starts from."""
        from mirrorpo.divergences.neural.map import NeuralDivergence  # loads torch

        divergence = self.objective.build().penalties[0].divergence
        assert isinstance(divergence, NeuralDivergence)
        return divergence.map


class LearnSpec(Settings):
    """Learning a part of the penalty by gradient while the policy trains."""

    what: Literal["map", "beta", "alpha", "coefficient"] = Field(
        default="map", description="the 380 parameters of a neural map, a divergence's option, or the coefficient"
    )
    every: int = Field(default=1, ge=1, le=1_000_000, description="optimiser steps between outer steps")
    window: int = Field(default=8, ge=1, le=10_000, description="hypergradients that an outer step averages")
    rule: Literal["exponentiated", "projected"] | None = Field(
        default=None, description="outer step; empty: exponentiated, and projected for beta and alpha"
    )
    rate: float = Field(
        default=0.3, ge=0.0, le=10.0, description="largest length of an outer step (exponentiated: of log values)"
    )
    validation_problems: int = Field(default=256, ge=1, le=1_000_000, description="that are never trained on")
    prompts: int = Field(default=8, ge=1, le=100_000, description="validation problems of an outer step")
    group_size: int = Field(default=8, ge=2, le=10_000, description="completions of each of them")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of the validation completions")

    @property
    def step_rule(self) -> str:
        """The rule, or the one that the variable implies."""
        return self.rule or ("projected" if self.what in ("beta", "alpha") else "exponentiated")

    @model_validator(mode="after")
    def _fits(self) -> LearnSpec:
        if self.what in ("beta", "alpha") and self.rule == "exponentiated":
            raise ValueError(f"rule must be projected for {self.what}, which may be negative, got exponentiated")
        if self.prompts > self.validation_problems:
            raise ValueError(
                f"prompts must be at most validation_problems = {self.validation_problems}, got {self.prompts}"
            )
        return self


class LearnRecipe(Recipe):
    """A training that learns its own penalty. The objective's penalty is where it starts."""

    objective: MapObjectiveSpec = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=lambda: MapObjectiveSpec.model_construct(preset="nm_grpo", estimator="score")
    )
    learning: LearnSpec = LearnSpec()

    @model_validator(mode="after")
    def _learnable(self, info: ValidationInfo) -> LearnRecipe:
        parts, what = self.objective.parts(info.context), self.learning.what
        if parts is None:
            return self
        penalties = parts.penalties
        if len(penalties) != 1:
            raise ValueError(f"objective must have one penalty, got {len(penalties)}")
        penalty = penalties[0]
        for key, legal in (("estimator", "score"), ("anchor", "reference"), ("placement", "loss")):
            if getattr(penalty, key) != legal:
                raise ValueError(
                    f"objective's penalty must have {key} {legal!r}: the hypergradient is that of it, got "
                    f"{getattr(penalty, key)!r}"
                )
        fits = {"map": "neural", "beta": "beta", "alpha": "alpha"}
        if what in fits and penalty.divergence.name != fits[what]:
            raise ValueError(
                f"learning.what {what!r} needs objective.divergence {fits[what]!r}, got {penalty.divergence.name!r}"
            )
        if parts.control is not None and what == "coefficient":
            raise ValueError("objective.control must be empty where the coefficient is learned")
        if self.train.precision != "float32":
            raise ValueError(
                "train.precision must be float32: differences of log-probabilities are taken, got "
                f"{self.train.precision}"
            )
        return self

    def start(self) -> list[float]:
        """The first values of what is learned."""
        from mirrorpo.divergences.neural.map import NeuralDivergence  # loads torch

        penalty, what = self.objective.build().penalties[0], self.learning.what
        if what == "coefficient":
            return [penalty.coefficient]
        if isinstance(penalty.divergence, NeuralDivergence):
            return penalty.divergence.map.parameters.tolist()
        spec = self.objective.spec()
        given = spec.get("penalties", [spec])[0]["divergence"]
        return [float(given[what])]


__all__ = ["EvolutionSpec", "EvolveRecipe", "LearnRecipe", "LearnSpec"]
