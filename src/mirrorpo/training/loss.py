"""The loss of a micro-batch: from packed rows in one sweep where that is possible, else padded as TRL lays it out.

Packed rows: the objective is computed from hidden states, and no logits are kept. Padded: from the scores of TRL's own
head, or from logits (B, T, V) in memory where an estimator or a region needs the whole next-token distribution. What
packed rows cannot carry comes back as None, and the padded loss says which tokens are not finite.

A ``LossComputer`` has an objective, a ``Scorer`` and settings, and never sees the trainer. The share of the penalty in
the norm of the gradient is measured here too, by two extra backward passes now and then.

TRL shuffles the completions of a generation batch before it cuts it into micro-batches, so that a group is spread over
all of them and its prompt is read as often. An optimiser step adds up the gradients of ``gradient_accumulation_steps``
micro-batches in a row: within that window their order changes no sum. ``regroup`` sorts the completions of the window
by prompt, in the order in which TRL's shuffle brought the prompts up, and cuts it again. With more than one update per
generation batch TRL's shuffle decides which completions of a group an update sees, and that stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.kernels.idle import pays
from mirrorpo.kernels.objective_head import objective_from_hidden
from mirrorpo.losses.aggregation import aggregation_weights
from mirrorpo.losses.objective import Objective, Output
from mirrorpo.training.nonfinite import NonFinite
from mirrorpo.training.scoring import FORWARD_KEYS, Scored, Scorer, gather_ids

logger = logging.get_logger(__name__)

# There where TRL corrects for the sampler's log-probabilities.
_SAMPLER_RATIO = "importance_sampling_ratio"


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of a training that enter its loss beside the objective.

    Attributes:
        max_completion_length: tokens that a completion may have.
        num_processes: of the run.
        steps_per_generation: micro-batches that share one generation.
        entropy_bonus: TRL's factor on the mean entropy; 0.0 leaves it out.
        aux_loss: factor on a mixture model's load-balancing loss.
        top_entropy_quantile: share of tokens, those of highest entropy, that enter the policy term.
        off_policy_mask_threshold: TRL's bound on a sequence's divergence from its sampler, None without.
    """

    max_completion_length: int
    num_processes: int
    steps_per_generation: int
    entropy_bonus: float
    aux_loss: float
    top_entropy_quantile: float
    off_policy_mask_threshold: float | None

    @property
    def weighs_by_scores(self) -> bool:
        """Whether the factor on the policy term depends on log-probabilities or entropies."""
        return self.top_entropy_quantile < 1.0 or self.off_policy_mask_threshold is not None


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a run is when it computes a loss.

    Attributes:
        step: the optimiser step, from 1; for messages.
        training: whether the batch is trained on.
        accumulation: micro-batches of the optimiser step.
        penalty_factor: what the penalties' coefficients are multiplied by.
        with_share: whether the penalty's share of the gradient is measured.
    """

    step: int
    training: bool
    accumulation: int
    penalty_factor: float
    with_share: bool


@dataclass(frozen=True, kw_only=True)
class MicroLoss:
    """The loss of a micro-batch.

    Attributes:
        loss: what is differentiated.
        output: of the objective.
        scored: the tokens under the policy.
        mask: (B, T), the tokens that counted.
        total: what the optimiser step's average divides by, on this process.
        penalty_share: of the gradient's norm, where it was measured.
    """

    loss: Tensor
    output: Output
    scored: Scored
    mask: Tensor
    total: Tensor | float
    penalty_share: float | None


class LossComputer:
    """Loss, metrics and scores of micro-batches as TRL hands them to its loss.

    Args:
        objective: what is trained.
        scorer: reads the tokens.
        settings: of the training.
        nonfinite: the handling of NaN and infinite values.
        entropy_mask: TRL's mask of the tokens of highest entropy, over all processes.
    """

    def __init__(
        self,
        objective: Objective,
        scorer: Scorer,
        settings: LossSettings,
        nonfinite: NonFinite,
        entropy_mask: Callable[[Tensor, Tensor, float], Tensor],
    ) -> None:
        self.objective, self.scorer, self.settings = objective, scorer, settings
        self.nonfinite, self.entropy_mask = nonfinite, entropy_mask

    def __call__(self, model: nn.Module, inputs: dict[str, Any], moment: Moment) -> MicroLoss:
        """Computes the loss of one micro-batch.

        Args:
            model: the policy, as the trainer holds it.
            inputs: the micro-batch.
            moment: where the run is.

        Raises:
            NonFiniteError: a number is not finite and the settings say ``raise``.
        """
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        known = {
            "logp_old": inputs.get("old_per_token_logps"),
            "logp_ref": inputs.get("ref_per_token_logps"),
            "logp_teacher": inputs.get("teacher_per_token_logps"),
            "advantages": inputs["advantages"],
            "importance_sampling_ratio": inputs.get(_SAMPLER_RATIO),
        }
        mask = self.nonfinite.usable(known, mask, moment.step)
        num_tokens = self._num_tokens(inputs, moment)
        total = mask.shape[0] * moment.accumulation if num_tokens is None else num_tokens
        found = self.packed(model, inputs, mask, moment)
        output, scored, mask = self.padded(model, inputs, mask, moment) if found is None else (*found, mask)
        self.nonfinite.check_loss(output.loss, moment.step)
        share = None
        if moment.with_share and output.penalty_loss is not None:
            share = penalty_share(model, output, self.scorer.accelerator)
        loss = output.loss * self._share(moment)
        if found is None:
            loss = self._with_bonuses(loss, scored, mask, moment)
        return MicroLoss(loss=loss, output=output, scored=scored, mask=mask, total=total, penalty_share=share)

    def packed(
        self, model: nn.Module, inputs: dict[str, Any], mask: Tensor, moment: Moment
    ) -> tuple[Output, Scored] | None:
        """Loss, metrics and scores from packed rows; None where the micro-batch is not packed.

        The entropy bonus is in the loss already. Loss parts have a graph of their own only where the penalty's share of
        the gradient is measured: that takes a second sweep.

        Args:
            model: the policy.
            inputs: the micro-batch.
            mask: (B, T), the tokens that count.
            moment: where the run is.
        """
        path, objective = self.scorer.packed, self.objective
        causal = path.model(model)
        if causal is None:
            return None
        if any(inputs.get(key) is not None for key in FORWARD_KEYS):
            path.say("multimodal input")
            return None
        ids, attention, keep = gather_ids(inputs)
        packing = path.pack(causal, ids, attention, keep, self._idle(causal, attention, inputs["advantages"]))
        hidden = None if packing is None else path.hidden(model, packing)
        if packing is None or hidden is None:
            return None
        if not path.everywhere(bool(hidden.detach().isfinite().all())):
            return None  # the padded path says which tokens it is, and raises or leaves them out
        kept = slice(None) if mask is inputs["completion_mask"] else mask.reshape(-1).bool()[packing.slots]
        if not path.everywhere(not isinstance(kept, Tensor) or bool(kept.any())):
            return None  # nothing counts: a zero with a gradient, as the padded path gives it
        reference = None
        if "reference" in objective.needs_logits_of:
            reference = self.scorer.reference_anchor(model, packing, kept)
            if reference is None:
                return None
        teacher = None
        if self._reads_teacher(inputs):
            teacher = self.scorer.teacher_anchor(model, inputs, packing, kept)
            if teacher is None:
                return None

        def weight(logp: Tensor, entropy: Tensor) -> Tensor | None:
            return self._policy_weight(Scored(logp=logp, entropy=entropy), inputs, mask)

        # A function where the factor depends on the scores, or where two sweeps are wanted.
        by_scores = self.settings.weighs_by_scores or moment.with_share
        output, logp, entropy = objective_from_hidden(
            objective,
            hidden[kept],
            path.head(causal),
            packing.tokens[kept],
            mask=mask,
            reference=reference,
            teacher=teacher,
            weight=weight if by_scores else weight(mask, mask),  # looks at neither
            entropy_weight=self._entropy_weight(moment),
            **self._common(inputs, moment),
        )
        if not path.everywhere(bool(output.loss.detach().isfinite())):
            return None  # finite hidden states, but logits that are not: as above
        return output, Scored(logp=logp, entropy=entropy)

    def padded(
        self, model: nn.Module, inputs: dict[str, Any], mask: Tensor, moment: Moment
    ) -> tuple[Output, Scored, Tensor]:
        """Loss, metrics, scores and usable tokens of a padded micro-batch; without TRL's bonuses.

        Args:
            model: the policy.
            inputs: the micro-batch.
            mask: (B, T), the tokens that count.
            moment: where the run is.
        """
        objective = self.objective
        scored = self.scorer.padded(model, inputs, with_logits=objective.needs_logits)
        mask = self.nonfinite.usable({"logp": scored.logp}, mask, moment.step)
        of_reference = "reference" in objective.needs_logits_of
        output = objective(
            logp=scored.logp,
            mask=mask,
            weight=self._policy_weight(scored, inputs, mask),
            logits=scored.logits,
            logits_ref=self.scorer.reference_logits(model, inputs) if of_reference else None,
            logits_old=inputs.get("old_logits"),
            logits_teacher=self.scorer.teacher_logits(model, inputs) if self._reads_teacher(inputs) else None,
            tokens=inputs["completion_ids"],
            entropy=scored.entropy,
            vocabulary=self.scorer.vocabulary(model) if "uniform" in objective.needs else None,
            **self._common(inputs, moment),
        )
        return output, scored, mask

    def token_weights(self, inputs: dict[str, Any], mask: Tensor, moment: Moment) -> Tensor:
        """(B, T): what each token's penalty, without its coefficient, weighs in the loss."""
        weights = aggregation_weights(
            mask,
            self.objective.aggregation,
            max_completion_length=self.settings.max_completion_length,
            num_tokens=self._num_tokens(inputs, moment),
        )
        return weights * (self._share(moment) * moment.penalty_factor)

    def _common(self, inputs: dict[str, Any], moment: Moment) -> dict[str, Any]:
        """Arguments that the objective takes from both layouts."""
        sparse = "teacher_indices" in inputs and "teacher" in self.objective.needs_logits_of
        top = (inputs["teacher_indices"], inputs["teacher_entries"]) if sparse else None
        return {
            "advantages": inputs["advantages"],
            "logp_old": inputs.get("old_per_token_logps"),
            "logp_ref": inputs.get("ref_per_token_logps"),
            "logp_sampler": inputs.get("sampling_per_token_logps"),
            "logp_teacher": inputs.get("teacher_per_token_logps"),
            "teacher_top": top,
            "max_completion_length": self.settings.max_completion_length,
            "num_tokens": self._num_tokens(inputs, moment),
            "penalty_scale": moment.penalty_factor,
        }

    def _idle(self, causal: nn.Module, attention: Tensor, advantages: Tensor) -> Tensor | None:
        """(B,), completions that have no gradient, as where all rewards of a group are equal; None: not worth it."""
        if not self.objective.follows_advantages or self.settings.entropy_bonus or not torch.is_grad_enabled():
            return None
        if self.settings.num_processes > 1 or self.scorer.packed.in_parts:
            return None  # all processes must go backward
        idle = (advantages.reshape(len(advantages), -1) == 0).all(1)
        return idle if pays(int(attention[idle].sum()), causal.parameters(), attention.device) else None

    def _reads_teacher(self, inputs: dict[str, Any]) -> bool:
        """Whether a local teacher's whole next-token distributions are needed."""
        return "teacher" in self.objective.needs_logits_of and "teacher_indices" not in inputs

    def _num_tokens(self, inputs: dict[str, Any], moment: Moment) -> Tensor | None:
        """This micro-batch's share of an optimiser step's tokens (TRL counts those of a whole generation batch)."""
        if self.objective.aggregation != "token_mean":
            return None
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.settings.num_processes
        if moment.training:
            tokens = tokens * moment.accumulation / self.settings.steps_per_generation
        return tokens

    def _entropy_mask(self, scored: Scored, mask: Tensor) -> Tensor:
        """(B, T), 1 at the tokens of highest entropy, of which ``top_entropy_quantile`` says how many."""
        return self.entropy_mask(scored.entropy, mask, 1 - self.settings.top_entropy_quantile).float()

    def _policy_weight(self, scored: Scored, inputs: dict[str, Any], mask: Tensor) -> Tensor | None:
        """TRL's detached factors on the policy term: entropy mask, off-policy mask, the sampler's importance ratio."""
        settings = self.settings
        weight: Tensor | None = None
        if settings.top_entropy_quantile < 1.0:
            weight = self._entropy_mask(scored, mask)
        if settings.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps")
            old = scored.logp.detach() if old is None else old
            advantages = inputs["advantages"]
            factor = GRPOTrainer.get_off_policy_mask(
                advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
                per_token_logps=scored.logp,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=settings.off_policy_mask_threshold,
            ).float()
            weight = factor if weight is None else weight * factor
        factor = inputs.get(_SAMPLER_RATIO)
        if factor is not None:
            weight = factor if weight is None else weight * factor
        return weight

    def _share(self, moment: Moment) -> float:
        # `token_mean` has the whole step's tokens in its denominator already; the others average within a micro-batch.
        return self._each(moment) if self.objective.aggregation != "token_mean" else 1.0

    @staticmethod
    def _each(moment: Moment) -> float:
        """What averages over the micro-batches of an optimiser step."""
        return 1.0 / moment.accumulation if moment.training else 1.0

    def _entropy_weight(self, moment: Moment) -> float:
        """What the mean entropy is multiplied by in a loss that is multiplied by ``_share`` later."""
        return -self.settings.entropy_bonus * self._each(moment) / self._share(moment)

    def _with_bonuses(self, loss: Tensor, scored: Scored, mask: Tensor, moment: Moment) -> Tensor:
        """TRL's static entropy bonus and its load-balancing loss of mixture models, averaged over micro-batches."""
        if self.settings.entropy_bonus:
            # On the tokens that the policy term is restricted to.
            chosen = mask if self.settings.top_entropy_quantile == 1.0 else mask * self._entropy_mask(scored, mask)
            mean_entropy = (scored.entropy * chosen).sum() / chosen.sum().clamp(min=1.0)
            loss = loss - self.settings.entropy_bonus * mean_entropy * self._each(moment)
        if scored.aux_loss is not None:
            loss = loss + self.settings.aux_loss * scored.aux_loss * self._each(moment)
        return loss


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


