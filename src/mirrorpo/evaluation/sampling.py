"""What does a policy answer? Completions for the problems of a task, sampled in batches and graded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mirrorpo.evaluation.statistics import mean_interval, pass_at_k, wilson_interval
from mirrorpo.tasks.base import Row, Task, grade_all


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How completions are drawn.

    Attributes:
        temperature: 0 for greedy.
        top_p: nucleus.
        max_completion_length: tokens.
        batch_size: completions generated at once.
        seed: of the draws; the global random state is left as it was.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int = 256
    batch_size: int = 256
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of one problem: prompt, text, length in tokens, verdict."""

    problem: int
    prompt: str
    completion: str
    answer: str
    num_tokens: int
    reward: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Graded samples, ``samples_per_problem`` in a row for each problem."""

    samples: tuple[Sample, ...]
    samples_per_problem: int

    def _groups(self) -> list[Sequence[Sample]]:
        step = self.samples_per_problem
        groups = [self.samples[i : i + step] for i in range(0, len(self.samples), step)]
        # A sample that cannot be scored is no wrong answer: the problem is left out, and counted under its reason.
        return [group for group in groups if all(sample.reward is not None for sample in group)]

    def pass_at(self, k: int) -> tuple[float, tuple[float, float]]:
        """The mean over problems of the unbiased pass@k, with its 95 % interval."""
        groups = self._groups()
        if not groups:
            return float("nan"), (0.0, 1.0)
        values = [pass_at_k(len(g), sum((s.reward or 0.0) >= 1.0 for s in g), k) for g in groups]
        mean = sum(values) / len(values)
        if self.samples_per_problem == 1:
            return mean, wilson_interval(sum(values), len(values))
        return mean, mean_interval(values)

    def summary(self, ks: Sequence[int] = (1,)) -> dict[str, Any]:
        """Plain numbers: accuracy, pass@k, intervals, lengths, reasons."""
        accuracy, interval = self.pass_at(1)
        result: dict[str, Any] = {
            "problems": len(self.samples) // self.samples_per_problem,
            "problems_scored": len(self._groups()),
            "samples_per_problem": self.samples_per_problem,
            "accuracy": accuracy,
            "accuracy_interval": list(interval),
            "mean_length": sum(s.num_tokens for s in self.samples) / max(1, len(self.samples)),
            "reasons": dict(Counter(s.reason for s in self.samples).most_common()),
        }
        for k in ks:
            value, bounds = self.pass_at(k)
            result[f"pass@{k}"], result[f"pass@{k}_interval"] = value, list(bounds)
        return result


def chat(tokenizer: Any, row: Row) -> Any:
    """The prompt in the form that training uses: messages if the tokenizer has a chat template, else plain text."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and tokenizer.chat_template is not None:
        return [{"role": "user", "content": prompt}]
    return prompt


def prompt_ids(tokenizer: Any, row: Row, chat_template: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a prompt as the policy sees them in training; ``chat_template`` holds options of the template."""
    prompt = chat(tokenizer, row)
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template or {})
    )["input_ids"]


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    sampler: Sampler,
    samples_per_problem: int = 1,
    progress: Callable[[int], None] | None = None,
    chat_template: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Samples and grades.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; pads on the left here, whatever it is set to.
        task: grades the completions.
        rows: the problems.
        sampler: how completions are drawn.
        samples_per_problem: N.
        progress: called with the number of completions done in each batch.
        chat_template: options of the tokenizer's chat template.

    Returns:
        The graded samples, in the order of ``rows``.
    """
    ids = [prompt_ids(tokenizer, row, chat_template) for row in rows]
    jobs = [index for index in range(len(rows)) for _ in range(samples_per_problem)]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    samples: list[Sample] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampler.seed)
        for start in range(0, len(jobs), sampler.batch_size):
            batch = jobs[start : start + sampler.batch_size]
            generated = _generate(model, tokenizer, [ids[i] for i in batch], sampler)
            texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generated]
            grades = grade_all(task, texts, [rows[i] for i in batch])
            for index, tokens, text, grade in zip(batch, generated, texts, grades, strict=True):
                samples.append(
                    Sample(
                        problem=index,
                        prompt=str(rows[index]["prompt"]),
                        completion=text,
                        answer=str(rows[index].get("answer", "")),
                        num_tokens=len(tokens),
                        reward=grade.reward,
                        reason=grade.reason,
                    )
                )
            if progress is not None:
                progress(len(batch))
    model.train(was_training)
    return Evaluation(samples=tuple(samples), samples_per_problem=samples_per_problem)


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], sampler: Sampler) -> list[list[int]]:
    """The tokens of each completion, up to and with the first end token."""
    device = next(model.parameters()).device
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = torch.full((len(prompts), width), pad, dtype=torch.long, device=device)
    attention = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids, device=device)
        attention[row, width - len(ids) :] = 1
    draw = sampler.temperature > 0
    settings = {"temperature": sampler.temperature, "top_p": sampler.top_p, "top_k": 0} if draw else {}
    output = model.generate(
        input_ids=tokens,
        attention_mask=attention,
        max_new_tokens=sampler.max_completion_length,
        do_sample=draw,
        pad_token_id=pad,
        **settings,
    )[:, width:].tolist()
    stops = model.generation_config.eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
    return [_until(row, ends) for row in output]


def _until(tokens: list[int], ends: set[int | None]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens
