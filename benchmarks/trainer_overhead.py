"""What do objective and trainer add to a TRL step? Whole steps (generate, score, loss, backward), interleaved (2 min).

Both trainers hold the same weights and draw the same completions (same seed, no optimiser step between rounds): TRL's
Dr. GRPO with its k3 penalty against ours with the same objective, and against ``prob_l2_grpo``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.models import builtin_path
from mirrorpo.tasks import Arithmetic
from mirrorpo.training import MirrorConfig, MirrorTrainer
from timing import interleaved, parser, ratios, show

TINY = str(builtin_path("tiny"))
TASK = Arithmetic()


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    return [TASK.grade(c[0]["content"], {"answer": a}).reward for c, a in zip(completions, answer, strict=True)]


def step_of(kind: type, config: Any) -> Callable[[], None]:
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in TASK.rows("train")]
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    trainer = kind(
        TINY, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))

    def step() -> None:
        torch.manual_seed(0)
        trainer._step = 0
        trainer.state.global_step += 1  # the penalty's gradient share is measured on every 100th
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, batch, None)

    return step


def main() -> None:
    args = parser(__doc__).parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    folder = tempfile.mkdtemp()
    common = {
        "output_dir": str(Path(folder)),
        "per_device_train_batch_size": 256,
        "num_generations": 16,
        "max_completion_length": 40,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
    }
    same = {"preset": "dr_grpo", "divergence": "k3", "coefficient": 0.04}
    contenders = {
        "TRL": step_of(
            GRPOTrainer,
            GRPOConfig(**common, loss_type="dr_grpo", scale_rewards="none", beta=0.04, use_bias_correction_kl=False),
        ),
        "mirrorpo, the same objective": step_of(MirrorTrainer, MirrorConfig(**common, objective=same)),
        "mirrorpo, prob_l2_grpo": step_of(MirrorTrainer, MirrorConfig(**common, objective="prob_l2_grpo")),
    }
    medians = interleaved(contenders, rounds=9 if args.quick else 31, warmup=2)
    show("one training step, over TRL's", ratios(medians, "TRL"), "x", args.json)


if __name__ == "__main__":
    main()
