"""When is a batch of completions packed, and when padded? Packed, unless there is a reason, which is said.

The reasons are found where they are known: settings and model when training starts (``PackedPath``), a model's code by
reading two small groups both ways (``backbone.probe``), a batch's layout when it arrives. Each is logged once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

from mirrorpo.kernels import Head, token_logps
from mirrorpo.kernels.packing import Packing, UnpackableError, pack
from mirrorpo.training.backbone import (
    IMPLEMENTATIONS,
    UnsupportedAttentionError,
    causal_model,
    hidden_states,
    install,
    probe,
    prompt_adapter,
)
from mirrorpo.training.head import check_head, head_of
from mirrorpo.training.resuming import UNSHARDED
from mirrorpo.training.wrapped import through

logger = logging.get_logger(__name__)


class PackedPath:
    """Scores completions from packed rows, or says why not.

    Args:
        args: the trainer's; ``fast`` and ``token_budget`` of it are read, and what rules packing out.
        accelerator: accelerate's.
        temperature: the logits are divided by it.
        aux_loss: whether the load-balancing loss of a mixture model is wanted.

    Attributes:
        reason: why nothing is packed, whatever the batch; None if something may be.
        last: model and padded batch of the last micro-batch that was trained on.
    """

    def __init__(self, args: Any, accelerator: Any, temperature: float, aux_loss: bool) -> None:
        self.accelerator, self.temperature = accelerator, temperature
        self.token_budget: int | None = args.token_budget
        self._models: dict[int, str | None] = {}
        self._heads: dict[int, Head] = {}
        self._said: set[str] = set()
        self.last: tuple[PreTrainedModel, Tensor, Tensor, int] | None = None
        self.reason: str | None = None
        if args.fast == "off":
            self.reason = "fast is 'off'"
            return
        if accelerator.distributed_type not in UNSHARDED:
            self.reason = f"the model is sharded ({accelerator.distributed_type.value.lower()})"
        elif args.n_gpu > 1:
            self.reason = "the model is wrapped (data parallel)"
        elif args.torch_compile:
            self.reason = "torch_compile: every packed row has a shape of its own"
        elif aux_loss:
            self.reason = "the load-balancing loss of a mixture model is over padded rows"
        if self.reason is not None:
            self.say(self.reason)
        else:
            install()

    def say(self, reason: str) -> None:
        """Logs a reason for the padded path, the first time that it holds."""
        if reason in self._said:
            return
        self._said.add(reason)
        if self.accelerator.is_main_process:
            logger.warning("completions are padded, not packed: %s", reason)

    def model(self, model: Any) -> PreTrainedModel | None:
        """The causal language model to read packed rows with, None if it cannot."""
        if self.reason is not None:
            return None
        unwrapped = self.accelerator.unwrap_model(model)
        causal = causal_model(unwrapped)
        if any(isinstance(parameter, DTensor) for parameter in causal.parameters()):  # a model is sharded in place
            self._models[id(causal)] = "the model is sharded (distributed tensors)"
        if id(causal) not in self._models:
            self._models[id(causal)] = prompt_adapter(unwrapped) or self._unsupported(causal)
        reason = self._models[id(causal)]
        if reason is not None:
            self.say(reason)
            return None
        return causal

    def _unsupported(self, causal: PreTrainedModel) -> str | None:
        implementation = causal.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            return f"attention {implementation!r}; packed rows need one of {', '.join(IMPLEMENTATIONS)}"
        if len(set(vars(causal).get("hf_device_map", {}).values())) > 1:
            return "the model is split over devices"
        if not isinstance(causal.get_output_embeddings(), nn.Linear):
            return f"the output layer is a {type(causal.get_output_embeddings()).__name__}"
        try:
            head = head_of(causal)
        except ValueError as error:  # a quantised head has no floating weight
            return str(error)
        # In the weights' own precision: mixed precision would hide a small difference behind its rounding.
        with torch.autocast(causal.device.type, enabled=False):
            return probe(causal) or check_head(causal, head)

    def pack(self, causal: PreTrainedModel, ids: Tensor, attention: Tensor, keep: int) -> Packing | None:
        """The plan of a padded batch, None where it must stay padded.

        Args:
            causal: what will read it.
            ids: (B, P + T).
            attention: (B, P + T).
            keep: T.

        Raises:
            RowTooLongError: a prompt with one completion exceeds the token budget or the model's context.
        """
        config = causal.config.get_text_config()
        try:
            packing = pack(ids, attention, keep, self.token_budget, config.max_position_embeddings)
        except UnpackableError as error:
            self.say(str(error))
            return None
        if packing.tokens.numel() == 0:
            return None
        if torch.is_grad_enabled():
            self.last = (causal, ids, attention, keep)
        window = sliding_window(config)
        if window is not None and int(attention.sum(1).max()) > window:
            self.say(f"a sequence of {int(attention.sum(1).max())} tokens is longer than the sliding window, {window}")
            return None
        return packing

    def hidden(self, model: nn.Module, packing: Packing) -> Tensor | None:
        """(N, H): what predicts each token of the completions, in the order of ``packing.tokens``.

        Args:
            model: as the trainer holds it; ``self.model`` has accepted it.
            packing: what it reads.
        """
        causal = causal_model(self.accelerator.unwrap_model(model))
        head = causal.get_output_embeddings()
        assert head is not None

        def read() -> Tensor:
            return hidden_states(causal, packing).index_select(0, packing.predictors)

        try:
            with self.accelerator.autocast():
                return through(model, read, head) if torch.is_grad_enabled() else read()
        except UnsupportedAttentionError as error:
            self._models[id(causal)] = str(error)
            self.say(str(error))
            return None

    # What a failed allocation is advised on

    @property
    def last_tokens(self) -> int:
        """Tokens in the longest row of the last micro-batch that was trained on."""
        assert self.last is not None
        _, ids, attention, keep = self.last
        return max(row.segments.length for row in pack(ids, attention, keep, self.token_budget).rows)

    @property
    def last_shortest(self) -> int:
        """The least budget that its longest sequence needs."""
        assert self.last is not None
        return int(self.last[2].sum(1).max())

    def read_last(self, token_budget: int) -> None:
        """Reads it again, forward and backward, under another budget."""
        assert self.last is not None
        causal, ids, attention, keep = self.last
        with torch.enable_grad(), self.accelerator.autocast():
            hidden_states(causal, pack(ids, attention, keep, token_budget)).sum().backward()

    def head(self, causal: PreTrainedModel) -> Head:
        """The model's head at the sampling temperature; its parameters are the model's own."""
        embeddings = causal.get_output_embeddings()
        assert embeddings is not None
        head = self._heads.get(id(causal))
        if head is None or head.weight is not embeddings.weight:
            head = self._heads[id(causal)] = head_of(causal, self.temperature)
        return head

    def score(
        self, model: nn.Module, ids: Tensor, attention: Tensor, keep: int, rows: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Log-probabilities and entropies (B, T) of completions, ``rows`` of them at a time; None: not packed."""
        causal = self.model(model)
        if causal is None:
            return None
        parts = []
        for first in range(0, ids.shape[0], rows):
            part = slice(first, first + rows)
            packing = self.pack(causal, ids[part], attention[part], keep)
            hidden = None if packing is None else self.hidden(model, packing)
            if packing is None or hidden is None:
                return None
            logp, entropy = token_logps(hidden, self.head(causal), packing.tokens)
            parts.append((packing.unpack(logp), packing.unpack(entropy)))
        logps, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return logps, entropies if with_entropy else None


def sliding_window(config: Any) -> int | None:
    """The window of the layers that have one, None if all layers see everything."""
    values = config.to_dict()
    window = values.get("sliding_window")
    if window is None or values.get("use_sliding_window") is False:
        return None
    layers = values.get("layer_types")
    return window if layers is None or "sliding_attention" in layers else None


__all__ = ["PackedPath", "sliding_window"]
