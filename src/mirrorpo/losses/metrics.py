r"""Metrics of a batch: numbers to act on while a policy moves, from tensors the loss has anyway.

=================================  ====================================================================================
metric                             what it says, and what to do
=================================  ====================================================================================
``divergence/<name>/mean``         the chosen penalty's estimate per token; ``reverse_kl`` stands beside it always
``clip/low/frac``                  tokens with A < 0 held back below the region: high? a smaller step or a wider region
``clip/high/frac``                 the same above it, with A > 0
``outside/positive/frac``          tokens outside the region whose A > 0, on either side
``outside/negative/frac``          the same with A < 0; much more here than above: the negative side drives the policy
``ratio/q01/mean`` (q50, q99)      quantiles of w, and ``ratio/mean`` and ``ratio/max``
``entropy/predicted_change/mean``  first-order change of the entropy per unit step from the tokens that pass
``entropy/held_back/mean``         the same from the tokens that the region stops: negative means clipping saves entropy
``mask/<region>_<anchor>/frac``    tokens whose policy term a mask drops
``truncate/<region>_<anchor>/...`` tokens whose ratio of old policy to anchor was clamped (``/frac``)
``behaviour/missing/frac``         tokens whose log-probability under b is missing: their policy term is dropped too
=================================  ====================================================================================

The entropy prediction: a policy-gradient step moves the logits of a state by w A (e_y - p); entropy changes by
:math:`\langle \nabla_z H, w A (e_y - p) \rangle` with :math:`\nabla_z H = -p (\log p + H)`. The part that depends on
the sampled token is :math:`-w A\, p_y (\log p_y + H)`; the rest, :math:`w A \sum_v p_v^2 (\log p_v + H)`, averages out
over a group of centred advantages and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirrorpo.divergences import divergence
from mirrorpo.divergences.base import MAX_LOG_WEIGHT
from mirrorpo.losses.surrogates import Tokens

_REVERSE_KL = divergence("reverse_kl")
# torch.quantile sorts; beyond this many tokens an even subsample is as good.
_MAX_QUANTILE_TOKENS = 1 << 20
_QUANTILES = {"q01": 0.01, "q50": 0.5, "q99": 0.99}


@dataclass(frozen=True, kw_only=True)
class Output:
    """What an objective returns.

    Attributes:
        loss: scalar, differentiable; the sum of the next two.
        policy_loss: the surrogate's part, differentiable.
        penalty_loss: the regularisers' part, differentiable; None without a penalty in the loss.
        metrics: detached scalars; the suffix says how to reduce them over ranks: ``/mean`` and ``/frac`` over tokens,
            ``/max`` and ``/min`` as they say.
    """

    loss: Tensor
    policy_loss: Tensor
    penalty_loss: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """The loss before it is aggregated; (B, T), 0 or without meaning where the mask drops a token.

    Attributes:
        policy: the surrogate's term of each token, differentiable.
        penalty: the regularisers' with their coefficients, differentiable; None without a penalty in the loss.
        values: the penalties' estimates by divergence, detached.
        state: what the surrogate saw.
        log_ratio: log w of every token, whatever the level.
        logp_ref: under the reference, detached, or None.
        fractions: bool (B, T) or (B, 1), by metric.
    """

    policy: Tensor
    penalty: Tensor | None
    values: dict[str, Tensor]
    state: Tokens
    log_ratio: Tensor
    logp_ref: Tensor | None
    fractions: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """(B, T), bool, the tokens that count."""
        return self.state.mask

    @property
    def loss(self) -> Tensor:
        """(B, T), policy term and penalty: for a framework that averages by itself."""
        return self.policy if self.penalty is None else self.policy + self.penalty

    def metrics(self, entropy: Tensor | None = None) -> dict[str, Tensor]:
        """The metrics of ``Output``, without the two that need an average."""
        return batch_metrics(self.state, self.log_ratio, self.logp_ref, self.values, entropy, self.fractions)


@torch.no_grad()
def batch_metrics(
    tokens: Tokens,
    token_log_ratio: Tensor,
    logp_ref: Tensor | None,
    penalty_values: dict[str, Tensor],
    entropy: Tensor | None,
    fractions: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The metrics of one batch.

    Args:
        tokens: the surrogate's view of the batch.
        token_log_ratio: (B, T), log w of every token, whatever the level.
        logp_ref: (B, T) or None.
        penalty_values: estimates of the penalties, (B, T) each, by name.
        entropy: (B, T) or None.
        fractions: bool (B, T) or (B, 1), by metric.

    Returns:
        Detached scalars; see the module for their meaning.
    """
    keep, logp = tokens.mask, tokens.logp.detach()
    count = keep.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(keep, x.to(logp.dtype), 0.0).sum() / count

    metrics = {f"divergence/{name}/mean": mean(value) for name, value in penalty_values.items()}
    if logp_ref is not None and "divergence/reverse_kl/mean" not in metrics:
        metrics["divergence/reverse_kl/mean"] = mean(_REVERSE_KL.sampled(logp, logp_ref))
    low, high = tokens.blocked()
    metrics["clip/low/frac"] = mean(low.expand_as(keep))
    metrics["clip/high/frac"] = mean(high.expand_as(keep))
    beyond = tokens.beyond().expand_as(keep)
    metrics["outside/positive/frac"] = mean(beyond & (tokens.advantage > 0))
    metrics["outside/negative/frac"] = mean(beyond & (tokens.advantage < 0))
    metrics |= {name: mean(where.expand_as(keep)) for name, where in fractions.items()}
    ratio = token_log_ratio.detach().clamp(max=MAX_LOG_WEIGHT).exp()  # a mean with an infinite entry says nothing
    metrics["ratio/mean"] = mean(ratio)
    metrics["ratio/max"] = torch.where(keep, ratio, 0.0).amax() if ratio.numel() else ratio.sum()
    metrics |= ratio_quantiles(ratio, keep)
    if entropy is not None:
        push = -ratio * tokens.advantage * logp.exp() * (logp + entropy.detach())
        held = low | high if tokens.dropped is None else low | high | tokens.dropped
        metrics["entropy/mean"] = mean(entropy.detach())
        metrics["entropy/predicted_change/mean"] = mean(torch.where(held, 0.0, push))
        metrics["entropy/held_back/mean"] = mean(torch.where(held, push, 0.0))
    return metrics


def ratio_quantiles(ratio: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Quantiles of w over the tokens that ``keep`` keeps, by metric name; 1 where it keeps none."""
    # NaN marks what the mask drops: boolean indexing would make the host wait for the device.
    flat = torch.where(keep, ratio.double(), torch.nan).reshape(-1)
    if flat.numel() == 0:
        return {}
    flat = flat[:: -(-flat.numel() // _MAX_QUANTILE_TOKENS)]
    at = torch.tensor(list(_QUANTILES.values()), dtype=flat.dtype, device=flat.device)
    values = torch.nanquantile(flat, at).nan_to_num(nan=1.0)
    return {f"ratio/{name}/mean": values[index].to(ratio.dtype) for index, name in enumerate(_QUANTILES)}
