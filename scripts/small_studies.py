"""Two studies of the embedded model in a loop of their own: over-optimisation of a faulty verifier, and diversity.

A run takes 10 to 20 seconds on one thread. One command runs some seeds, all arms of a seed before the next, and writes
FOLDER/STUDY-seedN.csv and the trained weights when a seed is finished; a seed that has a file is not repeated.
Registered plans: docs/evidence/overoptimisation.md and docs/evidence/diversity.md.

    python scripts/small_studies.py overoptimisation FOLDER [--seeds 500,501]
    python scripts/small_studies.py diversity FOLDER [--seeds 610,611]
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import mirrorpo
from mirrorpo.evaluation.sampling import Sampler, TransformersEngine, prompt_ids, seed_of
from mirrorpo.losses.objective import Objective
from mirrorpo.models import builtin_path
from mirrorpo.statistics import pass_at_k
from mirrorpo.tasks.arithmetic import Arithmetic
from mirrorpo.tasks.task import Row

PROMPTS, GROUP, TOKENS, RATE = 8, 8, 48, 2e-4
REVERSE, FORWARD = mirrorpo.divergence("reverse_kl"), mirrorpo.divergence("forward_kl")
GOLD = Arithmetic(difficulty="hard", test_size=256)
TEST = GOLD.rows("test")
EVALUATION = 1234  # seed of the draws on test problems

# Over-optimisation: coefficients by the calculation of the plan, a third of it and all of it.
WARM = 3  # steps on the gold reward, which make the start
MEASURED = (6, 8, 10, 12)  # steps after which gold, proxy and distances are measured
COEFFICIENTS = {"reverse_kl": (0.055, 0.17), "forward_kl": (0.1, 0.3), "js": (0.35, 1.07), "prob_l2": (0.1, 0.3)}


# Diversity.
STEPS, DRAWS, AT = 12, 64, (1, 4, 16, 64)
HARD, MEDIUM = TEST[:64], Arithmetic(difficulty="medium", test_size=32).rows("test")
RAREFIED = 8  # right draws that distinct texts are counted in
REHEARSED = 16  # right completions of the start in each step
DIVERSITY_ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "reverse_kl": {"divergence": "reverse_kl", "estimator": "exact", "coefficient": 0.1},
    "forward_kl": {"divergence": "forward_kl", "estimator": "exact", "coefficient": 0.1},
    "rehearsal": {},
}
REHEARSAL = {"divergence": "forward_kl", "coefficient": 0.5, "anchor": "reference", "estimator": "weighted"}


def gold(completion: str, row: Row) -> float:
    """1 for the right answer."""
    return float(GOLD.grade(completion, row).reward or 0.0)


def is_guess(completion: str) -> bool:
    """Whether it is a number without any calculation."""
    return re.fullmatch(r"#### *[0-9]{1,18} *", completion) is not None


def proxy(completion: str, row: Row) -> float:
    """The faulty verifier: it accepts right answers, and any number that is only guessed."""
    return 1.0 if is_guess(completion) else gold(completion, row)


class Batch:
    """Completions as padded tensors: prompts on the left, completions on the right."""

    def __init__(self, prompts: Sequence[list[int]], completions: Sequence[list[int]], pad: int) -> None:
        self.width = max(map(len, prompts))
        length = max(map(len, completions))
        rows = [
            [pad] * (self.width - len(p)) + p + c + [pad] * (length - len(c))
            for p, c in zip(prompts, completions, strict=True)
        ]
        seen = [
            [0] * (self.width - len(p)) + [1] * (len(p) + len(c)) + [0] * (length - len(c))
            for p, c in zip(prompts, completions, strict=True)
        ]
        self.ids, self.attention = torch.tensor(rows), torch.tensor(seen)
        self.tokens, self.mask = self.ids[:, self.width :], self.attention[:, self.width :].bool()

    def logits(self, model: nn.Module, part: Tensor | slice = slice(None)) -> Tensor:
        """(B, T, V): next-token logits at the completions' tokens."""
        seen = self.attention[part]
        places = (seen.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=self.ids[part], attention_mask=seen, position_ids=places).logits[:, self.width - 1 : -1]

    def logp(self, logits: Tensor, part: Tensor | slice = slice(None)) -> Tensor:
        """(B, T): log-probabilities of the completions' tokens."""
        return logits.log_softmax(-1).gather(-1, self.tokens[part].unsqueeze(-1)).squeeze(-1)

    def mean(self, x: Tensor) -> float:
        """Over the completions' tokens."""
        return float((x * self.mask).sum() / self.mask.sum())


