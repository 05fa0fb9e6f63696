"""How are completions scored when the whole next-token distribution is needed? By a forward pass that keeps logits.

TRL's own path never forms logits; ``exact`` and ``top_k`` estimators and regions need them, (B, T, V) in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
