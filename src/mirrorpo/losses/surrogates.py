r"""Policy surrogates: what is maximised inside a trust region, one per-token loss each.

=============  ===================================================  ====================================================
surrogate      per-token loss                                       who uses it
=============  ===================================================  ====================================================
``clip``       -min(w A, clip(w, low, high) A)                      PPO, GRPO, DAPO, GSPO, ATR-GRPO
``truncated``  -sg(min(w, cap)) A log p, outside the region 0       CISPO (no region), DPPO (binary regions, cap 20)
``sigmoid``    -(4 / tau) sigmoid(tau (w - 1)) A                    SAPO (arXiv 2511.20347)
``geometric``  -exp(mean_t clipped log w_t) A, per sequence         GMPO (arXiv 2507.20673)
``regression`` (A - tau S)^2 / (2 tau n), per sequence of n tokens  Kimi's policy mirror descent, A*-PO
``none``       0                                                    distillation by penalties alone
=============  ===================================================  ====================================================

``regression`` has S = sum_t log p_t/a_t, with a the anchor: ``old`` or ``reference``. It is least where log p/a is A /
tau for every completion, as at the optimum of the reward with a KL of coefficient tau; at S = 0 its gradient is that of
the policy gradient (arXiv 2501.12599, Eq. 3; arXiv 2505.20686).

``clip`` has the gradient of a hard mask: -w A grad log p inside the region and where the advantage pushes back towards
it, 0 elsewhere. ``truncated`` has that gradient too (for w below the cap) with a loss value that is not a ratio.

A surrogate of your own is a function of ``Tokens`` and its options, handed to ``mirrorpo.objective`` as it is, as
``"module:attribute"``, or as a ``Surrogate`` that says what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mirrorpo.errors import unknown_name
from mirrorpo.losses.facts import SURROGATE_FACTS, Option, SurrogateFacts
from mirrorpo.user_code import import_attribute

# w = exp(log_ratio) is clamped at exp(20) = 4.9e8: further out the value is constant and the gradient of a token with
# A < 0 stays -w A at that w. No sensible region is that wide; it keeps (inf - inf) out of float32.
MAX_LOG_RATIO = 20.0


def held_exp(log_ratio: Tensor) -> Tensor:
    """exp, held at exp(MAX_LOG_RATIO) with the slope that it has there."""
    held = log_ratio.detach().clamp(max=MAX_LOG_RATIO)
    return held.exp() * (1.0 + log_ratio - log_ratio.detach())


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a surrogate sees of a batch; shapes (B, T), or (B, 1) for ratios and bounds at sequence level.

    Attributes:
        log_ratio: log w, differentiable.
        logp: log p_y, differentiable.
        advantage: A.
        mask: bool, tokens that count.
        low: smallest ratio inside the region.
        high: largest ratio inside the region.
        outside: for a region that is a mask over the vocabulary: whether it is left (then low and high are not used).
        dropped: bool, (B, T) or (B, 1): tokens whose term is dropped afterwards, by a mask or for want of their b;
            None: no token.
        drift: log p/a of the region's anchor a where that is not b; None: it is b, and this is ``log_ratio``.
        anchored: log p/a of the surrogate's own anchor a, differentiable; None: it is b, and this is ``log_ratio``.
    """

    log_ratio: Tensor
    logp: Tensor
    advantage: Tensor
    mask: Tensor
    low: Tensor
    high: Tensor
    outside: Tensor | None = None
    dropped: Tensor | None = None
    drift: Tensor | None = None
    anchored: Tensor | None = None

    def ratio(self) -> Tensor:
        """w, clamped at exp(MAX_LOG_RATIO) with the slope that it has there."""
        return held_exp(self.log_ratio)

    def beyond(self) -> Tensor:
        """Whether a token is outside the region, on either side."""
        if self.outside is not None:
            return self.outside
        ratio = self.log_ratio.detach().exp()
        return (ratio < self.low) | (ratio > self.high)

    def blocked(self) -> tuple[Tensor, Tensor]:
        """Whether the policy gradient is stopped: below the region with A < 0, above it with A > 0."""
        log_ratio = (self.log_ratio if self.outside is None or self.drift is None else self.drift).detach()
        if self.outside is None:
            ratio = log_ratio.exp()
            return (ratio < self.low) & (self.advantage < 0), (ratio > self.high) & (self.advantage > 0)
        below, above = log_ratio < 0, log_ratio > 0
        return self.outside & below & (self.advantage < 0), self.outside & above & (self.advantage > 0)


def clip(tokens: Tokens, *, dual_clip: float | None = None) -> Tensor:
    """-min(w A, clip(w, low, high) A); the gradient is that of a hard mask on the region."""
    ratio = tokens.ratio()
    if tokens.outside is not None:
        low, high = tokens.blocked()
        ratio = torch.where(low | high, ratio.detach(), ratio)
        held = ratio
    else:
        held = torch.minimum(torch.maximum(ratio, tokens.low), tokens.high)
    gain = torch.minimum(ratio * tokens.advantage, held * tokens.advantage)
    if dual_clip is not None:
        floor = dual_clip * tokens.advantage
        gain = torch.where(tokens.advantage < 0, torch.maximum(gain, floor), gain)
    return -gain


