"""What each of two processes runs in test_two_processes.py: ``accelerate launch ... two_ranks.py CASES FOLDER``.

``measure`` is also what the test runs in one process, on the whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.world import rank, world_size
from trl_pair import batch, fill, settings, trainer

ROWS = 8
AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {"preset": "grpo", "coefficient": 0.5, "aggregation": name} for name in AGGREGATIONS},
    "sequence level": {"preset": "prob_l2_gspo", "coefficient": 1.0},
    "exact": {"preset": "dapo", "divergence": "js", "coefficient": 0.5, "estimator": "exact"},
}
LAYOUTS = ("ragged", "an empty rank")


def cases() -> list[tuple[str, str]]:
    return [(objective, layout) for objective in OBJECTIVES for layout in LAYOUTS]


def measure(objective: str, layout: str, folder: Path) -> dict[str, Any]:
    """Loss, gradient (the mean over processes) and metrics of one batch; this process takes its share of the rows."""
    processes = world_size()
    config = MirrorConfig(
        **settings(folder, per_device_train_batch_size=ROWS // processes, gradient_share_every=1),
        objective=OBJECTIVES[objective],
    )
    built: Any = trainer(MirrorTrainer, config)
    built.current_gradient_accumulation_steps = 1
    inputs = batch(rows=ROWS)
    if layout == "an empty rank":
        inputs["completion_mask"][ROWS // 2 :] = 0
    inputs = fill(inputs, built)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()  # TRL sums it over the processes
    mine = slice(rank() * ROWS // processes, (rank() + 1) * ROWS // processes)
    inputs = {name: value[mine] if value.dim() else value for name, value in inputs.items()}
    model = built.accelerator.prepare(built.model)
    model.train()
    loss = built._compute_loss(model, inputs)
    built.accelerator.backward(loss)
    grads = [p.grad.reshape(-1) for p in built.model.parameters() if p.grad is not None]
    return {
        "loss": built.accelerator.reduce(loss.detach(), "mean"),
        "gradient": torch.cat(grads),
        "metrics": {name: values[-1] for name, values in built._metrics["train"].items()},
        "type": str(built.accelerator.distributed_type),
    }


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
    found["unequal"] = unequal(folder)
    torch.save(found, folder / f"rank-{rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
