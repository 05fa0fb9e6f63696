"""The adapter inside SkyRL's real worker and loss code: `SKYRL=CHECKOUT pytest tests/real/test_real_skyrl.py`.

What runs is SkyRL's: the settings from the command line, the scaling of the advantages, the registry, micro-batches,
forward and backward pass of the policy's worker, with a model that is a table of logits and a device that is the CPU.
Packages for logging and storage, and the inference engine's settings, which that code imports, have stand-ins.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import mirrorpo
from framework_batch import LENGTHS, WIDTH, assert_same, batch
from mirrorpo.config.objective_file import read_objective
from mirrorpo.integrations import skyrl

CHECKOUT = os.environ.get("SKYRL", "")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of SkyRL, named by SKYRL"),
    pytest.mark.filterwarnings("ignore"),  # of its packages, and of an autocast for a GPU that is not there
]
WORKER = "skyrl.backends.skyrl_train.workers.worker"


ABSENT = ("loguru", "cloudpathlib")  # where they are not installed


class Anything(ModuleType):
    """Stands for a package that is imported and not used: every name in it is a silent logger or a class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {method: staticmethod(lambda *_, **__: None) for method in ("info", "warning", "error")})


@pytest.fixture(scope="module")
def real() -> Any:
    pytest.importorskip("ray", reason="SkyRL's registries are Ray's")
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [CHECKOUT, str(Path(CHECKOUT) / "skyrl-gym")]
    backends = ModuleType("skyrl.backends")
    vars(backends).update(__path__=[str(Path(CHECKOUT) / "skyrl/backends")])
    servers = ModuleType("skyrl.backends.skyrl_train.inference_servers.utils")  # the engine's, asked for LoRA only
    vars(servers).update(_uses_lora_weight_sync=lambda _: False)
    for module in (*(Anything(name) for name in ABSENT), backends, servers):
        sys.modules.setdefault(module.__name__, module)
    yield import_module(WORKER)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("skyrl", "skyrl_gym", *ABSENT):
            del sys.modules[name]
    sys.path[:] = path


class Strategy:
    """One process: nothing to reduce."""

    def backward(self, loss: torch.Tensor, *_: Any) -> None:
        loss.backward()

    def all_reduce(self, metrics: dict[str, float], **_: Any) -> dict[str, float]:
        return metrics


def worker_of(real: Any, cfg: Any, logp: torch.Tensor) -> Any:
    """SkyRL's policy worker, whose model gives the rows that the tokens name."""

    class Table:
        def train(self) -> None:
            pass

        def __call__(self, sequences: torch.Tensor, num_actions: int, **_: Any) -> Any:
            rows = logp[sequences[:, 0]]
            return rows, {"entropy": torch.zeros(len(sequences), num_actions + 2)}

    made = object.__new__(real.PolicyWorkerBase)
    made.cfg, made.model, made.strategy, made.optimizer = cfg.trainer, Table(), Strategy(), None
    made.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    made.mesh_rank = SimpleNamespace(dp_size=1)
    made.device_mesh = SimpleNamespace(get_group=lambda _: None)
    made.policy_loss_fn = real.PolicyLossRegistry.get(cfg.trainer.algorithm.policy_loss_type)
    return made


def settings_of(real: Any, spec: str) -> Any:
    """SkyRL's own reading of the command line that we print."""
    config = import_module("skyrl.train.config")
    lines = skyrl.settings(spec, read_objective(spec)).splitlines()
    given = [shlex.split(line)[0] for line in lines]
    given = [line for line in given if not line.startswith("trainer.override_entrypoint")]
    more = ["trainer.micro_train_batch_size_per_gpu=2", f"generator.sampling_params.max_generate_length={WIDTH}"]
    cfg = config.SkyRLTrainConfig.from_cli_overrides([*given, *more])
    skyrl.prepare(cfg)
    return cfg


SPECS = (
    "{preset: dapo}",
    "{preset: atr_grpo, behaviour: sampler}",
    "{preset: grpo, coefficient: 0.3}",
    "{preset: gspo, divergence: js, coefficient: 0.4, estimator: weighted}",
    "{preset: dr_grpo, divergence: prob_l2, coefficient: 2.0, estimator: score}",
    "{preset: spo}",
    "{preset: sapo}",
    "{preset: icepop}",
    "{preset: dppo_tv}",
)


@pytest.mark.parametrize("spec", SPECS)
def test_the_real_worker_gives_our_loss_and_gradient(real: Any, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    cfg, b = settings_of(real, spec), batch()
    utils = import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
    algorithm = cfg.trainer.algorithm
    sampler = b.logp_old + 0.1 * b.mask
    # SkyRL pads on the left
    left = lambda x: torch.stack([row.roll(WIDTH - n) for row, n in zip(x, LENGTHS, strict=True)])  # noqa: E731
    mask = left(b.mask).double()
    advantages = utils.apply_loss_reduction_to_advantages_minibatch(
        left(b.advantages), mask, algorithm.loss_reduction, 2, algorithm.max_seq_len
    )
    batches = import_module("skyrl.backends.skyrl_train.training_batch")
    data = batches.TrainingInputBatch(
        {
            "sequences": torch.arange(b.rows).unsqueeze(1).expand(-1, WIDTH + 1).contiguous(),
            "attention_mask": torch.ones(b.rows, WIDTH + 1),
            "loss_mask": mask,
            "response_mask": mask.long(),
            "action_log_probs": left(b.logp_old),
            "base_action_log_probs": left(b.logp_ref),
            "advantages": advantages,
            "rollout_logprobs": left(sampler),
        }
    )
    data.metadata = {"response_length": WIDTH}
    table = left(b.logp.detach()).requires_grad_()
    output = worker_of(real, cfg, table).forward_backward(data)
    ours = mirrorpo.objective_from(read_objective(spec).spec)(
        **vars(b), logp_sampler=sampler, max_completion_length=WIDTH
    ).loss
    slope = left(torch.autograd.grad(ours, b.logp)[0])
    assert table.grad is not None
    assert_same((torch.tensor(output.metrics["final_loss"]), table.grad), (ours.detach(), slope))
    assert "loss_metrics/mirrorpo/ratio/mean" in output.metrics


def test_the_settings_that_skyrl_would_refuse_are_none_of_ours(real: Any) -> None:
    cfg = settings_of(real, "{preset: dr_grpo}")
    assert cfg.trainer.algorithm.max_seq_len == WIDTH
    assert cfg.trainer.algorithm.policy_loss_type in real.PolicyLossRegistry.list_available()
