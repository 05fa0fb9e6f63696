"""How completions are drawn: by ``mirrorpo.models.decoding`` from the policy itself; what must hold of vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging
from trl.generation import vllm_generation
from trl.import_utils import is_vllm_available

from mirrorpo.models.decoding import complete, decoding_weights, pick, reason_for_generate
from mirrorpo.training.distributed import UNSHARDED

logger = logging.get_logger(__name__)

# Settings of TRL's generation config that are done here, and those that decide no token.
_DONE = frozenset({"temperature", "top_p", "top_k", "min_p", "max_new_tokens"})
_HARMLESS = frozenset({"do_sample", "disable_compile", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache"})
# Mean difference of log-probabilities that rounding explains, in float32 and below.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Rollouts:
    """Completions of a trainer's prompts.

    On the first batch the probabilities of one completion are compared with those of a whole forward pass; where they
    differ, TRL's own generation is used from then on, and a line says so.

    Args:
        config: how TRL would generate; None if it does not generate itself.
        accelerator: of the run.
        rollouts: the setting: "auto", or "transformers" for TRL's own generation.

    Attributes:
        reason: why TRL's own generation is used, in a few words; None if it is not.
    """

    def __init__(self, config: GenerationConfig | None, accelerator: Any, rollouts: str) -> None:
        self._config = config
        self._dtype = _AUTOCAST.get(accelerator.mixed_precision)
        self._seen: list[Tensor] | None = []  # log-probabilities of the first rows' tokens, until they are compared
        self.reason = "another engine generates" if config is None else _reason(config, accelerator, rollouts)

    def complete(self, model: nn.Module, prompts: list[list[int]]) -> list[list[int]] | None:
        """Tokens up to and with the end token, one completion a prompt; None where TRL is to generate."""
        config = self._config
        if self.reason is not None or config is None:
            return None
        ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
        with decoding_weights(model, self._dtype):
            found = complete(
                model, prompts, self._draw, int(config.max_new_tokens or 0), ends, int(config.pad_token_id)
            )
            if reason_for_generate(model) is not None:
                self._seen = None  # transformers' own passes
            if self._seen is not None:
                self._compare(model, prompts, found)
        return found if self.reason is None else None

    def state(self) -> dict[str, Any]:
        """What a resumed run must know: whether the comparison was made, and its result."""
        return {"compared": self._seen is None, "reason": self.reason}

    def take_up(self, kept: dict[str, Any]) -> None:
        """Goes on from ``state``; a setting of this run that asks for TRL's generation stays."""
        if kept["compared"]:
            self._seen = None
            self.reason = self.reason or kept["reason"]

    def _draw(self, logits: Tensor, rows: Tensor, position: int) -> Tensor:
        config = self._config
        assert config is not None
        if not config.do_sample:
            chosen = logits.argmax(-1)
        else:
            chosen = pick(
                logits,
                torch.rand(logits.shape[0], device=logits.device),
                config.temperature or 1.0,
                1.0 if config.top_p is None else config.top_p,
                config.top_k or 0,
                config.min_p or 0.0,
            )
        if self._seen is not None:
            self._seen.append(_logp(logits, chosen)[rows == 0])  # nothing once the first row has left
        return chosen

    @torch.no_grad()
    def _compare(self, model: nn.Module, prompts: list[list[int]], found: list[list[int]]) -> None:
        assert self._seen is not None
        drawn, self._seen = torch.cat(self._seen)[: len(found[0])], None
        tokens = torch.tensor([prompts[0] + found[0]], device=drawn.device)
        was_training = model.training
        model.eval()
        logits = model(input_ids=tokens).logits[0, len(prompts[0]) - 1 : -1]
        model.train(was_training)
        difference = (_logp(logits, tokens[0, len(prompts[0]) :]) - drawn).abs().mean().item()
        limit = _TOLERANCE if logits.dtype == torch.float32 and self._dtype is None else _HALF_TOLERANCE
        if not difference <= limit:
            self.reason = f"its log-probabilities differ by {difference:.2g} on average"
            logger.warning("rollouts are generated by transformers: token by token, %s", self.reason)


