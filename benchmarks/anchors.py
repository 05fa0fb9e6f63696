"""What do a mask, a second penalty and a teacher cost? Ratios of whole policy steps, packed, in turns (5 min).

A step is forward, loss and backward; with a teacher, its forward pass too: at rollout time for ``score``, in the loss
for ``exact``. Processor time of one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrorpo.models import builtin_path
from mirrorpo.training import MirrorConfig, MirrorTrainer
from policy_model import Shape, micro_batch, save_model
from timing import interleaved, parser, ratios, show

CLIP = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28}
MASK = {"name": "kl3", "radius": 0.5, "act": "mask", "anchor": "reference"}
SECOND = {"divergence": "js", "coefficient": 0.01, "estimator": "score"}
FIRST = {"divergence": "reverse_kl", "coefficient": 0.04}


def penalised(*penalties: dict[str, Any], mask: bool = False) -> dict[str, Any]:
    return {"preset": "dapo", "regions": [CLIP, *([MASK] if mask else [])], "penalties": list(penalties)}


def toward_teacher(estimator: str) -> dict[str, Any]:
    penalty = {"divergence": "reverse_kl", "coefficient": 1.0, "anchor": "teacher", "estimator": estimator}
    return {"preset": "opd", "penalties": [penalty]}


OBJECTIVES = {
    "one penalty": penalised(FIRST),
    "and a mask": penalised(FIRST, mask=True),
    "and a second penalty": penalised(FIRST, SECOND),
    "teacher, score": toward_teacher("score"),
    "teacher, exact": toward_teacher("exact"),
}
BASES = {"and a mask": "one penalty", "and a second penalty": "one penalty", "teacher, exact": "teacher, score"}


def step_of(objective: dict[str, Any], model: str, teacher: str, folder: Path, shape: Shape) -> Callable[[], Any]:
    learns = objective["preset"] == "opd"
    args = MirrorConfig(
        str(folder),
        per_device_train_batch_size=shape.group * shape.groups,
        num_generations=shape.group,
        max_completion_length=shape.longest,
        report_to="none",
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        save_strategy="no",
        gradient_share_every=0,  # measured once in 100 steps, by two sweeps: no part of an ordinary one
        objective=objective,
        teacher={"path": teacher} if learns else None,
    )
    trainer: Any = MirrorTrainer(
        model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 16),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = micro_batch(shape)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"] - 0.1

    def step() -> None:
        trainer.model.zero_grad()
        scored = trainer._teacher_scores([], dict(inputs)) if learns else {}
        trainer._compute_loss(trainer.model, {**inputs, **scored}).backward()

    return step


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        for vocabulary in (1_000, 32_000):
            folder = Path(name) / str(vocabulary)
            shape = Shape(vocabulary=vocabulary)
            model = save_model(folder, vocabulary, 256, 6)
            teacher = str(folder / "teacher")
            wise = AutoModelForCausalLM.from_pretrained(model)
            for parameter in wise.parameters():
                parameter.data.mul_(1.1)
            wise.save_pretrained(teacher)
            for path in (model, teacher):
                AutoTokenizer.from_pretrained(str(builtin_path("tiny"))).save_pretrained(path)
            steps = {name: step_of(o, model, teacher, folder, shape) for name, o in OBJECTIVES.items()}
            medians = interleaved(steps, rounds=3 if args.quick else 9, warmup=1, clock=time.process_time)
            found = {f"{name} / {base}": ratios(medians, base)[name] for name, base in BASES.items()}
            show(f"whole policy step, vocabulary {vocabulary:,}", found, "x", args.json)


if __name__ == "__main__":
    main()
