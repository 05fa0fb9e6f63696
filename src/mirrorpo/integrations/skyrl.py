"""SkyRL: an objective of this library in its registry of policy losses, and in its KL term.

.. code-block:: text

    python -m skyrl.train.entrypoints.main_base trainer.override_entrypoint=mirrorpo.integrations.skyrl
        trainer.algorithm.policy_loss_type=mirrorpo:objective.yaml ...

``python -m mirrorpo.integrations skyrl FILE`` writes all settings. Workers get the objective as text and need no file.

The call (NovaSky-AI/SkyRL, ``worker.py`` and ``ppo_utils.py`` in ``skyrl/backends/skyrl_train``, read at commit
a9564572): ``function(log_probs, old_log_probs, advantages, config=, loss_mask=, rollout_logprobs=)``, all (B, T), gives
``(loss, metrics)``. The loss is the SUM over the tokens of the mask: SkyRL has multiplied the advantages by the weight
that makes it the average of ``loss_reduction``. The reference's log-probabilities go to ``compute_approx_kl`` alone,
whose result is averaged over each sequence, then over the sequences; it is replaced wherever SkyRL has imported it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mirrorpo.errors import InputError
from mirrorpo.integrations import shared
from mirrorpo.integrations.shared import PREFIX
from mirrorpo.losses.objective import Objective

REACH = shared.Reach(
    framework="SkyRL",
    aggregations={
        "token_mean": {"loss_reduction": "token_mean"},
        "sequence_mean": {"loss_reduction": "sequence_mean"},
        "constant": {"loss_reduction": "seq_mean_token_sum_norm"},
    },
    advantages={
        "grpo": {"advantage_estimator": "grpo", "grpo_norm_by_std": True},
        "dr_grpo": {"advantage_estimator": "grpo", "grpo_norm_by_std": False},
        "rloo": {"advantage_estimator": "rloo"},
    },
    kl_term=("sequence_mean", "constant"),
    scaled=True,
)
_UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
_CALLS = {
    "ppo_policy_loss": ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"),
    "compute_approx_kl": ("log_probs", "log_probs_base", "loss_mask", "kl_estimator_type"),
    "reduce_loss": ("loss", "loss_mask"),
}
_passed = shared.Passed()


def policy_loss(
    text: str,
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The policy loss of a micro-batch, in SkyRL's registry with its first argument, the objective, bound.

    Returns:
        The sum over the tokens of the mask, and metrics as numbers.

    Raises:
        InputError: a setting that contradicts the objective, or log-probabilities that it needs and SkyRL did not send.
    """
    load()
    objective = check(text, config)
    remedy = "set generator.sampling_params.logprobs=1, or behaviour and anchors 'old'"
    shared.need("sampler", objective, rollout_logprobs, "SkyRL sent no rollout_logprobs", remedy)
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    rollouts: dict[str, Any] = {"logp_old": old_log_probs, "logp_sampler": rollout_logprobs}
    terms = shared.policy_alone(objective).terms(logp=log_probs, advantages=advantages, mask=mask, **rollouts)
    _passed.leave(log_probs, (rollouts, config.max_seq_len))
    total = import_module(_UTILS).reduce_loss(terms.policy.masked_fill(~terms.mask, 0.0), mask)
    metrics = shared.numbers(shared.means(terms.metrics()))
    metrics["clip_ratio"] = metrics["mirrorpo/clip/low/frac"] + metrics["mirrorpo/clip/high/frac"]
    return total, metrics


def kl_term(
    theirs: Callable[..., Tensor],
    log_probs: Tensor,
    log_probs_base: Tensor,
    loss_mask: Tensor | None = None,
    kl_estimator_type: str = "k3",
) -> Tensor:
    """SkyRL's ``compute_approx_kl``, given first, which also knows ``mirrorpo:`` names; (B, T)."""
    if not kl_estimator_type.startswith(PREFIX):
        return theirs(log_probs, log_probs_base, loss_mask, kl_estimator_type)
    objective = shared.expressible(kl_estimator_type.removeprefix(PREFIX), REACH)
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    rollouts, longest = _passed.of(log_probs) or ({}, None)
    if objective.placement == "loss" and not rollouts:
        raise InputError(f"policy_loss_type must be the kl_estimator_type, {kl_estimator_type!r}: it was not called")
    penalty = shared.penalty_alone(objective, logp=log_probs, logp_ref=log_probs_base, mask=mask, **rollouts)
    if longest is None or objective.aggregation != "constant":
        return penalty
    return penalty * (mask.bool().sum(-1, keepdim=True) / longest)  # SkyRL divides by the sequence's tokens