class Policy:
    """The embedded model, its start and its tokenizer."""

    def __init__(self) -> None:
        path = builtin_path("tiny")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model, self.start = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
        self._shipped = {name: x.clone() for name, x in self.start.state_dict().items()}
        self.reset()

    def reset(self) -> None:
        """The shipped weights as policy and as start."""
        for model in (self.model, self.start):
            model.load_state_dict(self._shipped)
            model.eval()

    def draw(self, model: nn.Module, rows: Sequence[Row], each: int, seed: int) -> tuple[Batch, list[str]]:
        """``each`` completions of every problem at temperature 1, and their texts."""
        prompts = [prompt_ids(self.tokenizer, row) for row in rows for _ in range(each)]
        seeds = [seed_of(seed, problem, number) for problem in range(len(rows)) for number in range(each)]
        found = TransformersEngine(model, self.tokenizer).complete(
            prompts, seeds, Sampler(max_completion_length=TOKENS)
        )
        completions = [completion.tokens for completion in found]
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return Batch(prompts, completions, self.tokenizer.pad_token_id), texts


class Run:
    """One training: Dr. GRPO, one update a batch, with a penalty toward the start, or rehearsal, or neither."""

    def __init__(self, policy: Policy, objective: Objective, grade: Any, seed: int) -> None:
        torch.manual_seed(seed)
        self.policy, self.objective, self.grade, self.seed = policy, objective, grade, seed
        policy.model.load_state_dict(policy.start.state_dict())
        self.optimiser = torch.optim.AdamW(policy.model.parameters(), lr=RATE, weight_decay=0.0)
        self.problems = Arithmetic(difficulty="hard", seed=seed, train_size=512).rows("train")

    def step(self, number: int, extra: Tensor | None = None) -> None:
        """Draws, grades and updates once; ``extra`` is added to the loss."""
        policy = self.policy
        asked = self.problems[number * PROMPTS : (number + 1) * PROMPTS]
        batch, texts = policy.draw(policy.model, asked, GROUP, 1000 * self.seed + number)
        rewards = torch.tensor([self.grade(text, asked[i // GROUP]) for i, text in enumerate(texts)])
        logits = batch.logits(policy.model)
        given: dict[str, Any] = {}
        if self.objective.penalties:
            with torch.no_grad():
                start = batch.logits(policy.start)
            given = {"logits": logits, "logits_ref": start, "logp_ref": batch.logp(start)}
        logp = batch.logp(logits)
        out = self.objective(
            logp=logp,
            logp_old=logp.detach(),
            advantages=mirrorpo.advantages(rewards, group_size=GROUP, kind="dr_grpo"),
            mask=batch.mask,
            max_completion_length=TOKENS,
            **given,
        )
        self.optimiser.zero_grad()
        (out.loss if extra is None else out.loss + extra).backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        self.optimiser.step()


@torch.no_grad()
def distance(policy: Policy, batch: Batch) -> dict[str, float]:
    """Exact KLs of policy and start at a batch's tokens, in nats a response, and the length of a response."""
    logits, start = batch.logits(policy.model), batch.logits(policy.start)
    length = float(batch.mask.sum()) / len(batch.mask)
    found = {"reverse_kl": REVERSE.exact(logits, start), "forward_kl": FORWARD.exact(logits, start)}
    return {**{name: length * batch.mean(x) for name, x in found.items()}, "length": length}


def overoptimised(policy: Policy, seed: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of one arm after another: gold, proxy and distances after some steps."""
    policy.reset()
    warm = Run(policy, mirrorpo.objective("dr_grpo"), gold, seed)
    for number in range(WARM):
        warm.step(number)
    policy.start.load_state_dict(policy.model.state_dict())
    arms = {"none": mirrorpo.objective("dr_grpo")}
    for name, coefficients in COEFFICIENTS.items():
        for number in coefficients:
            arms[f"{name}_{number:g}"] = mirrorpo.objective(
                "dr_grpo", divergence=name, estimator="exact", coefficient=number
            )
    for arm, objective in arms.items():
        run, rows = Run(policy, objective, proxy, seed), []
        for number in range(max(MEASURED) + 1):
            if number in MEASURED or (number == 0 and arm == "none"):
                rows.append({"arm": arm, "seed": seed, "step": number, **scored(policy)})
            if number < max(MEASURED):
                run.step(number)
        yield rows


def scored(policy: Policy) -> dict[str, float]:
    """Shares of test problems that each verifier accepts and that are only guessed, and the distance from the start."""
    batch, texts = policy.draw(policy.model, TEST, 1, EVALUATION)
    shares = {"gold": map(gold, texts, TEST), "proxy": map(proxy, texts, TEST), "guesses": map(is_guess, texts)}
    return {**{name: sum(found) / len(TEST) for name, found in shares.items()}, **distance(policy, batch)}


def rehearsal_pool(policy: Policy, problems: Sequence[Row], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions that the start solves."""
    batch, texts = policy.draw(policy.start, problems, GROUP, seed)
    kept = [i for i, text in enumerate(texts) if gold(text, problems[i // GROUP])]
    prompts = [batch.ids[i, : batch.width][batch.attention[i, : batch.width].bool()].tolist() for i in kept]
    return prompts, [batch.tokens[i][batch.mask[i]].tolist() for i in kept]


def rehearsal(policy: Policy, pool: tuple[list[list[int]], list[list[int]]], objective: Objective) -> Tensor:
    """Forward KL from right completions of the start: the estimate ``weighted`` with the start as behaviour policy."""
    chosen = torch.randperm(len(pool[0]))[:REHEARSED].tolist()
    batch = Batch([pool[0][i] for i in chosen], [pool[1][i] for i in chosen], policy.tokenizer.pad_token_id)
    with torch.no_grad():
        start = batch.logp(batch.logits(policy.start))
    logp = batch.logp(batch.logits(policy.model))
    return objective(logp=logp, logp_old=start, logp_ref=start, mask=batch.mask).loss


def rarefied(counts: Sequence[int], draws: int) -> float:
    """Expected number of distinct kinds among ``draws`` draws without putting back.

    Args:
        counts: of each kind.
        draws: at most their sum.

    Example:
        >>> rarefied([2, 2], 2)
        1.6666666666666667
    """
    total = comb(sum(counts), draws)
    return sum(1 - comb(sum(counts) - count, draws) / total for count in counts)


def diversity(policy: Policy, problems: Sequence[Row]) -> dict[str, float]:
    """pass@k, and distinct right texts: over all draws of a problem, and among equally many right ones."""
    kinds: list[Counter[str]] = []
    for first in range(0, len(problems), 16):
        rows = problems[first : first + 16]
        _, texts = policy.draw(policy.model, rows, DRAWS, EVALUATION + first)
        for i, row in enumerate(rows):
            own = texts[i * DRAWS : (i + 1) * DRAWS]
            kinds.append(Counter(text.strip() for text in own if gold(text, row)))
    right = [sum(found.values()) for found in kinds]
    enough = [rarefied([*found.values()], RAREFIED) for found, n in zip(kinds, right, strict=True) if n >= RAREFIED]
    return {
        **{f"pass@{k}": sum(pass_at_k(DRAWS, n, k) for n in right) / len(problems) for k in AT},
        "distinct": sum(map(len, kinds)) / len(problems),
        "rarefied": sum(enough) / max(1, len(enough)),
        "enough": len(enough),
    }


def measured(policy: Policy) -> dict[str, float]:
    """Diversity on the trained difficulty and on an easier one, and the distance from the start."""
    batch, _ = policy.draw(policy.model, TEST, 1, EVALUATION)
    rows = {"hard": HARD, "medium": MEDIUM}
    found = {f"{name}.{key}": x for name, own in rows.items() for key, x in diversity(policy, own).items()}
    return {**found, **distance(policy, batch)}


def diversified(policy: Policy, seed: int) -> Iterator[list[dict[str, Any]]]:
    """The row of one arm after another; the start's is the first, with the first seed."""
    policy.reset()
    if seed == SEEDS["diversity"][0]:
        yield [{"arm": "start", "seed": seed, **measured(policy)}]
    rehearse = mirrorpo.objective("opd", penalties=[REHEARSAL])
    for arm, keys in DIVERSITY_ARMS.items():
        run = Run(policy, mirrorpo.objective("dr_grpo", **keys), gold, seed)
        pool = rehearsal_pool(policy, run.problems[-64:], seed) if arm == "rehearsal" else None
        for number in range(STEPS):
            run.step(number, None if pool is None else rehearsal(policy, pool, rehearse))
        yield [{"arm": arm, "seed": seed, **measured(policy)}]


STUDIES = {"overoptimisation": overoptimised, "diversity": diversified}
SEEDS = {"overoptimisation": range(500, 510), "diversity": range(610, 620)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("study", choices=STUDIES)
    options.add_argument("folder", type=Path)
    options.add_argument("--seeds", help="with commas between them")
    args = options.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    policy = Policy()
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")) if args.seeds else SEEDS[args.study]:
        path = args.folder / f"{args.study}-seed{seed}.csv"
        if path.exists():
            continue
        rows = []
        for found in STUDIES[args.study](policy, seed):
            rows += found
            torch.save(policy.model.state_dict(), args.folder / f"{args.study}-seed{seed}-{found[0]['arm']}.pt")
            print(*(f"{value:.3f}" if isinstance(value, float) else value for value in found[-1].values()), flush=True)
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
            table.writeheader()
            table.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
