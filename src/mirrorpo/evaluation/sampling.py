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
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mirrorpo.errors import InputError
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.models.generation import bare_generation, end_tokens, say_what_is_ignored
from mirrorpo.models.thresholds import forget_lengths
from mirrorpo.tasks.task import Row, Task, grade_all


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How completions are drawn.

    Attributes:
        temperature: 0 for greedy.
        top_p: nucleus.
        max_completion_length: tokens.
        batch_size: completions generated at once.
        seed: of the draws; every sample of every problem has its own (``mirrorpo.evaluation.sampling``). The
            global random state is neither used nor changed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_completion_length: int = 256
    batch_size: int = 256
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Tokens up to and with the end token; ``truncated`` if the length ran out before one came."""

    tokens: list[int]
    truncated: bool


class Engine(Protocol):
    """Something that completes prompts."""

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
        say_what_is_ignored(model)

    @torch.no_grad()
    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampler: Sampler) -> list[Completion]:
        model, tokenizer = self._model, self._tokenizer
        device = next(model.parameters()).device
        width = max(len(ids) for ids in prompts)
        ends = end_tokens(model, tokenizer)
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        tokens = torch.full((len(prompts), width), pad, dtype=torch.long)
        attention = torch.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
            attention[row, width - len(ids) :] = 1
        length = sampler.max_completion_length
        processors = LogitsProcessorList()
        if sampler.temperature > 0:
            processors.append(OwnDraws(seeds, length, sampler.temperature, sampler.top_p, device))
        settings = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=pad, eos_token_id=ends)
        was_training = model.training
        model.eval()
        forget_lengths(model)
        try:
            with bare_generation(model):
                output = model.generate(
                    input_ids=tokens.to(device),
                    attention_mask=attention.to(device),
                    generation_config=settings,
                    logits_processor=processors,
                )[:, width:].tolist()
        finally:
            model.train(was_training)
        return [_until(row, set(ends)) for row in output]


def _until(tokens: list[int], ends: set[int]) -> Completion:
    for position, token in enumerate(tokens):
        if token in ends:
            return Completion(tokens=tokens[: position + 1], truncated=False)
    return Completion(tokens=tokens, truncated=True)


class VllmEngine:
    """vLLM's offline engine: continuous batching on a GPU. Not bit for bit what transformers draws.

    Args:
        path: folder or hub name of the model.
        dtype: of its weights; "auto" for the config's.
        context: the longest sequence, in tokens.
        seed: of the engine; each sample still has its own.

    Raises:
        InputError: vLLM is not installed.
    """

    def __init__(self, path: str, dtype: str, context: int, seed: int) -> None:
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


def pick(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token of each row at which the distribution function passes ``uniform``.

    Args:
        logits: (B, V).
        uniform: (B,), in [0, 1).
        temperature: above 0.
        top_p: only the fewest most likely tokens whose probabilities reach it are drawn.

    Returns:
        (B,) token ids, each with probability softmax(logits / temperature) within the nucleus, renormalised.

    Reference: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, Eq. 2 (nucleus).

    Example:
        >>> pick(torch.tensor([[0.0, 0.0]]), torch.tensor([0.75]), 1.0, 1.0)
        tensor([1])
    """
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, index = probs.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    mass = probs.cumsum(-1)
    total = mass[:, -1:]
    # Below the total even after rounding, or the search would run past the last token that can be drawn.
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted, right=True)[:, 0]


class OwnDraws(LogitsProcessor):
    """Leaves one token a row: that of the row's own draw. Greedy decoding then takes it.

    Args:
        seeds: one a row.
        length: the most tokens.
        temperature, top_p: as in ``pick``.
    """

    def __init__(self, seeds: Sequence[int], length: int, temperature: float, top_p: float, device: torch.device):
        self._uniforms = uniforms(seeds, length).to(device)
        self._temperature, self._top_p = temperature, top_p
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = pick(scores, self._uniforms[self._step], self._temperature, self._top_p)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


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
