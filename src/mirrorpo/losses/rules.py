r"""Rules: how a trust region acts, on what, and around which anchor.

============  ==========================================================================================================
``act``       what happens outside the region
============  ==========================================================================================================
``clip``      the policy gradient stops where the advantage pushes further out; at most one per objective
``mask``      the policy term is dropped on either side, whatever the advantage; denominators keep it; any number
``soft``      nothing: the loss gains abs(A) / (2 radius) * D(p, anchor), with the ``weighted`` estimate of D
``truncate``  the policy term is multiplied by the ratio old / anchor everywhere, clamped into the region; at most one
============  ==========================================================================================================

``level`` says whose ratio is looked at: of the ``token``, exp of the mean log-ratio of its ``sequence``, or exp of
their sum (``product``: the ratio of the whole completions, which grows with their length). A mask may also compare the
mean, the sum or the maximum of its sequence's divergences with the radius (``mean_divergence``, ``sum_divergence``,
``max_divergence``). ``side`` restricts a rule to ``positive`` or ``negative`` advantages; at the levels of sequences
that is the sign of the mean advantage. A mask may be ``of`` the ``old`` policy in place of the one that is trained:
old / sampler is what differs between trainer and engine.

Special cases: SPO (arXiv 2401.16025) is ``chi2`` with ``soft``, DRPO is ``prob_l2`` with ``soft``; IcePop (arXiv
2510.18855), verl's rejection sampling and DeepSeek's off-policy sequence mask (arXiv 2512.02556) are masks around the
sampler; truncated importance sampling is ``truncate`` around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mirrorpo.errors import unknown_name
from mirrorpo.losses.facts import ANCHORS, CODE, PartsFrom, named

if TYPE_CHECKING:
    from mirrorpo.losses.regions import TrustRegion

ACTS = ("clip", "mask", "soft", "truncate")
LEVELS = ("token", "sequence", "product")
# Of masks only: a statistic of the sequence's divergences, token by token.
MASK_LEVELS = ("mean_divergence", "sum_divergence", "max_divergence")
SIDES = ("both", "positive", "negative")
SUBJECTS = ("policy", "old")
RULE_KEYS = ("anchor", "act", "level", "side", "of")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A region with its anchor and its effect.

    Attributes:
        region: the set of ratios, or of distributions; its facts where nothing is to be computed.
        anchor: what it lies around.
        act: ``clip``, ``mask``, ``soft`` or ``truncate``.
        level: ``token``, ``sequence`` or ``product``; of a mask also one of ``MASK_LEVELS``.
        side: ``both``, ``positive`` or ``negative``.
        of: the policy that is to stay in it: ``policy``, the one that is trained, or ``old``.

    Raises:
        ValueError: a combination that means nothing.
    """

    region: TrustRegion
    anchor: str = "old"
    act: str = "clip"
    level: str = "token"
    side: str = "both"
    of: str = "policy"

    def __post_init__(self) -> None:
        levels = (*LEVELS, *MASK_LEVELS) if self.act == "mask" else LEVELS
        legal = {"act": ACTS, "anchor": ANCHORS, "level": levels, "side": SIDES, "of": SUBJECTS}
        for key, names in legal.items():
            if getattr(self, key) not in tuple(names):  # a list is no key of a table
                raise unknown_name(key, getattr(self, key), names)
        region = f"region {self.region.name!r}"
        if self.anchor == "uniform":
            raise ValueError(f"{region}: anchor 'uniform' is for penalties. Legal: reference, old, sampler, teacher")
        if self.region.needs_logits and ANCHORS[self.anchor].logits is None:
            raise ValueError(
                f"{region} needs the anchor's next-token logits, and {self.anchor!r} reports sampled tokens only. "
                "Legal: anchor old, reference, teacher"
            )
        if self.level in LEVELS[1:] and (self.region.per_token or self.region.needs_logits):
            raise ValueError(f"level {self.level!r} needs a region with one bound for all tokens, got {region}")
        if self.level in MASK_LEVELS and self.region.needs_logits:
            raise ValueError(f"level {self.level!r} needs a region at the sampled token, got {region}")
        if self.level in MASK_LEVELS[:2] and not self.region.has_constraint:
            raise ValueError(
                f"level {self.level!r} needs a region with a radius, got {region}. Legal: kl2, kl3, binary_tv, "
                "binary_kl, any divergence"
            )
        if self.act == "soft" and (not self.region.is_ball or self.level != "token"):
            raise ValueError(
                f"act 'soft' needs a divergence at level 'token', got {region} at level {self.level!r}. "
                "Legal: any name of `mirrorpo list divergences` but k1 to k3"
            )
        moved = self.act in ("mask", "truncate") and self.anchor != "old" and not self.region.needs_logits
        if self.of == "old" and not moved:
            raise ValueError(
                f"of 'old' is for masks and act 'truncate' with bounds around another anchor than 'old', got {region} "
                f"with act {self.act!r} around {self.anchor!r}"
            )
        if self.act == "truncate" and self.region.name == "none":
            raise ValueError("act 'truncate' needs a region with bounds, got region 'none', which leaves the ratio out")
        if self.act == "truncate" and (self.of != "old" or self.side != "both"):
            raise ValueError(
                "act 'truncate' weighs by the ratio of the old policy to its anchor: of must be 'old' and side "
                f"'both', got of {self.of!r} and side {self.side!r}"
            )

    @property
    def anchors(self) -> frozenset[str]:
        """The anchors whose log-probabilities or logits it needs."""
        return frozenset({self.anchor} | ({"old"} if self.of == "old" else set()))

    @property
    def couples_tokens(self) -> bool:
        """Whether what it does to a token depends on others."""
        return self.level != "token"

    @property
    def label(self) -> str:
        """Its name in the metrics."""
        return f"{self.region.name}_{self.anchor}" + ("" if self.level == "token" else f"_{self.level}")

    def describe(self, behaviour: str) -> str:
        """A few words; what is the default is not said."""
        own = vars(self.region)
        keys = ("low", "high") if "low" in own and self.act != "soft" else ("epsilon_low", "epsilon_high", "radius")
        bounds = ", ".join(f"{key} {own[key]:.5g}" for key in keys if own.get(key) is not None)
        text = f"region {self.region.name} ({bounds})"
        said = {
            f"{self.act}": self.act != "clip",
            f"level {self.level}": self.level != "token" and self.act != "clip",
            f"around {self.anchor}": self.anchor != behaviour,
            f"of {self.of}": self.of != "policy",
            f"where A is {self.side}": self.side != "both",
        }
        return " ".join([text, *(words for words, needed in said.items() if needed)])