def truncated(tokens: Tokens, *, ratio_cap: float | None = None) -> Tensor:
    """-sg(min(w, cap)) A log p where the region does not block the token."""
    weight = tokens.ratio().detach()
    if ratio_cap is not None:
        weight = weight.clamp(max=ratio_cap)
    low, high = tokens.blocked()
    return -torch.where(low | high, 0.0, weight * tokens.advantage) * tokens.logp


def sigmoid(tokens: Tokens, *, temperature_positive: float = 1.0, temperature_negative: float = 1.05) -> Tensor:
    """-(4 / tau) sigmoid(tau (w - 1)) A: a soft gate whose slope at w = 1 is that of w A."""
    positive = tokens.advantage > 0
    # full_like, so that tau has the advantage's dtype: a where() of two numbers is float32
    tau = torch.full_like(tokens.advantage, temperature_negative)
    tau = tau.masked_fill(positive, temperature_positive)
    return -torch.sigmoid(tau * (tokens.ratio() - 1.0)) * (4.0 / tau) * tokens.advantage


def geometric(tokens: Tokens) -> Tensor:
    """-exp(mean_t min/max-clipped log w_t) A per sequence, (B, 1)."""
    # clip(log w, log low, log high) on the side that the advantage pushes to only, as min() does for ratios
    held = torch.where(
        tokens.advantage > 0,
        torch.minimum(tokens.log_ratio, tokens.high.log()),
        torch.maximum(tokens.log_ratio, tokens.low.clamp(min=0.0).log()),
    )
    if tokens.dropped is not None:
        held = held.masked_fill(tokens.dropped, 0.0)  # a ratio of 1: no part in the product
    lengths = tokens.mask.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(tokens.mask, held, 0.0).sum(-1, keepdim=True) / lengths
    return -held_exp(mean) * tokens.advantage


def regression(tokens: Tokens, *, tau: float = 0.01) -> Tensor:
    """(A - tau S)^2 / (2 tau n) per sequence, (B, 1); A is the mean over its tokens."""
    log_ratio = tokens.log_ratio if tokens.anchored is None else tokens.anchored
    counted = tokens.mask if tokens.dropped is None else tokens.mask & ~tokens.dropped
    # as the loss, not as whole numbers: tau times these would be float32
    lengths = tokens.mask.sum(-1, keepdim=True).clamp(min=1).to(log_ratio.dtype)
    total = torch.where(counted, log_ratio, 0.0).sum(-1, keepdim=True)
    advantage = torch.where(tokens.mask, tokens.advantage, 0.0).sum(-1, keepdim=True) / lengths
    return (advantage - tau * total).square() / (2.0 * tau * lengths)


def none(tokens: Tokens) -> Tensor:
    """0: no policy term, for distillation by penalties alone."""
    return tokens.logp.masked_fill(torch.ones_like(tokens.mask), 0.0)  # attached to the graph


@dataclass(frozen=True, kw_only=True)
class Surrogate(SurrogateFacts):
    """A surrogate with its function; the other attributes are those of ``SurrogateFacts``.

    Attributes:
        fn: ``(tokens, **options) -> loss``, (B, T) or one number for each sequence, (B, 1); differentiable.
    """

    fn: Callable[..., Tensor]

    def loss(self, tokens: Tokens, options: Mapping[str, float | None]) -> Tensor:
        """What ``fn`` returns.

        Raises:
            ValueError: it is no tensor (B, T) or (B, 1).
        """
        found: Any = self.fn(tokens, **options)
        if not isinstance(found, Tensor) or found.shape not in (tokens.logp.shape, (len(tokens.logp), 1)):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"surrogate {self.name!r} must return a tensor (B, T) or (B, 1), got {got}")
        return found


_FUNCTIONS = {fn.__name__: fn for fn in (clip, truncated, sigmoid, geometric, regression, none)}
SURROGATES: dict[str, Surrogate] = {
    name: Surrogate(**vars(facts), fn=_FUNCTIONS[name]) for name, facts in SURROGATE_FACTS.items()
}


def surrogate_from(spec: Any) -> Surrogate:
    """A surrogate from a name, ``"module:attribute"``, a function of ``Tokens``, or a ``Surrogate``.

    A bare function takes no options and may couple the tokens of a sequence, as far as anybody knows; a ``Surrogate``
    says more.

    Raises:
        ValueError: an unknown name (the nearest valid one is named), an import that fails, something not callable.

    Example:
        >>> surrogate_from("clip").couples_tokens, surrogate_from(lambda tokens: -tokens.ratio()).couples_tokens
        (False, True)
    """
    if isinstance(spec, Surrogate):
        return spec
    found: Any = spec
    if isinstance(spec, str):
        if spec in SURROGATES:
            return SURROGATES[spec]
        if ":" not in spec:
            raise unknown_name("surrogate", spec, SURROGATES)
        found = import_attribute(spec, "surrogate")
        if isinstance(found, Surrogate):
            return found
    if not callable(found):
        raise ValueError(f"surrogate must be a name, a function of Tokens or 'module:attribute', got {spec!r}")
    name = spec if isinstance(spec, str) else getattr(found, "__name__", type(found).__name__)
    return Surrogate(name=name, fn=cast("Callable[..., Tensor]", found))  # what it returns is checked in the loss


__all__ = ["SURROGATES", "Option", "Surrogate", "Tokens", "held_exp", "surrogate_from"]
