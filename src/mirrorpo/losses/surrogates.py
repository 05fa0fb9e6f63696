r"""What is maximised inside a trust region? Policy surrogates, one per-token loss each.

=============  ===================================================  ====================================================
surrogate      per-token loss                                       who uses it
=============  ===================================================  ====================================================
``clip``       -min(w A, clip(w, low, high) A)                      PPO, GRPO, DAPO, GSPO, ATR-GRPO
``truncated``  -sg(min(w, cap)) A log p, outside the region 0       CISPO (no region), DPPO (binary regions, cap 20)
``sigmoid``    -(4 / tau) sigmoid(tau (w - 1)) A                    SAPO (arXiv 2511.20347)
``geometric``  -exp(mean_t clipped log w_t) A, per sequence         GMPO (arXiv 2507.20673)
=============  ===================================================  ====================================================

``clip`` has the gradient of a hard mask: -w A grad log p inside the region and where the advantage pushes back towards
it, 0 elsewhere. ``truncated`` has that gradient too (for w below the cap) with a loss value that is not a ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# w = exp(log_ratio) is held at exp(20) = 4.9e8: further out the value is constant and the gradient of a token with A <
# 0 stays -w A at that w. No sensible region is that wide; it keeps (inf - inf) out of float32.
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
    """

    log_ratio: Tensor
    logp: Tensor
    advantage: Tensor
    mask: Tensor
    low: Tensor
    high: Tensor
    outside: Tensor | None = None

    def ratio(self) -> Tensor:
        """w, held at exp(MAX_LOG_RATIO) with the slope that it has there."""
        return held_exp(self.log_ratio)

    def beyond(self) -> Tensor:
        """Whether a token is outside the region, on either side."""
        if self.outside is not None:
            return self.outside
        ratio = self.log_ratio.detach().exp()
        return (ratio < self.low) | (ratio > self.high)

    def blocked(self) -> tuple[Tensor, Tensor]:
        """Whether the policy gradient is stopped: below the region with A < 0, above it with A > 0."""
        log_ratio = self.log_ratio.detach()
        if self.outside is None:
            ratio = log_ratio.exp()
            return (ratio < self.low) & (self.advantage < 0), (ratio > self.high) & (self.advantage > 0)
        below, above = log_ratio < 0, log_ratio > 0
        return self.outside & below & (self.advantage < 0), self.outside & above & (self.advantage > 0)


@dataclass(frozen=True, kw_only=True)
class SurrogateOptions:
    """Options of the surrogates.

    Attributes:
        dual_clip: with ``clip``: where A < 0 the gain is at least this times A: w is held (arXiv 1912.09729).
        ratio_cap: with ``truncated``: the largest weight.
        temperature_positive: with ``sigmoid``: tau where A > 0.
        temperature_negative: with ``sigmoid``: tau where A <= 0.
    """

    dual_clip: float | None = None
    ratio_cap: float | None = None
    temperature_positive: float = field(default=1.0)
    temperature_negative: float = field(default=1.05)


def clip(tokens: Tokens, options: SurrogateOptions) -> Tensor:
    """-min(w A, clip(w, low, high) A); the gradient is that of a hard mask on the region."""
    ratio = tokens.ratio()
    if tokens.outside is not None:
        low, high = tokens.blocked()
        ratio = torch.where(low | high, ratio.detach(), ratio)
        held = ratio
    else:
        held = torch.minimum(torch.maximum(ratio, tokens.low), tokens.high)
    gain = torch.minimum(ratio * tokens.advantage, held * tokens.advantage)
    if options.dual_clip is not None:
        floor = options.dual_clip * tokens.advantage
        gain = torch.where(tokens.advantage < 0, torch.maximum(gain, floor), gain)
    return -gain


def truncated(tokens: Tokens, options: SurrogateOptions) -> Tensor:
    """-sg(min(w, cap)) A log p where the region does not block the token."""
    weight = tokens.ratio().detach()
    if options.ratio_cap is not None:
        weight = weight.clamp(max=options.ratio_cap)
    low, high = tokens.blocked()
    return -torch.where(low | high, 0.0, weight * tokens.advantage) * tokens.logp


def sigmoid(tokens: Tokens, options: SurrogateOptions) -> Tensor:
    """-(4 / tau) sigmoid(tau (w - 1)) A: a soft gate whose slope at w = 1 is that of w A."""
    positive = tokens.advantage > 0
    # full_like, so that tau has the advantage's dtype: a where() of two numbers is float32
    tau = torch.full_like(tokens.advantage, options.temperature_negative)
    tau = tau.masked_fill(positive, options.temperature_positive)
    return -torch.sigmoid(tau * (tokens.ratio() - 1.0)) * (4.0 / tau) * tokens.advantage


def geometric(tokens: Tokens, options: SurrogateOptions) -> Tensor:
    """-exp(mean_t min/max-clipped log w_t) A per sequence, (B, 1)."""
    if tokens.outside is not None:
        raise ValueError("surrogate 'geometric' clips the log-ratio and needs a region with bounds, not a mask")
    # clip(log w, log low, log high) on the side that the advantage pushes to only, as min() does for ratios
    held = torch.where(
        tokens.advantage > 0,
        torch.minimum(tokens.log_ratio, tokens.high.log()),
        torch.maximum(tokens.log_ratio, tokens.low.clamp(min=0.0).log()),
    )
    lengths = tokens.mask.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(tokens.mask, held, 0.0).sum(-1, keepdim=True) / lengths
    return -held_exp(mean) * tokens.advantage


SURROGATES: dict[str, Callable[[Tokens, SurrogateOptions], Tensor]] = {
    "clip": clip,
    "truncated": truncated,
    "sigmoid": sigmoid,
    "geometric": geometric,
}
