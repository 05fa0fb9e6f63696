"""The parts of an objective and what follows from them: which anchors, logits and sweeps it needs.

Nothing here loads torch: the parts may be facts alone (``mirrorpo.losses.facts``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from mirrorpo.errors import check_number
from mirrorpo.losses.coefficient import Control
from mirrorpo.losses.facts import SURROGATE_FACTS, SurrogateFacts
from mirrorpo.losses.penalties import Penalty
from mirrorpo.losses.rules import Rule


@dataclass(frozen=True, kw_only=True)
class FutureKL:
    """Settings of the weighting.

    Attributes:
        half_life: tokens after which a future log-ratio counts half.
        clip: the weight stays within [1, 1 + clip], or [1 - clip, 1 + clip] with ``lower_bound``.
        lower_bound: whether weights below 1 are allowed.
        max_ratio: tokens with w above this (the dual-clip bound) do not enter F.
        safety_ratio: where A < 0 and w is above this, the weight is clamped to [1 - clip, 1].
    """

    half_life: float = 32.0
    clip: float = 0.2
    lower_bound: bool = False
    max_ratio: float = 10.0
    safety_ratio: float = 4.0

    def __post_init__(self) -> None:
        if not isinstance(self.lower_bound, bool):
            raise ValueError(f"lower_bound must be true or false, got {self.lower_bound!r}")
        check_number("half_life", self.half_life, 1.0, 1e9)
        check_number("clip", self.clip, 0.0, 1.0)
        check_number("max_ratio", self.max_ratio, 1.0)
        check_number("safety_ratio", self.safety_ratio, 1.0)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a policy objective consists of.

    Attributes:
        name: of the preset it came from.
        rules: trust regions with their anchors and effects; empty for none.
        penalties: divergences from an anchor; empty for none.
        surrogate: what is maximised inside the region: an entry of ``mirrorpo.losses.surrogates``.
        level: of the ratio w: ``token``, ``sequence`` for exp(mean_t log w_t) (GSPO), ``product`` for exp(sum_t
            log w_t).
        behaviour: b, the policy that the tokens count as drawn from: ``old`` or ``sampler``.
        advantage: how rewards become advantages (``mirrorpo.advantages``); not used in the call.
        aggregation: how tokens become a loss (``mirrorpo.aggregate``).
        options: of the surrogate, all of them, by name.
        anchor: of the surrogate (``regression``); empty for one that has none.
        future_kl: future-KL weighting of the advantages, or None.
        control: how the coefficients move over the run, or None; whoever trains applies it as ``penalty_scale``.
    """

    name: str
    surrogate: SurrogateFacts
    rules: tuple[Rule, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    level: str = "token"
    behaviour: str = "old"
    advantage: str = "grpo"
    aggregation: str = "sequence_mean"
    options: Mapping[str, float | None] = field(default_factory=dict)
    anchor: str = ""
    future_kl: FutureKL | None = None
    control: Control | None = None

    @cached_property
    def bound(self) -> Rule | None:
        """The rule with act ``clip`` or ``soft``, of which there is at most one."""
        return next((rule for rule in self.rules if rule.act in ("clip", "soft")), None)

    @cached_property
    def masks(self) -> tuple[Rule, ...]:
        """The rules with act ``mask``."""
        return tuple(rule for rule in self.rules if rule.act == "mask")

    @cached_property
    def truncation(self) -> Rule | None:
        """The rule with act ``truncate``, of which there is at most one."""
        return next((rule for rule in self.rules if rule.act == "truncate"), None)

    def placed(self, placement: str) -> tuple[Penalty, ...]:
        """The penalties with this placement."""
        return tuple(p for p in self.penalties if p.placement == placement)

    @property
    def placement(self) -> str:
        """The penalties' placement where they have one in common; ``loss`` if any is in the loss, or there is none."""
        found = {p.placement for p in self.penalties} or {"loss"}
        return next(name for name in ("loss", "advantage", "reward") if name in found)

    @cached_property
    def penalty_labels(self) -> tuple[str, ...]:
        """The penalties' names in the metrics: divergence and anchor, numbered from the second of one name on."""
        names = [p.divergence.name + ("" if p.anchor == "reference" else f"_{p.anchor}") for p in self.penalties]
        return tuple(numbered(names))

    @cached_property
    def needs(self) -> frozenset[str]:
        """The anchors that a batch must bring, as log-probabilities or (``needs_logits_of``) as logits."""
        found = {p.anchor for p in self.penalties} | {anchor for rule in self.rules for anchor in rule.anchors}
        found |= {self.anchor} - {""}
        if self.surrogate.has_policy_term or any(p.reads_behaviour for p in self.penalties):
            found.add(self.behaviour)
        return frozenset(found)

    @cached_property
    def needs_logits_of(self) -> frozenset[str]:
        """The anchors whose next-token logits are needed, beside the policy's own."""
        of_rules = {rule.anchor for rule in self.rules if rule.region.needs_logits}
        return frozenset(of_rules | {p.anchor for p in self.penalties if p.needs_logits})

    @property
    def needs_reference(self) -> bool:
        """Whether there must be a reference model."""
        return "reference" in self.needs

    @property
    def reference_coefficient(self) -> float:
        """The coefficient of the first penalty toward the reference; 1 if only a region needs it; 0 if nothing does."""
        found = [p.coefficient for p in self.penalties if p.anchor == "reference"]
        return found[0] if found else float(self.needs_reference)

    @property
    def follows_advantages(self) -> bool:
        """Whether a completion whose advantages are all 0 has no gradient."""
        return self.surrogate.scales_advantage and not self.penalties

    @property
    def needs_logits(self) -> bool:
        """Whether ``logits`` (and those of ``needs_logits_of``) must be given."""
        return bool(self.needs_logits_of)

    @property
    def token_separable(self) -> bool:
        """Whether a token's term depends on no other token: then loss and gradient need one sweep over the tokens."""
        coupled = self.surrogate.couples_tokens or any(rule.couples_tokens for rule in self.rules)
        return self.level == "token" and not coupled and self.future_kl is None

    def drawn_by_policy(self) -> Self:
        """The same where the old policy generated the tokens itself, so that the sampler is the old policy.

        Raises:
            ValueError: a penalty in the reward toward the sampler: it would be 0.
        """

        def placed(part: Any) -> Any:
            return replace(part, anchor="old") if part.anchor == "sampler" else part

        # Of the old policy around itself nothing is ever outside.
        rules = tuple(placed(rule) for rule in self.rules if not (rule.of == "old" and rule.anchor == "sampler"))
        own = "old" if self.anchor == "sampler" else self.anchor
        return replace(self, behaviour="old", rules=rules, penalties=tuple(map(placed, self.penalties)), anchor=own)

    def describe(self) -> str:
        """One line: regions, penalties with estimator and coefficient, level, advantage, aggregation."""
        rules = [rule.describe(self.behaviour) for rule in self.rules] or ["no region"]
        toward = f" toward {self.anchor}" if self.anchor else ""
        parts = [", ".join([f"{self.name}: {self.surrogate.name} surrogate{toward}", *rules])]
        parts += [p.describe() for p in self.penalties] or ["no penalty"]
        if self.control is not None:
            parts.append(f"{self.control.kind} coefficient")
        if self.future_kl is not None:
            parts.append(f"future-KL weights (half life {self.future_kl.half_life:g})")
        if self.behaviour != "old":
            parts.append(f"behaviour {self.behaviour}")
        parts.append(f"{self.level} level, {self.advantage} advantages, {self.aggregation} aggregation")
        return "; ".join(parts)


def numbered(names: list[str]) -> list[str]:
    """Names with a number from the second of one name on."""
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def check_parts(
    surrogate: SurrogateFacts,
    level: str,
    rules: tuple[Rule, ...],
    penalties: tuple[Penalty, ...],
    advantage: str,
    future_kl: FutureKL | None,
) -> None:
    """Raises ``ValueError`` for parts that do not go together."""
    name = f"surrogate {surrogate.name!r}"
    if level not in surrogate.levels:
        raise ValueError(f"level {level!r} does not go with {name}. Legal: {', '.join(surrogate.levels)}")
    for rule in rules:
        region = f"region {rule.region.name!r} with act {rule.act!r}"
        if not surrogate.has_policy_term or (not surrogate.uses_region and rule.act == "clip"):
            raise ValueError(f"{region} has no effect: {name} does not look at it")
        if rule.act == "soft" and not surrogate.soft:
            legal = ", ".join(entry.name for entry in SURROGATE_FACTS.values() if entry.soft)
            raise ValueError(f"{region} does not go with {name}. Legal: {legal}")
        if rule.act == "soft" and level != "token":
            raise ValueError(f"{region} does not go with level {level!r}. Legal: token")
        if rule.act == "clip" and rule.level != level:
            raise ValueError(f"{region} is at level {rule.level!r}, but the ratio in the loss at level {level!r}")
        if rule.act == "clip" and surrogate.needs_bounds and rule.region.needs_logits:
            raise ValueError(
                f"{name} needs a region with bounds, not the mask over the vocabulary {rule.region.name!r}"
            )
    if not surrogate.has_policy_term:
        if not any(p.placement == "loss" for p in penalties):
            raise ValueError(
                f"{name} has no policy term, so a penalty with placement 'loss' is needed: give divergence"
            )
        if future_kl is not None:
            raise ValueError(f"future_kl has no effect: {name} has no policy term")
        for p in penalties:
            if p.placement != "loss":
                raise ValueError(f"placement {p.placement!r} has no effect: {name} does not look at advantages")
    if surrogate.anchors:  # one advantage for each sequence
        if future_kl is not None:
            raise ValueError(f"future_kl has no effect: {name} has one advantage for each sequence")
        if any(p.placement == "advantage" for p in penalties):
            raise ValueError(f"placement 'advantage' has no effect: {name} has one advantage for each sequence")
    if advantage == "maxrl" and any(p.placement == "reward" for p in penalties):
        raise ValueError("advantage 'maxrl' needs rewards >= 0, which placement 'reward' does not keep. Legal: loss")


__all__ = ["FutureKL", "Parts", "check_parts", "numbered"]
