r"""Trust regions: bounds on the likelihood ratio w = p_y / b_y, and masks where there is no interval.

A trust region says when a token stops contributing policy gradient: once the divergence from the rollout policy
exceeds a radius, in the direction that the advantage pushes. For a constraint on the sampled token that is an interval
for w, and the clipped surrogate min(w A, clip(w, low, high) A) has exactly the gradient of a hard mask on the
constraint (the equivalence theorem of the unified clipping paper).

==============================  ===============================================================================
region                          which classical method it is
==============================  ===============================================================================
``ratio``                       PPO and GRPO (arXiv 1707.06347, 2402.03300); DAPO with low != high (2503.14476)
``kl3``                         ATR-GRPO (arXiv 2602.05494)
``binary_tv``, ``binary_kl``    DPPO (arXiv 2602.04879)
``dcpo``                        DCPO (arXiv 2509.02333)
``log_ratio``                   GMPO (arXiv 2507.20673); as a mask, off-policy sequence masking (arXiv 2512.02556)
``exact``, ``top_k``            DPPO's full and top-K variants, for any divergence
``none``                        unclipped importance-weighted policy gradient
any divergence                  the unified clipping framework (arXiv 2602.05494)
==============================  ===============================================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from mirrorpo._checks import Bool, Float, Tensor
from mirrorpo.divergences import DIVERGENCES, Divergence, divergence
from mirrorpo.divergences.bregman import k
from mirrorpo.errors import unknown_name
from mirrorpo.losses.facts import DIVERGENCE_FACTS, RADIUS, REGION_FACTS, check_options, named, no_such_region
from mirrorpo.losses.solver import LOG_RATIO_LIMIT, solve_log_bounds

Constraint = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrustRegion(ABC):
    """A region around the rollout policy.

    Required of a subclass: ``ratio_bounds``, or ``mask_from`` with ``needs_logits`` set.

    Attributes:
        name: the name in the table.
        divergence: whose ball it is; None for a region that is not a ball.
        radius: of that ball.
    """

    name: str
    divergence: Divergence | None = field(default=None, kw_only=True)
    radius: float | None = field(default=None, kw_only=True)

    # Whether the bounds differ from token to token (then ``level: sequence`` has no meaning).
    per_token: ClassVar[bool] = False
    # Whether the region is a mask from both models' logits instead of an interval.
    needs_logits: ClassVar[bool] = False

    @abstractmethod
    def ratio_bounds(self, logp_old: Float[Tensor, ...]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        """The smallest and the largest ratio w inside the region.

        Args:
            logp_old: log-probabilities of the sampled tokens under the rollout policy, any shape.

        Returns:
            ``(low, high)`` that broadcast with ``logp_old``, in its dtype (bf16 and fp16: float32). ``low <= 0`` means
            no lower bound, ``high == inf`` no upper bound.

        Raises:
            ValueError: the region is a mask (``exact``, ``top_k``) and has no interval.
        """

    @property
    def is_ball(self) -> bool:
        """Whether the region is what a divergence at the sampled token leaves within the radius."""
        return self.divergence is not None and not self.needs_logits

    @property
    def has_constraint(self) -> bool:
        """Whether the region is what one number at the sampled token leaves within the radius."""
        return self.is_ball

    def constrained(self, log_ratio: Float[Tensor, ...], logp_old: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """That number, D(w): 0 at w = 1, compared with the radius; any shape, in the dtype of ``log_ratio``."""
        assert self.divergence is not None
        return _in_double(self.divergence.constraint, log_ratio, logp_old)


def _in_double(constraint: Constraint, log_ratio: Tensor, logp_old: Tensor) -> Tensor:
    held = log_ratio.double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return constraint(held, logp_old.double().clamp(max=0.0, min=-LOG_RATIO_LIMIT)).to(log_ratio.dtype)


def _dtype_of(logp: Tensor) -> torch.dtype:
    return logp.dtype if logp.dtype in (torch.float32, torch.float64) else torch.float32


@dataclass(frozen=True)
class Interval(TrustRegion):
    """The same two bounds for every token."""

    low: float = field(kw_only=True)
    high: float = field(kw_only=True)

    def ratio_bounds(self, logp_old: Float[Tensor, ...]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        dtype = _dtype_of(logp_old)
        return (
            torch.full((), self.low, dtype=dtype, device=logp_old.device),
            torch.full((), self.high, dtype=dtype, device=logp_old.device),
        )


@dataclass(frozen=True)
class PerToken(TrustRegion):
    """Bounds that depend on the token's probability, solved for every token.

    Attributes:
        constraint: ``(log_ratio, logp_old) -> value``, float64; compared with the radius.
        radius: in the constraint's units.
    """

    constraint: Constraint = field(kw_only=True)
    radius: float = field(kw_only=True)

    per_token: ClassVar[bool] = True

    @property
    def has_constraint(self) -> bool:
        return True

    def constrained(self, log_ratio: Float[Tensor, ...], logp_old: Float[Tensor, ...]) -> Float[Tensor, ...]:
        return _in_double(self.constraint, log_ratio, logp_old)

    @torch.no_grad()
    def ratio_bounds(self, logp_old: Float[Tensor, ...]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        logb = logp_old.detach().double().clamp(max=0.0, min=-LOG_RATIO_LIMIT)
        lowest = torch.full_like(logb, -LOG_RATIO_LIMIT)
        low, high = solve_log_bounds(lambda s: self.constraint(s, logb), self.radius, lowest, -logb)  # w <= 1 / b_y
        dtype = _dtype_of(logp_old)
        return low.exp().to(dtype), high.exp().to(dtype)


@dataclass(frozen=True)
class BinaryTV(TrustRegion):
    """|p_y - b_y| <= radius (DPPO): 1 -/+ radius / b_y in closed form."""

    radius: float = field(kw_only=True)

    per_token: ClassVar[bool] = True

    @property
    def has_constraint(self) -> bool:
        return True

    def constrained(self, log_ratio: Float[Tensor, ...], logp_old: Float[Tensor, ...]) -> Float[Tensor, ...]:
        return _in_double(lambda s, logb: (logb.exp() * torch.expm1(s)).abs(), log_ratio, logp_old)

    def ratio_bounds(self, logp_old: Float[Tensor, ...]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        dtype = _dtype_of(logp_old)
        reach = self.radius * logp_old.detach().double().neg().exp()
        return (1.0 - reach).to(dtype), (1.0 + reach).to(dtype)


@dataclass(frozen=True)
class DCPO(TrustRegion):
    """-epsilon_low <= b_y w (w - 1) <= epsilon_high (DCPO): wider for rare tokens, in closed form."""

    epsilon_low: float = field(kw_only=True)
    epsilon_high: float = field(kw_only=True)

    per_token: ClassVar[bool] = True

    def ratio_bounds(self, logp_old: Float[Tensor, ...]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        dtype = _dtype_of(logp_old)
        inverse = logp_old.detach().double().clamp(max=0.0, min=-LOG_RATIO_LIMIT).neg().exp()
        low = 0.5 + 0.5 * (1.0 - 4.0 * self.epsilon_low * inverse).clamp(min=0.0).sqrt()
        high = 0.5 + 0.5 * (1.0 + 4.0 * self.epsilon_high * inverse).sqrt()
        return low.to(dtype), high.to(dtype)


@dataclass(frozen=True)
class OverVocabulary(TrustRegion):
    """D(p, b) <= radius over the vocabulary: a mask, not an interval.

    Attributes:
        divergence: D.
        radius: in nats (or D's own units).
        k: None for the whole vocabulary, else the K of ``Divergence.top_k``.
    """

    divergence: Divergence = field(kw_only=True)
    radius: float = field(kw_only=True)
    k: int | None = field(default=None, kw_only=True)

    needs_logits: ClassVar[bool] = True

    def ratio_bounds(self, logp_old: Float[Tensor, ...]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        raise ValueError(f"region {self.name!r} is a mask over the vocabulary and has no ratio bounds; use outside()")

    @torch.no_grad()
    def outside(
        self, logits: Float[Tensor, "... V"], logits_old: Float[Tensor, "... V"], tokens: Tensor
    ) -> Bool[Tensor, ...]:
        """Whether D(p, b) exceeds the radius at each position; shapes as in ``Divergence.top_k``."""
        if self.k is None:
            return self.divergence.exact(logits, logits_old) > self.radius
        return self.divergence.top_k(logits, logits_old, tokens, self.k) > self.radius


def binary_kl(log_ratio: Tensor, logb: Tensor) -> Tensor:
    """KL(Bernoulli(b_y) || Bernoulli(p_y)) as a sum of two non-negative terms, so without cancellation."""
    b = logb.exp()
    rest = -torch.expm1(logb)  # 1 - b
    moved = b * torch.expm1(log_ratio)  # p - b
    share = (moved / rest.clamp(min=1e-300)).clamp(max=1.0, min=-1e300)
    # log((1 - p) / (1 - b)): the difference of logs near p = 1, where 1 - share has no digits left. At p = 1 it is -inf
    # and the divergence inf, as it should be: every radius is reached before.
    near_one = torch.log(-torch.expm1((logb + log_ratio).clamp(max=0.0))) - rest.clamp(min=1e-300).log()
    log_rest_ratio = torch.where(share > 0.5, near_one, torch.log1p(-share.clamp(max=0.5)))
    # rest * k(log_rest_ratio), with rest * exp(log_rest_ratio) = 1 - p written out where that is exact: right at
    # b = 1 too, where rest is 0 and 1 - p is not.
    far = log_rest_ratio.abs() > 1.0
    rest_term = torch.where(far, -moved - rest * log_rest_ratio, rest * k(log_rest_ratio))
    return b * k(log_ratio) + rest_term


def _interval_from(name: str, d: Divergence, radius: float) -> Interval:
    end = torch.tensor(LOG_RATIO_LIMIT / max(1.0, d.growth), dtype=torch.float64)
    low, high = solve_log_bounds(lambda s: d.constraint(s, torch.zeros_like(s)), radius, -end, end)
    return Interval(name, low=low.exp().item(), high=high.exp().item(), divergence=d, radius=radius)


def _ratio(epsilon_low: float = 0.2, epsilon_high: float | None = None) -> TrustRegion:
    return Interval("ratio", low=1.0 - epsilon_low, high=1.0 + (epsilon_low if epsilon_high is None else epsilon_high))


def _log_ratio(epsilon_low: float | None = None, epsilon_high: float | None = None) -> TrustRegion:
    low, high = (math.inf if value is None else value for value in (epsilon_low, epsilon_high))
    return Interval("log_ratio", low=math.exp(-low), high=math.exp(high))


def _dcpo(epsilon_low: float = 0.16, epsilon_high: float = 0.2) -> TrustRegion:
    return DCPO("dcpo", epsilon_low=epsilon_low, epsilon_high=epsilon_high)


def _none() -> TrustRegion:
    return Interval("none", low=0.0, high=float("inf"))


def _of_divergence(region: str, d: Divergence, radius: object) -> TrustRegion:
    """The region of one divergence's constraint at the sampled token."""
    if region in _REFUSED:
        raise no_such_region(region)
    size = RADIUS.checked("radius", radius)
    if d.depends_on_token:
        return PerToken(region, constraint=d.constraint, radius=size, divergence=d)
    return _interval_from(region, d, size)


def _alias(region: str, name: str, radius: object) -> TrustRegion:
    return _of_divergence(region, divergence(name), radius)


def _binary_tv(radius: float) -> TrustRegion:
    return BinaryTV("binary_tv", radius=radius)


def _binary_kl(radius: float) -> TrustRegion:
    return PerToken("binary_kl", constraint=binary_kl, radius=radius)


def _over_vocabulary(region: str, radius: float, divergence: Any = "reverse_kl", k: int = 64) -> TrustRegion:
    d = resolve_divergence(divergence)
    return OverVocabulary(region, divergence=d, radius=radius, k=k if region == "top_k" else None)


def resolve_divergence(spec: Any) -> Divergence:
    """A divergence from a name, a callable, a ``Divergence``, or ``{"name": ..., option: ...}`` as recipes have it."""
    name, options = named("divergence", spec)
    return divergence(name, **options)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table."""

    build: Callable[..., TrustRegion]
    constraint: str
    source: str


UNIFIED, DPPO = "Unified clipping, arXiv 2602.05494", "DPPO, arXiv 2602.04879"
REGIONS: dict[str, Entry] = {
    "ratio": Entry(
        build=_ratio,
        constraint="1 - epsilon_low <= w <= 1 + epsilon_high",
        source="PPO, arXiv 1707.06347; GRPO 2402.03300; DAPO 2503.14476",
    ),
    "kl3": Entry(
        build=partial(_alias, "kl3", "forward_kl"), constraint="w - 1 - log w <= radius", source="ATR-GRPO, " + UNIFIED
    ),
    "kl2": Entry(build=partial(_alias, "kl2", "k2"), constraint="(log w)^2 / 2 <= radius", source=UNIFIED),
    "binary_tv": Entry(build=_binary_tv, constraint="|p_y - b_y| <= radius", source=DPPO),
    "binary_kl": Entry(build=_binary_kl, constraint="KL(Bernoulli(b_y) || Bernoulli(p_y)) <= radius", source=DPPO),
    "log_ratio": Entry(
        build=_log_ratio,
        constraint="-epsilon_low <= log w <= epsilon_high; one may be left out",
        source="GMPO, arXiv 2507.20673; DeepSeek-V3.2, arXiv 2512.02556",
    ),
    "dcpo": Entry(
        build=_dcpo,
        constraint="-epsilon_low <= b_y w (w - 1) <= epsilon_high",
        source="DCPO, arXiv 2509.02333",
    ),
    "exact": Entry(
        build=partial(_over_vocabulary, "exact"),
        constraint="D(p, b) <= radius over the vocabulary",
        source=DPPO,
    ),
    "top_k": Entry(
        build=partial(_over_vocabulary, "top_k"),
        constraint="D(p, b) <= radius over the K likeliest tokens and y",
        source=DPPO,
    ),
    "none": Entry(build=_none, constraint="no bound", source="REINFORCE with importance weights"),
}
# Every divergence of the table is a region too, under its own name, but for these.
_REFUSED = {name for name, facts in DIVERGENCE_FACTS.items() if facts.no_region}
DIVERGENCE_REGIONS = tuple(name for name in DIVERGENCES if name not in _REFUSED)


def trust_region(name: str | Divergence | Callable[..., Any], /, **options: Any) -> TrustRegion:
    """The trust region of that name.

    Args:
        name: a name of the table (``mirrorpo list regions``), the name of any divergence, your own function or
            ``"module:attribute"`` as in ``mirrorpo.divergence``.
        **options: ``radius`` (divergences and the ``binary`` ones), ``epsilon_low`` and ``epsilon_high`` (``ratio``,
            ``log_ratio``, ``dcpo``), ``divergence`` and ``k`` (``exact``, ``top_k``), and the divergence's own
            (``alpha``, ``beta``, ``family``).

    Returns:
        A ``TrustRegion``; ``ratio_bounds(logp_old)`` gives ``(low, high)``.

    Raises:
        ValueError: an unknown name (the nearest valid one is named) or option; a radius that is not positive.

    Reference: the unified clipping framework, arXiv 2602.05494; see the module for the others.

    Example:
        >>> import torch, mirrorpo
        >>> low, high = mirrorpo.trust_region("kl3", radius=0.03).ratio_bounds(torch.zeros(1))
        >>> round(low.item(), 5), round(high.item(), 5)
        (0.77463, 1.26534)
    """
    if isinstance(name, TrustRegion):
        check_options("region", name.name, options, set())
        return name
    if isinstance(name, str) and name in REGIONS:
        return REGIONS[name].build(**REGION_FACTS[name].checked(options))
    if isinstance(name, str) and name in _REFUSED:
        raise no_such_region(name)
    if isinstance(name, str) and ":" not in name and name not in DIVERGENCE_REGIONS:
        try:
            d = divergence(name, **{key: value for key, value in options.items() if key != "radius"})
        except ValueError:
            raise unknown_name("region", name, [*REGIONS, *DIVERGENCE_REGIONS]) from None
    else:
        d = divergence(name, **{key: value for key, value in options.items() if key != "radius"})
    if "radius" not in options:
        raise ValueError(f"region {d.name!r} needs a radius in (0, 1e+06]")
    return _of_divergence(d.name, d, options.get("radius"))


__all__ = [
    "DIVERGENCE_REGIONS",
    "REGIONS",
    "TrustRegion",
    "trust_region",
]
