"""What the adapters have in common: what a hook can express, which settings say the same, rows as one (B, T) batch."""

from __future__ import annotations

import inspect
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mirrorpo.config.objective_file import read_objective, read_spec
from mirrorpo.errors import InputError
from mirrorpo.losses.facts import SURROGATE_FACTS
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.surrogates import SURROGATES

PREFIX = "mirrorpo:"
_LOGITS = "its hook gets the log-probabilities of the sampled tokens, no logits"
_NOT_SENT = "its hook does not get those log-probabilities"


class SeamError(TypeError):
    """A hook of the framework is not where, or not what, its adapter was written for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """What the hooks of a framework can express.

    Attributes:
        framework: its name, for messages.
        aggregations: our aggregation to the framework's settings that give the same denominator.
        advantages: our advantage to the framework's settings that compute it.
        kl_term: the aggregations of a KL term of its own, in the loss or in the reward, which alone gets the
            reference's log-probabilities; empty where the policy loss gets them.
        rollout_policies: how many log-probabilities of the rollouts it hands: 1 where old policy and sampler are one.
        scaled: whether the advantages come multiplied by the weights of its average.
    """

    framework: str
    aggregations: Mapping[str, Mapping[str, Any]]
    advantages: Mapping[str, Mapping[str, Any]]
    kl_term: tuple[str, ...] = ()
    rollout_policies: int = 2
    scaled: bool = False

    def settings(self, objective: Objective) -> dict[str, Any]:
        """The framework's settings for the objective's aggregation and advantages."""
        return {**self.aggregations[objective.aggregation], **self.advantages[objective.advantage]}


def check_expressible(objective: Objective, reach: Reach) -> Objective:
    """The objective, if the framework can run all of it.

    Raises:
        InputError: names the part that it cannot express, and what it can.
    """
    for parts in (_unlike_rules, _unlike_penalties, _unlike_whole):
        for problem in parts(objective, reach):
            raise InputError(f"{reach.framework} cannot express {problem}")
    return objective


@lru_cache(maxsize=32)
def expressible(source: str, reach: Reach) -> Objective:
    """The objective of a file, its text in braces or a preset's name, checked; read once in a process."""
    return check_expressible(read_objective(source), reach)


def _unlike_rules(objective: Objective, reach: Reach) -> Iterator[str]:
    legal = {"old", "sampler"} if reach.kl_term else {"old", "sampler", "reference"}
    for rule in objective.rules:
        what = f"region {rule.region.name!r}"
        if rule.region.needs_logits:
            yield (
                f"{what}: {_LOGITS}. Legal: a region at the sampled token, such as ratio, kl3, binary_tv, binary_kl or "
                "any divergence; or train with TRL"
            )
        yield from _unknown(what, rule.anchors, legal)
        if rule.of == "old" and reach.rollout_policies == 1:
            yield f"{what} of 'old': it hands no other log-probabilities of the rollouts. Legal: of policy"
    yield from _unknown(f"surrogate {objective.surrogate.name!r}", {objective.anchor} - {""}, legal)


def _unlike_penalties(objective: Objective, reach: Reach) -> Iterator[str]:
    legal = {"reference"} if reach.kl_term else {"old", "sampler", "reference"}
    placements = ("loss", "reward") if reach.kl_term else ("advantage", "loss")
    for p in objective.penalties:
        divergence = repr(p.divergence.name)
        yield from _unknown(f"penalty {divergence}", {p.anchor}, legal)
        if p.estimator in ("exact", "top_k"):
            yield (
                f"estimator {p.estimator!r} of divergence {divergence}: {_LOGITS}. Legal: sampled, weighted, score; "
                "or train with TRL"
            )
        if p.baseline == "exact":
            yield f"baseline 'exact' of divergence {divergence}: {_LOGITS}. Legal: none"
        if p.placement not in placements:
            yield (
                f"placement {p.placement!r}: its hook for penalties sees no {p.placement}s. "
                f"Legal: placement {', '.join(placements)}; or train with TRL"
            )
    if reach.kl_term and len({p.placement for p in objective.penalties}) > 1:
        yield "penalties in the loss and in the reward: it has one KL term. Legal: one placement for all"
    if objective.placed("loss") and reach.kl_term and objective.aggregation not in reach.kl_term:
        yield (
            f"aggregation {objective.aggregation!r} with a penalty in the loss: its KL term is averaged over each "
            f"sequence. Legal: aggregation {' or '.join(reach.kl_term)}; placement: reward; or no penalty"
        )


def _unlike_whole(objective: Objective, reach: Reach) -> Iterator[str]:
    if objective.control is not None:
        yield (
            f"control {objective.control.kind!r}: its hook is not told the step. Legal: a constant coefficient; or "
            "train with TRL"
        )
    for key, legal in (("aggregation", reach.aggregations), ("advantage", reach.advantages)):
        value = getattr(objective, key)
        if value not in legal:
            yield f"{key} {value!r}. Legal: {', '.join(legal)}"
    if reach.scaled and not objective.surrogate.scales_advantage:
        surrogates = ", ".join(facts.name for facts in SURROGATE_FACTS.values() if facts.scales_advantage)
        yield (
            f"surrogate {objective.surrogate.name!r}: it hands advantages times the weight of the average, and this "
            f"loss is not in proportion to them. Legal: {surrogates}"
        )


