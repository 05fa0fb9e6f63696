"""Shapes in signatures, without a dependency of the core.

``Float[Tensor, "B T"]`` reads as "a floating tensor of B sequences and T tokens". At run time it is just ``Tensor``;
with ``MIRRORPO_CHECK_SHAPES=1`` (set by the tests) jaxtyping provides the names and beartype checks every call.
Legend: ``B`` sequences, ``T`` tokens, ``V`` vocabulary, ``...`` any leading shape.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING or os.environ.get("MIRRORPO_CHECK_SHAPES") == "1":
    from jaxtyping import Bool, Float, Num, Shaped
else:

    class _Plain:
        def __class_getitem__(cls, _: object) -> type[Tensor]:
            return Tensor

    Bool = Float = Num = Shaped = _Plain

__all__ = ["Bool", "Float", "Num", "Shaped", "Tensor"]
