"""Is the reference what the penalty takes it for? A frozen copy of the policy's start, and not the policy itself."""

from __future__ import annotations

import torch
from torch import nn


class ReferenceMismatchError(ValueError):
    """The reference is the policy itself, or does not agree with it at the start."""


def check_reference(policy: nn.Module, reference: nn.Module) -> None:
    """Raises unless ``reference`` has storage of its own and the policy's values.

    TRL loads the reference from the policy's *path*. A policy that was changed after loading therefore gets a reference
    that never was its start, and every penalty is measured from the wrong place.

    Args:
        policy: the model that is trained, before the first step.
        reference: the frozen one.

    Raises:
        ReferenceMismatchError: shared storage, other parameter names or shapes, or other values; names the parameter.
    """
    theirs = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            raise ReferenceMismatchError(
                f"reference has no parameter {name!r} of shape {tuple(parameter.shape)}: another model"
            )
        if other.data_ptr() == parameter.data_ptr():
            raise ReferenceMismatchError(
                f"the reference is the policy itself (parameter {name!r} is shared): its divergence would always be 0"
            )
        if not torch.equal(other.detach().to(parameter.device, parameter.dtype), parameter.detach()):
            raise ReferenceMismatchError(
                f"reference and policy differ before the first step (parameter {name!r}): the reference is loaded from "
                "the policy's path. Save the changed policy and pass its path as the model"
            )
