"""Handling of NaN and infinite values: the run stops, or the tokens (else the whole optimiser step) are left out.

With ``raise`` the first non-finite log-probability, advantage, reward, loss or gradient ends the run and is named.
With ``skip``:

* tokens whose log-probability (of policy, rollout policy or reference) or advantage is not finite leave numerator and
  denominator: what the step's average divides by shrinks by as much;
* a loss or a gradient that is still not finite drops the optimiser step: no parameter and no moment moves;
* both are counted (``nonfinite/tokens/mean``, ``nonfinite/dropped/frac``), and more than ``limit`` such optimiser
  steps end the run.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mirrorpo.errors import RunError


class NonFiniteError(RunError, FloatingPointError):
    """A tensor of the loss is NaN or infinite; the message names it and the step."""


class NonFinite:
    """The policy, and what it has seen in this optimiser step.

    Args:
        mode: "raise" or "skip".
        limit: optimiser steps with left-out numbers before the run ends.

    Attributes:
        events: such optimiser steps so far; part of a checkpoint.
    """

    def __init__(self, mode: str, limit: int) -> None:
        self.mode, self.limit = mode, limit
        self.events = 0
        self._tokens: Tensor | float = 0.0
        self._lost: Tensor | float = 0.0
        self._drop: Tensor | float = 0.0
        self._last = ""

    @property
    def skips(self) -> bool:
        """Whether numbers are left out."""
        return self.mode == "skip"

    def usable(self, tensors: dict[str, Tensor | None], mask: Tensor, step: int) -> Tensor:
        """The tokens of ``mask`` whose tensors are all finite.

        Args:
            tensors: (B, T) or (B,), by name; None is left out.
            mask: (B, T).
            step: for the message.

        Raises:
            NonFiniteError: ``raise``, and one of them is not.
        """
        keep = mask.bool()
        good = torch.ones_like(keep)
        finite = {}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            fine = torch.isfinite(tensor.detach())
            fine = fine if fine.dim() == 2 else fine.unsqueeze(1).expand_as(keep)
            finite[name] = (fine | ~keep).all()
            good = good & fine
        everything = torch.stack(list(finite.values())).all()
        if not self.skips:
            if not bool(everything):
                raise NonFiniteError(_message(step, _names(finite)))
            return mask
        kept = keep & good
        if not bool(everything):
            self._last = _names(finite)
            self._tokens = self._tokens + (keep & ~good).sum()
            self._lost = self._lost + (keep.any(1) & ~kept.any(1)).sum()
        return kept.to(mask.dtype)

    def check_loss(self, loss: Tensor, step: int) -> None:
        """Drops the optimiser step of a loss that is not finite, or raises."""
        if bool(torch.isfinite(loss.detach())):
            return
        if not self.skips:
            raise NonFiniteError(_message(step, "loss"))
        self._drop, self._last = 1.0, "loss"

    def settle(self, model: nn.Module, accelerator: Any, total: float, unit: str, step: int) -> dict[str, float]:
        """The end of an optimiser step's backward passes, on all ranks: corrects the denominator or drops the step.

        Args:
            model: its gradients are summed up.
            accelerator: accelerate's.
            total: what the average over the whole optimiser step (all ranks) divides by, in ``unit``.
            unit: "tokens", or "sequences" (those that lost all their tokens).
            step: for the message.

        Returns:
            The metrics of the step.

        Raises:
            ValueError: the gradients are DeepSpeed's, out of reach: ``MirrorConfig`` was made before the accelerator.
        """
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("on_nonfinite must be 'raise' with DeepSpeed, which keeps its gradients to itself")
        local = torch.tensor([float(self._tokens), float(self._lost), float(self._drop)], device=accelerator.device)
        tokens, lost, drop = accelerator.reduce(local, reduction="sum").tolist()
        left_out = tokens if unit == "tokens" else lost
        if tokens or drop:
            self._count(step)
        if drop or left_out >= total > 0:
            model.zero_grad(set_to_none=True)
            drop = 1.0
        elif left_out:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(total / (total - left_out))
        self._tokens = self._lost = self._drop = 0.0
        return {"nonfinite/tokens/mean": tokens, "nonfinite/dropped/frac": float(bool(drop))}

    def drop_gradient(self, model: nn.Module, norm: float, step: int) -> None:
        """Drops the optimiser step whose gradient norm is not finite, or raises."""
        if not self.skips:
            raise NonFiniteError(f"step {step}: the gradient norm is {norm}; the last checkpoint is intact")
        self._last = "gradient"
        self._count(step)
        model.zero_grad(set_to_none=True)

    def leave_out_rewards(self, rewards: Tensor, names: list[str], step: int) -> Tensor:
        """The rewards (N, F) with NaN, TRL's mark for none, in place of infinite ones; or raises."""
        infinite = rewards.isinf()
        if not bool(infinite.any()):
            return rewards
        name = names[int(infinite.any(0).nonzero()[0])]
        if not self.skips:
            raise NonFiniteError(_message(step, f"the reward of {name!r}"))
        self._last = f"reward of {name!r}"
        self._count(step)
        return torch.where(infinite, torch.nan, rewards)

    def _count(self, step: int) -> None:
        self.events += 1
        if self.events > self.limit:
            raise NonFiniteError(
                f"step {step}: numbers that are not finite in {self.events} optimiser steps, at most {self.limit} may "
                f"be left out (the last: {self._last or 'on another process'}); the last checkpoint is intact"
            )


def _names(finite: dict[str, Tensor]) -> str:
    return ", ".join(name for name, ok in finite.items() if not bool(ok))


def _message(step: int, what: str) -> str:
    return f"step {step}: {what} is not finite; the last checkpoint is intact"
