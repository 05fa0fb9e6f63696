r"""Coefficients over a run: fixed, scheduled, or steered to a target divergence.

The objective's coefficients are multiplied by a factor that starts at 1 (``schedule``: at its first value):

* ``linear`` and ``cosine``: from ``start`` to ``end`` over the run;
* ``adaptive``: after every optimiser step the factor is multiplied by
  :math:`1 + r \cdot \mathrm{clip}(D/D^* - 1, -0.2, 0.2)`, so that the measured divergence D settles at the target D*
  (the proportional controller of Ziegler et al., arXiv 1909.08593, section 2.2, with r = batch size / horizon).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mirrorpo.errors import check_number, unknown_name

KINDS = ("linear", "cosine", "adaptive")
_OPTIONS = {"linear": ("start", "end"), "cosine": ("start", "end"), "adaptive": ("target", "rate")}
# The controller's error is clipped to this, as in the paper: one wild batch moves the factor by at most 0.2 * rate.
_MAX_ERROR = 0.2
# The factor stays within these: a controller that runs away would otherwise end in 0 (no penalty, for good) or inf.
_FACTOR_RANGE = (1e-6, 1e6)


@dataclass(frozen=True, kw_only=True)
class Control:
    """How the coefficient moves; a pure description.

    Attributes:
        kind: ``linear``, ``cosine`` or ``adaptive``.
        start: first factor of a schedule.
        end: last factor of a schedule.
        target: divergence that the controller aims at, in the penalty's units per token.
        rate: r, how fast the controller moves.
    """

    kind: Literal["linear", "cosine", "adaptive"]
    start: float = 1.0
    end: float = 0.0
    target: float = 0.1
    rate: float = 0.1

    def factor_at(self, progress: float) -> float:
        """The factor of a schedule at a share of the run in [0, 1]; 1 for ``adaptive`` (see ``updated``)."""
        if self.kind == "adaptive":
            return 1.0
        share = min(1.0, max(0.0, progress))
        if self.kind == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.start + (self.end - self.start) * share

    def updated(self, factor: float, divergence: float) -> float:
        """The factor after a step that measured ``divergence``.

        Example:
            >>> Control(kind="adaptive", target=0.1, rate=0.5).updated(1.0, 0.2)
            1.1
        """
        if self.kind != "adaptive" or not math.isfinite(divergence):
            return factor
        error = min(_MAX_ERROR, max(-_MAX_ERROR, divergence / self.target - 1.0))
        return min(_FACTOR_RANGE[1], max(_FACTOR_RANGE[0], factor * (1.0 + self.rate * error)))


def control_from(spec: Control | Mapping[str, Any] | None) -> Control | None:
    """A control from a mapping such as ``{"kind": "adaptive", "target": 0.1}``.

    Raises:
        ValueError: an unknown kind, an option that the kind does not have, a value out of range.
    """
    if spec is None or isinstance(spec, Control):
        return spec
    if not isinstance(spec, Mapping):
        raise ValueError(f"control must be a mapping with the key 'kind', got {spec!r}")
    options = {str(key): value for key, value in spec.items()}
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise unknown_name("control kind", kind, KINDS)
    for key, value in options.items():
        if key not in _OPTIONS[kind]:
            raise ValueError(f"control {kind!r} does not take {key!r}. Legal: {', '.join(_OPTIONS[kind])}")
        options[key] = check_number(key, value, 0.0, 1e6, open_low=key in ("target", "rate"))
    if kind == "adaptive" and "target" not in options:
        raise ValueError("control 'adaptive' needs target, the divergence to aim at, a number > 0")
    return Control(kind=kind, **options)
