"""Is the run doing nothing, and nobody notices? Four silences that are worth a line, each with what to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from mirrorpo.losses.objective import Objective

logger = logging.get_logger(__name__)

# Steps in a row in which (nearly) every group has one and the same reward.
PATIENCE = 10
_NEARLY_ALL = 0.95
# The penalty's share of the gradient below which float32 (and Adam's division) cannot see it.
_NO_EFFECT = 1e-7
# Reverse KL that two float32 evaluations of one policy show: half the square of a log-ratio of 1e-6 or so.
_ROUNDING = 1e-11
# The policy starts at its reference, where the gradient of a divergence is 0: it is looked at after some steps.
_FIRST_STEP = 1


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
        self._equal: deque[float] = deque(maxlen=PATIENCE)
        self._unscored: deque[float] = deque(maxlen=PATIENCE)

    def _once(self, what: str, line: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.say(f"warning: {line}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._look_at_rewards(logs)
        self._look_at_penalty(logs, state.global_step)
        if (logs.get("grad_norm") or 0.0) > 0.0 and (logs.get("learning_rate") or 0.0) > 0.0:
            self._look_at_reference(model, args)

    def _look_at_rewards(self, logs: dict[str, Any]) -> None:
        if "unscored/frac" not in logs:
            return  # a later update on the same completions
        self._equal.append(logs["frac_reward_zero_std"] or 0.0)
        self._unscored.append(logs["unscored/frac"])
        if len(self._unscored) == PATIENCE and min(self._unscored) >= _NEARLY_ALL:
            self._once(
                "unscored",
                f"for {PATIENCE} steps hardly a completion had a reward: look at the reward's reasons, and at the data",
            )
        elif len(self._equal) == PATIENCE and min(self._equal) >= _NEARLY_ALL:
            self._once(
                "equal",
                f"for {PATIENCE} steps the completions of nearly every group had one and the same reward: nothing is "
                "learned from them; take easier or harder problems, a larger group_size or a higher temperature",
            )

    def _look_at_penalty(self, logs: dict[str, Any], step: int) -> None:
        share = logs.get("penalty_gradient_share")
        if share is None or step <= _FIRST_STEP or self.objective.placement == "reward":
            return
        names = " and ".join(p.divergence.name for p in self.objective.penalties)
        equal = share < _NO_EFFECT and logs.get("divergence/reverse_kl/mean", 1.0) < _ROUNDING
        if share == 0.0 or equal:
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
