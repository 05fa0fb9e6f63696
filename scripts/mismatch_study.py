"""A study of sampler and trainer that disagree: the sampler's logits are perturbed; what do corrections save?

Own loop, embedded model, arithmetic: every batch is drawn from the policy with Gaussian noise on its logits, which the
sampler reports as its own log-probabilities; the trainer scores the tokens without it. Arms x updates per batch x
seeds; one row for each run. Registered plan: docs/evidence/mismatch.md.

    python scripts/mismatch_study.py docs/evidence/mismatch.csv [--seeds 60,61,62,63,64]
    python scripts/mismatch_study.py docs/evidence/mismatch.csv --analyse     # the page's tables, as the plan says
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

import mirrorpo
from mirrorpo.losses.objective import Objective
from mirrorpo.models import builtin_path
from mirrorpo.statistics.seeds import holm, mean_interval, permutation_p
from mirrorpo.tasks.arithmetic import Arithmetic

STEPS, PROMPTS, GROUP, TOKENS, RATE, NOISE, PROBLEMS = 24, 16, 8, 56, 2e-4, 2.0, 512
CLIP = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28}
MASK = {"name": "kl3", "radius": 0.1, "act": "mask", "of": "old", "anchor": "sampler"}
TRUNCATE = {"name": "ratio", "epsilon_low": 1, "epsilon_high": 1, "act": "truncate"}
ARMS: dict[str, dict[str, Any]] = {
    "no noise": {"regions": [CLIP]},
    "nothing": {"regions": [CLIP]},
    "mask": {"regions": [CLIP, MASK]},
    "truncate": {"regions": [CLIP, TRUNCATE]},
    "behaviour": {"regions": [CLIP], "behaviour": "sampler"},
}
UPDATES = (1, 4, 16)
COMPARED = ("mask", "truncate", "behaviour")


class Noise(LogitsProcessor):
    """Adds Gaussian noise to the logits of every position: other kernels, other digits, many times enlarged."""

    def __init__(self, size: float, seed: int) -> None:
        self.size, self.random = size, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores + self.size * torch.randn(scores.shape, generator=self.random)


class Drawn:
    """Completions of prompts, and what the sampler says of their tokens."""

    def __init__(self, model: Any, tokenizer: Any, rows: list[Any], noise: float, seed: int) -> None:
        chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        self.width = inputs.input_ids.shape[1]
        processors = LogitsProcessorList([Noise(noise, seed)] if noise else [])
        with torch.no_grad():
            found = model.generate(
                **inputs,
                max_new_tokens=TOKENS,
                do_sample=True,
                logits_processor=processors,
                output_scores=True,
                return_dict_in_generate=True,
            )
        self.ids = found.sequences
        self.tokens = self.ids[:, self.width :]
        ends = (self.tokens == tokenizer.eos_token_id).long()
        self.mask = ends.cumsum(1) - ends == 0
        self.attention = torch.cat([inputs.attention_mask, self.mask.long()], 1)
        scores = torch.stack(found.scores, 1).log_softmax(-1)
        self.logp = scores.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)
        texts = tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        task = Arithmetic(difficulty="hard")
        self.rewards = torch.tensor([task.grade(text, row).reward for text, row in zip(texts, rows, strict=True)])

    def scored(self, model: Any, part: Tensor) -> Tensor:
        """Log-probabilities under a model."""
        mask = self.attention[part]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=self.ids[part], attention_mask=mask, position_ids=positions).logits
        logps = logits[:, self.width - 1 : -1].log_softmax(-1)
        return logps.gather(-1, self.tokens[part].unsqueeze(-1)).squeeze(-1)


def run(objective: Objective, noise: float, updates: int, seed: int) -> dict[str, float]:
    """Trains once; the accuracy is that of the policy without noise."""
    torch.manual_seed(seed)
    path = builtin_path("tiny")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    task = Arithmetic(difficulty="hard", seed=seed)
    rows, gaps, dropped = task.rows("train"), [], []
    for step in range(STEPS):
        asked = [row for row in rows[step * PROMPTS : (step + 1) * PROMPTS] for _ in range(GROUP)]
        drawn = Drawn(model, tokenizer, asked, noise, 1000 * seed + step)
        every = torch.arange(len(asked))
        with torch.no_grad():
            old = drawn.scored(model, every)
        gap = mirrorpo.divergence("reverse_kl").sampled(drawn.logp, old)  # from the sampler to the old policy
        gaps.append((gap * drawn.mask).sum() / drawn.mask.sum())
        advantages = mirrorpo.advantages(drawn.rewards, group_size=GROUP, kind="grpo")
        for part in torch.randperm(len(asked)).chunk(updates):
            out = objective(
                logp=drawn.scored(model, part),
                logp_old=old[part],
                logp_sampler=drawn.logp[part],
                advantages=advantages[part],
                mask=drawn.mask[part],
            )
            dropped += [value for name, value in out.metrics.items() if name.startswith(("mask/", "truncate/"))]
            optimiser.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    after = Drawn(model, tokenizer, task.rows("test")[:PROBLEMS], 0.0, seed)
    mean = torch.stack(gaps).mean().item()
    share = torch.stack(dropped).mean().item() if dropped else 0.0
    return {"accuracy": after.rewards.mean().item(), "gap": mean, "dropped": share}


def tables(rows: list[dict[str, str]], seeds: list[int]) -> str:
    """Accuracies and comparisons, in Markdown.

    Raises:
        ValueError: a run of the plan is missing: nothing is analysed before all are there.
    """
    runs = {(row["arm"], int(row["updates"]), int(row["seed"])): row for row in rows}
    missing = [(arm, u, seed) for arm in ARMS for u in UPDATES for seed in seeds if (arm, u, seed) not in runs]
    if missing:
        arm, updates, seed = missing[0]
        raise ValueError(f"{len(missing)} runs are missing, the first: {arm!r}, {updates} updates, seed {seed}")

    def column(arm: str, updates: int, name: str = "accuracy") -> np.ndarray:
        return np.array([float(runs[arm, updates, seed][name]) for seed in seeds])

    lines = [
        "| arm | updates | accuracy, mean (lowest to highest) | divergence | masked or clamped |",
        "|---|---|---|---|---|",
    ]
    for updates in UPDATES:
        for arm in ARMS:
            found, gap, share = (column(arm, updates, name) for name in ("accuracy", "gap", "dropped"))
            spread = f"{found.mean():.3f} ({found.min():.3f} to {found.max():.3f})"
            lines.append(f"| {arm} | {updates} | {spread} | {gap.mean():.3f} | {100 * share.mean():.1f} % |")
    pairs = [(arm, updates) for updates in UPDATES for arm in COMPARED]
    differences = [column(arm, updates) - column("nothing", updates) for arm, updates in pairs]
    p_values = [permutation_p(x) for x in differences]
    lines += [
        "",
        "| against `nothing` | updates | mean difference (95 % interval) | p | Holm |",
        "|---|---|---|---|---|",
    ]
    for (arm, updates), x, p, corrected in zip(pairs, differences, p_values, holm(p_values), strict=True):
        mean = mean_interval(x)
        interval = f"{mean.estimate:+.3f} ({mean.low:+.3f} to {mean.high:+.3f})"
        lines.append(f"| `{arm}` | {updates} | {interval} | {p:.4f} | {corrected:.2f} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("--seeds", default="60,61,62,63,64")
    options.add_argument("--analyse", action="store_true", help="print the tables of a file that is there")
    args = options.parse_args()
    if args.analyse:
        with args.out.open(newline="") as file:
            print(tables(list(csv.DictReader(file)), [int(seed) for seed in args.seeds.split(",")]))
        return
    disable_progress_bar()
    torch.set_num_threads(1)
    with args.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["arm", "updates", "seed", "accuracy", "gap", "dropped"])
        for seed in map(int, args.seeds.split(",")):
            for updates in UPDATES:
                for arm, keys in ARMS.items():
                    objective = mirrorpo.objective("dapo", **keys)
                    found = run(objective, 0.0 if arm == "no noise" else NOISE, updates, seed)
                    values = [f"{found[name]:.5g}" for name in ("accuracy", "gap", "dropped")]
                    table.writerow([arm, updates, seed, *values])
                    file.flush()


if __name__ == "__main__":
    main()
