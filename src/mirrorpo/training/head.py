"""Which head does a transformers model have? Its matrix, and what its config says is done to the logits after it.

The config has a different key in each family; whether the reading is right is asked of the model itself
(``check_head``): a few tokens, through its own forward pass and through ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirrorpo.kernels import Head

# Config keys and the scale that they mean, given the key's value and the model's type.
_SCALES: dict[str, Any] = {
    "logit_scale": lambda value, _: value,  # Cohere
    "output_multiplier": lambda value, _: value,  # Muse
    "lm_head_multiplier": lambda value, _: value,  # Falcon-H1
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    "logits_scaling": lambda value, kind: value if kind == "hyperclovax" else 1.0 / value,
}
# Of a float32 model and of a 16-bit one, relative to the largest logit: other rounding, the same function.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_16_BIT = 3e-2


def head_of(model: nn.Module, temperature: float = 1.0) -> Head:
    """The head of a causal language model of transformers, as its config describes it.

    Args:
        model: with ``get_output_embeddings`` and ``config``; the parameters are the model's own, not copies.
        temperature: the logits are divided by it, as in sampling.

    Returns:
        A ``Head``.

    Raises:
        ValueError: the model has no output embeddings with a 2-D weight.
    """
    embeddings: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    weight = None if embeddings is None else embeddings.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{type(model).__name__} has no output embeddings with a weight (V, H)")
    config: Any = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    settings = config.to_dict()
    scale = 1.0
    for key, meaning in _SCALES.items():
        if settings.get(key) is not None:
            scale = float(meaning(settings[key], settings.get("model_type")))
            break
    softcap = settings.get("final_logit_softcapping")
    bias = vars(embeddings)["_parameters"].get("bias")
    return Head(weight, bias, None if softcap is None else float(softcap), scale, temperature)


@torch.no_grad()
def check_head(model: nn.Module, head: Head) -> str | None:
    """Why this head is not the model's, in a few words; None if it is.

    Three tokens go through the backbone (``base_model``) and ``head``, and through the model itself.

    Args:
        model: a causal language model of transformers, not wrapped.
        head: of ``head_of``; its temperature is left out.
    """
    was_training = model.training
    model.eval()  # dropout would differ between the two passes
    try:
        ids = torch.arange(1, 4, device=head.weight.device).unsqueeze(0) % head.vocabulary
        # The class's own pass: an instance's may be wrapped in mixed precision, which is no difference of the head.
        expected = type(model).forward(model, input_ids=ids, use_cache=False).logits[0]
        backbone: Any = model.base_model
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        model.train(was_training)
    if hidden.shape[-1] != head.weight.shape[1] or expected.shape[-1] != head.vocabulary:
        return f"its hidden states have {hidden.shape[-1]} numbers, its head takes {head.weight.shape[1]}"
    got = head.logits(hidden) * head.temperature
    error = ((got - expected.to(got.dtype)).abs().amax() / expected.abs().amax().clamp(min=1e-6)).item()
    allowed = _TOLERANCE.get(head.weight.dtype, _TOLERANCE_16_BIT)
    if error > allowed:
        return f"its logits are not those of its head and config (relative error {error:.1g})"
    return None


__all__ = ["check_head", "head_of"]
