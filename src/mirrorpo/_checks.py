"""Argument checks: one line that names the argument, the value received and the legal range.

Shapes in signatures, without a dependency of the core.

``Float[Tensor, "B T"]`` reads as "a floating tensor of B sequences and T tokens". At run time it is just ``Tensor``;
with ``MIRRORPO_CHECK_SHAPES=1`` (set by the tests) jaxtyping provides the names and beartype checks every call.
Legend: ``B`` sequences, ``T`` tokens, ``V`` vocabulary, ``...`` any leading shape.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING or os.environ.get("MIRRORPO_CHECK_SHAPES") == "1":
    from jaxtyping import Bool, Float, Num, Shaped
else:

    class _Plain:
        def __class_getitem__(cls, _: object) -> type[Tensor]:
            return Tensor

    Bool = Float = Num = Shaped = _Plain


# Log-probabilities that come out of a low-precision log-softmax may exceed 0 by rounding. Up to this much is accepted
# and used as it is; it has no effect on the gradient.
LOGP_TOLERANCE = 1e-3


def check_logps(names: tuple[str, ...], *logps: Tensor) -> float:
    """The smallest of all log-probabilities; raises ``ValueError`` unless all are floating tensors of one shape <= 0.

    The values are looked at on the CPU only: elsewhere the look would make the host wait for the device. There a NaN
    reaches the loss, and whoever consumes the loss must check it (the trainer does).

    Args:
        names: of the arguments, for the message.
        *logps: the tensors.

    Returns:
        The smallest value; 0 for empty tensors, -inf where the values are not looked at.
    """
    first = logps[0]
    for name, logp in zip(names, logps, strict=True):
        if not logp.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating tensor of log-probabilities, got dtype {logp.dtype}")
        if logp.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(logp.shape)} but {names[0]} has shape {tuple(first.shape)}: they must agree"
            )
    if first.device.type != "cpu":
        return -math.inf
    if first.numel() == 0:
        return 0.0
    smallest = 0.0
    for name, logp in zip(names, logps, strict=True):
        low, high = torch.aminmax(logp)  # both are NaN if any entry is, and NaN <= x is false
        if not high.item() <= LOGP_TOLERANCE:
            raise ValueError(f"{name} must hold log-probabilities (legal: -inf to 0, no NaN), got {high.item()}")
        smallest = min(smallest, low.item())
    return smallest


def call_with_options(kind: str, name: str, build: Callable[..., Any], options: dict[str, Any], legal: set[str]) -> Any:
    """``build(**options)``; an option outside ``legal`` raises ``ValueError`` that names the legal ones."""
    extra = sorted(set(options) - legal)
    if extra:
        takes = ", ".join(sorted(legal)) if legal else "no options"
        raise ValueError(f"{kind} {name!r} does not take {extra[0]!r}. Legal: {takes}")
    return build(**options)


__all__ = ["Bool", "Float", "Num", "Shaped", "Tensor"]
