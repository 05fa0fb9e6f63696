"""A stand-in that calls a registered policy loss as SkyRL does (NovaSky-AI/SkyRL, commit a9564572).

As in ``skyrl/train/trainer.py``, ``skyrl/backends/skyrl_train/workers/worker.py`` and ``utils/ppo_utils.py``: the
advantages are multiplied by the weights of ``loss_reduction`` over the whole mini-batch, the loss of each micro-batch
is a sum, the KL term an average of the sequences' means. No code of SkyRL.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
WORKER = "skyrl.backends.skyrl_train.workers.worker"


@dataclass
class OffPolicyCorrectionConfig:
    tis_ratio_type: str | None = None
    token_tis_ratio_clip_high: float = 2.0
    sequence_mask_metric: str | None = None
    outlier_token_is_threshold_low: float | None = None
    outlier_token_is_threshold_high: float | None = None
    token_mask_is_threshold_low: float | None = None
    token_mask_is_threshold_high: float | None = None


@dataclass
class KLCtrlConfig:
    type: str = "fixed"


@dataclass
class AlgorithmConfig:
    """SkyRL's settings, as far as its loss reads them, with its defaults."""

    policy_loss_type: str = "regular"
    loss_reduction: str = "token_mean"
    advantage_estimator: str = "grpo"
    grpo_norm_by_std: bool = True
    advantage_batch_normalize: bool = False
    use_tis: bool = False
    use_kl_loss: bool = True
    use_kl_in_reward: bool = False
    kl_estimator_type: str = "k3"
    kl_loss_coef: float = 0.001
    max_seq_len: int | None = None
    kl_ctrl: KLCtrlConfig = field(default_factory=KLCtrlConfig)
    off_policy_correction: OffPolicyCorrectionConfig = field(default_factory=OffPolicyCorrectionConfig)


class PolicyLossRegistry:
    functions: dict[str, Callable[..., Any]]

    @classmethod
    def register(cls, name: str, func: Callable[..., Any]) -> None:
        assert name not in cls.functions
        cls.functions[name] = func

    @classmethod
    def list_available(cls) -> list[str]:
        return list(cls.functions)


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    raise NotImplementedError


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, loss_mask: Tensor | None = None, kl_estimator_type: str = "k3"
) -> Tensor:
    assert kl_estimator_type == "k2"
    kl = 0.5 * (log_probs - log_probs_base).square()
    return kl if loss_mask is None else torch.where(loss_mask.bool(), kl, 0.0)


def reduce_loss(loss: Tensor, loss_mask: Tensor | None) -> Tensor:
    return loss.sum() if loss_mask is None else (loss * loss_mask).sum()


def install(monkeypatch: Any) -> None:
    """Puts the modules that the adapter imports in place; the worker has imported the KL term by name."""
    names = UTILS.split(".")
    parents = [".".join(names[: i + 1]) for i in range(len(names))]
    for name in {*parents, WORKER.rpartition(".")[0], WORKER}:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    registry = type("PolicyLossRegistry", (PolicyLossRegistry,), {"functions": {}})
    vars(sys.modules[UTILS]).update(
        PolicyLossRegistry=registry,
        ppo_policy_loss=ppo_policy_loss,
        compute_approx_kl=compute_approx_kl,
        reduce_loss=reduce_loss,
    )
    vars(sys.modules[WORKER]).update(compute_approx_kl=compute_approx_kl)


def weights(mask: Tensor, reduction: str, longest: int | None) -> Tensor:
    """What SkyRL multiplies the advantages of a mini-batch by, (B, T) or a number."""
    if reduction == "token_mean":
        return 1.0 / mask.sum().clamp(min=1)
    if reduction == "sequence_mean":
        return (1.0 / (len(mask) * mask.sum(-1, keepdim=True).clamp(min=1))).expand_as(mask)
    assert reduction == "seq_mean_token_sum_norm"
    assert longest is not None
    return torch.tensor(1.0 / (len(mask) * longest))


def step(
    algorithm: AlgorithmConfig,
    *,
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    logp_sampler: Tensor | None = None,
    micro: int = 2,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a mini-batch on one worker, in micro-batches of ``micro`` sequences, and the metrics' means."""
    function = sys.modules[UTILS].PolicyLossRegistry.functions[algorithm.policy_loss_type]
    loss_mask = mask.to(logp.dtype)
    scaled = advantages * weights(loss_mask, algorithm.loss_reduction, algorithm.max_seq_len)
    total, logged, count = torch.zeros((), dtype=logp.dtype), {}, 0
    for first in range(0, len(mask), micro):
        rows = slice(first, first + micro)
        action = logp[rows]
        loss, metrics = function(
            action,
            logp_old[rows],
            scaled[rows],
            config=algorithm,
            loss_mask=loss_mask[rows],
            rollout_logprobs=None if logp_sampler is None else logp_sampler[rows],
        )
        if algorithm.use_kl_loss:
            assert logp_ref is not None
            kl = sys.modules[WORKER].compute_approx_kl(
                action, logp_ref[rows], loss_mask=loss_mask[rows], kl_estimator_type=algorithm.kl_estimator_type
            )
            means = (kl * loss_mask[rows]).sum(-1) / loss_mask[rows].sum(-1).clamp(min=1.0)
            loss = loss + means.mean() * algorithm.kl_loss_coef * len(action) / len(mask)
        total = total + loss
        count += 1
        for name, value in metrics.items():
            logged[name] = logged.get(name, 0.0) + value
    return total, {name: value / count for name, value in logged.items()}
