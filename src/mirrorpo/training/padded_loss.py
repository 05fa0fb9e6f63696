"""What is a micro-batch's loss as TRL lays it out, padded? The objective of scores from TRL's head, or from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import use_adapter

from mirrorpo.losses.objective import Output
from mirrorpo.training.logits import FORWARD_KEYS, Scored, gather_ids, score_from_logits

if TYPE_CHECKING:
    from mirrorpo.training.trainer import MirrorTrainer


def padded_loss(
    trainer: MirrorTrainer, model: nn.Module, inputs: dict[str, Any], mask: Tensor
) -> tuple[Output, Scored, Tensor]:
    """Loss, metrics, scores and usable tokens of a padded micro-batch; without the bonuses of ``with_bonuses``.

    Args:
        trainer: whose objective and settings hold.
        model: the policy.
        inputs: a micro-batch as TRL hands it to the loss.
        mask: (B, T), the tokens that count.
    """
    scored = score(trainer, model, inputs)
    mask = trainer.nonfinite.usable({"logp": scored.logp}, mask, trainer.state.global_step + 1)
    old = inputs.get("old_per_token_logps")
    output = trainer.policy_objective(
        logp=scored.logp,
        logp_old=old,
        logp_ref=inputs.get("ref_per_token_logps"),
        logp_sampler=inputs.get("sampling_per_token_logps"),
        vocabulary=trainer.vocabulary,
        advantages=inputs["advantages"],
        mask=mask,
        max_completion_length=trainer.max_completion_length,
        num_tokens=trainer._num_tokens(inputs, trainer.model.training),
        weight=trainer._policy_weight(scored, old, inputs, mask),
        logits=scored.logits,
        logits_ref=_reference_logits(trainer, inputs),
        logits_old=inputs.get("old_logits"),
        tokens=inputs["completion_ids"],
        entropy=scored.entropy,
        penalty_scale=trainer.penalty_state.factor,
    )
    return output, scored, mask


def score(trainer: MirrorTrainer, model: nn.Module, inputs: dict[str, Any]) -> Scored:
    """The sampled tokens under the policy; with logits where the objective needs them, else through TRL's head."""
    ids, attention, keep = gather_ids(inputs)
    if trainer.policy_objective.needs_logits:
        return logits_of(trainer, model, ids, attention, keep)
    # TRL's own method: the trainer's would pack.
    logp, entropy, aux_loss = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer,
        model,
        ids,
        attention,
        keep,
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{key: inputs.get(key) for key in FORWARD_KEYS},
    )
    assert entropy is not None
    return Scored(logp=logp, entropy=entropy, aux_loss=aux_loss)


def logits_of(trainer: MirrorTrainer, model: Any, ids: Tensor, attention: Tensor, keep: int) -> Scored:
    """Scores with logits (B, T, V), in the trainer's mixed precision."""
    with trainer.accelerator.autocast():
        return score_from_logits(model, ids, attention, keep, trainer.temperature)


@torch.no_grad()
def _reference_logits(trainer: MirrorTrainer, inputs: dict[str, Any]) -> Tensor | None:
    if "reference" not in trainer.policy_objective.needs_logits_of:
        return None
    ids, attention, keep = gather_ids(inputs)
    if trainer.ref_model is not None:
        return logits_of(trainer, trainer.ref_model, ids, attention, keep).logits
    policy = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
        return logits_of(trainer, trainer.model, ids, attention, keep).logits


def with_bonuses(trainer: MirrorTrainer, loss: Tensor, scored: Scored, mask: Tensor) -> Tensor:
    """TRL's static entropy bonus and its load-balancing loss of mixture models, averaged over micro-batches."""
    share = 1.0 / trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0
    if trainer._entropy_bonus_enabled:
        mean_entropy = (scored.entropy * mask).sum() / mask.sum().clamp(min=1.0)
        loss = loss - trainer.entropy_coef * mean_entropy * share
    if trainer.aux_loss_enabled and scored.aux_loss is not None:
        loss = loss + trainer.router_aux_loss_coef * scored.aux_loss * share
    return loss


__all__ = ["logits_of", "padded_loss", "score", "with_bonuses"]