def _logp(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def _reason(config: GenerationConfig, accelerator: Any, rollouts: str) -> str | None:
    if rollouts == "transformers":
        return "rollouts is 'transformers'"
    if accelerator.distributed_type not in UNSHARDED:
        return "the model is sharded"
    neutral = GenerationConfig().to_dict()
    for name, value in config.to_diff_dict().items():
        known = name in _DONE or name in _HARMLESS or name.startswith("_") or name == "transformers_version"
        if not known and value is not None and value != neutral.get(name) and not _changes_nothing(name, value):
            return f"the setting {name}={value!r}"
    return None


def _changes_nothing(name: str, value: Any) -> bool:
    return name == "repetition_penalty" and value == 1.0


def check_sampler(trainer: Any) -> None:
    """Raises unless the engine reports what it draws from; says how large the bias of truncated sampling is.

    Args:
        trainer: the main process's ``MirrorTrainer``, with its engine.
    """
    lines = [truncation(trainer.args)]
    if trainer.use_vllm and trainer.vllm_mode == "server":  # in this process mode and precision are set, not asked
        settings = trainer.vllm_generation.vllm_client.get_server_info()["model_config"]
        if "sampler" in trainer.policy_objective.needs:
            check_logprobs_mode(settings["logprobs_mode"])
        lines.append(other_precision(settings["dtype"], precision(trainer)))
    for line in filter(None, lines):
        logger.warning(line)


@contextmanager
def vllm_as_trained(trainer: Any) -> Iterator[None]:
    """vLLM, where TRL starts it in this process, computes in the trainer's precision: by itself it rounds float32.

    Args:
        trainer: before its model is there; it is asked when vLLM starts.
    """
    if not is_vllm_available():  # TRL's own line says so
        yield
        return
    module: Any = vllm_generation
    whole = module.LLM

    def llm(**settings: Any) -> Any:
        return whole(**settings, dtype=str(precision(trainer)).removeprefix("torch."))

    module.LLM = llm  # TRL has no setting for it
    try:
        yield
    finally:
        module.LLM = whole
    if trainer.use_vllm and trainer.vllm_mode == "colocate" and trainer.accelerator.device.type == "cpu":
        trainer.vllm_generation.sync_weights = partial(_sync_on_cpu, trainer.vllm_generation)


def _sync_on_cpu(generation: Any) -> None:
    """The trainer's weights in a vLLM on the CPU, which packs them when they are loaded: all are loaded anew."""
    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    runner.reload_weights(generation._iter_named_params())
    head = runner.get_model().lm_head  # packed apart, also where it shares the embedding's weights
    head.quant_method.process_weights_after_loading(head)
    generation.llm.reset_prefix_cache()


def precision(trainer: Any) -> torch.dtype:
    """What the trainer's matrix products are computed in."""
    mixed = _AUTOCAST.get(trainer.accelerator.mixed_precision)
    return mixed or trainer.accelerator.unwrap_model(trainer.model).dtype


def truncation(args: Any) -> str | None:
    """One line on the bias of sampling from a part of the distribution; None where all of it is drawn from.

    Args:
        args: the trainer's; ``top_p``, ``top_k`` and ``min_p`` of it are read.
    """
    kept = []
    if args.top_p < 1.0:
        kept.append(f"top_p {args.top_p:g}: up to {1.0 / args.top_p:.4g} times")
    if args.top_k:
        kept.append(f"top_k {args.top_k}: by one over the mass of so many tokens")
    if args.min_p:
        kept.append(f"min_p {args.min_p:g}: by one over the kept mass")
    if not kept:
        return None
    return (
        "tokens are drawn from a part of the policy's distribution, in which each is likelier than under the policy "
        f"({'; '.join(kept)}): ratios to the sampler are too small by that factor, and the gradient is that of another "
        "policy. top_p 1 has no such bias"
    )


def check_logprobs_mode(mode: str) -> None:
    """Raises ``ValueError`` unless vLLM reports log-probabilities of the distribution that it draws from."""
    if mode != "processed_logprobs":
        raise ValueError(
            f"vLLM must report processed_logprobs, those of the distribution that it draws from, got logprobs_mode "
            f"{mode!r}: start the server with --logprobs-mode processed_logprobs"
        )


def other_precision(sampler: str, trainer: torch.dtype) -> str | None:
    """One line where vLLM's server draws in another precision than the trainer: by itself it rounds float32."""
    names = [str(dtype).removeprefix("torch.") for dtype in (sampler, trainer)]
    if names[0] == names[1]:
        return None
    return (
        f"vLLM draws in {names[0]}, the model is trained in {names[1]}: sampler and trainer differ by more "
        f"than kernels do; start the server with --dtype {names[1]}, or let its correction, or a region around the "
        "sampler, account for it"
    )


__all__ = ["Rollouts", "check_logprobs_mode", "check_sampler", "other_precision", "truncation", "vllm_as_trained"]
