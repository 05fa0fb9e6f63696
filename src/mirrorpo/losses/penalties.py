r"""Penalties: a divergence from an anchor, its estimator, its coefficient, and where it goes.

=============  ========================================================================================================
``placement``  what happens to coefficient * D(p, anchor)
=============  ========================================================================================================
``loss``       it is added to the loss
``reward``     its sum over the completion is subtracted from the reward, before the advantages are computed
``advantage``  coefficient * g is subtracted from the token's advantage, with g of ``Divergence.score``: then the trust
               region applies to it too
=============  ========================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirrorpo.divergences import ESTIMATORS, LOGITS_ESTIMATORS, SUPPORTS, Divergence
from mirrorpo.errors import check_number, unknown_name
from mirrorpo.losses.anchors import ANCHORS, AnchorLogps
from mirrorpo.losses.keys import COEFFICIENT
from mirrorpo.losses.regions import resolve_divergence
from mirrorpo.losses.surrogates import MAX_LOG_RATIO

PLACEMENTS = ("loss", "reward", "advantage")
PENALTY_KEYS = ("divergence", "coefficient", "estimator", "k", "anchor", "placement", "support", "baseline")
BASELINES = ("none", "exact")


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """One regulariser: ``coefficient * D(p, anchor)``.

    Attributes:
        divergence: D.
        estimator: ``sampled``, ``weighted``, ``score``, ``exact`` or ``top_k``.
        coefficient: > 0, in loss units per nat.
        k: K of ``top_k``.
        anchor: ``reference``, ``old``, ``sampler``, ``teacher`` or ``uniform``.
        placement: ``loss``, ``reward`` or ``advantage``.
        support: of ``top_k``: whose K likeliest tokens: the ``anchor``'s, the ``policy``'s, or their ``union``.
        baseline: of ``score``: ``exact`` subtracts sum_v p_v g_v from g: the same gradient with less noise.

    Raises:
        ValueError: a combination that means nothing.
    """

    divergence: Divergence
    estimator: str
    coefficient: float
    k: int = 64
    anchor: str = "reference"
    placement: str = "loss"
    support: str = "anchor"
    baseline: str = "none"

    def __post_init__(self) -> None:
        legal = {"estimator": ESTIMATORS, "anchor": ANCHORS, "placement": PLACEMENTS}
        legal |= {"support": SUPPORTS, "baseline": BASELINES}
        for key, names in legal.items():
            if getattr(self, key) not in tuple(names):
                raise unknown_name(key, getattr(self, key), names)
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an integer >= 1, got {self.k!r}")
        if self.baseline == "exact" and self.estimator != "score":
            raise ValueError(f"baseline 'exact' has no effect with estimator {self.estimator!r}. Legal: score")
        if self.needs_logits and self.anchor == "sampler":
            part = "baseline 'exact'" if self.baseline == "exact" else f"estimator {self.estimator!r}"
            raise ValueError(
                f"{part} needs the anchor's next-token logits, and the sampler reports sampled "
                "tokens only. Legal: sampled, weighted, score"
            )
        if self.estimator == "top_k" and self.anchor == "uniform":
            raise ValueError(
                "estimator 'top_k' takes the anchor's likeliest tokens, and under 'uniform' all are alike. "
                "Legal: exact, sampled, weighted, score"
            )
        if self.support != "anchor" and self.estimator != "top_k":
            raise ValueError(f"support {self.support!r} has no effect: it belongs to estimator 'top_k'")
        if self.placement == "reward" and self.estimator not in ("sampled", "weighted"):
            raise ValueError(
                "placement 'reward' uses the value of the estimate, so estimator must be 'sampled' or 'weighted', "
                f"got {self.estimator!r}"
            )
        if self.placement == "reward" and self.anchor == "old":
            raise ValueError(
                "placement 'reward' with anchor 'old' has no effect: rewards are computed before the policy has moved "
                "from it. Legal: reference, sampler, teacher, uniform"
            )
        if self.placement == "advantage" and self.estimator != "score":
            raise ValueError(
                f"placement 'advantage' uses the weight g, so estimator must be 'score', got {self.estimator!r}"
            )

    @property
    def needs_logits(self) -> bool:
        """Whether both models' next-token logits are needed, and not only the sampled tokens' log-probabilities."""
        return self.summed or self.baseline == "exact"

    @property
    def summed(self) -> bool:
        """Whether its estimate is itself a sum over the vocabulary."""
        return self.estimator in LOGITS_ESTIMATORS

    @property
    def reads_behaviour(self) -> bool:
        """Whether its estimate weighs tokens by p / b."""
        return self.estimator in ("weighted", "score") and self.placement == "loss"

    @property
    def what(self) -> str:
        """Its name in messages."""
        toward = "" if self.anchor == "reference" else f" toward {self.anchor!r}"
        return f"penalty {self.divergence.name!r}{toward} with estimator {self.estimator!r}"

    def describe(self) -> str:
        """A few words; what is the default is not said."""
        details = [self.estimator]
        if self.anchor != "reference":
            details.append(f"toward {self.anchor}")
        if self.baseline != "none":
            details.append("exact baseline")
        if self.placement != "loss":
            details.append(f"subtracted from the {self.placement}")
        return f"penalty {self.coefficient:g} * {self.divergence.name} ({', '.join(details)})"

    def estimate(self, logp: Tensor, anchors: AnchorLogps, behaviour: str, baseline: Tensor | None = None) -> Tensor:
        """D at the sampled tokens, (B, T), differentiable; 0 where the anchor or b could not be scored.

        Args:
            logp: (B, T), of the policy.
            anchors: of the batch.
            behaviour: the anchor that is b.
            baseline: (B, T), what is subtracted from g; the value does not change.
        """
        q, b = anchors.of(self.anchor, self.what), anchors.of(behaviour, self.what)
        value = self.divergence.estimate(self.estimator, logp, q, b)
        if baseline is not None:
            baseline = torch.where(baseline.isfinite(), baseline, 0.0)  # none is no bias either
            value = value - ((logp - b).clamp(max=MAX_LOG_RATIO).exp() * baseline).detach() * (logp - logp.detach())
        for name in {self.anchor, behaviour} if self.reads_behaviour else {self.anchor}:
            absent = anchors.missing.get(name)
            if absent is not None:
                value = torch.where(absent, 0.0, value)
        return value

    @torch.no_grad()
    def advantage_shift(self, logp: Tensor, anchors: AnchorLogps, baseline: Tensor | None = None) -> Tensor:
        """What ``placement: advantage`` subtracts from each token's advantage, up to the coefficient: g, (B, T)."""
        g = self.divergence.score(logp.detach(), anchors.of(self.anchor, self.what)).to(logp.dtype)
        g = g if baseline is None else g - torch.where(baseline.isfinite(), baseline, 0.0)
        absent = anchors.missing.get(self.anchor)
        return g if absent is None else torch.where(absent, 0.0, g)


