"""Names and settings for verl: what a ``mirrorpo:`` name means, and which settings say the same as an objective.

Needs no verl.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mirrorpo.config.objective_file import SUFFIXES
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.divergences import ESTIMATORS
from mirrorpo.errors import InputError
from mirrorpo.integrations.shared import PREFIX, Reach, assignments, check_expressible, expressible, quoted_name
from mirrorpo.losses.objective import Objective, Penalty
from mirrorpo.losses.presets import PRESETS
from mirrorpo.losses.regions import resolve_divergence

REACH = Reach(
    framework="verl",
    aggregations={
        "token_mean": {"loss_agg_mode": "token-mean"},
        "sequence_mean": {"loss_agg_mode": "seq-mean-token-mean"},
        "constant": {"loss_agg_mode": "seq-mean-token-sum-norm"},
    },
    advantages={
        "grpo": {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True},
        "dr_grpo": {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False},
        "rloo": {"adv_estimator": "rloo"},
    },
    kl_term=("token_mean", "sequence_mean", "constant"),
)
CALCULATE = "actor_rollout_ref.rollout.calculate_log_probs"
_HOOK_ESTIMATORS = ("sampled", "weighted", "score")


def loss_objective(name: str) -> Objective:
    """The objective of a policy loss's name, ``mirrorpo:`` and a preset, a file or a text in braces."""
    return expressible(name.removeprefix(PREFIX), REACH)


@lru_cache(maxsize=16)
def penalties_of(name: str) -> tuple[Penalty, ...]:
    """The penalties of a KL penalty's name.

    Args:
        name: ``mirrorpo:`` and a divergence's name, ``{divergence: ..., estimator: ...}``, or an objective.

    Returns:
        An objective's penalties with their coefficients, or one divergence with coefficient 1 (verl has its own).

    Raises:
        InputError: a name or key that does not exist, an estimator that needs logits, an objective without penalty.
    """
    if is_objective(name):
        return _penalties_of_objective(name)
    spec = _mapping(name)
    unknown = sorted(set(spec) - {"divergence", "estimator"})
    if unknown or "divergence" not in spec:
        raise InputError(
            f"{name}: has the keys {sorted(spec)}. Legal: divergence, estimator (the coefficient is verl's); or preset "
            "and the overrides of an objective"
        )
    estimator = spec.get("estimator", "sampled")
    if estimator not in _HOOK_ESTIMATORS:
        why = "needs logits, which verl's hook does not get" if estimator in ESTIMATORS else "does not exist"
        raise InputError(f"{name}: estimator {estimator!r} {why}. Legal: {', '.join(_HOOK_ESTIMATORS)}")
    try:
        d = resolve_divergence(spec["divergence"])
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    return (Penalty(divergence=d, estimator=estimator, coefficient=1.0),)


def is_objective(name: str) -> bool:
    """Whether a KL penalty's name is an objective, with coefficients of its own, and not a divergence only."""
    return name.endswith(SUFFIXES) or name.removeprefix(PREFIX) in PRESETS or "preset" in _mapping(name)


def _mapping(name: str) -> dict[str, Any]:
    text = name.removeprefix(PREFIX).strip()
    spec: Any = parse_yaml(text, name) if text.startswith("{") else {"divergence": text}
    if not isinstance(spec, dict):
        raise InputError(f"{name}: must be a divergence, or a mapping with the keys divergence and estimator")
    return spec


def _penalties_of_objective(name: str) -> tuple[Penalty, ...]:
    objective = loss_objective(name)
    if not objective.penalties:
        raise InputError(f"{name}: objective {objective.name!r} has no penalty: give divergence and coefficient")
    return objective.penalties


def overrides(source: str, objective: Objective) -> list[str]:
    """verl's command-line settings for an objective file, one argument each; workers need no file.

    Args:
        source: what ``read_spec`` takes.
        objective: the same, built.

    Returns:
        ``key=value`` for ``python -m verl.trainer.main_ppo``.

    Raises:
        InputError: what verl cannot express.
    """
    check_expressible(objective, REACH)
    actor, name = "actor_rollout_ref.actor", quoted_name(source)
    lines: dict[str, Any] = {f"{actor}.policy_loss.loss_mode": name}
    lines |= {f"{actor}.{key}": value for key, value in REACH.aggregations[objective.aggregation].items()}
    lines |= {f"algorithm.{key}": value for key, value in REACH.advantages[objective.advantage].items()}
    if objective.aggregation == "constant":
        lines[f"{actor}.loss_scale_factor"] = "${data.max_response_length}"
    in_loss, in_reward = bool(objective.placed("loss")), bool(objective.placed("reward"))
    lines |= {
        f"{actor}.use_kl_loss": in_loss,
        "algorithm.use_kl_in_reward": in_reward,
        "algorithm.rollout_correction.bypass_mode": False,  # it puts a loss of its own in place of any other
    }
    if "sampler" in objective.needs:
        lines |= {CALCULATE: True, "algorithm.rollout_correction.rollout_is": "null"}
    if in_loss:
        lines |= {f"{actor}.kl_loss_coef": 1.0, f"{actor}.kl_loss_type": name}
    if in_reward:
        lines |= {"algorithm.kl_penalty": name, "algorithm.kl_ctrl.type": "fixed", "algorithm.kl_ctrl.kl_coef": 1.0}
    return assignments(lines)
