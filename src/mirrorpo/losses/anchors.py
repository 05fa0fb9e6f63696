r"""Anchors: the policy that a penalty or a region is measured from.

=============  ==================  =====================================================================================
anchor         tensor              what it is
=============  ==================  =====================================================================================
``reference``  ``logp_ref``        the start of training, frozen, synced or averaged
``old``        ``logp_old``        the policy at the start of the rollout batch, scored by the trainer
``sampler``    ``logp_sampler``    what the inference engine reported for the tokens that it drew
``teacher``    ``logp_teacher``    another model with the same vocabulary
``uniform``    none                1/V for every token: a penalty toward it is an entropy bonus
=============  ==================  =====================================================================================

``behaviour`` names the one of ``old`` and ``sampler`` that is b in every formula: in the ratio w = p/b, in ``weighted``
and in ``score``. The sampler is the unbiased choice, if the engine reports the distribution that it drew from.

**Missing values.** An engine reports NaN or -inf for tokens that it cannot score (a probability that rounds to 1, a
token outside its top-p). Under ``old`` and ``sampler`` such a token counts as outside every region: its policy term is
0, and so are the terms that need its b. In the mean or the sum of its sequence its log-ratio is 0: no evidence either
way. The metric ``behaviour/missing/frac`` counts them; denominators keep them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mirrorpo._checks import check_logps
from mirrorpo.divergences.base import upcast
from mirrorpo.losses.facts import ANCHORS


@dataclass(frozen=True, kw_only=True)
class AnchorLogps:
    """Log-probabilities of the sampled tokens under every anchor that was given; detached, 0 where the mask drops one.

    Attributes:
        by_name: (B, T) each. Missing values of ``old`` and ``sampler`` are replaced by the policy's own.
        missing: bool (B, T) each, where such a value was replaced; None: nothing to replace, the policy itself.
    """

    by_name: Mapping[str, Tensor]
    missing: Mapping[str, Tensor | None]

    def of(self, anchor: str, what: str) -> Tensor:
        """(B, T).

        Raises:
            ValueError: it was not given; the message says what needs it and how to get it.
        """
        if anchor in self.by_name:
            return self.by_name[anchor]
        inputs = ANCHORS[anchor]
        raise ValueError(f"{what} needs {inputs.logp or 'vocabulary'}, got None: {inputs.how}")


def read_anchors(
    logp: Tensor, keep: Tensor, given: Mapping[str, Tensor | None], vocabulary: int | None = None
) -> AnchorLogps:
    """The anchors of a batch, checked and cleaned.

    Args:
        logp: (B, T), of the policy, 0 where ``keep`` is false.
        keep: (B, T), bool.
        given: by anchor, (B, T) or None; ``old`` as None is the policy itself.
        vocabulary: V, for ``uniform``.

    Raises:
        ValueError: a log-probability above 0 at a kept token, or a NaN that is not the sampler's (looked at on a CPU
            only).
    """
    own = logp.detach()
    by_name: dict[str, Tensor] = {}
    missing: dict[str, Tensor | None] = {}
    names, values = ["logp"], [own]
    for anchor, tensor in given.items():
        if tensor is None:
            continue
        value = torch.where(keep, upcast(tensor.detach()), 0.0)
        if anchor == "sampler":
            absent = value.isnan() | (value == -torch.inf)
            value = torch.where(absent, own.to(value.dtype), value)
            missing[anchor] = absent
        by_name[anchor] = value
        names.append(ANCHORS[anchor].logp or anchor)
        values.append(value)
    check_logps(tuple(names), *values)
    if "old" in by_name:  # a NaN was refused above, where it was looked at
        value = by_name["old"]
        absent = value.isnan() | (value == -torch.inf)
        by_name["old"], missing["old"] = torch.where(absent, own.to(value.dtype), value), absent
    else:
        by_name["old"], missing["old"] = own, None
    if vocabulary is not None:
        by_name["uniform"] = torch.full_like(own, -math.log(vocabulary))
    return AnchorLogps(by_name=by_name, missing=missing)


def check_shapes(logp: Tensor, advantages: Tensor | None, mask: Tensor, **others: Tensor | None) -> None:
    """Raises ``ValueError`` for a tensor that does not fit ``logp``, (B, T); names it."""
    if logp.dim() != 2 or mask.shape != logp.shape:
        shapes = f"{tuple(logp.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"logp and mask must have the same shape (B, T), got {shapes}")
    for name, other in others.items():
        if other is not None and other.shape != logp.shape:
            raise ValueError(f"{name} must have the shape of logp, {tuple(logp.shape)}, got {tuple(other.shape)}")
    rows = logp.shape[0]
    if advantages is not None and advantages.shape not in ((rows,), (rows, 1), tuple(logp.shape)):
        raise ValueError(f"advantages must have shape (B,), (B, 1) or (B, T), got {tuple(advantages.shape)}")


__all__ = ["ANCHORS", "AnchorLogps", "check_shapes", "read_anchors"]
