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
from typing import TYPE_CHECKING, Any

from mirrorpo.errors import check_number, unknown_name
from mirrorpo.losses.facts import ANCHORS, CODE, PartsFrom
from mirrorpo.losses.keys import BASELINES, COEFFICIENT, ESTIMATORS, LOGITS_ESTIMATORS, PLACEMENTS, SUPPORTS

if TYPE_CHECKING:
    import mirrorpo.divergences

PENALTY_KEYS = ("divergence", "coefficient", "estimator", "k", "anchor", "placement", "support", "baseline")


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """One regulariser: ``coefficient * D(p, anchor)``.

    Attributes:
        divergence: D; its facts where nothing is to be computed.
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

    divergence: mirrorpo.divergences.Divergence
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


def penalty_from(spec: Any, k: int | None = None, parts: PartsFrom = CODE) -> Penalty | None:
    """A penalty from a mapping as recipes have it; None where the coefficient is 0.

    Args:
        spec: ``{"divergence": ..., "coefficient": ..., "estimator": ..., "anchor": ..., "placement": ..., "k": ...,
            "support": ..., "baseline": ...}``; the first two are needed.
        k: where the mapping has none.
        parts: what the divergence is made by.

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
    divergence = parts.divergence(given.pop("divergence"))
    made = Penalty(divergence=divergence, coefficient=coefficient, **given)
    return made if coefficient > 0 else None


__all__ = ["PENALTY_KEYS", "PLACEMENTS", "Penalty", "penalty_from"]
