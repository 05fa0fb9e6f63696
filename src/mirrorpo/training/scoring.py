"""Scores of the sampled tokens under policy and reference: from packed rows, unless there is a reason against it.

The choice between packed and padded batches is made here, and its reason is logged once.

Reasons are found where they are known: settings when training starts (``PackedPath``), a model's code by reading two
small groups both ways (``probe``), a batch's layout and length when it arrives (``mirrorpo.models.thresholds``), and
whatever else by comparing log-probabilities on the first batch, and on each that is longer than any before by a factor
of two (``disagreement``). None of them ends a run.

Old, reference and current log-probabilities of a batch go the same way. What depends on a batch's length looks at the
number of its columns, which its micro-batches share; everything else holds for the rest of the run, and is kept in
checkpoints so that a resumed run goes the way of the unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.trainer.utils import use_adapter

from mirrorpo.kernels.backend import check_available
from mirrorpo.kernels.fused import token_logps
from mirrorpo.kernels.head import Head
from mirrorpo.kernels.packing import Packing, UnpackableError, pack
from mirrorpo.kernels.vocabulary import Anchor
from mirrorpo.models.generation import causal_part
from mirrorpo.models.thresholds import Threshold, thresholds
from mirrorpo.training.distributed import agreed, parts_elsewhere, through, why_padded
from mirrorpo.training.model_adapter import (
    IMPLEMENTATIONS,
    UnsupportedAttentionError,
    check_head,
    disagreement,
    head_of,
    hidden_states,
    install,
    probe,
    prompt_adapter,
)

logger = logging.get_logger(__name__)


# What TRL hands from the rollout to the forward pass of multimodal models.
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# A batch that is longer by more than this factor than any that was compared is compared.
_LONGER = 2
_ELSEWHERE = "they failed on another process"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The sampled tokens under a model.

    Attributes:
        logp: (B, T), log-probabilities of the sampled tokens.
        entropy: (B, T), of the next-token distributions, in nats.
        logits: (B, T, V), temperature applied, or None.
        aux_loss: a mixture model's load-balancing loss, or None.
    """

    logp: Tensor
    entropy: Tensor
    logits: Tensor | None = None
    aux_loss: Tensor | None = None


