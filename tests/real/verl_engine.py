"""A run of verl 0.9.1's own workers on a CPU: two optimiser steps with our loss, against one process without verl.

``python tests/real/verl_engine.py`` in an environment that has verl with its own requirements and the core of mirrorpo
(``scripts/test_install.py verl`` makes one). What is verl's: the Ray worker group, ``TrainingWorker``, the FSDP2 engine
with gradient accumulation, clipping and AdamW, ``ppo_loss``, and the entry point that loads us. verl has no CPU
platform: ``PlatformCPU`` registers one through its own registry, as for an accelerator that it does not know.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "mirrorpo:{preset: dapo, region: {name: kl3, radius: 0.02}, divergence: js, estimator: score, coefficient: 0.3}"
RANKS, ROWS, MICRO, PROMPT, RESPONSE, VOCABULARY = 2, 8, 2, 3, 6, 50
LR, CLIP = 1e-2, 0.5
TOLERANCE = 2e-6  # float32: the sums are taken in another order

if __name__ == "__main__":  # as verl imports it, here and in every worker
    os.environ |= {
        "VERL_USE_EXTERNAL_MODULES": "verl_engine",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "RAY_raylet_start_wait_time_s": "120",  # a busy machine
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
    }
    import_module("verl_engine").main()
    sys.exit()

import torch  # noqa: E402
from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """The answers of a machine without an accelerator."""

    device_name, vendor_name = "cpu", "cpu"

    @property
    def device_module(self) -> Any:
        nothing = dict.fromkeys(("max_memory_allocated", "max_memory_reserved", "memory_allocated"), lambda: 0)
        return SimpleNamespace(**nothing, memory_reserved=lambda: 0, mem_get_info=lambda: (0, 0))

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Any:
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing


def worker_class() -> Any:
    """verl's ``TrainingWorker`` with a gloo group, which also tells its parameters and what it has loaded."""
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.workers.engine_workers import TrainingWorker

    class CpuWorker(TrainingWorker):
        def __init__(self, config: Any) -> None:
            # verl asks for "cpu:gloo,cpu:...", which torch refuses; a group that is there is used as it is.
            torch.distributed.init_process_group(
                "gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
            )
            super().__init__(config)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def parameters(self) -> dict[str, torch.Tensor]:
            found = {name: p.full_tensor().detach().clone() for name, p in self.engine.module.named_parameters()}
            return {
                **found,
                "sharded": torch.tensor(
                    float(all(p.to_local().numel() < p.numel() for p in self.engine.module.parameters()))
                ),
            }

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def loaded(self) -> str:
            return f"{type(self.engine).__name__} {'mirrorpo.integrations.verl' in sys.modules}"

    return CpuWorker


def model(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **shape)).save_pretrained(folder)
    return str(folder)


def batch() -> dict[str, Any]:
    """Rows padded on the right, of unequal length, with ratios on both sides of the region."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (ROWS, PROMPT + RESPONSE), generator=g)
    lengths = torch.tensor([6, 3, 5, 2, 6, 4, 1, 6])
    mask = (torch.arange(RESPONSE) < lengths.unsqueeze(1)).long()
    attention = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.long), mask], 1)
    ids = torch.where(attention.bool(), ids, 0)
    noise = [0.3 * torch.randn(ROWS, RESPONSE, generator=g) for _ in range(2)]
    start = torch.log(torch.tensor(1.0 / VOCABULARY))
    advantages = torch.randn(ROWS, 1, generator=g).expand(-1, RESPONSE) * mask
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": torch.arange(PROMPT + RESPONSE).expand(ROWS, -1).contiguous(),
        "prompts": ids[:, :PROMPT].contiguous(),
        "responses": ids[:, PROMPT:].contiguous(),
        "response_mask": mask,
        "old_log_probs": (start + noise[0]) * mask,
        "ref_log_prob": (start + noise[1]) * mask,
        "advantages": advantages,
    }


def alone(path: str, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps in this process: transformers, ``mirrorpo.objective``, torch's AdamW. No verl."""
    from transformers import AutoModelForCausalLM

    from mirrorpo.config.objective_file import read_objective

    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    optimiser = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.01)
    objective, b, norms = read_objective(NAME.removeprefix("mirrorpo:")), batch(), []
    for _ in range(steps):
        logits = net(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, PROMPT - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, b["responses"].unsqueeze(-1)).squeeze(-1)
        optimiser.zero_grad()
        objective(
            logp=logp,
            logp_old=b["old_log_probs"],
            logp_ref=b["ref_log_prob"],
            advantages=b["advantages"],
            mask=b["response_mask"],
        ).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP).item())
        optimiser.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}, norms


