"""verl: an objective of this library as a policy loss and a KL penalty, by names in verl's own YAML.

.. code-block:: yaml

    actor_rollout_ref.actor:
      policy_loss: {loss_mode: "mirrorpo:{preset: grpo, region: {name: kl3, radius: 0.03}}"}
      kl_loss_type: "mirrorpo:js"                 # any divergence; its coefficient is kl_loss_coef
    algorithm:
      kl_penalty: "mirrorpo:{divergence: {name: beta, beta: 0.5}}"     # the same in the reward

After ``mirrorpo:`` stands an objective file (a path that every worker sees), the text of one in braces, or one name: of
a preset, or for a penalty of a divergence. A penalty given as an objective has its coefficients; then ``kl_loss_coef``
must be 1. Anchor and behaviour ``sampler`` read ``rollout_log_probs``, which verl has where
``actor_rollout_ref.rollout.calculate_log_probs`` is true. ``python -m mirrorpo.integrations verl FILE`` writes all
settings of an objective file.

verl loads this module in every process by ``VERL_USE_EXTERNAL_MODULES=mirrorpo.integrations.verl``, or by itself where
mirrorpo is installed (entry point ``verl.plugins``). At load the hooks are compared with those of verl 0.9.1: a seam
that moved raises ``SeamError``. (verl hides what an entry point raises, so it is logged as an error too, and every
``mirrorpo:`` name is then unknown to verl, which raises.) Settings are checked when verl builds its actor's config.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache, wraps
from typing import Any

import torch
import verl
import verl.trainer.ppo.core_algos as core
from packaging.version import Version
from torch import Tensor
from verl.workers.config import ActorConfig

from mirrorpo.divergences import divergence
from mirrorpo.errors import InputError
from mirrorpo.integrations import shared
from mirrorpo.integrations.shared import PREFIX, SeamError
from mirrorpo.integrations.verl_settings import CALCULATE, REACH, is_objective, loss_objective, penalties_of
from mirrorpo.losses.objective import Objective

SUPPORTED = (Version("0.9.1"), Version("0.10"))  # from, up to but not with
logger = logging.getLogger("mirrorpo.integrations.verl")

_CALLS = {
    "compute_policy_loss_vanilla": (
        "old_log_prob",
        "log_prob",
        "advantages",
        "response_mask",
        "loss_agg_mode",
        "config",
        "rollout_is_weights",
    ),
    "kl_penalty": ("logprob", "ref_logprob", "kl_penalty"),
    "get_policy_loss_fn": ("name",),
}
_CONFIG_FIELDS = {"policy_loss", "loss_agg_mode", "loss_scale_factor", "use_kl_loss", "kl_loss_coef", "kl_loss_type"}


_passed = shared.Passed()  # the rollout policy's log-probabilities
# What the rollout engine reported, (B, T), during verl's ``ppo_loss``, which hands it to no policy loss.
_reported: Tensor | None = None


@lru_cache(maxsize=16)
def policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """verl's policy loss of a ``mirrorpo:`` name.

    Args:
        name: ``mirrorpo:`` and an objective; see the module.

    Returns:
        A function of verl's signature: log-probabilities, advantages and mask (B, T) to ``(loss, metrics)``; the
        average is ``verl.trainer.ppo.core_algos.agg_loss`` with verl's global counts.

    Raises:
        InputError: an objective that cannot be read, or that verl cannot express.

    Reference: ``compute_policy_loss_vanilla`` in verl/trainer/ppo/core_algos.py, verl 0.9.1.
    """
    objective = shared.policy_alone(loss_objective(name))

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        sampler = _sampler(objective, rollout_is_weights)
        terms = objective.terms(
            logp=log_prob,
            logp_old=old_log_prob,
            logp_sampler=sampler,
            advantages=advantages,
            mask=response_mask,
            weight=rollout_is_weights,
        )
        _passed.leave(log_prob, old_log_prob if sampler is None or objective.behaviour == "old" else sampler)
        total = core.agg_loss(
            loss_mat=terms.policy, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        return total, _metrics(terms.metrics(), log_prob, old_log_prob, response_mask)

    return loss


def _sampler(objective: Objective, weights: Tensor | None) -> Tensor | None:
    """The engine's log-probabilities, where the objective needs them; (B, T)."""
    if "sampler" not in objective.needs:
        return None
    remedy = f"set {CALCULATE}=True, or behaviour and anchors 'old'"
    shared.need("sampler", objective, _reported, "verl sent no rollout_log_probs", remedy)
    if weights is not None and (objective.behaviour == "sampler" or objective.truncation):
        raise InputError(
            f"algorithm.rollout_correction.rollout_is must be null with objective {objective.name!r}, whose own ratio "
            "to the sampler corrects already"
        )
    return _reported


