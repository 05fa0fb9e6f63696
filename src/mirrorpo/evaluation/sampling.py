"""What does a policy answer? Completions for the problems of a task, sampled in batches and graded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mirrorpo.evaluation.engines import Completion, Engine, Sampler, TransformersEngine
from mirrorpo.evaluation.seeded_sampling import seed_of
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.tasks.base import Row, Task, grade_all

Sink = Callable[[list[Sample]], None]


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
    samples: list[Sample] = []

    def take(batch: list[Sample]) -> None:
        samples.extend(batch)
        if progress is not None:
            progress(len(batch))

    engine = TransformersEngine(model, tokenizer)
    sample_batches(engine, tokenizer, task, rows, ids, sampler, samples_per_problem, take)
    return Evaluation(samples=tuple(samples), samples_per_problem=samples_per_problem)


def sample_batches(
    engine: Engine,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    ids: Sequence[list[int]],
    sampler: Sampler,
    samples_per_problem: int,
    take: Sink,
    start: int = 0,
) -> None:
    """Generates batch after batch; each is graded, and handed over, beside the generation of the next.

    Args:
        engine: generates.
        tokenizer: turns tokens into text.
        task: grades.
        rows: the problems.
        ids: their prompts.
        sampler: how completions are drawn; its batch size cuts the samples, problem by problem, into batches.
        samples_per_problem: N.
        take: gets each batch, in order, from one other thread.
        start: samples that are there already; a whole number of batches.
    """
    jobs = [(problem, number) for problem in range(len(rows)) for number in range(samples_per_problem)]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirrorpo-grading") as thread:
        grading: Future[None] | None = None
        for first in range(start, len(jobs), sampler.batch_size):
            batch = jobs[first : first + sampler.batch_size]
            began = time.monotonic()
            seeds = [seed_of(sampler.seed, problem, number) for problem, number in batch]
            completions = engine.complete([ids[problem] for problem, _ in batch], seeds, sampler)
            seconds = (time.monotonic() - began) / len(batch)
            if grading is not None:
                grading.result()
            grading = thread.submit(_grade, tokenizer, task, rows, batch, completions, seconds, take)
        if grading is not None:
            grading.result()


def _grade(
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    batch: Sequence[tuple[int, int]],
    completions: Sequence[Completion],
    seconds: float,
    take: Sink,
) -> None:
    texts = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
    grades = grade_all(task, texts, [rows[problem] for problem, _ in batch])
    samples = []
    for (problem, number), completion, text, grade in zip(batch, completions, texts, grades, strict=True):
        samples.append(
            Sample(
                problem=problem,
                sample=number,
                prompt=str(rows[problem]["prompt"]),
                completion=text,
                answer=str(rows[problem].get("answer", "")),
                num_tokens=len(completion.tokens),
                truncated=completion.truncated,
                reward=grade.reward,
                reason=grade.reason,
                seconds=round(seconds, 6),
            )
        )
    take(samples)