def through_verl(path: str, steps: int) -> tuple[dict[str, torch.Tensor], list[float], list[str]]:
    """The steps by verl's worker group; parameters, gradient norms and what each worker has loaded."""
    import ray
    from verl.protocol import DataProto
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        PolicyLossConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import left_right_2_no_padding

    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=MICRO,
        use_torch_compile=False,
    )
    settings = TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=path,
            load_tokenizer=False,
            use_remove_padding=False,
            override_config={"attn_implementation": "sdpa"},
            enable_gradient_checkpointing=False,
        ),
        engine_config=engine,
        optimizer_config=FSDPOptimizerConfig(
            lr=LR, betas=(0.9, 0.999), weight_decay=0.01, clip_grad=CLIP, total_training_steps=10
        ),
    )
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=MICRO,
        policy_loss=PolicyLossConfig(loss_mode=NAME),
        loss_agg_mode="token-mean",
        use_kl_loss=True,
        kl_loss_coef=1.0,
        kl_loss_type=NAME,
    )
    # The agent of the dashboard, which a busy machine cannot start in the 15 s that Ray allows, leaves its parts out.
    vars(import_module("ray._private.utils"))["get_dashboard_dependency_error"] = lambda: ImportError("no dashboard")
    ray.init(num_cpus=RANKS, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    pool = RayResourcePool([RANKS], use_gpu=False, max_colocate_count=1)
    worker = RayClassWithInitArgs(ray.remote(worker_class()), config=settings)
    group: Any = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=worker, device_name="cpu")
    group.reset()
    group.set_loss_fn(partial(ppo_loss, config=actor))
    norms = []
    for _ in range(steps):
        data = left_right_2_no_padding(DataProto.from_single_dict(batch()).to_tensordict())
        tu.assign_non_tensor(data, temperature=1.0, global_batch_size=ROWS, calculate_entropy=False)
        output = group.train_batch(data)
        output = output.get() if hasattr(output, "get") and not hasattr(output, "batch_size") else output
        norms.append(tu.get(output, "metrics")["grad_norm"])
    found, said = group.parameters(), group.loaded()
    ray.shutdown()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0].pop("sharded") == 1
    return found[0], norms, said


def main() -> None:
    begun, steps = time.monotonic(), 2
    with tempfile.TemporaryDirectory() as name:
        path = model(Path(name))
        theirs, norms, said = through_verl(path, steps)
        ours, wanted = alone(path, steps)
        from transformers import AutoModelForCausalLM

        before = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    assert said == ["FSDPEngineWithLMHead True"] * RANKS, said
    assert theirs.keys() == ours.keys()
    moved = max((ours[key] - before[key]).abs().max().item() for key in ours)
    apart = max((theirs[key] - ours[key]).abs().max().item() for key in ours)
    norm = max(abs(a - b) for a, b in zip(norms, wanted, strict=True))
    assert moved > LR, moved
    assert apart < TOLERANCE, (apart, norms, wanted)
    assert norm < TOLERANCE, (norms, wanted)
    sys.stdout.write(
        f"verl's FSDP2 engine on {RANKS} Ray workers: {steps} steps, parameters moved {moved:.1e}, apart from one "
        f"process {apart:.1e}, gradient norms {norm:.1e}; {time.monotonic() - begun:.0f} s\n"
    )
