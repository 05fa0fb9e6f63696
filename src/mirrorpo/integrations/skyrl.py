"""SkyRL: an objective of this library in its registry of policy losses, and in its KL term.

.. code-block:: text

    python -m skyrl.train.entrypoints.main_base trainer.override_entrypoint=mirrorpo.integrations.skyrl
        trainer.algorithm.policy_loss_type=mirrorpo:objective.yaml ...

``python -m mirrorpo.integrations skyrl FILE`` writes all settings. ``main`` registers the objective, checks the
settings and starts SkyRL's own run. The workers get the objective as text from SkyRL's registry; they need no file.

The call (NovaSky-AI/SkyRL, ``workers/worker.py`` and ``utils/ppo_utils.py`` in ``skyrl/backends/skyrl_train``, read
at commit a9564572): ``function(log_probs, old_log_probs, advantages, config=, loss_mask=, rollout_logprobs=)``, all
(B, T), gives ``(loss, metrics)``. The loss is the SUM over the tokens of the mask: SkyRL has multiplied the advantages
by the weight that makes it the average of ``loss_reduction``, so only surrogates in proportion to the advantage can be
carried. The reference's log-probabilities go to ``compute_approx_kl`` alone, whose result is averaged over each
sequence and over the sequences; it has no registry: that function is replaced wherever SkyRL has imported it.
"""

from __future__ import annotations

import inspect
import json
import shlex
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mirrorpo.config.objective_file import read_objective, read_spec
from mirrorpo.errors import InputError
from mirrorpo.integrations.shared import Reach, check_expressible, inline
from mirrorpo.losses.objective import Objective
from mirrorpo.losses.surrogates import SURROGATES

PREFIX = "mirrorpo:"
REACH = Reach(
    framework="SkyRL",
    aggregations={
        "token_mean": "loss_reduction=token_mean",
        "sequence_mean": "loss_reduction=sequence_mean",
        "constant": "loss_reduction=seq_mean_token_sum_norm",
    },
    advantages={
        "grpo": "advantage_estimator=grpo",
        "dr_grpo": "advantage_estimator=grpo, grpo_norm_by_std=false",
        "rloo": "advantage_estimator=rloo",
    },
    placements=frozenset({"loss", "reward"}),
    behaviours=frozenset({"old", "sampler"}),
    region_anchors=frozenset({"old", "sampler"}),
    penalty_anchors=frozenset({"reference"}),
)
# Their loss is in proportion to the advantage, so SkyRL's factor on the one is a factor on the other.
_PROPORTIONAL = ("clip", "truncated", "sigmoid", "geometric", "none")
_UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
_LOSS_PARAMETERS = ["log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"]
_KL_PARAMETERS = ["log_probs", "log_probs_base", "loss_mask", "kl_estimator_type"]

# The policy loss, called first, leaves for the KL term of the same forward pass what SkyRL does not hand it: the old
# and the engine's log-probabilities, and max_seq_len. A weak reference, so that no graph outlives its step.
_seen: tuple[weakref.ref[Tensor], Tensor | None, Tensor | None, int | None] | None = None


@lru_cache(maxsize=8)
def _objective(text: str) -> Objective:
    return _checked(read_objective(text))


def _checked(objective: Objective) -> Objective:
    check_expressible(objective, REACH)
    if objective.surrogate.name not in _PROPORTIONAL:
        raise InputError(
            f"SkyRL cannot express surrogate {objective.surrogate.name!r}: it hands advantages times the weight of the "
            f"average, and this loss is not in proportion to them. Legal: {', '.join(_PROPORTIONAL)}"
        )
    if objective.placed("loss") and objective.aggregation == "token_mean":
        raise InputError(
            "SkyRL cannot express aggregation 'token_mean' with a penalty in the loss: its KL term is averaged over "
            "each sequence. Legal: aggregation sequence_mean or constant; placement: reward; or no penalty"
        )
    return objective


@lru_cache(maxsize=8)
def _penalties_alone(text: str, placement: str) -> Objective:
    """What the KL term evaluates, in the loss or in the reward."""
    whole = _objective(text)
    penalties = tuple(replace(p, placement="loss") for p in whole.placed(placement))
    return replace(
        whole,
        rules=(),
        penalties=penalties,
        surrogate=SURROGATES["none"],
        options={},
        future_kl=None,
        behaviour=whole.behaviour if placement == "loss" else "old",  # the policy itself has drawn the tokens there
    )


