r"""Future-KL weighting of the advantages (FIPO, arXiv 2603.19835).

:math:`F_t = \sum_{k \ge t} \gamma^{k-t} m_k \log w_k` with :math:`\gamma = 2^{-1/\text{half life}}` says whether the
update so far makes the rest of the completion more likely; the advantage of token t is multiplied by
:math:`\mathrm{clip}(e^{F_t}, 1, 1 + \epsilon)`, detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirrorpo.losses.parts import FutureKL

# Tokens summed in closed form at once; gamma^-CHUNK must stay far from the end of float64 for every half life >= 1.
_CHUNK = 256


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