def gather_ids(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Prompt and completion side by side: token ids, attention mask, and the number of completion positions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, attention, inputs["completion_ids"].shape[1]


def read_by_teacher(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch with the prompts as the teacher reads them, behind its prefix."""
    return {**inputs, **{key: inputs.get(f"teacher_{key}", inputs[key]) for key in ("prompt_ids", "prompt_mask")}}


def score_from_logits(model: nn.Module, ids: Tensor, attention: Tensor, keep: int, temperature: float) -> Scored:
    """Scores the last ``keep`` tokens of each row.

    Args:
        model: a causal language model of transformers.
        ids: (B, P + T).
        attention: (B, P + T).
        keep: T.
        temperature: the logits are divided by it, as in sampling.

    Returns:
        Log-probabilities, entropies and logits; float32 or wider.
    """
    output = model(input_ids=ids, attention_mask=attention, logits_to_keep=keep + 1, use_cache=False)
    logits = output.logits[:, -keep - 1 : -1].float() / temperature
    log_probs = logits.log_softmax(-1)
    logp = log_probs.gather(-1, ids[:, -keep:].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum(-1)
    return Scored(logp=logp, entropy=entropy, logits=logits)


class PackedPath:
    """Scores completions from packed rows, or says why not.

    Args:
        args: the trainer's; ``fast``, ``kernels`` and ``token_budget`` of it are read, and what rules packing out.
        accelerator: accelerate's.
        temperature: the logits are divided by it.
        aux_loss: whether the load-balancing loss of a mixture model is wanted.
        needs_logits: what part of the objective needs the logits of the rollout policy, if any.

    Attributes:
        reason: why nothing is packed, whatever the batch; None if something may be.
        found: the same, found while the run went on; a part of a checkpoint.
        compared: columns of the longest batch that packed and padded agreed on, for each kind of model.
        last: model and padded batch of the last micro-batch that was trained on.
        in_parts: whether passes of the policy gather it from all processes, which must then all make the same ones.

    Raises:
        ValueError: ``kernels`` asks for Triton where it cannot run, or where everything is padded.
    """

    def __init__(
        self, args: Any, accelerator: Any, temperature: float, aux_loss: bool, needs_logits: str | None = None
    ) -> None:
        self.accelerator, self.temperature = accelerator, temperature
        self.token_budget: int | None = args.token_budget
        self.kernels: str = args.kernels
        self.found: str | None = None
        self.compared: dict[str, int] = {}
        self._examined: set[int] = set()
        self._thresholds: dict[int, tuple[Threshold, ...]] = {}
        self._heads: dict[int, Head] = {}
        self._roots: dict[int, nn.Module] = {}  # whose forward pass gathers the parameters of a causal model
        self._said: set[str] = set()
        self.last: tuple[PreTrainedModel, Tensor, Tensor, int] | None = None
        self.in_parts = False
        self.reason: str | None = None
        if args.fast == "off":
            self.reason = "fast is 'off'"
            return
        sharded = why_padded(accelerator)
        if sharded is not None:
            self.reason = sharded
        elif args.n_gpu > 1:
            self.reason = "the model is wrapped (data parallel)"
        elif args.torch_compile:
            self.reason = "torch_compile: every packed row has a shape of its own"
        elif aux_loss:
            self.reason = "the load-balancing loss of a mixture model is over padded rows"
        elif args.entropy_coef and args.top_entropy_quantile < 1.0:
            self.reason = (
                "entropy_coef with top_entropy_quantile: a bonus on tokens that are known after the sweep only"
            )
        elif needs_logits is not None:
            self.reason = f"{needs_logits} needs the rollout policy's logits"
        if self.kernels == "triton":
            check_available(self.kernels, accelerator.device)
            if self.reason is not None:
                raise ValueError(
                    f"kernels must be 'torch' or 'auto' where completions are padded ({self.reason}), got 'triton'"
                )
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

    def give_up(self, reason: str) -> None:
        """Pads from here on."""
        self.reason = self.found = reason
        self.say(reason)

    def everywhere(self, flag: bool) -> bool:
        """Whether it holds here and, where passes gather a model from all processes, on all of them."""
        return agreed(flag, self.accelerator.device) if self.in_parts else flag

    def state(self) -> dict[str, Any]:
        """What was found out about the models so far, for a checkpoint."""
        return {"found": self.found, "compared": dict(self.compared)}

    def take_up(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken; settings of this run that rule packing out still hold."""
        self.compared = dict(state["compared"])
        if state["found"] is not None and self.reason is None:
            self.give_up(state["found"])

    def model(self, model: Any) -> PreTrainedModel | None:
        """The causal language model to read packed rows with, None if it cannot."""
        if self.reason is not None:
            return None
        unwrapped: nn.Module = self.accelerator.unwrap_model(model)
        causal = causal_part(unwrapped)
        self.in_parts = self.in_parts or isinstance(unwrapped, FSDPModule)
        reason = None
        if id(causal) not in self._examined:
            self._examined.add(id(causal))
            self._roots[id(causal)] = unwrapped
            reason = parts_elsewhere(unwrapped, causal.get_output_embeddings()) or prompt_adapter(unwrapped)
            if reason is None:
                reason = through(unwrapped, unwrapped, lambda: self._unsupported(causal), causal)
            if not self.everywhere(reason is None):
                reason = reason or _ELSEWHERE
        if reason is not None:
            self.give_up(reason)
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

    def pack(
        self, causal: PreTrainedModel, ids: Tensor, attention: Tensor, keep: int, idle: Tensor | None = None
    ) -> Packing | None:
        """The plan of a padded batch for ``causal``, None where it must stay padded; arguments as in ``pack``."""
        packing = self._plan(causal, ids, attention, keep, idle)
        several = packing is not None and len(packing.rows) > 1 and self.in_parts  # more passes than other processes
        if several:
            self.say("token_budget: a sharded model is read in one row")
        if not self.everywhere(packing is not None and not several):
            return None
        assert packing is not None
        if torch.is_grad_enabled():
            self.last = (causal, ids, attention, keep)
        return packing if self._agrees(causal, packing, ids, attention, keep) else None

    def _plan(
        self, causal: PreTrainedModel, ids: Tensor, attention: Tensor, keep: int, idle: Tensor | None
    ) -> Packing | None:
        width = ids.shape[1]
        known = self._thresholds.setdefault(id(causal), thresholds(causal.config))
        beyond = next((threshold for threshold in known if width > threshold.length), None)
        if beyond is not None:
            self.say(f"a batch has more columns than {beyond.feature}: {beyond.reason}")
            return None
        if self.token_budget is not None and width > self.token_budget:
            self.say(f"a batch has more columns than token_budget, {self.token_budget}")
            return None
        try:
            packing = pack(ids, attention, keep, self.token_budget, idle)
        except UnpackableError as error:
            self.say(str(error))
            return None
        return packing if packing.tokens.numel() else None

    def _agrees(self, causal: PreTrainedModel, packing: Packing, ids: Tensor, attention: Tensor, keep: int) -> bool:
        """Whether packed and padded rows give the same log-probabilities, as far as that is not known yet."""
        width = ids.shape[1]
        # The question is about code, not about weights: policy and reference share the answer.
        kind = f"{type(causal).__name__} {causal.config._attn_implementation} {causal.dtype}"
        if self.everywhere(width <= _LONGER * self.compared.get(kind, 0)):
            return True
        root = self._roots.get(id(causal), causal)
        rows = len(ids) if self.in_parts else 0  # as many passes as other processes

        def compare() -> str | None:
            return disagreement(causal, self.head(causal), packing, ids, attention, keep, rows)

        with self.accelerator.autocast():
            reason = through(root, root, compare, causal)
        if not self.everywhere(reason is None):
            self.give_up(f"{type(causal).__name__}, a batch of {width} columns: {reason or _ELSEWHERE}")
            return False
        self.compared[kind] = width
        return True

    def hidden(self, model: nn.Module, packing: Packing) -> Tensor | None:
        """(N, H): what predicts each token of the completions, in the order of ``packing.tokens``.

        Args:
            model: as the trainer holds it; ``self.model`` has accepted it.
            packing: what it reads.
        """
        whole: nn.Module = self.accelerator.unwrap_model(model)
        causal = causal_part(whole)
        head = causal.get_output_embeddings()
        assert head is not None

        def read() -> Tensor:
            return hidden_states(causal, packing).index_select(0, packing.predictors)

        try:
            with self.accelerator.autocast():
                return through(model if torch.is_grad_enabled() else whole, whole, read, head)
        except UnsupportedAttentionError as error:
            self.give_up(str(error))
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
            head = replace(head_of(causal, self.temperature), kernels=self.kernels)
            self._heads[id(causal)] = head
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
            if self.everywhere(not bool(attention[part, -keep:].any())):  # completions without a token
                parts.append((torch.zeros(len(ids[part]), keep, device=ids.device),) * 2)
                continue
            packing = self.pack(causal, ids[part], attention[part], keep)
            hidden = None if packing is None else self.hidden(model, packing)
            if packing is None or hidden is None:
                return None
            logp, entropy = token_logps(hidden, self.head(causal), packing.tokens)
            parts.append((packing.unpack(logp), packing.unpack(entropy)))
        logps, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return logps, entropies if with_entropy else None


class Scorer:
    """Scores of the sampled tokens under the policy and its reference.

    Args:
        packed: the packed path.
        accelerator: accelerate's.
        temperature: the logits are divided by it.
        reference: the reference model; None if it is the policy with its adapter off.
        head_scores: TRL's method that scores padded rows through the model's own head.
        aux_loss: whether the load-balancing loss of a mixture model is wanted.
        teacher: the teacher's model; None if there is none, or it is the policy behind a prefix.
    """

    def __init__(
        self,
        packed: PackedPath,
        accelerator: Any,
        temperature: float,
        reference: Any,
        head_scores: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]],
        aux_loss: bool,
        teacher: nn.Module | None = None,
    ) -> None:
        self.packed, self.accelerator, self.temperature = packed, accelerator, temperature
        self.teacher = teacher
        self.reference, self.head_scores, self.aux_loss = reference, head_scores, aux_loss

    def padded(self, model: nn.Module, inputs: dict[str, Any], *, with_logits: bool) -> Scored:
        """A padded micro-batch under ``model``; with logits (B, T, V) in memory where they are wanted."""
        ids, attention, keep = gather_ids(inputs)
        if with_logits:
            return self.with_logits(model, ids, attention, keep)
        more = {key: inputs.get(key) for key in FORWARD_KEYS}
        logp, entropy, aux_loss = self.head_scores(
            model, ids, attention, keep, compute_entropy=True, compute_aux_loss=self.aux_loss, **more
        )
        assert entropy is not None
        return Scored(logp=logp, entropy=entropy, aux_loss=aux_loss)

    def with_logits(self, model: Any, ids: Tensor, attention: Tensor, keep: int) -> Scored:
        """Scores with logits (B, T, V), in the trainer's mixed precision."""
        with self.accelerator.autocast():
            return score_from_logits(model, ids, attention, keep, self.temperature)

    @torch.no_grad()
    def logits_in_parts(self, model: Any, inputs: dict[str, Any], rows: int) -> Tensor:
        """(B, T, V), read ``rows`` sequences at a time."""
        ids, attention, keep = gather_ids(inputs)
        parts = [slice(first, first + rows) for first in range(0, ids.shape[0], rows)]
        found = [self.with_logits(model, ids[part], attention[part], keep).logits for part in parts]
        return torch.cat([logits for logits in found if logits is not None])

    @torch.no_grad()
    def reference_logits(self, policy: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """(B, T, V) under the reference."""
        with self._reference_of(policy) as model:
            return self.with_logits(model, *gather_ids(inputs)).logits

    @torch.no_grad()
    def reference_anchor(self, policy: nn.Module, packing: Packing, kept: Any) -> Anchor | None:
        """The reference's hidden states of the tokens that count, and its head; None where it cannot read the rows."""
        with self._reference_of(policy) as model:
            causal = self.packed.model(model)
            hidden = None if causal is None else self.packed.hidden(model, packing)
        if causal is None or hidden is None:
            return None
        return Anchor(hidden=hidden[kept], head=self.packed.head(causal))

    @torch.no_grad()
    def teacher_logits(self, policy: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """(B, T, V) under the teacher."""
        return self.with_logits(
            policy if self.teacher is None else self.teacher, *gather_ids(read_by_teacher(inputs))
        ).logits

    @torch.no_grad()
    def teacher_anchor(self, policy: nn.Module, inputs: dict[str, Any], packing: Packing, kept: Any) -> Anchor | None:
        """The teacher's hidden states of the tokens that count, and its head; None where it cannot read the rows."""
        model = policy if self.teacher is None else self.teacher
        causal = self.packed.model(model)
        if causal is None:
            return None
        own = self.packed.pack(causal, *gather_ids(read_by_teacher(inputs)))
        hidden = None if own is None else self.packed.hidden(model, own)
        if own is None or hidden is None:
            return None
        # Behind a prefix, completions may be laid out in another order.
        place = torch.empty(int(own.slots.max()) + 1, dtype=torch.long, device=own.slots.device)
        place[own.slots] = torch.arange(len(own.slots), device=own.slots.device)
        return Anchor(hidden=hidden[place[packing.slots]][kept], head=self.packed.head(causal))

    @contextmanager
    def _reference_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference model, or the policy while its adapter is off (or is the one that TRL keeps as a reference)."""
        if self.reference is not None:
            yield self.reference
            return
        unwrapped: Any = self.accelerator.unwrap_model(policy)
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            yield unwrapped

    def vocabulary(self, model: nn.Module) -> int:
        """V, the rows of the model's head."""
        unwrapped: Any = self.accelerator.unwrap_model(model)
        return unwrapped.get_output_embeddings().weight.shape[0]


__all__ = [
    "FORWARD_KEYS",
    "PackedPath",
    "Scored",
    "Scorer",
    "gather_ids",
    "score_from_logits",
]