def _keeping(ppo_loss: Callable[..., Any]) -> Callable[..., Any]:
    """verl's ``ppo_loss``, which keeps the engine's log-probabilities for the policy loss that it calls."""

    @wraps(ppo_loss)
    def keeping(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
        global _reported
        if "rollout_log_probs" in data:
            _reported = data.select("rollout_log_probs").to_padded_tensor()["rollout_log_probs"]
        try:
            return ppo_loss(config, model_output, data, dp_group)
        finally:
            _reported = None

    return keeping


def _metrics(ours: dict[str, Tensor], log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> dict[str, float]:
    """Python numbers; verl's names for those that its dashboards show."""
    kept = mask.bool() & old_log_prob.isfinite()
    moved = torch.where(kept, old_log_prob - log_prob.detach(), 0.0).sum() / kept.sum().clamp(min=1)
    named = shared.numbers({**shared.means(ours), "actor/ppo_kl": moved})
    low, high = named["mirrorpo/clip/low/frac"], named["mirrorpo/clip/high/frac"]
    return {**named, "actor/pg_clipfrac": low + high, "actor/pg_clipfrac_lower": low}


_verl_kl_penalty = core.kl_penalty


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """verl's ``kl_penalty``, which also knows ``mirrorpo:`` names.

    Args:
        logprob: (B, T), of the sampled tokens under the policy.
        ref_logprob: (B, T), the same under the reference.
        kl_penalty: verl's own name, or ``mirrorpo:`` and a divergence or an objective.

    Returns:
        (B, T), the estimate per token; an objective's penalties come with their coefficients.

    Raises:
        InputError: a name that cannot be read.
        ValueError: an estimator that needs the rollout policy's log-probabilities, which only a ``mirrorpo:`` policy
            loss passes on.

    Reference: ``kl_penalty`` in verl/trainer/ppo/core_algos.py, verl 0.9.1.
    """
    if not kl_penalty.startswith(PREFIX):
        return _verl_kl_penalty(logprob, ref_logprob, kl_penalty)  # pyright: ignore[reportArgumentType]
    total = torch.zeros_like(logprob)
    for p in penalties_of(kl_penalty):
        needs_old = p.estimator != "sampled"
        old = _rollout_policy(logprob, p.estimator) if needs_old else logprob.detach()
        known = old.isfinite()  # the engine marks what it could not score
        value = p.divergence.estimate(
            p.estimator, logprob, ref_logprob, torch.where(known, old, logprob.detach().to(old.dtype))
        )
        total = total + p.coefficient * torch.where(known, value, 0.0)
    return total


def _rollout_policy(logprob: Tensor, estimator: str) -> Tensor:
    passed = _passed.of(logprob)
    if passed is not None:
        return passed
    if not logprob.requires_grad:
        return logprob  # the penalty in the reward: the tokens were sampled from this policy
    raise ValueError(
        f"estimator {estimator!r} needs the rollout policy's log-probabilities, and verl hands them to the policy loss "
        "only: set actor.policy_loss.loss_mode to a mirrorpo: name, or estimator: sampled"
    )


class _Registry(dict):
    """verl's table of policy losses, in which every ``mirrorpo:`` name is a key."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(PREFIX))

    def __missing__(self, name: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
        return policy_loss(name)


def check_config(config: Any) -> None:
    """Raises ``InputError`` unless an actor's settings ask for the whole objective, and for it once.

    Args:
        config: verl's ``ActorConfig``.
    """
    mode, kind = config.policy_loss.loss_mode, config.kl_loss_type
    whole = kind.startswith(PREFIX) and is_objective(kind)
    if kind.startswith(PREFIX):
        penalties_of(kind)
    if not mode.startswith(PREFIX):
        if whole and config.use_kl_loss:
            raise InputError(
                f"actor.policy_loss.loss_mode must be {kind!r} like actor.kl_loss_type, or that a divergence only, "
                f"got {mode!r}"
            )
        return
    objective = loss_objective(mode)
    shared.check_settings("actor.", config, REACH.aggregations[objective.aggregation], objective)
    in_loss = bool(objective.placed("loss"))
    if in_loss:
        wanted = {"use_kl_loss": True, "kl_loss_coef": 1.0, "kl_loss_type": mode}
        shared.check_settings("actor.", config, wanted, objective, "its penalty would be off or wrong")
    if objective.aggregation == "constant" and config.loss_scale_factor is None:
        raise InputError(
            "actor.loss_scale_factor must be data.max_response_length for aggregation 'constant', got None"
        )
    if whole and config.use_kl_loss and not in_loss:
        raise InputError(
            f"actor.use_kl_loss must be False: objective {objective.name!r} has no penalty in the loss, got True with "
            f"{kind!r}"
        )


def load() -> None:
    """Puts the hooks in and checks that verl uses them.

    Raises:
        SeamError: verl's signatures, fields or imports are not those of 0.9.1; says which.
    """
    _check_version()
    _check_signatures()
    core.POLICY_LOSS_REGISTRY = _Registry(core.POLICY_LOSS_REGISTRY)
    import verl.workers.utils.losses as losses

    shared.rebind("verl", _verl_kl_penalty, kl_penalty)
    shared.rebind("verl", losses.ppo_loss, _keeping(losses.ppo_loss))
    _check_settings_at_start()
    _check_in_use(losses)


def _check_version() -> None:
    found = Version(verl.__version__)
    # A development version of the first that was not tested is not one of those that were: 0.10.0.dev0 < 0.10.
    if not SUPPORTED[0] <= found or Version(found.base_version) >= SUPPORTED[1]:
        warnings.warn(
            f"mirrorpo was tested with verl >={SUPPORTED[0]},<{SUPPORTED[1]}, this is {found}: compare "
            "its loss with mirrorpo.objective on a batch before you trust a run",
            stacklevel=2,
        )


def _check_signatures() -> None:
    shared.check_calls(f"verl {verl.__version__}", core, _CALLS)
    missing = {"loss_mat", "loss_mask", "loss_agg_mode"} - set(inspect.signature(core.agg_loss).parameters)
    missing |= _CONFIG_FIELDS - {field.name for field in fields(ActorConfig)}
    if missing:
        raise SeamError(_moved(f"agg_loss or ActorConfig has no {sorted(missing)[0]!r}"))


def _check_settings_at_start() -> None:
    """Every actor config is checked when it is built: on the driver, before a worker loads a model."""
    inner = ActorConfig.__post_init__

    def __post_init__(self: Any) -> None:
        inner(self)
        check_config(self)

    ActorConfig.__post_init__ = __post_init__


def _check_in_use(losses: Any) -> None:
    if list(inspect.signature(losses.ppo_loss).parameters) != ["config", "model_output", "data", "dp_group"]:
        raise SeamError(_moved("ppo_loss takes other parameters than config, model_output, data, dp_group"))
    logp = torch.tensor([[-0.5, -2.0]])
    ref = torch.tensor([[-1.0, -1.0]])
    for module in (core, losses):
        given = module.kl_penalty(logprob=logp, ref_logprob=ref, kl_penalty=f"{PREFIX}js")
        if not torch.equal(given, divergence("js").sampled(logp, ref)):
            raise SeamError(_moved(f"{module.__name__}.kl_penalty does not reach this module"))
    if losses.get_policy_loss_fn(f"{PREFIX}dr_grpo") is not policy_loss(f"{PREFIX}dr_grpo"):
        raise SeamError(_moved("get_policy_loss_fn does not reach this module"))
    if "policy_loss_fn(" not in inspect.getsource(losses.ppo_loss) or "kl_penalty(" not in inspect.getsource(
        losses.ppo_loss
    ):
        raise SeamError(_moved("verl.workers.utils.losses.ppo_loss calls neither policy_loss_fn nor kl_penalty"))


def _moved(what: str) -> str:
    return f"verl {verl.__version__}: {what}. The hook moved; mirrorpo supports verl >={SUPPORTED[0]},<{SUPPORTED[1]}"


try:
    load()
except SeamError as error:
    logger.error("%s", error)  # verl hides what a plugin raises
    raise
