"""slime: an objective of this library as its custom loss, called once for each micro-batch.

.. code-block:: text

    --loss-type custom_loss
    --custom-loss-function-path mirrorpo.integrations.slime.loss_function
    --custom-megatron-init-path mirrorpo.integrations.slime.check      (stops a wrong setting before the first rollout)
    MIRRORPO_OBJECTIVE=objective.yaml in the environment of the job

The documented call (THUDM/slime, ``slime/backends/megatron_utils/loss.py``, read at commit 624b824a):
``loss, metrics = function(args, batch, logits, sum_of_sample_mean)``. ``logits`` are (1, T, V) of the packed batch;
``batch`` holds one tensor for each sample, (response length,), under ``advantages``, ``log_probs`` (the rollout policy,
scored by the trainer), ``rollout_log_probs``, ``ref_log_probs``, ``loss_masks``. ``sum_of_sample_mean`` takes the
samples' tokens side by side and sums the samples' means (the tokens, with ``--calculate-per-token-loss``); slime then
divides by the samples (the tokens) of the whole step.
"""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mirrorpo.errors import InputError
from mirrorpo.integrations import shared
from mirrorpo.integrations.shared import pad_rows
from mirrorpo.losses.objective import Objective, TokenTerms

VARIABLE = "MIRRORPO_OBJECTIVE"
_SCORE_PARAMETERS = {"logits", "args", "unconcat_tokens", "total_lengths", "response_lengths", "with_entropy"}
_SCORE_PARAMETERS |= {"top_p_token_ids", "top_p_token_offsets"}
REACH = shared.Reach(
    framework="slime",
    aggregations={
        "sequence_mean": {"calculate_per_token_loss": False},
        "token_mean": {"calculate_per_token_loss": True},
        "constant": {"calculate_per_token_loss": False},  # with --rollout-max-response-len
    },
    advantages={"grpo": {"grpo_std_normalization": True}, "dr_grpo": {"grpo_std_normalization": False}},
)


def check(args: Any) -> Objective:
    """The objective of ``MIRRORPO_OBJECTIVE``, if slime's arguments ask for the same.

    Args:
        args: slime's arguments.

    Returns:
        The objective.

    Raises:
        InputError: no objective, one that slime cannot express, or an argument that contradicts it; names the argument
            and the value that it needs.
        SeamError: slime's arguments or functions are not those that are documented.
    """
    source = os.environ.get(VARIABLE, "")
    if not source:
        raise InputError(f"{VARIABLE} is not set: give an objective file, its text in braces, or a preset's name")
    objective = shared.expressible(source, REACH)
    shared.check_settings("slime: ", args, _wanted(objective), objective)
    missing = _SCORE_PARAMETERS - set(inspect.signature(_scored()).parameters)
    if missing:
        raise shared.SeamError(
            f"slime's get_log_probs_and_entropy takes no {sorted(missing)[0]!r}: its call moved; "
            f"mirrorpo passes {', '.join(sorted(_SCORE_PARAMETERS))}"
        )
    return objective


def _wanted(objective: Objective) -> dict[str, Any]:
    """The legal values of each argument that decides what the objective's loss is."""
    wanted = {
        **REACH.settings(objective),
        "loss_type": "custom_loss",  # any other never calls this module
        "custom_loss_function_path": f"{__name__}.loss_function",
        "context_parallel_size": 1,  # a sample would lie on several ranks; levels and geometric means need it whole
        "advantage_estimator": ("grpo", "gspo", "cispo"),  # one and the same: the group's normalised reward
        "rewards_normalization": True,  # the group's mean is subtracted only then
        "normalize_advantages": False,  # once more, over the batch
        "kl_coef": 0,  # a second penalty, in the rewards
        # Parts of slime's own policy loss, which a custom loss does not run.
        "use_tis": False,
        "use_opsm": False,
        "custom_pg_loss_reducer_function_path": None,
    }
    if objective.needs_reference:
        wanted["use_kl_loss"] = True  # slime scores with the reference only then; its own KL term is not run
    return wanted


def _scored() -> Callable[..., Any]:
    """slime's own scoring of the packed logits; it knows tensor and pipeline parallelism."""
    return import_module("slime.backends.megatron_utils.loss").get_log_probs_and_entropy


