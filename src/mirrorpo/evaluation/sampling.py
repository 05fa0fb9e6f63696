"""Evaluation of a policy: completions of transformers or vLLM, drawn with seeds of their own, and graded.

A sample's draws come from a seed of its own (of seed, problem and sample number), one uniform number a token, turned
into a token by the inverse of the distribution function. So batch size, order and a resumed evaluation change no draw.
What remains is the arithmetic of the model: another batch shape rounds logits differently, which moves a draw only if
it lies within that rounding (about 1e-7 in float32, 1e-2 in bfloat16) of the border between two tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mirrorpo.errors import InputError, check_vllm
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.models.decoding import Draw, complete, decoding_weights, pick
from mirrorpo.models.generation import end_tokens, say_what_is_ignored
from mirrorpo.tasks.task import Row, Task, grade_all

# Completions generated at once: where a batch takes minutes, progress is seen and kept in smaller ones. On a CPU a
# model of 135 million parameters took as long in batches of 32 as in one of 64 (16 took 1.5 times that).
_BATCH, _LARGE_BATCH = 256, 32
_LARGE = 20_000_000  # parameters


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How completions are drawn.

    Attributes:
        temperature: 0 for greedy.
        top_p: nucleus.
        max_completion_length: tokens.
        batch_size: completions generated at once; None for what suits the engine.
        seed: of the draws; every sample of every problem has its own (``mirrorpo.evaluation.sampling``). The
            global random state is neither used nor changed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int = 256
    batch_size: int | None = None
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Tokens up to and with the end token; ``truncated`` if the length ran out before one came."""

    tokens: list[int]
    truncated: bool


class Engine(Protocol):
    """Something that completes prompts.

    Attributes:
        batch_size: completions at once that suit it.
    """

    batch_size: int

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampler: Sampler) -> list[Completion]:
        """The completions of prompts (token ids), each drawn with its own seed, in their order."""
        ...


class TransformersEngine:
    """A model of transformers, on whatever device it is.

    Args:
        model: a causal language model; its training mode is as before after each call.
        tokenizer: its tokenizer; prompts are padded on the left here, whatever it is set to.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        large = sum(p.numel() for p in model.parameters()) > _LARGE
        self.batch_size = _LARGE_BATCH if large and next(model.parameters()).device.type == "cpu" else _BATCH
        say_what_is_ignored(model)

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampler: Sampler) -> list[Completion]:
        model, tokenizer = self._model, self._tokenizer
        ends = end_tokens(model, tokenizer)
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        length = sampler.max_completion_length
        draw = own_draws(seeds, length, sampler.temperature, sampler.top_p, next(model.parameters()).device)
        with decoding_weights(model, None):
            found = complete(model, prompts, draw, length, ends, pad)
        return [Completion(tokens=tokens, truncated=tokens[-1] not in ends) for tokens in found]


class VllmEngine:
    """vLLM's offline engine: continuous batching on a GPU. Not bit for bit what transformers draws.

    Args:
        path: folder or hub name of the model.
        dtype: of its weights; "auto" for the config's.
        context: the longest sequence, in tokens.
        seed: of the engine; each sample still has its own.

    Raises:
        InputError: vLLM is not installed, or of a version that does not fit.
    """

    batch_size = _BATCH

    def __init__(self, path: str, dtype: str, context: int, seed: int) -> None:
        check_vllm("--engine vllm")
        try:
            from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError("--engine vllm: needs the extra 'vllm': pip install 'mirrorpo[vllm]'") from error
        self._params = SamplingParams
        self._llm = LLM(model=path, dtype=dtype, max_model_len=context, seed=seed)

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampler: Sampler) -> list[Completion]:
        params = [
            self._params(
                temperature=sampler.temperature,
                top_p=sampler.top_p,
                max_tokens=sampler.max_completion_length,
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], sampling_params=params, use_tqdm=False
        )
        first = [output.outputs[0] for output in outputs]
        return [Completion(tokens=list(o.token_ids), truncated=o.finish_reason == "length") for o in first]


def seed_of(seed: int, problem: int, sample: int) -> int:
    """The seed of one sample's draws, in [0, 2^32).

    Example:
        >>> seed_of(7, 0, 0) != seed_of(7, 0, 1)
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}/{sample}".encode()).digest()[:4])


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """(length, rows): numbers in [0, 1), a column from each seed; the same on every device."""
    columns = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(columns, dim=1)


def own_draws(seeds: Sequence[int], length: int, temperature: float, top_p: float, device: torch.device) -> Draw:
    """A draw in which every row has its own uniform numbers.

    Args:
        seeds: one a row.
        length: maximum number of tokens.
        temperature: 0 for the most likely token.
        top_p: as in ``mirrorpo.models.decoding.pick``.
    """
    if temperature == 0:
        return lambda logits, rows, step: logits.argmax(-1)
    numbers = uniforms(seeds, length).to(device)
    return lambda logits, rows, step: pick(logits, numbers[step, rows], temperature, top_p)


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
        sampler: how completions are drawn; its batch size, or the engine's, cuts the samples, problem by problem.
        samples_per_problem: N.
        take: gets each batch, in order, from one other thread.
        start: samples that are there already; a whole number of batches.
    """
    jobs = [(problem, number) for problem in range(len(rows)) for number in range(samples_per_problem)]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirrorpo-grading") as thread:
        grading: Future[None] | None = None
        size = sampler.batch_size or engine.batch_size
        for first in range(start, len(jobs), size):
            batch = jobs[first : first + size]
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
