r"""Divergences between next-token distributions, and the ways into a loss that all of them share.

Every divergence here is a sum over the vocabulary, :math:`D(p, q) = \sum_v d(p_v, q_v)`, and is defined by ONE
function, the coordinate term d and its derivative. The four ways into a loss (sampled, weighted, score, exact; plus
``top_k``, the cheap sibling of exact) follow from it, for every divergence alike:

==========  ==============================================  ==========================================================
estimator   value per token                                 gradient per token (tokens from the rollout policy b)
==========  ==============================================  ==========================================================
sampled     the form at the sampled token, as it stands     of that form: in general NOT the gradient of D
weighted    unbiased for D when y ~ b                       unbiased for grad D
score       that of ``sampled``                             that of ``weighted``, without its noisy value
exact       D                                               grad D
==========  ==============================================  ==========================================================

``weighted`` and ``score`` have the same gradient, token by token: the derivative of d(p_y) / b_y in log p_y is
p_y d'(p_y) / b_y = w g. They differ in the value alone.

Divergences are averaged over the states that the rollouts visited; the dependence of the state distribution on the
parameters is dropped, as in every GRPO implementation.

Where a float32 evaluation would lose every digit near equality, float64 is used inside; what comes back is float32
(float64 for float64 input), and at (B, T) elements the cost is a few microseconds. Derivatives are exact and attached
by hand, so no operation of the formula can turn a gradient into NaN.

References:
    GBMPO (arXiv 2602.04380) for Bregman divergences as regularisers; the unified clipping framework (arXiv 2602.05494)
    for divergences as trust regions; DeepSeek-V3.2 and TRL's ``use_bias_correction_kl`` for ``weighted`` on reverse KL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch

from mirrorpo._checks import LOGP_TOLERANCE, Float, Shaped, Tensor, check_logps
from mirrorpo.errors import unknown_name

Estimator = Literal["sampled", "weighted", "score", "exact", "top_k"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
LOGITS_ESTIMATORS = ("exact", "top_k")
# Whose K likeliest tokens `top_k` takes.
SUPPORTS = ("anchor", "policy", "union")

# Log-probabilities below this are treated as this: exp(-700) = 1e-304 is the edge of float64. Only a probability of
# exactly 0 (a masked vocabulary entry) ever meets it, and there p * slope, the gradient, is 0 anyway.
LOG_PROB_FLOOR = -700.0
# A weight p/b or 1/b beyond exp(80) leaves float32. It is clamped there; the gradient keeps that weight, it does not
# vanish.
MAX_LOG_WEIGHT = 80.0
# Values and slopes beyond this leave float32. Both are clamped there: a gradient stays 1e38, not 0 or inf.
MAX_MAGNITUDE = 1e38
# exp(this) and what is a few orders larger fit into float32. Log-probabilities down to -MAX_ORDINARY / (1 + growth) can
# meet none of the limits above: values and slopes grow as exp(growth * |log-ratio|), a weight adds one factor 1/b.
MAX_ORDINARY = 80.0
# Stands for log 0 = -inf, so that a difference of two of them is 0 and not NaN; its exp is exactly 0, as for -inf.
LOG_ZERO = -1e30
# What K entries of an anchor leave over is known as 1 minus their sum, which rounding can bring to 0 or below. The rest
# is at least this: a policy with mass there then pays log(p_rest / 1e-7), not log(p_rest / 0).
SMALLEST_REST = 1e-7
# Vocabulary entries that `exact` holds in float64 at once (three to five temporaries of this size).
EXACT_CHUNK = 1 << 21

Term = tuple[Tensor, Tensor]
_NAMES = ("logp", "logp_ref", "logp_old")


class _WithSlope(torch.autograd.Function):
    """Evaluates ``fn(logp, *others, guard) -> (value, d value / d logp)`` and attaches that derivative to logp."""

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., Term], ordinary: float, logp: Tensor, *others: Tensor) -> Tensor:
        # Log-probabilities above `ordinary` need none of the guards. (On a GPU they are not looked at: the host would
        # have to wait, and there the guards cost next to nothing.)
        if check_logps(_NAMES[: 1 + len(others)], logp, *others) >= ordinary and logp.dtype == torch.float32:
            value, slope = fn(logp, *others, False)
            ctx.save_for_backward(slope.float())
            return value.float()
        value, slope = fn(*(x.double().clamp(min=LOG_ZERO) for x in (logp, *others)), True)
        ctx.save_for_backward(_held(slope).to(logp.dtype))
        return _held(value).to(logp.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _raise_on_second_derivative()
        (slope,) = ctx.saved_tensors
        return (None, None, grad_outputs[0] * slope, *(None for _ in ctx.needs_input_grad[3:]))


class _OverVocabulary(torch.autograd.Function):
    """Evaluates ``rows(logits, logits_ref, *rest) -> (value, grad)`` in chunks; the gradient goes to ``logits``."""

    @staticmethod
    def forward(ctx: Any, rows: Callable[..., Term], logits: Tensor, logits_ref: Tensor, *rest: Tensor) -> Tensor:
        keep = ctx.needs_input_grad[1]
        chunk = max(1, EXACT_CHUNK // max(1, logits.shape[-1]))
        values = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
        grads = torch.empty_like(logits) if keep else None
        for start in range(0, logits.shape[0], chunk):
            part = slice(start, start + chunk)
            value, grad = rows(logits[part].double(), logits_ref[part].double(), *(extra[part] for extra in rest))
            values[part] = _held(value)
            if grads is not None:
                grads[part] = _held(grad)
        ctx.save_for_backward(*(() if grads is None else (grads,)))
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _raise_on_second_derivative()
        (grads,) = ctx.saved_tensors
        upstream = grad_outputs[0].unsqueeze(-1)
        # A position that nothing depends on (masked) gets 0 even where its own logits are NaN.
        grad = (upstream * grads).masked_fill_(upstream == 0.0, 0.0)
        return (None, grad, *(None for _ in ctx.needs_input_grad[2:]))


def _raise_on_second_derivative() -> None:
    # The slope is attached as a constant, so a second derivative would silently be 0.
    if torch.is_grad_enabled():
        raise RuntimeError("a divergence is differentiable once: create_graph=True is not supported")


def _held(x: Tensor) -> Tensor:
    return x.clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE)


def _check_entries(
    logits: Tensor, indices: Tensor, logp_anchor: Tensor, tokens: Tensor | None, logp_anchor_tokens: Tensor | None
) -> None:
    lead, width = tuple(logits.shape[:-1]), logits.shape[-1]
    if indices.shape != logp_anchor.shape or tuple(indices.shape[:-1]) != lead:
        raise ValueError(
            f"indices and logp_anchor must have the same shape {(*lead, 'K')}, got {tuple(indices.shape)} and "
            f"{tuple(logp_anchor.shape)}"
        )
    if (tokens is None) != (logp_anchor_tokens is None):
        missing = "tokens" if tokens is None else "logp_anchor_tokens"
        raise ValueError(f"tokens and logp_anchor_tokens go together, got None for {missing}")
    checked = [("indices", indices)]
    if tokens is not None and logp_anchor_tokens is not None:
        for name, x in (("tokens", tokens), ("logp_anchor_tokens", logp_anchor_tokens)):
            if tuple(x.shape) != lead:
                raise ValueError(f"{name} has shape {tuple(x.shape)}, legal: {lead}")
        checked.append(("tokens", tokens))
    if logits.device.type != "cpu" or logits.numel() == 0:
        return
    for name, x in checked:
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < width:
            raise ValueError(f"{name} must be in [0, {width}), got {int(x.min())} to {int(x.max())}")
    highest = logp_anchor.nan_to_num(nan=-torch.inf).amax().item() if logp_anchor.numel() else 0.0
    if highest > LOGP_TOLERANCE:
        raise ValueError(f"logp_anchor must hold log-probabilities (legal: -inf to 0), got {highest}")


def upcast(x: Tensor) -> Tensor:
    """bf16 and fp16 to float32, the rest as it is (autograd casts the gradient back)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass(frozen=True)
