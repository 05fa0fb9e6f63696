"""What each of two processes runs in test_two_processes.py: ``accelerate launch ... two_ranks.py CASES FOLDER``.

``measure`` is also what the test runs in one process, on the whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.distributed import rank, world_size
from small_models import SIZES, small_folder
from trl_pair import batch, fill, settings, trainer

ROWS = 8
AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {"preset": "grpo", "coefficient": 0.5, "aggregation": name} for name in AGGREGATIONS},
    "sequence level": {"preset": "prob_l2_gspo", "coefficient": 1.0},
    "exact": {"preset": "dapo", "divergence": "js", "coefficient": 0.5, "estimator": "exact"},
    "teacher and a mask of sequences": {
        "preset": "dapo",
        "regions": [
            {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28},
            {"name": "kl3", "radius": 0.02, "anchor": "reference", "act": "mask", "level": "mean_divergence"},
        ],
        "penalties": [
            {"divergence": "js", "coefficient": 0.5, "anchor": "teacher", "estimator": "exact"},
            {"divergence": "prob_l2", "coefficient": 0.2, "anchor": "teacher", "estimator": "score"},
        ],
    },
}
LAYOUTS = ("ragged", "an empty rank")
WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"fast": "off"},
    "unused parameters looked for": {"ddp_find_unused_parameters": True},
    "recomputed, in several rows": {"activation_checkpointing": True, "token_budget": 32},
    "LoRA": {"lora": True},
}
# Of models in parts: what is gathered anew after the forward pass, and a head that is a part of its own.
PARTS = ("resharded", "head apart")


def cases() -> list[tuple[str, str, str]]:
    """Objective, layout, way: all objectives packed, the other ways with one."""
    packed = [(objective, layout, "packed") for objective in OBJECTIVES for layout in LAYOUTS]
    return packed + [("token_mean", layout, way) for layout in LAYOUTS for way in WAYS if way != "packed"]


def sharded_cases() -> list[tuple[str, str, str]]:
    """The same of models in parts."""
    ways = [("token_mean", layout, way) for layout in LAYOUTS for way in ("packed", "recomputed, in several rows")]
    ways += [("token_mean", "ragged", "LoRA"), *(("token_mean", "ragged", part) for part in PARTS)]
    return ways + [(name, "ragged", "packed") for name in OBJECTIVES if name != "token_mean"]


def measure(objective: str, layout: str, way: str, folder: Path, *, shard: bool = False) -> dict[str, Any]:
    """Loss, gradient (the mean over processes) and metrics of one batch; this process takes its share of the rows.

    With ``shard`` the parameters lie on both processes (FSDP2: torch's ``fully_shard``; accelerate's own FSDP asks for
    an accelerator and is not used on CPU).
    """
    processes, more = world_size(), dict(WAYS.get(way, {}))
    adapter = {"peft_config": lora()} if more.pop("lora", False) else {}
    more |= {"per_device_train_batch_size": ROWS // processes, "gradient_share_every": 0 if shard else 1}
    if objective.startswith("teacher"):
        more["teacher"] = {"path": teacher(folder)}
    config = MirrorConfig(**settings(folder, **more), objective=OBJECTIVES[objective])
    built: Any = trainer(MirrorTrainer, config, **adapter)
    built.accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=bool(config.ddp_find_unused_parameters)
    )
    built.current_gradient_accumulation_steps = 1
    inputs = batch(rows=ROWS)
    inputs["prompt_ids"] = inputs["prompt_ids"][::2].repeat_interleave(2, 0)  # groups that stay on their process
    if layout == "an empty rank":
        inputs["completion_mask"][ROWS // 2 :] = 0
    inputs = fill(inputs, built)
    inputs |= built._teacher_scores([], inputs) if "teacher" in more else {}
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()  # TRL sums it over the processes
    mine = slice(rank() * ROWS // processes, (rank() + 1) * ROWS // processes)
    inputs = {name: value[mine] if value.dim() else value for name, value in inputs.items()}
    model = sharded(built.model, way) if shard else built.accelerator.prepare(built.model)
    model.train()
    if shard:  # what was found of the whole model is asked again
        built.packed._examined.clear()
        built.packed.compared.clear()
        built.packed.last = None
    loss = built._compute_loss(model, inputs)
    built.accelerator.backward(loss)
    grads = [p.grad for p in built.model.parameters() if p.grad is not None]
    grads = [(g.full_tensor() if isinstance(g, DTensor) else g).reshape(-1) for g in grads]
    return {
        "loss": built.accelerator.reduce(loss.detach(), "mean"),
        "gradient": torch.cat(grads),
        "metrics": {name: values[-1] for name, values in built._metrics["train"].items()},
        "parameters": type(next(built.model.parameters())).__name__,
        "type": str(built.accelerator.distributed_type),
        "packed": built.packed.reason is None and not built.packed._said,
        "read in a row": built.packed.last is not None,
    }


def teacher(folder: Path) -> str:
    """A small model; made by whoever is alone, before there are two processes."""
    path = folder / "teacher"
    if path.exists():
        return str(path)
    path.mkdir()
    return small_folder(path, LlamaConfig(**SIZES, max_position_embeddings=256))


def lora() -> Any:
    from peft import LoraConfig

    torch.manual_seed(0)
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def sharded(model: Any, way: str) -> Any:
    """FSDP2: every layer, and the rest."""
    mesh = init_device_mesh("cpu", (world_size(),))
    causal = model.get_base_model() if way == "LoRA" else model
    for layer in causal.model.layers:
        fully_shard(layer, mesh=mesh)
    if way == "head apart":
        fully_shard([causal.model.embed_tokens, causal.lm_head], mesh=mesh)  # as accelerate does
    return fully_shard(model, mesh=mesh, reshard_after_forward=way == "resharded")


def unequal(folder: Path) -> str:
    """The error of a trainer whose processes were given different settings."""
    config = MirrorConfig(**settings(folder, learning_rate=1e-3 * (1 + rank())), objective="grpo")
    try:
        trainer(MirrorTrainer, config)
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    found: dict[Any, Any] = {case: measure(*case, folder) for case in cases()}
    found |= {("FSDP2", case): measure(*case, folder, shard=True) for case in sharded_cases()}
    found["unequal"] = unequal(folder)
    torch.save(found, folder / f"rank-{rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
