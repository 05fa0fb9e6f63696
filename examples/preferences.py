"""Preference pairs, right against wrong derivations, with any divergence in place of DPO's: no GPU, no download.

The built-in tiny model mostly guesses an answer without calculating. Each pair sets a derivation against one with a
wrong product. Expected with the defaults: accuracy on unseen problems rises from 0.35 to about 0.53, in under a
minute on two cores. With `forward_kl 0.1`, `js 0.2` or `hellinger 0.2` it falls below 0.04: their scores f'(p/q) are
bounded above, so a margin comes from pushing the wrong derivation down, which takes the right one along.

    python examples/preferences.py [DIVERGENCE [BETA]]
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from mirrorpo.evaluation import Evaluation, Sampler, evaluate
from mirrorpo.models import builtin_path
from mirrorpo.tasks.arithmetic import Arithmetic
from mirrorpo.training import MirrorDPOConfig, MirrorDPOTrainer

STEPS, BATCH = 40, 32
divergence = sys.argv[1] if len(sys.argv) > 1 else "reverse_kl"
beta = float(sys.argv[2]) if len(sys.argv) > 2 else 0.1


def derivation(problem: str, error: int) -> str:
    """The two steps of a problem and its answer; the product is off by ``error``."""
    factors = re.search(r"\d+\*\d+", problem)
    assert factors is not None
    one, other = map(int, factors[0].split("*"))
    product = one * other + error
    rest = problem.removesuffix("=?").replace(factors[0], str(product))
    left, sign, right = re.split(r"([+-])", rest)
    answer = int(left) + int(right) * (1 if sign == "+" else -1)
    return f"{factors[0]}={product};{rest}={answer}#### {answer}"


def pair(number: int, problem: str) -> dict[str, Any]:
    """A right and a wrong derivation of a problem, as TRL reads preferences; wrong by 1 to 9."""
    says = {"chosen": derivation(problem, 0), "rejected": derivation(problem, 1 + number % 9)}
    answers = {name: [{"role": "assistant", "content": text}] for name, text in says.items()}
    return {"prompt": [{"role": "user", "content": problem}], **answers}


disable_progress_bar()
started = time.monotonic()
path = str(builtin_path("tiny"))
task = Arithmetic(difficulty="medium")
rows, unseen = task.rows("train")[: STEPS * BATCH], task.rows("test")
tokenizer = AutoTokenizer.from_pretrained(path)
model, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))


def measured() -> Evaluation:
    """Sampled completions of unseen problems, graded."""
    return evaluate(model, tokenizer, task, unseen, Sampler(max_completion_length=40), 1)


before = measured()
with tempfile.TemporaryDirectory() as folder:
    config = MirrorDPOConfig(
        folder,
        divergence=divergence,
        beta=beta,
        learning_rate=1e-4,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    pairs = Dataset.from_list([pair(number, row["prompt"]) for number, row in enumerate(rows)])
    trainer = MirrorDPOTrainer(model, reference, args=config, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
after = measured()
print(f"{divergence}, beta {beta:g}: accuracy {before.summary()['accuracy']:.3f} -> {after.summary()['accuracy']:.3f}")
print(f"reasons: {before.summary()['reasons']} -> {after.summary()['reasons']}")
print(f"{time.monotonic() - started:.0f} s")