def loss_function(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's loss of a micro-batch, averaged by slime.

    Args:
        args: slime's arguments.
        batch: of samples; see the module.
        logits: (1, T, V), float32.
        sum_of_sample_mean: slime's average of (sum of response lengths,).

    Returns:
        The loss, and detached scalars by name.

    Raises:
        InputError: as in ``check``.
        ValueError: a penalty without reference log-probabilities.

    Reference: slime, ``loss_function`` in slime/backends/megatron_utils/loss.py; tests/integrations/test_slime.py.
    """
    objective = check(args)
    _, found = _scored()(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **_kept_tokens(args, batch),
    )
    terms = _terms(objective, args, batch, found)
    lengths = batch["response_lengths"]

    def average(x: Tensor) -> Tensor:
        return sum_of_sample_mean(shared.flat_rows(x, lengths))

    per_token, entropy = terms.loss, pad_rows(found["entropy"])
    if objective.aggregation == "constant":
        per_token = per_token * (_denominators(batch) / args.rollout_max_response_len)
    loss = average(per_token)
    if args.entropy_coef:
        loss = loss - args.entropy_coef * average(entropy)
    if terms.policy.numel() == 0:
        loss = loss + 0 * logits.sum()  # every rank must take part in the backward pass
    # slime divides what it logs as it divides the loss: a mean over tokens must come as the sum of its share.
    count = average(torch.ones_like(terms.policy))
    metrics = {name: value * count for name, value in shared.means(terms.metrics(entropy.detach())).items()}
    return loss, {"loss": loss.detach(), **metrics}


def _kept_tokens(args: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The tokens among which the engine drew, with top-p below 1: slime renormalised the old policy over them too."""
    if args.rollout_top_p == 1.0:
        return {}
    found = {name: batch.get(f"rollout_{name}") for name in ("top_p_token_ids", "top_p_token_offsets")}
    if any(value is None for value in found.values()):
        raise ValueError(
            f"slime: rollout_top_p is {args.rollout_top_p:g} and the batch has no rollout_top_p_token_ids: ratios "
            "would compare two different distributions. Set --rollout-top-p 1, or let the engine report the kept tokens"
        )
    return found


def _terms(objective: Objective, args: Any, batch: dict[str, Any], found: dict[str, list[Tensor]]) -> TokenTerms:
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    ref, sampler = batch.get("ref_log_probs") or None, batch.get("rollout_log_probs") or None
    remedy = "let the engine report them, or set behaviour and anchors to 'old'"
    shared.need("sampler", objective, sampler, "slime sent no rollout_log_probs", remedy)
    remedy = "give --use-kl-loss and --ref-load, or coefficient: 0"
    shared.need("reference", objective, ref, "slime sent no ref_log_probs", remedy)
    return objective.terms(
        logp=pad_rows(found["log_probs"]),
        logp_old=pad_rows(old) if old else None,
        logp_ref=pad_rows(ref) if ref else None,
        logp_sampler=pad_rows(sampler) if sampler else None,
        advantages=pad_rows(batch["advantages"]),
        mask=pad_rows(batch["loss_masks"]),
    )


def _denominators(batch: dict[str, Any]) -> Tensor:
    """(B, 1): what ``sum_of_sample_mean`` divides each sample by."""
    sums = batch.get("rollout_mask_sums")
    if sums is None:
        sums = [mask.sum() for mask in batch["loss_masks"]]
    return (
        torch.stack([torch.as_tensor(s, device=batch["loss_masks"][0].device) for s in sums]).clamp(min=1).unsqueeze(1)
    )


def settings(source: str, objective: Objective) -> str:
    """slime's arguments for an objective file.

    Raises:
        InputError: what slime cannot express.
    """
    shared.check_expressible(objective, REACH)
    lines = [
        f"export {VARIABLE}={shlex.quote(source)}",
        "--loss-type custom_loss",
        "--custom-loss-function-path mirrorpo.integrations.slime.loss_function",
        "--custom-megatron-init-path mirrorpo.integrations.slime.check",
        "--advantage-estimator grpo",
    ]
    if objective.advantage == "dr_grpo":
        lines.append("--disable-grpo-std-normalization")
    if objective.aggregation == "token_mean":
        lines.append("--calculate-per-token-loss")
    if objective.needs_reference:
        lines.append("--use-kl-loss --kl-loss-coef 0")
    return "\n".join(lines)
