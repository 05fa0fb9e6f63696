"""What the adapters have in common: what a hook can express, and rows of unequal length as one (B, T) batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mirrorpo.config.objective_file import read_spec
from mirrorpo.errors import InputError
from mirrorpo.losses.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the hooks of a framework can express.

    Attributes:
        framework: its name, for messages.
        aggregations: our aggregation to the framework's setting that has the same denominator.
        advantages: our advantage to the framework's settings that compute it.
        placements: of penalties that it has a place for.
        behaviours: policies whose log-probabilities it hands to the policy loss as those of the rollouts.
        region_anchors: anchors whose log-probabilities it hands to the policy loss.
        penalty_anchors: the same for penalties.
    """

    framework: str
    aggregations: Mapping[str, str]
    advantages: Mapping[str, str]
    placements: frozenset[str]
    behaviours: frozenset[str]
    region_anchors: frozenset[str]
    penalty_anchors: frozenset[str]


def check_expressible(objective: Objective, reach: Reach) -> Objective:
    """The objective, if the framework can run all of it.

    Raises:
        InputError: names the part that it cannot express, and what it can.
    """
    name = reach.framework
    logits = "its hook gets the log-probabilities of the sampled tokens, no logits"
    if objective.behaviour not in reach.behaviours:
        raise InputError(
            f"{name} cannot express behaviour {objective.behaviour!r}: its hook does not get those log-probabilities. "
            f"Legal: behaviour {' or '.join(sorted(reach.behaviours))}"
        )
    for rule in objective.rules:
        if rule.region.needs_logits:
            raise InputError(
                f"{name} cannot express region {rule.region.name!r}: {logits}. Legal: a region at the sampled token, "
                "such as ratio, kl3, binary_tv, binary_kl or any divergence; or train with TRL"
            )
        _check_anchors(name, f"region {rule.region.name!r}", rule.anchors, reach.region_anchors)
    for p in objective.penalties:
        _check_anchors(name, f"penalty {p.divergence.name!r}", {p.anchor}, reach.penalty_anchors)
        if p.estimator in ("exact", "top_k"):
            raise InputError(
                f"{name} cannot express estimator {p.estimator!r} of divergence {p.divergence.name!r}: {logits}. "
                "Legal: sampled, weighted, score; or train with TRL"
            )
        if p.baseline == "exact":
            raise InputError(
                f"{name} cannot express baseline 'exact' of divergence {p.divergence.name!r}: {logits}. Legal: none"
            )
    if objective.control is not None:
        raise InputError(
            f"{name} cannot express control {objective.control.kind!r}: its hook is not told the step. "
            "Legal: a constant coefficient; or train with TRL"
        )
    for p in objective.penalties:
        if p.placement not in reach.placements:
            raise InputError(
                f"{name} cannot express placement {p.placement!r}: its hook for penalties sees no {p.placement}s. "
                f"Legal: placement {', '.join(sorted(reach.placements))}; or train with TRL"
            )
    for key, value, legal in (
        ("aggregation", objective.aggregation, reach.aggregations),
        ("advantage", objective.advantage, reach.advantages),
    ):
        if value not in legal:
            raise InputError(
                f"{name} cannot express {key} {value!r}. Legal: "
                + ", ".join(f"{ours} ({theirs})" for ours, theirs in legal.items())
            )
    return objective


def _check_anchors(name: str, what: str, anchors: Set[str], legal: Set[str]) -> None:
    for anchor in sorted(set(anchors) - set(legal)):
        raise InputError(
            f"{name} cannot express {what} with anchor {anchor!r}: its hook does not get those log-probabilities. "
            f"Legal: {', '.join(sorted(legal))}"
        )


def inline(source: str) -> str:
    r"""An objective as one line of JSON without an apostrophe, so that it may stand in single quotes.

    Example:
        >>> inline('{preset: dapo, region: "my:it\'s"}')
        '{"preset": "dapo", "region": "my:it\\u0027s"}'
    """
    return json.dumps(read_spec(source)).replace("'", "\\u0027")


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
