"""TRL's DPO trainer with any divergence of this library.

TRL has four f-divergences (``f_divergence_type``); here ``divergence`` takes every convex one, and the loss is
``mirrorpo.preference_loss``. Data, reference model, adapters, metrics and everything else are TRL's.

==============================================  ================================================================
TRL                                             the same loss here
==============================================  ================================================================
``reverse_kl`` (DPO)                            ``divergence="reverse_kl"``
``forward_kl``                                  ``divergence="forward_kl"``
``alpha_divergence``, coefficient a             ``divergence={"name": "alpha", "alpha": a}``
``js_divergence``, beta b                       ``divergence="js"``, beta 2 b: TRL leaves out the 1/2 of the mean
==============================================  ================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from mirrorpo.errors import check_number
from mirrorpo.losses.preference import ImplicitReward, loss_of

# The private methods of TRL's trainer that are overridden, with their parameters; a test compares them with TRL's.
DPO_SEAMS = {"_compute_loss": ("model", "inputs", "return_outputs")}
# TRL's settings that have no effect on this loss, with the value that says nothing and what to use instead.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "f_divergence_type": ("reverse_kl", "divergence names the divergence"),
    "f_alpha_divergence_coef": (0.5, "use divergence={'name': 'alpha', 'alpha': ...}"),
    "loss_type": (["sigmoid"], "legal: 'sigmoid'"),
    "loss_weights": (None, "legal: None"),
    "ld_alpha": (None, "legal: None"),
    "label_smoothing": (0.0, "legal: 0.0"),
    "use_weighting": (False, "legal: False"),
    "discopop_tau": (0.05, "it belongs to TRL's loss_type 'discopop'"),
}


@dataclass
class MirrorDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` with one more field.

    Args:
        divergence: a divergence's name (``mirrorpo list divergences``), or a mapping with ``name`` and its options.
            ``beta`` is its coefficient. None (the default): TRL's own loss, whatever its other fields say.

    Raises:
        ValueError: an unknown divergence or one that is not convex, beta <= 0, a setting of TRL that has no effect.

    Example:
        >>> from mirrorpo.training import MirrorDPOConfig
        >>> quiet = {"report_to": "none", "bf16": False, "activation_checkpointing": False}
        >>> config = MirrorDPOConfig("out", divergence={"name": "alpha", "alpha": 0.5}, **quiet)
        >>> config.beta
        0.1
    """

    divergence: str | dict | None = field(
        default=None,
        metadata={"help": "Divergence, by name or as a mapping with 'name' and options; None: TRL's own loss."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence is None:
            if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
                raise ValueError(
                    f"f_alpha_divergence_coef={self.f_alpha_divergence_coef!r} has no effect with "
                    f"f_divergence_type={self.f_divergence_type!r}: it belongs to 'alpha_divergence'"
                )
            return
        if not isinstance(self.divergence, str | dict):
            raise ValueError(
                f"divergence must be a name or a mapping with 'name', got {type(self.divergence).__name__}; a function "
                "is named by 'module:attribute'"
            )
        check_number("beta", self.beta, 0.0, open_low=True)
        for name, (neutral, instead) in _WITHOUT_EFFECT.items():
            value = getattr(self, name)
            if value != neutral:
                raise ValueError(f"{name}={value!r} has no effect with divergence={self.divergence!r}: {instead}")
        ImplicitReward.of(self.divergence)


class MirrorDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` whose loss is ``mirrorpo.preference_loss`` with the divergence of its config.

    Arguments as TRL's; ``args`` is a ``MirrorDPOConfig``. The metrics ``rewards/*`` are those of the divergence,
    beta s(y).

    Warns:
        UserWarning: the divergence cannot identify the reward, or its score is flat or too steep on sequences.

    Raises:
        ValueError: ``args`` is not a ``MirrorDPOConfig``.
    """

    def __init__(self, model: Any = None, ref_model: Any = None, args: MirrorDPOConfig | None = None, **kwargs: Any):
        if not isinstance(args, MirrorDPOConfig):
            raise ValueError(f"args must be a MirrorDPOConfig, got {type(args).__name__}")
        self._reward = None if args.divergence is None else ImplicitReward.of(args.divergence)
        if self._reward is not None:
            self._reward.warn(stacklevel=2)
        super().__init__(model, ref_model, args=args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._reward is None:
            return super()._compute_loss(model, inputs, return_outputs)
        # TRL computes log-probabilities, metrics and its own loss in one method. What the models return on the way is
        # read, and its loss, which nothing depends on, is left.
        with ExitStack() as stack:
            policy = stack.enter_context(_outputs(model))
            anchor: Any = self.model if self.ref_model is None else self.ref_model
            reference = stack.enter_context(_outputs(anchor))
            given = super()._compute_loss(model, inputs, return_outputs)
        width = inputs["completion_mask"].shape[1] - 1

        def sums(output: Any) -> tuple[Tensor, Tensor]:
            chosen, rejected = output.log_probs[:, -width:].sum(dim=1).chunk(2)
            return chosen, rejected

        chosen, rejected = sums(policy[0])
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:  # an adapter's reference is the model itself, called again without it
            ref_chosen, ref_rejected = sums(reference[1 if self.ref_model is None else 0])
        loss = loss_of(self._reward, chosen, rejected, ref_chosen, ref_rejected, self.beta)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy[0].aux_loss
        with torch.no_grad():
            self._log_rewards(*(self.beta * self._reward(*x) for x in ((chosen, ref_chosen), (rejected, ref_rejected))))
        return (loss, given[1]) if return_outputs else loss

    def _log_rewards(self, chosen: Tensor, rejected: Tensor) -> None:
        """Puts the rewards of this divergence in the place of TRL's, beta times the log-ratio."""
        values = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        values["accuracies"] = (chosen > rejected).double()
        model: Any = self.model
        metrics = self._metrics["train" if model.training else "eval"]
        for name, value in values.items():
            gathered: Any = self.accelerator.gather(value)
            metrics[f"rewards/{name}"][-1] = gathered.mean().item()


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Any]]:
    """What the module returns while the context is open, call by call."""
    found: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


__all__ = ["DPO_SEAMS", "MirrorDPOConfig", "MirrorDPOTrainer"]
