"""What generates? transformers, or vLLM: prompts as token ids in, completions as token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessorList

from mirrorpo.errors import InputError
from mirrorpo.evaluation.seeded_sampling import OwnDraws
from mirrorpo.models.generation import bare_generation, end_tokens, say_what_is_ignored
from mirrorpo.models.thresholds import forget_lengths


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How completions are drawn.

    Attributes:
        temperature: 0 for greedy.
        top_p: nucleus.
        max_completion_length: tokens.
        batch_size: completions generated at once.
        seed: of the draws; every sample of every problem has its own (``mirrorpo.evaluation.seeded_sampling``). The
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