def _unknown(what: str, anchors: set[str] | frozenset[str], legal: set[str]) -> Iterator[str]:
    for anchor in sorted(anchors - legal):
        yield f"{what} with anchor {anchor!r}: {_NOT_SENT}. Legal: {', '.join(sorted(legal))}"


def check_settings(where: str, given: Any, wanted: Mapping[str, Any], objective: Objective, why: str = "") -> None:
    """Compares a framework's settings with those that mean the objective.

    Args:
        where: what stands before a setting's name in messages.
        given: the object whose attributes they are; a dot in a name leads into one.
        wanted: the legal value of each, or a tuple of them.
        objective: for messages.
        why: they must be so; by default the objective's aggregation and advantages.

    Raises:
        InputError: names the setting, the values that it may have, and its value.
        SeamError: there is no such setting.
    """
    why = why or f"{objective.aggregation} aggregation, {objective.advantage} advantages"
    for name, values in wanted.items():
        legal = values if isinstance(values, tuple) else (values,)
        try:
            found = attrgetter(name)(given)
        except AttributeError:
            moved = "there is no such setting; it moved since those that mirrorpo reads"
            raise SeamError(f"{where}{name}: {moved}") from None
        if found not in legal:
            raise InputError(
                f"{where}{name} must be {' or '.join(map(repr, legal))} for objective {objective.name!r} ({why}), "
                f"got {found!r}"
            )


def check_calls(framework: str, module: Any, expected: Mapping[str, Sequence[str]]) -> None:
    """Raises ``SeamError`` unless a framework's functions take the parameters of these names, in this order."""
    for name, wanted in expected.items():
        found = list(inspect.signature(vars(module)[name]).parameters)
        if found != list(wanted):
            raise SeamError(f"{framework}'s {name} takes {found}, expected {list(wanted)}: its call moved")


def rebind(package: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Puts a function in another's place wherever a package has imported it by name.

    Modules that are imported later get ours from where theirs is defined.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}.") and vars(module).get(theirs.__name__) is theirs:
            vars(module)[theirs.__name__] = ours


class Passed:
    """What a policy loss passes to the KL term of the same forward pass, which the framework does not.

    It belongs to a tensor, by a weak reference: no graph outlives its step.
    """

    def __init__(self) -> None:
        self._owner: Callable[[], Tensor | None] = lambda: None
        self._what: Any = None

    def leave(self, logp: Tensor, what: Any) -> None:
        """Keeps what belongs to these log-probabilities of the policy, until others come."""
        self._owner, self._what = weakref.ref(logp), what

    def of(self, logp: Tensor) -> Any:
        """What was left with this very tensor, or None."""
        return self._what if self._owner() is logp else None


def need(anchor: str, objective: Objective, given: Any, sent: str, remedy: str) -> None:
    """Raises ``InputError`` if the objective needs an anchor's log-probabilities and the framework sent none."""
    if anchor in objective.needs and given is None:
        raise InputError(f"objective {objective.name!r} needs the {anchor}'s log-probabilities and {sent}: {remedy}")


def policy_alone(objective: Objective) -> Objective:
    """The objective without its penalties, for a hook whose framework adds them by another."""
    return replace(objective, penalties=())


def penalty_alone(objective: Objective, **given: Any) -> Tensor:
    """The penalties' part of each token's loss, (B, T); of one in the reward the policy itself has drawn the tokens.

    Args:
        objective: its placements are one.
        given: arguments of ``Objective.terms``.
    """
    alone = replace(
        objective,
        rules=(),
        penalties=tuple(replace(p, placement="loss") for p in objective.penalties),
        surrogate=SURROGATES["none"],
        options={},
        anchor="",
        future_kl=None,
        behaviour=objective.behaviour if objective.placement == "loss" else "old",
    )
    penalty = alone.terms(**given).penalty
    assert penalty is not None
    return penalty


def means(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics that a framework may average, under our name."""
    return {f"mirrorpo/{name}": value for name, value in metrics.items() if name.endswith(("/mean", "/frac"))}


def numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as Python numbers, with one transfer."""
    return dict(zip(metrics, torch.stack([x.double() for x in metrics.values()]).tolist(), strict=True))


def as_text(source: str) -> str:
    """An objective as one line of JSON, for processes that do not see its file."""
    return json.dumps(read_spec(source))


def quoted_name(source: str) -> str:
    r"""The ``mirrorpo:`` name of an objective with its text, in quotes for a framework that reads values as YAML.

    Example:
        >>> quoted_name('{preset: dapo, region: "my:it\'s"}')
        '\'mirrorpo:{"preset": "dapo", "region": "my:it\\u0027s"}\''
    """
    escaped = as_text(source).replace("'", r"\u0027")
    return f"'{PREFIX}{escaped}'"


def assignments(settings: Mapping[str, Any]) -> list[str]:
    """``key=value`` for a command line."""
    return [f"{key}={value}" for key, value in settings.items()]


def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    """Rows of unequal length (T_i,) as (B, T), 0 where a row has ended.

    Example:
        >>> import torch
        >>> pad_rows([torch.ones(2), torch.ones(1)])
        tensor([[1., 1.],
                [1., 0.]])
    """
    return pad_sequence(list(rows), batch_first=True)


def flat_rows(batch: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inverse of ``pad_rows``, side by side: (B, T) to (sum of lengths,).

    Example:
        >>> import torch
        >>> flat_rows(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), [2, 1])
        tensor([1., 2., 3.])
    """
    return torch.cat([row[:length] for row, length in zip(batch, lengths, strict=True)])
