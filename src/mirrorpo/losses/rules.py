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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirrorpo.errors import unknown_name
from mirrorpo.losses.anchors import ANCHORS, AnchorLogps
from mirrorpo.losses.regions import TrustRegion, trust_region

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
        region: the set of ratios, or of distributions.
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
        ball = self.region.divergence is not None and not self.region.needs_logits
        if self.act == "soft" and (not ball or self.level != "token"):
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


def rule_from(spec: Any, behaviour: str, level: str = "token", **own: Any) -> Rule:
    """A rule from a region's name, a ``TrustRegion``, or a mapping as recipes have it.

    Args:
        spec: ``{"name": ..., option: ..., "anchor": ..., "act": ..., "level": ..., "side": ..., "of": ...}``.
        behaviour: the anchor where none is given.
        level: of a ``clip`` where none is given.
        **own: options of the region that were given beside it.

    Raises:
        ValueError: as in ``trust_region`` and ``Rule``; no ``name``; an option that is given twice.

    Example:
        >>> rule_from({"name": "kl3", "radius": 0.03, "act": "mask"}, "sampler").anchor
        'sampler'
    """
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        options = {str(key): value for key, value in spec.items()}
        if "name" not in options:
            raise ValueError(f"region as a mapping needs the key 'name', got {sorted(options)}")
        twice = sorted(set(options) & set(own))
        if twice:
            key = twice[0]
            raise ValueError(f"{key} is given twice: {options[key]!r} in region and {own[key]!r} beside it")
        spec = options.pop("name")
    placed = {key: options.pop(key) for key in RULE_KEYS if key in options}
    region = trust_region(spec, **options, **own)
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


def over_sequence(x: Tensor, keep: Tensor, level: str) -> Tensor:
    """Per-token numbers at a level: (B, T) for ``token``, else (B, 1): a mean, a sum or a maximum.

    Args:
        x: (B, T), 0 where ``keep`` is false; for ``max_divergence`` not negative.
        keep: (B, T), bool.
        level: of ``LEVELS`` or ``MASK_LEVELS``.
    """
    if level == "token":
        return x
    if level == "max_divergence":
        return x.amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)
    total = x.sum(-1, keepdim=True)
    if level in ("product", "sum_divergence"):
        return total
    return total / keep.sum(-1, keepdim=True).clamp(min=1)


def on_side(rule: Rule, advantage: Tensor, keep: Tensor) -> Tensor | None:
    """Whether the advantage is on the rule's side, (B, T) or (B, 1); None: it is on both."""
    if rule.side == "both":
        return None
    # A sequence is dropped as one: not the tokens of it whose own advantage has the sign.
    sign = over_sequence(torch.where(keep, advantage, 0.0), keep, "sequence" if rule.couples_tokens else "token")
    return sign > 0 if rule.side == "positive" else sign < 0


@torch.no_grad()
def dropped_by(
    rule: Rule, logp: Tensor, anchors: AnchorLogps, advantage: Tensor, keep: Tensor, outside: Tensor | None
) -> Tensor:
    """Which policy terms a mask drops, bool, (B, T) or (B, 1).

    Args:
        rule: with ``act: mask``.
        logp: (B, T), of the policy.
        anchors: of the batch.
        advantage: (B, T) or (B, 1).
        keep: (B, T), bool.
        outside: (B, T), for a region over the vocabulary: whether it is left.
    """
    absent = None
    if outside is None:
        what = f"region {rule.region.name!r} with act 'mask'"
        anchor = anchors.of(rule.anchor, what)
        subject = anchors.of("old", what) if rule.of == "old" else logp
        outside = _left(rule, subject - anchor, anchor, keep)
        absent = anchors.missing.get(rule.anchor)
    side = on_side(rule, advantage, keep)
    dropped = outside if side is None else outside & side
    # A token that the anchor could not score is outside, whatever the side.
    return dropped if absent is None or rule.level != "token" else dropped | absent


def _left(rule: Rule, log_ratio: Tensor, anchor: Tensor, keep: Tensor) -> Tensor:
    """Whether a region is left, (B, T) or (B, 1)."""
    if rule.level in MASK_LEVELS[:2]:
        assert rule.region.radius is not None
        values = rule.region.constrained(log_ratio, anchor)
        return over_sequence(torch.where(keep, values, 0.0), keep, rule.level) > rule.region.radius
    level = rule.level if rule.level in LEVELS else "token"
    ratio = over_sequence(log_ratio, keep, level).exp()
    low, high = rule.region.ratio_bounds(anchor)
    outside = (ratio < low) | (ratio > high)
    # The largest divergence is above the radius where a token's is: that holds for every region with bounds.
    return (outside & keep).any(-1, keepdim=True) if rule.level == "max_divergence" else outside


@torch.no_grad()
def truncated_weight(rule: Rule, anchors: AnchorLogps, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of act ``truncate`` on the policy term, and whether the ratio was clamped; (B, T) or (B, 1).

    Where the anchor could not score a token the factor is 0, or at the levels of sequences that of the others.
    """
    what = f"region {rule.region.name!r} with act 'truncate'"
    anchor = anchors.of(rule.anchor, what)
    ratio = over_sequence(anchors.of("old", what) - anchor, keep, rule.level).exp()
    low, high = rule.region.ratio_bounds(anchor)
    weight = torch.minimum(torch.maximum(ratio, low), high)
    absent = anchors.missing.get(rule.anchor)
    clamped = weight != ratio
    return (weight if absent is None or rule.level != "token" else weight.masked_fill(absent, 0.0)), clamped


def bounds_of(
    rule: Rule, anchors: AnchorLogps, behaviour: Tensor, advantage: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Bounds of a ``clip`` on w = p/b, and how far its anchor is from b.

    Around another anchor a the constraint is on p/a = w b/a, so the bounds are multiplied by a/b: with a = old and b =
    sampler that is decoupled PPO.

    Returns:
        ``(low, high, shift)``; shift is log a/b at the rule's level, or None where a is b.
    """
    what = f"region {rule.region.name!r}"
    anchor = anchors.of(rule.anchor, what)
    if rule.region.needs_logits:
        low = high = torch.ones((), dtype=behaviour.dtype, device=behaviour.device)
    else:
        low, high = rule.region.ratio_bounds(anchor)
    shift = None
    if anchor is not behaviour:
        shift = over_sequence(anchor - behaviour, keep, rule.level)
        low, high = low * shift.exp(), high * shift.exp()
    side = on_side(rule, advantage, keep)
    if side is not None:
        low, high = torch.where(side, low, 0.0), torch.where(side, high, torch.inf)
    return low, high, shift


def soft_term(
    rule: Rule, logp: Tensor, anchors: AnchorLogps, behaviour: Tensor, advantage: Tensor, keep: Tensor
) -> Tensor:
    """What a ``soft`` region adds to each token's loss, (B, T), differentiable."""
    assert rule.region.divergence is not None
    assert rule.region.radius is not None
    anchor = anchors.of(rule.anchor, f"region {rule.region.name!r} with act 'soft'")
    strength = advantage.abs() / (2.0 * rule.region.radius)
    side = on_side(rule, advantage, keep)
    if side is not None:
        strength = torch.where(side, strength, 0.0)
    return strength * rule.region.divergence.weighted(logp, anchor.to(logp.dtype), behaviour.to(logp.dtype))


__all__ = ["ACTS", "LEVELS", "MASK_LEVELS", "RULE_KEYS", "SIDES", "Rule", "check_rules", "rule_from"]