def policy_loss(
    text: str,
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The policy loss of a micro-batch, in SkyRL's registry with its first argument bound.

    Args:
        text: the objective, in braces.
        log_probs: (B, T), and so the others, under the names of SkyRL.
        old_log_probs: as the trainer scored them before the update.
        advantages: times the weight of SkyRL's average.
        config: SkyRL's ``trainer.algorithm``.
        loss_mask: 0 drops a token.
        rollout_logprobs: as the engine reported them.

    Returns:
        The sum over the tokens of the mask, and metrics as numbers.

    Raises:
        InputError: a setting that contradicts the objective, or log-probabilities that it needs and SkyRL did not send.

    Reference: ``ppo_policy_loss`` in skyrl/backends/skyrl_train/utils/ppo_utils.py; tests/integrations/test_skyrl.py.
    """
    global _seen
    load()
    check(text, config)
    objective = replace(_objective(text), penalties=())
    if "sampler" in _objective(text).needs and rollout_logprobs is None:
        raise InputError(
            f"objective {objective.name!r} needs the sampler's log-probabilities and SkyRL sent no rollout_logprobs: "
            "set generator.sampling_params.logprobs=1, or behaviour and anchors 'old'"
        )
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    terms = objective.terms(
        logp=log_probs,
        logp_old=old_log_probs,
        logp_sampler=rollout_logprobs,
        advantages=advantages,
        mask=mask,
    )
    _seen = (weakref.ref(log_probs), old_log_probs, rollout_logprobs, config.max_seq_len)
    total = import_module(_UTILS).reduce_loss(terms.policy.masked_fill(~terms.mask, 0.0), mask)
    shown = {name: value for name, value in terms.metrics().items() if name.endswith(("/mean", "/frac"))}
    numbers = torch.stack([value.double() for value in shown.values()]).tolist()  # one transfer
    metrics = dict(zip((f"mirrorpo/{name}" for name in shown), numbers, strict=True))
    metrics["clip_ratio"] = metrics["mirrorpo/clip/low/frac"] + metrics["mirrorpo/clip/high/frac"]
    return total, metrics


def _kl_term(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """SkyRL's ``compute_approx_kl``, which also knows ``mirrorpo:`` names."""

    def compute_approx_kl(
        log_probs: Tensor,
        log_probs_base: Tensor,
        loss_mask: Tensor | None = None,
        kl_estimator_type: str = "k3",
    ) -> Tensor:
        if not kl_estimator_type.startswith(PREFIX):
            return theirs(log_probs, log_probs_base, loss_mask, kl_estimator_type)
        text = kl_estimator_type.removeprefix(PREFIX)
        in_loss = log_probs.requires_grad
        objective = _penalties_alone(text, "loss" if in_loss else "reward")
        old = sampler = longest = None
        if in_loss and _seen is not None and _seen[0]() is log_probs:
            _, old, sampler, longest = _seen
        elif in_loss:
            raise InputError(
                f"SkyRL called its KL term without the policy loss of {kl_estimator_type!r}: policy_loss_type must be "
                "the same as kl_estimator_type"
            )
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        per_token = objective.terms(
            logp=log_probs, logp_old=old, logp_sampler=sampler, logp_ref=log_probs_base, mask=mask
        ).penalty
        assert per_token is not None
        if longest is not None and objective.aggregation == "constant":  # SkyRL divides by the sequence's tokens
            per_token = per_token * (mask.bool().sum(-1, keepdim=True) / longest)
        return per_token

    compute_approx_kl.mirrorpo = True  # pyright: ignore[reportFunctionMemberAccess]
    return compute_approx_kl


def load() -> None:
    """Puts the KL term in, wherever SkyRL has imported its own, and checks the calls; once in each process.

    Raises:
        TypeError: SkyRL's functions are not those that this module was written for.
    """
    utils = import_module(_UTILS)
    theirs = utils.compute_approx_kl
    if not hasattr(theirs, "mirrorpo"):
        expected = {"ppo_policy_loss": _LOSS_PARAMETERS, "compute_approx_kl": _KL_PARAMETERS}
        expected["reduce_loss"] = ["loss", "loss_mask"]
        for name, names in expected.items():
            found = list(inspect.signature(getattr(utils, name)).parameters)
            if found != names:
                raise TypeError(f"SkyRL's {name} takes {found}, expected {names}: its call moved since commit a9564572")
        vars(utils)["compute_approx_kl"] = _kl_term(theirs)
    for name, module in list(sys.modules.items()):
        given = vars(module).get("compute_approx_kl") if name.startswith("skyrl.") else None
        if given is not None and not hasattr(given, "mirrorpo"):
            vars(module)["compute_approx_kl"] = vars(utils)["compute_approx_kl"]


def check(text: str, algorithm: Any) -> None:
    """Raises ``InputError`` unless SkyRL's ``trainer.algorithm`` asks for the whole objective, and for it once."""
    objective = _objective(text)
    correction = algorithm.off_policy_correction
    for name, wanted in _wanted(objective, algorithm.policy_loss_type).items():
        given = getattr(algorithm, name)
        if given != wanted:
            raise InputError(
                f"trainer.algorithm.{name} must be {wanted!r} for objective {objective.name!r} "
                f"({objective.aggregation} aggregation, {objective.advantage} advantages), got {given!r}"
            )
    for name in ("tis_ratio_type", "sequence_mask_metric", *_THRESHOLDS):
        if getattr(correction, name) is not None:
            raise InputError(
                f"trainer.algorithm.off_policy_correction.{name} must be null with objective {objective.name!r}, got "
                f"{getattr(correction, name)!r}: SkyRL's own losses alone apply it. Legal: behaviour: sampler, or "
                "regions with anchor sampler (act truncate or mask)"
            )


_THRESHOLDS = [f"{what}_is_threshold_{side}" for what in ("outlier_token", "token_mask") for side in ("low", "high")]


def _wanted(objective: Objective, name: str) -> dict[str, Any]:
    """The value of each setting that decides what the objective's loss is."""
    in_loss, in_reward = bool(objective.placed("loss")), bool(objective.placed("reward"))
    wanted: dict[str, Any] = {
        "loss_reduction": REACH.aggregations[objective.aggregation].partition("=")[2],
        "advantage_estimator": "rloo" if objective.advantage == "rloo" else "grpo",
        "advantage_batch_normalize": False,  # once more, over the batch
        "use_tis": False,
        "use_kl_loss": in_loss,
        "use_kl_in_reward": in_reward,
    }
    if objective.advantage != "rloo":
        wanted["grpo_norm_by_std"] = objective.advantage == "grpo"
    if in_loss or in_reward:
        wanted |= {"kl_estimator_type": name, "kl_loss_coef": 1.0}
    return wanted


def settings(source: str, objective: Objective) -> str:
    """SkyRL's command-line settings for an objective file, one argument a line, quoted for a shell.

    Raises:
        InputError: what SkyRL cannot express.
    """
    _checked(objective)
    # Quoted once more: SkyRL reads what stands behind the = as YAML.
    name = f"'{PREFIX}{inline(source)}'"
    lines = {"trainer.override_entrypoint": __name__, "trainer.algorithm.policy_loss_type": name}
    for key, value in _wanted(objective, name).items():
        lines[f"trainer.algorithm.{key}"] = str(value).lower() if isinstance(value, bool) else str(value)
    if objective.placed("reward"):
        lines["trainer.algorithm.kl_ctrl.type"] = "fixed"
    if "sampler" in objective.needs:
        lines["generator.sampling_params.logprobs"] = "1"
    if objective.aggregation == "constant":
        lines["trainer.algorithm.max_seq_len"] = "${generator.sampling_params.max_generate_length}"
    return "\n".join(shlex.quote(f"{key}={value}") for key, value in lines.items())


def register(name: str) -> str:
    """Puts the objective of ``mirrorpo:FILE`` (or a text, or a preset) into SkyRL's registry; returns its name there.

    Raises:
        InputError: no ``mirrorpo:`` name, an objective that cannot be read, or that SkyRL cannot express.
    """
    if not name.startswith(PREFIX):
        raise InputError(f"trainer.algorithm.policy_loss_type must be {PREFIX}FILE, got {name!r}")
    text = json.dumps(read_spec(name.removeprefix(PREFIX)))
    _objective(text)
    full = f"{PREFIX}{text}"
    registry = import_module(_UTILS).PolicyLossRegistry
    if full not in registry.list_available():
        registry.register(full, partial(policy_loss, text))
    return full


def main(arguments: list[str] | None = None) -> None:
    """SkyRL's entry point (``trainer.override_entrypoint``): registers, checks, and starts SkyRL's own run."""
    base = import_module("skyrl.train.entrypoints.main_base")
    given = sys.argv[1:] if arguments is None else arguments
    own = "trainer.override_entrypoint="
    cfg = base.SkyRLTrainConfig.from_cli_overrides([item for item in given if not item.startswith(own)])
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
    text = algorithm.policy_loss_type.removeprefix(PREFIX)
    check(text, algorithm)
    objective = _objective(text)
    if cfg.trainer.fully_async.enabled and "old" in objective.needs:
        raise InputError(
            f"objective {objective.name!r} needs the old policy, which SkyRL's fully asynchronous training does not "
            "keep: set behaviour: sampler and regions with that anchor, or trainer.fully_async.enabled=false"
        )


def run(cfg: Any) -> None:
    """SkyRL's training, in the process of its controller, whose KL in the reward may be ours."""
    base = import_module("skyrl.train.entrypoints.main_base")
    import_module("skyrl.train.trainer")
    load()
    base.BasePPOExp(cfg).run()
