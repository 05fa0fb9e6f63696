"""Ten training steps of a model of SmolLM2-135M's shape (random weights) by TRL and by us: seconds by phase, memory.

``python benchmarks/ten_steps.py --device cuda [--quick]``, a part of ``make gpu``, prints one JSON document a line.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpu import Clock, Found, arguments, attempt


def train(device: str, quick: bool) -> dict[str, Any]:
    """The same training by TRL and by us."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from mirrorpo.training import MirrorConfig, MirrorTrainer

    ours, theirs = {"objective": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}
    contenders: dict[str, tuple[type, type, dict[str, Any]]] = {
        "TRL": (GRPOTrainer, GRPOConfig, theirs),
        "mirrorpo": (MirrorTrainer, MirrorConfig, ours),
        "mirrorpo, TRL's rollouts": (MirrorTrainer, MirrorConfig, {**ours, "rollouts": "transformers"}),
        "mirrorpo, TRL's rollouts, padded": (
            MirrorTrainer,
            MirrorConfig,
            {**ours, "rollouts": "transformers", "fast": "off"},
        ),
    }
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        model = _smollm2_shape(Path(name), device)
        for contender, (trainer, config, options) in contenders.items():
            found[contender] = attempt(lambda t=trainer, c=config, o=options: _trained(model, device, t, c, o, quick))
    return found


def _smollm2_shape(folder: Path, device: str) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 1536, "vocab_size": 49_152}  # fmt: skip
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
             "intermediate_size": 64, "vocab_size": 500}  # fmt: skip
    shape = wide if device == "cuda" else small
    config = LlamaConfig(**shape, tie_word_embeddings=True, pad_token_id=256, eos_token_id=257, bos_token_id=None)  # pyright: ignore[reportArgumentType]
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return str(folder / "model")


def _trained(model: str, device: str, trainer: type, config: type, options: dict[str, Any], quick: bool) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer

    from mirrorpo.models import builtin_path

    cuda = device == "cuda"
    steps, length, prompt = (10, 64 if quick else 128, 120) if cuda else (2, 6, 10)
    tokenizer = AutoTokenizer.from_pretrained(str(builtin_path("tiny")), padding_side="left")
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            folder,
            per_device_train_batch_size=64 if cuda else 4,
            num_generations=8 if cuda else 2,
            max_completion_length=length,
            max_steps=steps,
            learning_rate=1e-5,
            logging_steps=1,
            report_to="none",
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
            **options,
        )
        made = trainer(
            model,
            reward_funcs=lambda completion_ids, **_: [(sum(ids) % 97) / 97 for ids in completion_ids],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"{n:03d}+".ljust(prompt, "1")} for n in range(256)]),
            processing_class=tokenizer,
        )
        return _phases(made, Clock(device, 1), steps)


def _phases(trainer: Any, clock: Clock, steps: int) -> dict[str, Any]:
    """Trains; seconds by phase of all steps but the first, which pays for the first calls of every kernel."""
    spent: dict[str, list[float]] = {"generation": [], "rollout": [], "loss": [], "step": []}

    def timed(phase: str, method: str) -> None:
        inner = getattr(trainer, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            clock.ready()
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            clock.ready()
            spent[phase].append(time.perf_counter() - start)
            return result

        setattr(trainer, method, call)

    timed("generation", "_generate")
    timed("rollout", "_generate_and_score_completions")
    timed("loss", "_compute_loss")
    timed("step", "training_step")
    if clock.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.ready()
    start = time.perf_counter()
    trainer.train()
    clock.ready()
    total = time.perf_counter() - start
    each = {phase: sum(times[1:]) / max(1, len(times) - 1) for phase, times in spent.items()}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    tokens = [log["num_tokens"] for log in logs]
    step = (total - spent["step"][0]) / max(1, steps - 1)
    return {
        "seconds a step": {
            "generation": round(each["generation"], 4),
            "rewards, advantages, old log-probabilities": round(each["rollout"] - each["generation"], 4),
            "forward and loss": round(each["loss"], 4),
            "backward": round(each["step"] - each["rollout"] - each["loss"], 4),
            "optimiser and the rest": round(step - each["step"], 4),
            "all": round(step, 4),
        },
        "seconds in all": round(total, 2),
        "tokens per second": round((tokens[-1] - tokens[0]) / (total - spent["step"][0])),
        "peak MiB": round(torch.cuda.max_memory_allocated() / 2**20) if clock.device == "cuda" else None,
        "losses": [log["loss"] for log in logs],
        "gradient norms": [log.get("grad_norm") for log in logs],
        "mean completion": [log.get("completions/mean_length") for log in logs],
        "packed": None if not hasattr(trainer, "packed") else (trainer.packed.reason or trainer.packed.found or True),
    }


if __name__ == "__main__":
    given = arguments(argparse.ArgumentParser(description=__doc__))
    train(given.device, given.quick)