def load() -> None:
    """Puts the KL term in wherever SkyRL has imported its own; ``SeamError`` if a call moved. Once in each process."""
    utils = import_module(_UTILS)
    theirs = utils.compute_approx_kl
    if not isinstance(theirs, partial):
        shared.check_calls("SkyRL", utils, _CALLS)
        shared.rebind("skyrl", theirs, partial(kl_term, theirs))


def check(text: str, algorithm: Any) -> Objective:
    """The objective, if SkyRL's ``trainer.algorithm`` asks for the whole of it, and once; else ``InputError``."""
    objective, correction = shared.expressible(text, REACH), algorithm.off_policy_correction
    wanted, none = _wanted(objective, algorithm.policy_loss_type), vars(type(correction)())
    shared.check_settings("trainer.algorithm.", algorithm, wanted, objective)
    why = "SkyRL's own losses alone apply it: set behaviour: sampler, or regions with that anchor"
    shared.check_settings("trainer.algorithm.off_policy_correction.", correction, none, objective, why)
    return objective


def _wanted(objective: Objective, name: str) -> dict[str, Any]:
    """The value of each setting that decides what the objective's loss is."""
    wanted = {
        **REACH.settings(objective),
        "advantage_batch_normalize": False,  # once more, over the batch
        "use_tis": False,
        "use_kl_loss": bool(objective.placed("loss")),
        "use_kl_in_reward": bool(objective.placed("reward")),
    }
    if objective.penalties:
        wanted |= {"kl_estimator_type": name, "kl_loss_coef": 1.0}
    if objective.placed("reward"):
        wanted["kl_ctrl.type"] = "fixed"
    return wanted


def settings(source: str, objective: Objective) -> str:
    """SkyRL's arguments for an objective file, one a line, quoted for a shell; else ``InputError``."""
    name = shared.quoted_name(source)
    algorithm = {"policy_loss_type": name, **_wanted(shared.check_expressible(objective, REACH), name)}
    lines: dict[str, Any] = {"trainer.override_entrypoint": __name__}
    lines |= {f"trainer.algorithm.{key}": value for key, value in algorithm.items()}
    if "sampler" in objective.needs:
        lines["generator.sampling_params.logprobs"] = 1
    if objective.aggregation == "constant":
        lines["trainer.algorithm.max_seq_len"] = "${generator.sampling_params.max_generate_length}"
    return "\n".join(map(shlex.quote, shared.assignments(lines)))


def register(name: str) -> str:
    """Puts the objective of ``mirrorpo:FILE`` (or text, or preset) into SkyRL's registry; returns its name there."""
    if not name.startswith(PREFIX):
        raise InputError(f"trainer.algorithm.policy_loss_type must be {PREFIX}FILE, got {name!r}")
    text = shared.as_text(name.removeprefix(PREFIX))
    shared.expressible(text, REACH)
    registry = import_module(_UTILS).PolicyLossRegistry
    if PREFIX + text not in registry.list_available():
        registry.register(PREFIX + text, partial(policy_loss, text))
    return PREFIX + text


def main() -> None:
    """SkyRL's entry point (``trainer.override_entrypoint``): registers, checks, and starts SkyRL's own run."""
    base = import_module("skyrl.train.entrypoints.main_base")
    given = [item for item in sys.argv[1:] if not item.startswith("trainer.override_entrypoint=")]
    cfg = base.SkyRLTrainConfig.from_cli_overrides(given)
    prepare(cfg)
    base.validate_cfg(cfg)
    base.initialize_ray(cfg)
    ray = import_module("ray")
    ray.get(ray.remote(num_cpus=1)(run).remote(cfg))


def prepare(cfg: Any) -> None:
    """Registers the objective that SkyRL's settings name, and checks them before anything starts."""
    algorithm = cfg.trainer.algorithm
    given = algorithm.policy_loss_type
    algorithm.policy_loss_type = register(given)
    if algorithm.kl_estimator_type == given:  # a file's name: the workers get the text
        algorithm.kl_estimator_type = algorithm.policy_loss_type
    objective = check(algorithm.policy_loss_type.removeprefix(PREFIX), algorithm)
    if cfg.trainer.fully_async.enabled and "old" in objective.needs:
        raise InputError(
            f"objective {objective.name!r} needs the old policy, which SkyRL's fully asynchronous training does not "
            "keep: set behaviour: sampler and regions with that anchor, or trainer.fully_async.enabled=false"
        )


def run(cfg: Any) -> None:
    """SkyRL's training, in the process of its controller, whose KL in the reward may be ours."""
    load()
    import_module("skyrl.train.entrypoints.main_base").BasePPOExp(cfg).run()
