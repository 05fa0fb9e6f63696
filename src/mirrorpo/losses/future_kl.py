r"""Future-KL weighting of the advantages (FIPO, arXiv 2603.19835).

:math:`F_t = \sum_{k \ge t} \gamma^{k-t} m_k \log w_k` with :math:`\gamma = 2^{-1/\text{half life}}` says whether the
update so far makes the rest of the completion more likely; the advantage of token t is multiplied by
:math:`\mathrm{clip}(e^{F_t}, 1, 1 + \epsilon)`, detached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirrorpo.errors import check_number

# Tokens summed in closed form at once; gamma^-CHUNK must stay far from the end of float64 for every half life >= 1.
_CHUNK = 256


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


def discounted_future_sum(x: Tensor, gamma: float) -> Tensor:
    r""":math:`F_t = x_t + \gamma F_{t+1}` along the last axis, in chunks of closed form instead of T steps.

    Args:
        x: (B, T).
        gamma: in (0, 1].

    Returns:
        (B, T), float64.

    Example:
        >>> import torch
        >>> discounted_future_sum(torch.tensor([[1.0, 1.0, 1.0]]), 0.5)
        tensor([[1.7500, 1.5000, 1.0000]], dtype=torch.float64)
    """
    x = x.double()
    result = torch.empty_like(x)
    carry = x.new_zeros(x.shape[0], 1)
    for start in reversed(range(0, x.shape[1], _CHUNK)):
        part = x[:, start : start + _CHUNK]
        width = part.shape[1]
        place = torch.arange(width, dtype=x.dtype, device=x.device)
        power = gamma**place
        # sum_{k >= t} gamma^k x_k, then divided by gamma^t
        tail = (part * power).flip(-1).cumsum(-1).flip(-1) / power
        result[:, start : start + width] = tail + carry * gamma ** (width - place)
        carry = result[:, start : start + 1]
    return result


@torch.no_grad()
def future_kl_weight(settings: FutureKL, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """The factor on every token's advantage.

    Args:
        settings: half life, clip range, safety thresholds.
        log_ratio: (B, T), log w.
        advantage: (B, T) or (B, 1).
        mask: (B, T), bool.

    Returns:
        (B, T), detached, in the dtype of ``log_ratio``; between 1 - clip and 1 + clip.

    Reference: FIPO, arXiv 2603.19835.
    """
    ratio = log_ratio.exp()
    enters = mask & (ratio <= settings.max_ratio)
    future = discounted_future_sum(torch.where(enters, log_ratio, 0.0), 2.0 ** (-1.0 / settings.half_life))
    low = 1.0 - settings.clip if settings.lower_bound else 1.0
    weight = future.clamp(max=1.0).exp().clamp(low, 1.0 + settings.clip)
    unsafe = (advantage < 0) & (ratio > settings.safety_ratio)
    held = future.clamp(max=1.0).exp().clamp(1.0 - settings.clip, 1.0)
    return torch.where(unsafe, held, weight).to(log_ratio.dtype)