class Divergence(ABC):
    r"""A divergence between next-token distributions; p, the trained policy, is always the first argument.

    Subclasses are ``BregmanDivergence`` (``d`` from a generator) and ``RatioDivergence`` (from a function of the
    log-ratio); a new divergence is one function handed to one of them. Assumed and not checked (``mirrorpo.divergence``
    checks it for your own generators): d is convex in its first argument with d(z, z) = 0, so that D is non-negative.

    A definition may leave out every attribute but the name and its formula: what is not said is assumed to be the
    worst, which is slower and right.

    Attributes:
        name: the name in the table.
        needs_float64: whether the formula loses digits near equality in float32 (a difference of terms of first order);
            a product of such terms, as (sqrt t - 1)^2, keeps them.
        growth: value and slope grow at most as exp(growth * |log-ratio|): sets where the log-ratio is clamped.
        growth_known: whether that is certain; if not, every batch takes the guarded path.
    """

    name: str
    needs_float64: bool = field(default=True, kw_only=True)
    growth: float = field(default=1.0, kw_only=True)
    growth_known: bool = field(default=False, kw_only=True)

    # Whether D over a coarser partition of the vocabulary is a lower bound (data processing): true for f-divergences.
    bucket_rest: ClassVar[bool] = False
    # Whether the trust-region constraint depends on b_y itself and not on the ratio alone.
    depends_on_token: ClassVar[bool] = True

    @abstractmethod
    def term(self, logx: Tensor, logz: Tensor) -> Term:
        """The coordinate term d(x, z) and its derivative with respect to log x, i.e. x * dd/dx; float64 in and out."""

    @abstractmethod
    def constraint(self, log_ratio: Tensor, logz: Tensor) -> Tensor:
        """What a trust region compares with its radius at the sampled token; float64 in and out, 0 at log_ratio 0."""

    @property
    def ordinary(self) -> float:
        """Log-probabilities from here to 0 need no guard; 0 where it is not known how fast the divergence grows."""
        return -MAX_ORDINARY / (1.0 + self.growth) if self.growth_known else 0.0

    def over_vocabulary(self, logx: Float[Tensor, ...], logz: Float[Tensor, ...]) -> Term:
        """``term`` in the dtype of ``logx``: a float32 evaluation where the definition has one, else float64 inside.

        Args:
            logx: log-probabilities of the policy, any shape.
            logz: of the anchor, the same shape.
        """
        found = self._in_float32(logx, logz) if logx.dtype == torch.float32 else None
        if found is not None:
            return found
        value, slope = self.term(*(x.double().clamp(min=LOG_PROB_FLOOR) for x in (logx, logz)))
        return _held(value).to(logx.dtype), _held(slope).to(logx.dtype)

    def _in_float32(self, logx: Tensor, logz: Tensor) -> Term | None:
        """``term`` of float32 log-probabilities in float32, which may lose a digit or two; None: not known to do."""
        return None

    # The estimators on log-probabilities: float64 with `guard`, when limits must be watched; otherwise as they come,
    # and what needs float64 is widened inside. A difference of two float32 numbers is right to 6e-8 in float32.

    @abstractmethod
    def _sampled(self, logp: Tensor, logq: Tensor, guard: bool) -> Term: ...

    @abstractmethod
    def _weighted(self, logp: Tensor, logq: Tensor, logb: Tensor, guard: bool) -> Term: ...

    def _score(self, logp: Tensor, logq: Tensor, logb: Tensor, guard: bool) -> Term:
        """Value as ``_sampled``; slope w * g with w = p/b: the score-function gradient, also off-policy."""
        return self._sampled(logp, logq, guard)[0], self._weighted(logp, logq, logb, guard)[1]

    def sampled(self, logp: Float[Tensor, ...], logp_ref: Float[Tensor, ...]) -> Float[Tensor, ...]:
        r"""The form at the sampled token, differentiated as it stands.

        Bregman: :math:`d_h(p_y, q_y)` (GBMPO's estimator). f-divergence: the one-sample estimate with a control
        variate, :math:`F(t)/t` with :math:`t = p_y/q_y` and :math:`F(t) = f(t) - f'(1)(t - 1)`, which for
        ``reverse_kl`` is k3.

        Args:
            logp: log-probabilities of the sampled tokens under the policy, any shape and floating dtype.
            logp_ref: the same under the reference; constant (no gradient flows to it).

        Returns:
            Values in nats, shape of ``logp``, differentiable once in ``logp``.

        Raises:
            ValueError: shapes that differ, a log-probability above 0 or NaN.

        Reference: GBMPO, arXiv 2602.04380; Schulman, "Approximating KL divergence" (2020), for k3.

        Example:
            >>> import torch, mirrorpo
            >>> logp, logp_ref = torch.tensor([-1.0]), torch.tensor([-2.0])
            >>> mirrorpo.divergence("reverse_kl").sampled(logp, logp_ref)  # exp(-1) - 1 + 1
            tensor([0.3679])
        """
        return _WithSlope.apply(self._sampled, self.ordinary, upcast(logp), logp_ref.detach())

    def weighted(
        self, logp: Float[Tensor, ...], logp_ref: Float[Tensor, ...], logp_old: Float[Tensor, ...]
    ) -> Float[Tensor, ...]:
        r"""The unbiased one-sample estimate of D, :math:`d(p_y, q_y) / b_y`, for tokens sampled from b.

        Value and gradient are both unbiased, off-policy too. For an f-divergence it is w times ``sampled``. For a
        Bregman divergence the weight 1 / b_y makes the value noisy; the gradient is that of ``score``.

        Args:
            logp: log-probabilities of the sampled tokens under the policy, any shape.
            logp_ref: the same under the reference.
            logp_old: the same under the policy that sampled them.

        Returns:
            Values in nats, shape of ``logp``, differentiable once in ``logp``.

        Raises:
            ValueError: shapes that differ, a log-probability above 0 or NaN.

        Reference: DeepSeek-V3.2 (arXiv 2512.02556) for reverse KL.

        Example:
            >>> import torch, mirrorpo
            >>> logp = torch.tensor([-1.0])
            >>> mirrorpo.divergence("prob_l2").weighted(logp, torch.tensor([-2.0]), logp)
            tensor([0.1470])
        """
        return _WithSlope.apply(self._weighted, self.ordinary, upcast(logp), logp_ref.detach(), logp_old.detach())

    @torch.no_grad()
    def score(self, logp: Float[Tensor, ...], logp_ref: Float[Tensor, ...]) -> Float[Tensor, ...]:
        r"""The weight g of the unbiased gradient: :math:`E_{y \sim p}[g \nabla \log p_y] = \nabla D(p, q)`.

        Bregman: :math:`h'(p_y) - h'(q_y)`; f-divergence: :math:`f'(t) - f'(1)`, t = p_y/q_y.

        Args:
            logp: log-probabilities of the sampled tokens under the policy, any shape.
            logp_ref: the same under the reference.

        Returns:
            g, shape of ``logp``, detached. The surrogate is ``(w * g).detach() * logp`` with w = p_y / b_y.

        Raises:
            ValueError: shapes that differ, a log-probability above 0 or NaN.

        Example:
            >>> import torch, mirrorpo
            >>> mirrorpo.divergence("kl").score(torch.tensor([-1.0]), torch.tensor([-2.0]))
            tensor([1.])
        """
        check_logps(_NAMES[:2], logp, logp_ref)
        logx, logz = (x.double().clamp(min=LOG_ZERO) for x in (logp, logp_ref))
        _, slope = self._weighted(logx, logz, logx, True)
        return _held(slope).to(upcast(logp).dtype)

    def surrogate(
        self, logp: Float[Tensor, ...], logp_ref: Float[Tensor, ...], logp_old: Float[Tensor, ...]
    ) -> Float[Tensor, ...]:
        """What ``estimator="score"`` adds to a loss: the value of ``sampled`` with the gradient w * g * grad logp.

        Arguments, shapes and errors as in ``weighted``.
        """
        return _WithSlope.apply(self._score, self.ordinary, upcast(logp), logp_ref.detach(), logp_old.detach())

    def exact(self, logits: Float[Tensor, "... V"], logits_ref: Float[Tensor, "... V"]) -> Float[Tensor, ...]:
        r"""The whole sum, :math:`\sum_v d(p_v, q_v)`, from both models' logits.

        Args:
            logits: of the policy, (..., V); need not be normalised; -inf marks tokens that cannot occur.
            logits_ref: of the reference, the same shape; constant.

        Returns:
            Values in nats, (...), differentiable once in ``logits``. Memory: one tensor like ``logits`` for the
            gradient.

        Raises:
            ValueError: vocabularies or shapes that differ.

        Example:
            >>> import torch, mirrorpo
            >>> mirrorpo.divergence("tv").exact(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
            tensor(0.2311)
        """
        flat, flat_ref = self._flatten(logits, logits_ref)
        return _OverVocabulary.apply(self._exact_rows, flat, flat_ref).view(logits.shape[:-1])

    def top_k(
        self,
        logits: Float[Tensor, "... V"],
        logits_ref: Float[Tensor, "... V"],
        tokens: Shaped[Tensor, ...],
        k: int = 64,
        support: str = "anchor",
    ) -> Float[Tensor, ...]:
        """A lower bound of ``exact`` from the K most likely tokens of the anchor and the sampled token.

        For an f-divergence one bucket holds the rest (data processing); for others the rest is left out (its terms are
        >= 0). Equals ``exact`` for k >= V.

        Args:
            logits: of the policy, (..., V).
            logits_ref: of the reference, the same shape; constant. Its K largest entries are chosen.
            tokens: the sampled tokens, (...), integers in [0, V).
            k: K, at least 1.
            support: the K likeliest tokens of the ``anchor``, of the ``policy``, or the ``union`` of both.

        Returns:
            Values in nats, (...), differentiable once in ``logits``.

        Raises:
            ValueError: vocabularies or shapes that differ, k < 1, an unknown support.
        """
        if support not in SUPPORTS:
            raise unknown_name("support", support, SUPPORTS)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer >= 1, got {k!r}")
        if tokens.shape != logits.shape[:-1]:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, legal: {tuple(logits.shape[:-1])}")
        flat, flat_ref = self._flatten(logits, logits_ref)
        sources = {"anchor": (flat_ref,), "policy": (flat.detach(),), "union": (flat_ref, flat.detach())}[support]
        likeliest = (x.topk(min(k, x.shape[-1]), dim=-1).indices for x in sources)
        chosen = torch.cat([*likeliest, tokens.reshape(-1, 1).long()], dim=-1)
        return _OverVocabulary.apply(self._top_k_rows, flat, flat_ref, chosen).view(logits.shape[:-1])

    def top_k_sparse(
        self,
        logits: Float[Tensor, "... V"],
        indices: Shaped[Tensor, ...],
        logp_anchor: Float[Tensor, ...],
        tokens: Shaped[Tensor, ...] | None = None,
        logp_anchor_tokens: Float[Tensor, ...] | None = None,
    ) -> Float[Tensor, ...]:
        """``top_k`` toward an anchor that is known at K entries per position only, as a server reports it.

        The terms of the K entries and of the sampled token; for an f-divergence one bucket holds the rest, whose mass
        under the anchor is 1 minus that of its entries. Entries with a log-probability of -inf or NaN are padding: they
        belong to the rest. A token that is listed twice counts once.

        Args:
            logits: of the policy, (..., V).
            indices: the tokens of the entries, (..., K), integers in [0, V).
            logp_anchor: their log-probabilities under the anchor, normalised over the whole vocabulary; constant.
            tokens: the sampled tokens, (...); None: the entries alone.
            logp_anchor_tokens: their log-probabilities under the anchor, (...); needed with ``tokens``.

        Returns:
            Values in nats, (...), differentiable once in ``logits``; a lower bound of ``exact``.

        Raises:
            ValueError: shapes that differ, tokens without their log-probabilities, an index out of range, a
                log-probability above 0 (looked at on a CPU only).

        Example:
            >>> import torch, mirrorpo
            >>> d, logits = mirrorpo.divergence("tv"), torch.tensor([0.0, 0.0, 0.0])
            >>> logq = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
            >>> round(d.top_k_sparse(logits, torch.tensor([2]), logq[[2]]).item(), 4)  # |1/3 - 0.6652|
            0.3319
        """
        _check_entries(logits, indices, logp_anchor, tokens, logp_anchor_tokens)
        if tokens is not None and logp_anchor_tokens is not None:
            indices = torch.cat([indices.long(), tokens.long().unsqueeze(-1)], dim=-1)
            logp_anchor = torch.cat([logp_anchor, logp_anchor_tokens.to(logp_anchor.dtype).unsqueeze(-1)], dim=-1)
        rows = logits[..., 0].numel()
        flat = upcast(logits).reshape(rows, -1)
        entries = logp_anchor.detach().double().reshape(rows, -1)
        return _OverVocabulary.apply(
            self._sparse_rows, flat, flat.detach(), indices.long().reshape(rows, -1), entries
        ).view(logits.shape[:-1])

    def _sparse_rows(self, logits: Tensor, _: Tensor, indices: Tensor, entries: Tensor) -> Term:
        known = entries > -torch.inf  # false for NaN
        # The scatter keeps the likeliest of a token's entries, so padding never hides a real one.
        logz = torch.full_like(logits, -torch.inf).scatter_reduce_(
            -1, indices, torch.where(known, entries, -torch.inf), "amax"
        )
        inside = logz > -torch.inf
        rest = 1.0 - torch.where(inside, logz, -torch.inf).exp().sum(-1, keepdim=True)
        return self._bucketed(logits.log_softmax(-1), logz, inside, rest.clamp(min=SMALLEST_REST).log())

    def estimate(self, estimator: str, logp: Tensor, logp_ref: Tensor, logp_old: Tensor) -> Tensor:
        """The estimator of that name for tokens sampled from the policy of ``logp_old``; shapes as in ``weighted``.

        Raises:
            ValueError: an unknown estimator, or one that needs logits.
        """
        if estimator == "sampled":
            return self.sampled(logp, logp_ref)
        if estimator == "weighted":
            return self.weighted(logp, logp_ref, logp_old)
        if estimator == "score":
            return self.surrogate(logp, logp_ref, logp_old)
        if estimator in LOGITS_ESTIMATORS:
            raise ValueError(f"estimator {estimator!r} needs logits and logits_ref, (..., V), of both models")
        raise unknown_name("estimator", estimator, ESTIMATORS)

    def _flatten(self, logits: Tensor, logits_ref: Tensor) -> tuple[Tensor, Tensor]:
        if logits.shape[-1:] != logits_ref.shape[-1:]:
            raise ValueError(
                f"logits_ref has a vocabulary of {logits_ref.shape[-1]}, logits of {logits.shape[-1]}: they must agree"
            )
        if logits.shape != logits_ref.shape:
            raise ValueError(
                f"logits_ref has shape {tuple(logits_ref.shape)}, logits {tuple(logits.shape)}: they must agree"
            )
        width = logits.shape[-1]
        return upcast(logits).reshape(-1, width), logits_ref.detach().reshape(-1, width)

    def _exact_rows(self, logits: Tensor, logits_ref: Tensor) -> Term:
        logx = logits.log_softmax(-1).clamp_(min=LOG_PROB_FLOOR)
        logz = logits_ref.log_softmax(-1).clamp_(min=LOG_PROB_FLOOR)
        value, slope = (_held(part) for part in self.term(logx, logz))
        # d log p_v / d logit_k = [k = v] - p_k
        return value.sum(-1), slope - logx.exp_() * slope.sum(-1, keepdim=True)

    def _top_k_rows(self, logits: Tensor, logits_ref: Tensor, chosen: Tensor) -> Term:
        logx_all = logits.log_softmax(-1)
        logz_all = logits_ref.log_softmax(-1)
        inside = torch.zeros_like(logx_all, dtype=torch.bool).scatter_(-1, chosen, True)
        rest = logz_all.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True) if self.bucket_rest else None
        return self._bucketed(logx_all, logz_all, inside, rest)

    def _bucketed(self, logx_all: Tensor, logz_all: Tensor, inside: Tensor, rest_z: Tensor | None) -> Term:
        """The terms inside, and one bucket for what is outside, whose log-mass under the anchor is ``rest_z``."""
        logx, logz = logx_all.clamp(min=LOG_PROB_FLOOR), logz_all.clamp(min=LOG_PROB_FLOOR)
        value, slope = (_held(part).masked_fill(~inside, 0.0) for part in self.term(logx, logz))
        value = value.sum(-1)
        if self.bucket_rest and rest_z is not None:
            rest_x = logx_all.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
            rest_x, rest_z = rest_x.clamp(min=LOG_PROB_FLOOR), rest_z.clamp(min=LOG_PROB_FLOOR)
            everything = inside.all(-1, keepdim=True)  # then there is no rest
            rest_value, rest_slope = (_held(part).masked_fill(everything, 0.0) for part in self.term(rest_x, rest_z))
            value = value + rest_value.squeeze(-1)
            # d log p_rest / d logit_k = p_k / p_rest - p_k for k in the rest: the first part here, the second below
            slope = slope + (rest_slope * (logx - rest_x).exp()).masked_fill(inside, 0.0)
        return value, slope - logx.exp() * slope.sum(-1, keepdim=True)
