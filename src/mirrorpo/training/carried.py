"""What of an objective the trainer carries: the sampler's log-probabilities, no teacher yet."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from mirrorpo.losses.objective import Objective

logger = logging.get_logger(__name__)


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


__all__ = ["carried", "needs_padding"]