def carried(objective: Objective, args: Any, *, drawn_here: bool) -> Objective:
    """The objective that is trained.

    Args:
        objective: as it was asked for.
        args: the trainer's.
        drawn_here: whether the policy generates by itself: then the sampler is the old policy.

    Raises:
        ValueError: a correction for the sampler that would count twice.
    """
    if "sampler" in objective.needs and drawn_here:
        objective = objective.drawn_by_policy()
        logger.warning("the policy generates by itself: anchor and behaviour 'sampler' are the old policy")
    corrects = "behaviour 'sampler', whose ratio" if objective.behaviour == "sampler" else "act 'truncate', which"
    if (objective.behaviour == "sampler" or objective.truncation) and args.vllm_importance_sampling_correction:
        raise ValueError(
            f"vllm_importance_sampling_correction must be False with {corrects} corrects already (in a recipe: "
            "train.vllm.correction none), got True"
        )
    return objective


def needs_padding(objective: Objective) -> str | None:
    """Why packed rows cannot carry the objective; None: they can."""
    for rule in objective.rules:
        if rule.region.needs_logits:
            return f"region {rule.region.name!r}"
    for p in objective.penalties:
        if p.needs_logits and p.anchor == "old":
            return p.what
    return None


def regroup(batches: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Micro-batches with completions of one prompt side by side, within each ``window`` of them.

    Args:
        batches: micro-batches of equal size as TRL makes them; tensors with the completions first, scalars, None.
        window: micro-batches of an optimiser step; it divides their number.

    Returns:
        As many, with the same completions in each window.

    Raises:
        ValueError: ``window`` does not divide the number of micro-batches.
    """
    if window < 1 or len(batches) % window:
        raise ValueError(f"window must divide the number of micro-batches, {len(batches)}, got {window}")
    made: list[dict[str, Any]] = []
    for first in range(0, len(batches), window):
        parts = batches[first : first + window]
        order = _by_prompt(torch.cat([p["prompt_ids"].masked_fill(p["prompt_mask"] == 0, -1) for p in parts]))
        size = len(order) // window
        for number in range(window):
            rows = order[number * size : (number + 1) * size]
            made.append({key: _taken(parts, key, rows) for key in parts[0]})
    return made


def _by_prompt(prompts: Tensor) -> Tensor:
    """Indices that put equal rows side by side, in the order of their first appearance."""
    group = prompts.unique(dim=0, return_inverse=True)[1]
    place = torch.arange(len(group), device=group.device)
    first = torch.full_like(place, len(group)).scatter_reduce(0, group, place, "amin")
    return first[group].argsort(stable=True)


def _taken(parts: list[dict[str, Any]], key: str, rows: Tensor) -> Any:
    values = [part[key] for part in parts]
    if values[0] is None or (isinstance(values[0], Tensor) and values[0].dim() == 0):
        return values[0]
    if isinstance(values[0], Tensor):
        return torch.cat(values)[rows.to(values[0].device)]
    flat = [item for value in values for item in value]
    return [flat[row] for row in rows.tolist()]


__all__ = [
    "LossComputer",
    "LossSettings",
    "MicroLoss",
    "Moment",
    "carried",
    "needs_padding",
    "penalty_share",
    "regroup",
]
