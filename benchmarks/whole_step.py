"""A whole training step (generation, rewards, loss, backward, optimiser): TRL's time over ours, and its parts.

Both trainers have the same settings and start from the same random weights (no end token is ever likely, so every
completion has its full length); they take turns. ``--recipe`` takes model, task, rewards and settings from a training
recipe with Dr. GRPO's loss instead: completions end where they end, and some groups have equal rewards. ``--bf16``
compares our two precisions. ``--axis`` leaves TRL out and gives our time at 1, 2 and 4 times the completion length,
vocabulary, completions a prompt or prompts, and its exponent (1 is linear).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mirrorpo.config.shipped import find_recipe
from mirrorpo.config.train import load_recipe
from mirrorpo.models import builtin_path
from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.setup import build_trainer, prepare
from timing import in_turns, paired, parser

# hidden, layers, heads, key heads, intermediate, vocabulary: like the embedded model, in between, like SmolLM2-135M
MODELS = {
    "embedded": (96, 4, 4, 2, 256, 261),
    "small": (256, 8, 4, 2, 768, 8_000),
    "smollm2": (576, 30, 9, 3, 1536, 49_152),
}
PHASES = {
    "_generate": "generation",
    "_calculate_rewards": "reward",
    "_generate_and_score_completions": "scoring, advantages",
    "_compute_loss": "forward and loss",
    "training_step": "backward",
}
AXES = ("length", "vocabulary", "group", "groups")


@dataclass
class Phases:
    """Seconds of a trainer's methods, each without those that it calls."""

    clock: Callable[[], float]
    spent: dict[str, float] = field(default_factory=dict)
    inside: list[float] = field(default_factory=list)

    def watch(self, trainer: Any) -> None:
        for method, phase in PHASES.items():
            setattr(trainer, method, self._timed(phase, getattr(trainer, method)))

    def _timed(self, phase: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            with self.timed(phase):
                return inner(*args, **named)

        return call

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        self.inside.append(0.0)
        start = self.clock()
        yield
        took, inner = self.clock() - start, self.inside.pop()
        self.spent[phase] = self.spent.get(phase, 0.0) + took - inner
        if self.inside:
            self.inside[-1] += took


def model_folder(options: argparse.Namespace, folder: Path) -> str:
    hidden, layers, heads, key_heads, between, vocabulary = MODELS[options.model]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=between,
        vocab_size=options.vocabulary or vocabulary,
        tie_word_embeddings=True,
        pad_token_id=256,
        eos_token_id=257,
        bos_token_id=None,  # pyright: ignore[reportArgumentType]
    )
    path = folder / f"{options.model}-{config.vocab_size}"
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def trainer_of(kind: type, bf16: bool, options: argparse.Namespace, folder: Path) -> Any:
    rows = options.group * options.groups
    micro = options.micro_batch or rows
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rows // micro,
        "num_generations": options.group,
        "max_completion_length": options.length,
        "learning_rate": 1e-6,
        "report_to": "none",
        "bf16": bf16,
        "use_cpu": True,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "max_steps": 10_000,
    }
    low, high = options.prompt
    sizes = torch.randint(low, high + 1, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = kind is MirrorTrainer
    more: dict[str, Any] = (
        {"objective": "dr_grpo"} if ours else {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}
    )
    return kind(
        model_folder(options, folder),
        reward_funcs=lambda completion_ids, **_: [(sum(ids) % 97) / 97 for ids in completion_ids],
        args=(MirrorConfig if ours else GRPOConfig)(**settings | more),
        train_dataset=Dataset.from_list([{"prompt": f"{number:04d}+".ljust(s, "1")} for number, s in enumerate(sizes)]),
        processing_class=AutoTokenizer.from_pretrained(str(builtin_path("tiny")), padding_side="left"),
    )


def trainer_of_recipe(kind: type, options: argparse.Namespace, folder: Path) -> Any:
    def trl(path: str, *, args: MirrorConfig, **rest: Any) -> GRPOTrainer:
        theirs = {one.name for one in fields(GRPOConfig) if one.init}
        given = {one.name: getattr(args, one.name) for one in fields(args) if one.name in theirs}
        same: dict[str, Any] = {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}
        return GRPOTrainer(path, args=GRPOConfig(**given | same | {"generation_batch_size": None}), **rest)

    prepared = prepare(load_recipe(find_recipe(options.recipe), options.set or []))
    if prepared.recipe.objective.preset != "dr_grpo":
        raise SystemExit(f"--recipe: needs the objective dr_grpo, got {prepared.recipe.objective.preset}")
    built: Any = MirrorTrainer if kind is MirrorTrainer else trl
    return build_trainer(prepared, folder, [], built)


def step_of(trainer: Any, phases: Phases) -> Callable[[], None]:
    """One optimiser step: as many micro-batches as are accumulated for it, then the optimiser."""
    micro_batches = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer.model = trainer.accelerator.prepare_model(trainer.model)  # mixed precision
    trainer.create_optimizer()
    batches = iter(trainer.get_train_dataloader())
    phases.watch(trainer)

    def step() -> None:
        for _ in range(micro_batches):
            trainer.training_step(trainer.model, next(batches), None)
        with phases.timed("optimiser"):
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.model.zero_grad()
        trainer.state.global_step += 1

    return step


def compared(options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict[str, Any]:
    """Two ways to make the same step, and the shares of the first one's time."""
    ways: dict[str, tuple[type, bool]] = {"TRL": (GRPOTrainer, False), "mirrorpo": (MirrorTrainer, False)}
    if options.bf16:
        ways = {"float32": (MirrorTrainer, False), "bfloat16": (MirrorTrainer, True)}
    phases = {name: Phases(clock) for name in ways}
    trainers = {
        name: trainer_of(kind, bf16, options, folder / name)
        if options.recipe is None
        else trainer_of_recipe(kind, options, folder / name)
        for name, (kind, bf16) in ways.items()
    }
    steps = {name: step_of(trainer, phases[name]) for name, trainer in trainers.items()}
    times = in_turns(steps, options.rounds, options.warmup, clock)
    base, ours = ways
    median, low, high = paired(times, base, ours)
    whole = sum(phases[base].spent.values())
    seen = {
        key: {
            name: [round(value, 2) for value in trainer._metrics["train"][key][-options.rounds :]]
            for name, trainer in trainers.items()
        }
        for key in ("frac_reward_zero_std", "completions/mean_length")
    }
    return {
        f"{base} over {ours}": round(median, 2),
        "between": [round(low, 2), round(high, 2)],
        f"share of {base}'s step": {
            name: {phase: round(seconds / whole, 3) for phase, seconds in spent.spent.items()}
            for name, spent in phases.items()
        },
        **seen,
    }


def along(options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> dict[str, Any]:
    sizes = {}
    for factor in (1, 2, 4):
        larger = argparse.Namespace(**vars(options))
        larger.vocabulary = larger.vocabulary or MODELS[options.model][-1]
        setattr(larger, options.axis, getattr(larger, options.axis) * factor)
        sizes[f"{factor}x"] = step_of(
            trainer_of(MirrorTrainer, options.bf16, larger, folder / f"{factor}"), Phases(clock)
        )
    times = [statistics.median(spent) for spent in in_turns(sizes, options.rounds, options.warmup, clock).values()]
    exponent = math.log(times[2] / times[0]) / math.log(4.0)
    return {"exponent": round(exponent, 2), "time over 1x": [round(seconds / times[0], 2) for seconds in times]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", choices=tuple(MODELS), default="small", help="shape (default small)")
    options.add_argument("--recipe", help="a training recipe, in place of the options from --model to --micro-batch")
    options.add_argument("--set", nargs="+", metavar="KEY=VALUE", help="overrides of the recipe")
    options.add_argument("--vocabulary", type=int, help="tokens, in place of the shape's")
    options.add_argument("--prompt", type=int, nargs=2, default=(100, 200), help="tokens, lowest and highest")
    options.add_argument("--length", type=int, default=64, help="tokens of a completion (default 64)")
    options.add_argument("--group", type=int, default=8, help="completions a prompt (default 8)")
    options.add_argument("--groups", type=int, default=4, help="prompts a step (default 4)")
    options.add_argument("--micro-batch", type=int, help="completions at once in loss and backward (default all)")
    options.add_argument("--bf16", action="store_true", help="ours in float32 over ours in bfloat16")
    options.add_argument("--rounds", type=int, help="default 3, quick 2")
    options.add_argument("--warmup", type=int, default=1, help="rounds before those")
    options.add_argument("--cpu", action="store_true", help="processor time, for a busy machine: set one thread")
    options.add_argument("--axis", choices=AXES, help="what grows")
    args = options.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 3)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    clock = time.process_time if args.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        found = (compared if args.axis is None else along)(args, Path(folder), clock)
    model = args.recipe or args.model
    print(json.dumps({"title": "whole step", "model": model, "threads": torch.get_num_threads(), "values": found}))


if __name__ == "__main__":
    main()
