"""What is a micro-batch's loss, from packed rows? The objective from hidden states, in one sweep where it can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import use_adapter

from mirrorpo.kernels import Anchor, Packing, objective_from_hidden
from mirrorpo.losses.objective import Output
from mirrorpo.training.gradient_share import share_is_due
from mirrorpo.training.logits import FORWARD_KEYS, Scored, gather_ids

if TYPE_CHECKING:
    from mirrorpo.training.trainer import MirrorTrainer


def packed_loss(
    trainer: MirrorTrainer, model: nn.Module, inputs: dict[str, Any], mask: Tensor
) -> tuple[Output, Scored] | None:
    """Loss, metrics and scores of a micro-batch from packed rows; None where it is not packed.

    The entropy bonus is in the loss already. Loss parts have a graph of their own only where the trainer measures the
    penalty's share of the gradient: that takes a second sweep.

    Args:
        trainer: whose objective and settings hold.
        model: the policy.
        inputs: a micro-batch as TRL hands it to the loss.
        mask: (B, T), the tokens that count.
    """
    path, objective = trainer.packed, trainer.policy_objective
    causal = path.model(model)
    if causal is None:
        return None
    if any(inputs.get(key) is not None for key in FORWARD_KEYS):
        path.say("multimodal input")
        return None
    packing = path.pack(causal, *gather_ids(inputs))
    hidden = None if packing is None else path.hidden(model, packing)
    if packing is None or hidden is None:
        return None
    if not bool(hidden.detach().isfinite().all()):
        return None  # the padded path says which tokens it is, and raises or leaves them out
    kept = slice(None) if mask is inputs["completion_mask"] else mask.reshape(-1).bool()[packing.slots]
    if isinstance(kept, Tensor) and not bool(kept.any()):
        return None  # nothing counts: a zero with a gradient, as the padded path gives it
    reference = None
    if "reference" in objective.needs_logits_of:
        reference = _reference(trainer, packing, kept)
        if reference is None:
            return None
    training = trainer.model.training
    output, logp, entropy = objective_from_hidden(
        objective,
        hidden[kept],
        path.head(causal),
        packing.tokens[kept],
        advantages=inputs["advantages"],
        mask=mask,
        logp_old=inputs.get("old_per_token_logps"),
        logp_ref=inputs.get("ref_per_token_logps"),
        logp_sampler=inputs.get("sampling_per_token_logps"),
        reference=reference,
        max_completion_length=trainer.max_completion_length,
        num_tokens=trainer._num_tokens(inputs, training),
        weight=_weight(trainer, inputs, mask),
        entropy_weight=trainer.entropy_weight(training),
        penalty_scale=trainer.penalty_state.factor,
    )
    if not bool(output.loss.detach().isfinite()):
        return None  # finite hidden states, but logits that are not: as above
    return output, Scored(logp=logp, entropy=entropy)


def _weight(trainer: MirrorTrainer, inputs: dict[str, Any], mask: Tensor) -> Any:
    """The factor on the policy term; a function of the scores where it depends on them, or two sweeps are wanted."""

    def of_scores(logp: Tensor, entropy: Tensor) -> Tensor | None:
        old = inputs.get("old_per_token_logps")
        return trainer._policy_weight(Scored(logp=logp, entropy=entropy), old, inputs, mask)

    if trainer.weighs_by_scores or share_is_due(trainer):
        return of_scores
    return of_scores(mask, mask)  # looks at neither


@torch.no_grad()
def _reference(trainer: MirrorTrainer, packing: Packing, kept: Any) -> Anchor | None:
    """The reference's hidden states of the tokens that count, and its head."""
    path = trainer.packed
    if trainer.ref_model is not None:
        causal = path.model(trainer.ref_model)
        hidden = None if causal is None else path.hidden(causal, packing)  # never trained: no wrapper matters
    else:
        policy: Any = trainer.accelerator.unwrap_model(trainer.model)
        causal = path.model(policy)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            hidden = None if causal is None else path.hidden(policy, packing)
    if causal is None or hidden is None:
        return None
    return Anchor(hidden=hidden[kept], head=path.head(causal))


__all__ = ["packed_loss"]
