r"""Averages that make one loss of per-token terms; they differ in what a long completion weighs.

==================  =====================================  =======================================================
mode                formula                                who uses it
==================  =====================================  =======================================================
``sequence_mean``   mean_i (sum_t x_it m_it / sum_t m_it)  GRPO, GSPO, SAPO: every completion weighs the same
``token_mean``      sum x m / sum m                        DAPO (arXiv 2503.14476): every token weighs the same
``constant``        sum x m / (B * max_completion_length)  Dr. GRPO (arXiv 2503.20783): no length in the denominator
``sequence_sum``    mean_i sum_t x_it m_it                 LUSPO (TRL), verl's seq-mean-token-sum: ``constant`` with 1
==================  =====================================  =======================================================

Policy term and penalty go through the same call, so that no coefficient changes its meaning with the aggregation.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from mirrorpo._checks import Float, Num, Shaped, Tensor
from mirrorpo.errors import unknown_name

Aggregation = Literal["sequence_mean", "token_mean", "constant", "sequence_sum"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def aggregate(
    per_token: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    mode: str,
    *,
    max_completion_length: int | None = None,
    num_tokens: Num[Tensor, ""] | float | int | None = None,
) -> Float[Tensor, ""]:
    """The average of ``per_token`` over the tokens that ``mask`` keeps.

    Args:
        per_token: (B, T).
        mask: (B, T), bool, integer or float; 0 drops a token from numerator and denominator.
        mode: ``sequence_mean``, ``token_mean``, ``constant`` or ``sequence_sum``.
        max_completion_length: the constant of ``constant``, a length in tokens.
        num_tokens: replaces the denominator of ``token_mean``: the share of the whole optimiser step's tokens that
            belongs to this micro-batch, so that gradient accumulation does not change the loss.

    Returns:
        A scalar; a zero attached to the graph if the mask keeps nothing.

    Raises:
        ValueError: an unknown mode, shapes that differ, ``constant`` without ``max_completion_length``.

    Example:
        >>> import torch
        >>> x, mask = torch.tensor([[1.0, 3.0], [5.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> aggregate(x, mask, "sequence_mean"), aggregate(x, mask, "token_mean")
        (tensor(3.5000), tensor(3.))
    """
    if per_token.shape != mask.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, legal: {tuple(per_token.shape)}")
    divisor = _divisor(mask, mode, max_completion_length, num_tokens)
    # where, not a product: what a masked position holds (inf, NaN) must not reach the sum.
    return (torch.where(mask.bool(), per_token, 0.0).sum(-1) / divisor).sum()


def aggregation_weights(
    mask: Shaped[Tensor, "B T"],
    mode: str,
    *,
    max_completion_length: int | None = None,
    num_tokens: Num[Tensor, ""] | float | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T"]:
    """What each token weighs in ``aggregate``: a linear map, ``aggregate(x) == (weights * x).sum()``.

    A sweep over chunks of tokens needs the weights before it has seen the other chunks (``mirrorpo.kernels``).

    Args:
        mask: (B, T), as in ``aggregate``.
        mode: as there.
        max_completion_length: as there.
        num_tokens: as there.
        dtype: of the result.

    Returns:
        (B, T), 0 where the mask drops a token.

    Raises:
        ValueError: as in ``aggregate``.

    Example:
        >>> import torch
        >>> aggregation_weights(torch.tensor([[1, 1], [1, 0]]), "sequence_mean")
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    keep = mask.bool()
    divisor = _divisor(mask, mode, max_completion_length, num_tokens)
    return keep.to(dtype) / divisor.unsqueeze(-1).to(dtype)


def _divisor(
    mask: Tensor, mode: str, max_completion_length: int | None, num_tokens: Tensor | float | int | None
) -> Tensor:
    """(B,) or (1,): what a completion's sum over its tokens is divided by."""
    rows = max(1, mask.shape[0])
    if mode == "sequence_mean":
        return mask.bool().sum(-1).clamp(min=1) * rows
    if mode == "token_mean":
        tokens = mask.bool().sum() if num_tokens is None else torch.as_tensor(num_tokens, device=mask.device)
        return torch.where(tokens > 0, tokens, 1).unsqueeze(0)
    if mode == "sequence_sum":
        return torch.full((1,), rows, device=mask.device)
    if mode != "constant":
        raise unknown_name("aggregation", mode, AGGREGATIONS)
    if max_completion_length is None or max_completion_length < 1:
        raise ValueError(
            f"aggregation 'constant' needs max_completion_length, an integer >= 1, got {max_completion_length!r}"
        )
    return torch.full((1,), rows * max_completion_length, device=mask.device)