def rule_from(spec: Any, behaviour: str, level: str = "token", parts: PartsFrom = CODE, **own: Any) -> Rule:
    """A rule from a region's name, a ``TrustRegion``, or a mapping as recipes have it.

    Args:
        spec: ``{"name": ..., option: ..., "anchor": ..., "act": ..., "level": ..., "side": ..., "of": ...}``.
        behaviour: the anchor where none is given.
        level: of a ``clip`` where none is given.
        parts: what a region is made by.
        **own: options of the region that were given beside it.

    Raises:
        ValueError: as in ``trust_region`` and ``Rule``; no ``name``; an option that is given twice.

    Example:
        >>> rule_from({"name": "kl3", "radius": 0.03, "act": "mask"}, "sampler").anchor
        'sampler'
    """
    name, options = named("region", spec)
    twice = sorted(set(options) & set(own))
    if twice:
        key = twice[0]
        raise ValueError(f"{key} is given twice: {options[key]!r} in region and {own[key]!r} beside it")
    placed = {key: options.pop(key) for key in RULE_KEYS if key in options}
    region = parts.region(name, **options, **own)
    act = placed.get("act", "clip")
    default = {"anchor": behaviour, "level": level if act == "clip" else "token"}
    if act == "truncate":
        default |= {"anchor": "sampler", "of": "old"}
    return Rule(region=region, **{**default, **placed})


def check_rules(rules: tuple[Rule, ...], behaviour: str) -> None:
    """Raises ``ValueError`` for more than one region that bounds the gradient, or a ratio that would count twice."""
    bounds = [rule for rule in rules if rule.act in ("clip", "soft")]
    if len(bounds) > 1:
        names = " and ".join(f"{rule.region.name!r} ({rule.act})" for rule in bounds)
        raise ValueError(f"regions may have one entry with act 'clip' or 'soft', got {names}. Others: act 'mask'")
    weights = [rule for rule in rules if rule.act == "truncate"]
    if len(weights) > 1:
        names = " and ".join(repr(rule.region.name) for rule in weights)
        raise ValueError(f"regions may have one entry with act 'truncate', got {names}. Others: act 'mask'")
    if weights and behaviour != "old":
        raise ValueError(
            f"act 'truncate' needs behaviour 'old', got {behaviour!r}, whose ratio has the factor old / {behaviour} "
            "already"
        )


__all__ = ["ACTS", "LEVELS", "MASK_LEVELS", "RULE_KEYS", "SIDES", "Rule", "check_rules", "rule_from"]
