"""Warnings of a run that does nothing, each said once, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from mirrorpo.losses.objective import Objective

logger = logging.get_logger(__name__)

# Steps in a row after which a run without rewards, or without differences between them, is worth a line.
PATIENCE = 5
_NEARLY_ALL = 0.95
# The penalty's share of the gradient below which float32 (and Adam's division) cannot see it.
_NO_EFFECT = 1e-7
# Reverse KL that two float32 evaluations of one policy show: half the square of a log-ratio of 1e-6 or so.
ROUNDING = 1e-11


class Watch(TrainerCallback):
    """Says once what a run should not keep to itself.

    Args:
        objective: what is trained.
        reference: the frozen model, None if the reference is the policy with its adapter off.
        say: prints one line; the default is a warning of the library's logger.
    """

    def __init__(
        self, objective: Objective, reference: nn.Module | None, say: Callable[[str], None] | None = None
    ) -> None:
        self.objective, self.reference = objective, reference
        self.say = say or logger.warning
        self.said: set[str] = set()
        self._since: dict[str, int] = {}
        self._measured: tuple[float, float] | None = None

    def _once(self, what: str, line: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.say(f"warning: {line}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._look_at_rewards(logs)
        self._look_at_penalty()
        if (logs.get("grad_norm") or 0.0) > 0.0 and (logs.get("learning_rate") or 0.0) > 0.0:
            self._look_at_reference(model, args)

    def measured(self, step: int, share: float, divergence: float) -> None:
        """The penalty's share of the gradient in an optimiser step, and the divergence there.

        Args:
            step: optimiser steps before it; at 0 the policy is its reference, and the share says nothing.
            share: of the gradient's norm.
            divergence: the penalty's mean, or reverse KL where that is known.
        """
        self._measured = (share, divergence) if step > 0 else None

    def skipped(self) -> None:
        """An optimiser step was left out: no advantage, and a policy that equals its reference."""
        self._once(
            "skipped",
            "every advantage of the batch is 0 and the policy equals its reference: the update is left out, its "
            "gradient would be rounding noise, which Adam scales to full steps",
        )

    def _lasts(self, what: str, holds: bool) -> bool:
        """Whether something has held in ``PATIENCE`` logs of rewards."""
        if not holds:
            self._since.pop(what, None)
            return False
        self._since[what] = self._since.get(what, 0) + 1
        return self._since[what] >= PATIENCE

    def _look_at_rewards(self, logs: dict[str, Any]) -> None:
        if "unscored/frac" not in logs:
            return  # a later update on the same completions
        unscored = self._lasts("unscored", logs["unscored/frac"] >= _NEARLY_ALL)
        equal = self._lasts("equal", (logs["frac_reward_zero_std"] or 0.0) >= _NEARLY_ALL)
        zero = self._lasts("zero", logs["reward"] == 0.0 and not logs["reward_std"])
        if unscored:
            self._once(
                "unscored",
                f"for {PATIENCE} steps hardly a completion had a reward: look at the reward's reasons, and at the data",
            )
        elif zero:
            self._once(
                "equal",
                f"for {PATIENCE} steps every reward was 0: nothing is learned; look at completions and at the reward's "
                "reasons (format, max_completion_length), take easier problems or a larger group_size",
            )
        elif equal:
            self._once(
                "equal",
                f"for {PATIENCE} steps the completions of nearly every group had one and the same reward: nothing is "
                "learned from them; take easier or harder problems, a larger group_size or a higher temperature",
            )

    def _look_at_penalty(self) -> None:
        found, self._measured = self._measured, None
        if found is None or self.objective.placement == "reward":
            return
        share, divergence = found
        names = " and ".join(p.divergence.name for p in self.objective.penalties)
        if share == 0.0 or (share < _NO_EFFECT and divergence < ROUNDING):
            self._once(
                "no gradient",
                f"the penalty {names} has no gradient: the policy still is its reference, or the divergence is flat "
                "there. Choose another estimator or divergence, or leave the penalty out",
            )
        elif share < _NO_EFFECT:
            self._once(
                "no effect",
                f"the penalty {names} is {share:.0e} of the gradient: its coefficient can have no effect. Raise "
                "objective.coefficient, or leave the penalty out",
            )

    def _look_at_reference(self, model: Any, args: Any) -> None:
        """After a step that moved something: a policy that equals its reference still has not moved."""
        if "reference" in self.said or model is None or not self.objective.needs_reference or args.sync_ref_model:
            return
        self.said.add("reference")
        if _same_as_reference(model, self.reference):
            self.said.discard("reference")
            self._once(
                "reference",
                "after the first optimiser step the policy still equals its reference: its steps are too small for "
                "its precision (raise the learning rate, or train.precision with model.dtype float32 weights), or "
                "the reference is the policy itself",
            )


def _same_as_reference(policy: nn.Module, reference: nn.Module | None) -> bool:
    if reference is None:  # an adapter: the policy is its reference while the second factors are 0
        factors = [p for name, p in policy.named_parameters() if "lora_B" in name]
        return bool(factors) and not any(bool(p.detach().any()) for p in factors)
    theirs = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            return False  # wrapped or sharded: not comparable, so nothing is said
        if bool((other.detach() != parameter.detach()).any()):
            return False
    return True
