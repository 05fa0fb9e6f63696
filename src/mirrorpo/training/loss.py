"""The loss of a micro-batch: from packed rows in one sweep where that is possible, else padded as TRL lays it out.

Packed rows: the objective is computed from hidden states, and no logits are kept. Padded: from the scores of TRL's own
head, or from logits (B, T, V) in memory where an estimator or a region needs the whole next-token distribution. What
packed rows cannot carry comes back as None, and the padded loss says which tokens are not finite.

Beside it: the share of the penalty in the norm of the gradient, from two extra backward passes now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import use_adapter

from mirrorpo.kernels import Anchor, Packing, objective_from_hidden
from mirrorpo.losses.objective import Objective, Output
from mirrorpo.training.distributed import UNSHARDED

if TYPE_CHECKING:
    from mirrorpo.training.trainer import MirrorTrainer

logger = logging.get_logger(__name__)


# What TRL hands from the rollout to the forward pass of multimodal models.
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The sampled tokens under a model.

    Attributes:
        logp: (B, T), log-probabilities of the sampled tokens.
        entropy: (B, T), of the next-token distributions, in nats.
        logits: (B, T, V), temperature applied, or None.
        aux_loss: a mixture model's load-balancing loss, or None.
    """

    logp: Tensor
    entropy: Tensor
    logits: Tensor | None = None
    aux_loss: Tensor | None = None


def gather_ids(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Prompt and completion side by side: token ids, attention mask, and the number of completion positions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, attention, inputs["completion_ids"].shape[1]


def score_from_logits(model: nn.Module, ids: Tensor, attention: Tensor, keep: int, temperature: float) -> Scored:
    """Scores the last ``keep`` tokens of each row.

    Args:
        model: a causal language model of transformers.
        ids: (B, P + T).
        attention: (B, P + T).
        keep: T.
        temperature: the logits are divided by it, as in sampling.

    Returns:
        Log-probabilities, entropies and logits; float32 or wider.
    """
    output = model(input_ids=ids, attention_mask=attention, logits_to_keep=keep + 1, use_cache=False)
    logits = output.logits[:, -keep - 1 : -1].float() / temperature
    log_probs = logits.log_softmax(-1)
    logp = log_probs.gather(-1, ids[:, -keep:].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum(-1)
    return Scored(logp=logp, entropy=entropy, logits=logits)


# Measured once more, early, when the policy has left its reference.
_EARLY_LOOK = 5


def share_is_due(trainer: MirrorTrainer) -> bool:
    """Whether this micro-batch is one to measure the penalty's share of the gradient on."""
    objective, every = trainer.policy_objective, trainer.args.gradient_share_every
    if not objective.placed("loss"):
        return False
    if trainer.accelerator.distributed_type not in UNSHARDED:
        return False  # sharded gradients have no norm of their own
    step = trainer.state.global_step
    return every > 0 and trainer.model.training and (step % every == 0 or step == _EARLY_LOOK)


def penalty_share(model: nn.Module, output: Output, accelerator: Any) -> float:
    r"""The penalty's share of the gradient that an optimiser step would take,
    :math:`\lVert g_{penalty} \rVert / (\lVert g_{policy} \rVert + \lVert g_{penalty} \rVert)`.

    Args:
        model: the policy.
        output: of the objective; ``penalty_loss`` is not None, and both parts have a graph.
        accelerator: accelerate's; gradients are averaged over its processes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for part in (output.policy_loss, output.penalty_loss):
        assert part is not None
        grads = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        present = (accelerator.reduce(g.detach().float(), "mean") for g in grads if g is not None)
        norms.append(torch.stack([g.norm() for g in present]).norm())
    return (norms[1] / (norms[0] + norms[1]).clamp(min=torch.finfo(torch.float32).tiny)).item()


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


def carried(objective: Objective, args: Any, *, drawn_here: bool) -> Objective:
    """The objective that is trained.

    Args:
        objective: as it was asked for.
        args: the trainer's.
        drawn_here: whether the policy generates by itself: then the sampler is the old policy.

    Raises:
        ValueError: an anchor that the trainer does not have, or a correction for the sampler that would count twice.
    """
    if "teacher" in objective.needs:
        raise ValueError(
            "anchor 'teacher' is not supported by the trainer yet. Legal: reference, old, sampler, uniform"
        )
    if "sampler" in objective.needs and drawn_here:
        objective = objective.drawn_by_policy()
        logger.warning("the policy generates by itself: anchor and behaviour 'sampler' are the old policy")
    if objective.behaviour == "sampler" and args.vllm_importance_sampling_correction:
        raise ValueError(
            "vllm_importance_sampling_correction must be False with behaviour 'sampler', whose ratio corrects already "
            "(in a recipe: train.vllm.correction none), got True"
        )
    return objective


def needs_padding(objective: Objective) -> str | None:
    """Why packed rows cannot carry the objective; None: they can."""
    for rule in objective.rules:
        if rule.region.needs_logits:
            return f"region {rule.region.name!r}"
    for p in objective.penalties:
        if p.needs_logits and (p.anchor != "reference" or p.support != "anchor"):
            return p.what
    return None


__all__ = [
    "Scored",
    "carried",
    "gather_ids",
    "logits_of",
    "needs_padding",
    "packed_loss",
    "padded_loss",
    "penalty_share",
    "score",
    "score_from_logits",
    "share_is_due",
    "with_bonuses",
]