def penalty_from(spec: Any, k: int | None = None) -> Penalty | None:
    """A penalty from a mapping as recipes have it; None where the coefficient is 0.

    Args:
        spec: ``{"divergence": ..., "coefficient": ..., "estimator": ..., "anchor": ..., "placement": ..., "k": ...,
            "support": ..., "baseline": ...}``; the first two are needed.
        k: where the mapping has none.

    Raises:
        ValueError: an unknown key or name, a value out of range, a combination that means nothing.

    Example:
        >>> penalty_from({"divergence": "js", "coefficient": 0.1, "anchor": "teacher", "estimator": "score"}).anchor
        'teacher'
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"a penalty must be a mapping with divergence and coefficient, got {spec!r}")
    given = {str(key): value for key, value in spec.items() if value is not None}
    for key in given:
        if key not in PENALTY_KEYS:
            raise unknown_name("penalty key", key, PENALTY_KEYS)
    for key in ("divergence", "coefficient"):
        if key not in given:
            raise ValueError(f"a penalty needs {key}, got the keys {sorted(given)}")
    coefficient = check_number("coefficient", given.pop("coefficient"), *COEFFICIENT)
    given.setdefault("estimator", "score" if given.get("placement") == "advantage" else "sampled")
    if "k" in given and given["estimator"] != "top_k":
        raise ValueError("k has no effect: it belongs to estimator 'top_k'")
    if k is not None:
        given.setdefault("k", k)
    divergence = resolve_divergence(given.pop("divergence"))
    made = Penalty(divergence=divergence, coefficient=coefficient, **given)
    return made if coefficient > 0 else None


__all__ = ["PENALTY_KEYS", "PLACEMENTS", "Penalty", "penalty_from"]
