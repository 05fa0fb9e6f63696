r"""The sweep over a chunk of logits as two Triton kernels: one that measures, one that writes the gradient in place.

Each program has one row of (C, V) and goes through it block by block, in float32 whatever the logits are in.

===========  =============================================  ==========================================================
kernel       reads                                          writes
===========  =============================================  ==========================================================
``_measure`` the row (and the anchors'); once more if a     log-probability of the token, entropy, log-sum-exp; of
             divergence is asked for: it needs both         each divergence its sum, the sum of its slopes, and the
             log-sum-exps first                             anchor's log-sum-exp and log-probability of the token
``_gradient``  the row (and the anchors')                   d loss / d logits, over the row
===========  =============================================  ==========================================================

Between the two the objective's loss and its derivative are taken in torch, on (C,) numbers. What is computed is that of
``sweep`` and ``Divergence.over_vocabulary``; differences of first order near equality are written as series, so a term
loses fewer digits here than there.

The largest number is followed through the row, as in Milakov & Gimelshein 2018, arXiv 1805.02867; with
:math:`l = \sum e^{z - m}` and :math:`s = \sum e^{z - m} (z - m)` the entropy is :math:`\log l - s / l`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, LOG_ZERO, MAX_MAGNITUDE
from mirrorpo.divergences.neural.map import NeuralDivergence
from mirrorpo.kernels.backend import Form, form_of
from mirrorpo.kernels.head import Head
from mirrorpo.kernels.sweep import Chunk, Found
from mirrorpo.kernels.vocabulary import Anchor, VocabularyTerm

# Entries of a row that a program holds at once, and warps that share them.
BLOCK, WARPS = 4096, 8
# The same where divergences are evaluated, which takes more registers; float64 (`neural`) more still.
TERM_BLOCK, TABLE_BLOCK = 2048, 512
# Rows of what `_measure` writes, (_COMMON + _PER_TERM * terms, C).
_COMMON, _PER_TERM = 3, 4

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_FLOOR = tl.constexpr(LOG_PROB_FLOOR)
_LARGEST = tl.constexpr(MAX_MAGNITUDE)


# Comparisons and not tl.minimum or tl.maximum, which drop a NaN: it must reach the loss.


@triton.jit
def _at_least(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def _within(x, bound):
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit
def _near(u):
    """e^u - 1 - u for |u| <= 1, by its series."""
    rest = 1.0 + u * (1.0 / 9.0) * (1.0 + u * (1.0 / 10.0) * (1.0 + u * (1.0 / 11.0)))
    rest = 1.0 + u * (1.0 / 6.0) * (1.0 + u * (1.0 / 7.0) * (1.0 + u * (1.0 / 8.0) * rest))
    return 0.5 * u * u * (1.0 + u * (1.0 / 3.0) * (1.0 + u * (1.0 / 4.0) * (1.0 + u * (1.0 / 5.0) * rest)))


@triton.jit
def _k(u):
    """e^u - 1 - u."""
    return tl.where(tl.abs(u) < 1.0, _near(u), tl.exp(u) - 1.0 - u)


@triton.jit
def _expm1(u):
    return tl.where(tl.abs(u) < 1.0, u + _near(u), tl.exp(u) - 1.0)


@triton.jit
def _log1p(u):
    """Right near 0 too: what rounding did to 1 + u is divided out again (Kahan)."""
    w = 1.0 + u
    step = w - 1.0
    return tl.where(step == 0.0, u, tl.log(w) * (u / tl.where(step == 0.0, 1.0, step)))


@triton.jit
def _tanh(x):
    e = _expm1(-2.0 * tl.abs(x))
    size = -e / (e + 2.0)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _logits(row, columns, inside, bias, scale, cap_in, cap_out, CAPPED: tl.constexpr):
    """Logits of products, and the tanh that the soft cap's slope is made of."""
    z = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    z = _at_least(z, _LOG_ZERO)  # a difference of two -inf would be NaN
    bent = z
    if CAPPED:
        bent = _tanh(z * cap_in)
        z = bent * cap_out
    else:
        z = z * scale
    return tl.where(inside, _at_least(z, _LOG_ZERO), _LOG_ZERO), bent


@triton.jit
def _power_gap(A: tl.constexpr, delta, SHIFT: tl.constexpr, offset):
    """exp(SHIFT * delta + offset) * B_A(delta); see ``divergences.bregman.power_gap``."""
    if A > 0.5:
        u = -delta
        less: tl.constexpr = 1.0 - A
        shift: tl.constexpr = -(SHIFT + 1.0)
    else:
        u = delta
        less: tl.constexpr = A
        shift: tl.constexpr = SHIFT
    gap = _k(u) if less == 0.0 else _at_least((_k(less * u) / less - _k(u)) / (less - 1.0), 0.0)
    return gap * tl.exp(shift * u + offset)


@triton.jit
def _power_slope(A: tl.constexpr, delta):
    """dB_A / dt; see ``divergences.bregman.power_slope``."""
    return delta if A == 1.0 else _expm1((A - 1.0) * delta) / (A - 1.0)


@triton.jit
def _of_ratio(NAME: tl.constexpr, A: tl.constexpr, delta):
    """S and g of the log-ratio, as the forms of ``divergences.fdivergence``."""
    if NAME == "reverse_kl":
        value, score = _k(-delta), delta
    elif NAME == "forward_kl":
        value, score = _k(delta) * tl.exp(-delta), -_expm1(-delta)
    elif NAME == "jeffreys":
        e = _expm1(-delta)
        value, score = -delta * e, delta - e
    elif NAME == "js":
        e = _expm1(-delta)
        log_mix = _log1p(0.5 * e)
        value = _at_least(-0.5 * log_mix - 0.5 * (log_mix + delta) * (e + 1.0), 0.0)
        score = -0.5 * log_mix
    elif NAME == "tv":
        value = 0.5 * tl.abs(_expm1(-delta))
        score = tl.where(delta > 0.0, 0.5, tl.where(delta < 0.0, -0.5, delta))
    elif NAME == "chi2":
        up = _expm1(delta)
        value, score = up * up * tl.exp(-delta), 2.0 * up
    elif NAME == "hellinger":
        e = _expm1(-0.5 * delta)
        value, score = 0.5 * e * e, -0.5 * e
    elif NAME == "alpha":
        value, score = _power_gap(A, delta, -1.0, 0.0), _power_slope(A, delta)
    elif NAME == "k1":
        value, score = delta, delta + 1.0
    elif NAME == "k2":
        value = 0.5 * delta * delta
        score = value + delta
    else:
        tl.static_assert(NAME == "log_l2")
        value = delta * delta
        score = value + 2.0 * delta
    return value, score


@triton.jit
def _bregman(NAME: tl.constexpr, A: tl.constexpr, logx, logz, delta):
    """d and x dd/dx, as the coordinates of ``divergences.bregman``."""
    if NAME == "kl":
        x = tl.exp(logx)
        value, slope = x * _k(-delta), x * delta
    elif NAME == "prob_l2":
        x = tl.exp(logx)
        gap = x - tl.exp(logz)
        value, slope = gap * gap, 2.0 * x * gap
    elif NAME == "itakura_saito":
        value, slope = _k(delta), _expm1(delta)
    else:
        tl.static_assert(NAME == "beta")
        value = _power_gap(A, delta, 0.0, A * logz)
        slope = tl.exp(delta + A * logz) * _power_slope(A, delta)
    return _within(value, _LARGEST), _within(slope, _LARGEST)


@triton.jit
def _neural(logx, logz, inside, table, last):
    """d and x dd/dx of a neural map, as ``divergences.neural.table``; float64 inside."""
    logx, logz = _at_least(logx.to(tl.float64), _FLOOR), _at_least(logz.to(tl.float64), _FLOOR)
    sign = logx - logz
    log_high, log_low = tl.where(sign > 0.0, logx, logz), tl.where(sign > 0.0, logz, logx)
    high, low, delta = tl.exp(log_high), tl.exp(log_low), tl.abs(sign)
    total = high + low
    # high - low = high * (1 - e^-delta), which is a series where the difference has lost its digits
    series = delta * (1.0 - delta / 2.0 * (1.0 - delta / 3.0 * (1.0 - delta / 4.0 * (1.0 - delta / 5.0))))
    gap = high * tl.where(delta < 0.01, series, 1.0 - tl.exp(-delta))
    per_width, rate, shift, shortest = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    place = shift + (log_high + rate * high) * per_width
    move = delta + rate * gap
    there = place - tl.where(move > shortest, move, 0.0) * per_width
    at_high = tl.minimum(tl.maximum(place.to(tl.int32), 0), last)
    at_low = tl.minimum(tl.maximum(there.to(tl.int32), 0), last)
    at_high, at_low = table + 4 + 4 * at_high, table + 4 + 4 * at_low
    beta = tl.load(at_high + 2, mask=inside, other=0.0)
    alpha = tl.load(at_high + 3, mask=inside, other=0.0)
    more_offset = tl.load(at_high, mask=inside, other=0.0) - tl.load(at_low, mask=inside, other=0.0)
    more_base = tl.load(at_high + 1, mask=inside, other=0.0) - tl.load(at_low + 1, mask=inside, other=0.0)
    more_beta = beta - tl.load(at_low + 2, mask=inside, other=0.0)
    more_alpha = alpha - tl.load(at_low + 3, mask=inside, other=0.0)
    slope = more_offset + more_beta * log_low + more_alpha * low + beta * delta + alpha * gap
    part = more_base + (more_beta + 0.5 * more_alpha * low) * low + (beta + 0.5 * alpha * total) * gap
    slope = slope * tl.exp(logx)
    value, slope = tl.abs(slope - part), tl.where(sign < 0.0, -slope, slope)
    return _within(value, _LARGEST).to(tl.float32), _within(slope, _LARGEST).to(tl.float32)


@triton.jit
def _coordinate(term, logx, logz, inside):
    """d(x, z) and x dd/dx, 0 beyond the vocabulary."""
    if term[4] == "neural":
        value, slope = _neural(logx, logz, inside, term[2], term[3])
    else:
        delta = _within(logx - logz, term[7])
        # Where a small ratio is clamped, x is clamped with it, as in `Divergence.term`.
        if term[5] != "prob_l2":
            logx = _at_least(logx, logz + delta)
        if term[4] == "bregman":
            value, slope = _bregman(term[5], term[6], logx, logz, delta)
        else:
            x = tl.exp(logx)
            value, score = _of_ratio(term[5], term[6], delta)
            value, slope = x * value, x * score
    return tl.where(inside, value, 0.0), tl.where(inside, slope, 0.0)


@triton.jit
def _anchor_logits(term, at, columns, inside):
    """Logits of an anchor; of the uniform one 0."""
    if term[0] is None:
        z = tl.where(inside, 0.0, _LOG_ZERO)
    else:
        z = _at_least(tl.load(term[0] + at + columns, mask=inside, other=0.0).to(tl.float32) * term[1], _LOG_ZERO)
        z = tl.where(inside, z, _LOG_ZERO)
    return z


@triton.jit
def _followed(z, inside, largest, total, moment):
    """Largest number so far, sum of e^(z - m) and of e^(z - m) (z - m), with one block more."""
    more = tl.maximum(largest, tl.max(z, 0))
    gap = z - more
    e = tl.where(inside, tl.exp(gap), 0.0)
    step = more - largest
    shrink = tl.exp(-step)
    moment = shrink * (moment - step * total) + tl.sum(e * tl.where(inside, gap, 0.0), 0)
    return more, shrink * total + tl.sum(e, 0), moment


@triton.jit
def _statistics(row, bias, scale, cap_in, cap_out, CAPPED: tl.constexpr, V: tl.constexpr, B: tl.constexpr):
    """log-sum-exp and entropy of a row."""
    largest, total, moment = _LOG_ZERO + 0.0, 0.0, 0.0
    for start in range(0, V, B):
        columns = start + tl.arange(0, B)
        inside = columns < V
        x, _ = _logits(row, columns, inside, bias, scale, cap_in, cap_out, CAPPED)
        largest, total, moment = _followed(x, inside, largest, total, moment)
    return largest + tl.log(total), _at_least(tl.log(total) - moment / total, 0.0)


@triton.jit
def _log_sum_of(term, at, V: tl.constexpr, B: tl.constexpr):
    """log-sum-exp of an anchor's row."""
    largest, total, moment = _LOG_ZERO + 0.0, 0.0, 0.0
    for start in range(0, V, B):
        columns = start + tl.arange(0, B)
        inside = columns < V
        largest, total, moment = _followed(_anchor_logits(term, at, columns, inside), inside, largest, total, moment)
    return largest + tl.log(total)


@triton.jit
def _sums(
    term, at, row, log_sum, log_sum_q, bias, scale, cap_in, cap_out,
    CAPPED: tl.constexpr, V: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Sums of a divergence's coordinate terms and of their slopes."""
    value, slopes = 0.0, 0.0
    for start in range(0, V, B):
        columns = start + tl.arange(0, B)
        inside = columns < V
        x, _ = _logits(row, columns, inside, bias, scale, cap_in, cap_out, CAPPED)
        logq = _anchor_logits(term, at, columns, inside) - log_sum_q
        d, slope = _coordinate(term, x - log_sum, logq, inside)
        value += tl.sum(d, 0)
        slopes += tl.sum(slope, 0)
    return value, slopes


@triton.jit
def _measure(
    z, tokens, bias, out, scale, cap_in, cap_out, terms,
    TERMS: tl.constexpr, CAPPED: tl.constexpr, V: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Statistics of a row. out: (3 + 4 J, C): logp, entropy, log-sum-exp; per term value, slopes, log-sum-exp, logp."""
    at, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    row = z + at * V
    token = tl.load(tokens + at)
    known = (token >= 0) & (token < V)
    # A block of one entry, whose sum is a number.
    one = tl.where(known, token, 0) + tl.arange(0, 1)
    of_token, _ = _logits(row, one, one < V, bias, scale, cap_in, cap_out, CAPPED)
    log_sum, entropy = _statistics(row, bias, scale, cap_in, cap_out, CAPPED, V, B)
    tl.store(out + at, tl.where(known, tl.sum(of_token, 0) - log_sum, float("nan")))
    tl.store(out + count + at, entropy)
    tl.store(out + 2 * count + at, log_sum)
    for j in tl.static_range(TERMS):
        log_sum_q = _log_sum_of(terms[j], at * V, V, B)
        value, slopes = _sums(
            terms[j], at * V, row, log_sum, log_sum_q, bias, scale, cap_in, cap_out, CAPPED, V, B
        )  # fmt: skip
        anchor_of_token = tl.sum(_anchor_logits(terms[j], at * V, one, one < V), 0)
        into = out + (3 + 4 * j) * count + at
        tl.store(into, value)
        tl.store(into + count, slopes)
        tl.store(into + 2 * count, log_sum_q)
        tl.store(into + 3 * count, tl.where(known, anchor_of_token - log_sum_q, float("nan")))


@triton.jit
def _gradient(
    z, tokens, bias, found, coefficients, scale, cap_in, cap_out, terms,
    TERMS: tl.constexpr, PLACES: tl.constexpr, ENTROPY: tl.constexpr, CAPPED: tl.constexpr,
    V: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """d loss / d product over the row. coefficients: (3 + J, C): of p, of the token, of -p log p; of each term."""
    at, count = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    row = z + at * V
    token = tl.load(tokens + at)
    log_sum = tl.load(found + 2 * count + at)
    share, at_token = tl.load(coefficients + at), tl.load(coefficients + count + at)
    of_entropy = tl.load(coefficients + 2 * count + at)
    for start in range(0, V, B):
        columns = start + tl.arange(0, B)
        inside = columns < V
        x, bent = _logits(row, columns, inside, bias, scale, cap_in, cap_out, CAPPED)
        logp = x - log_sum
        p = tl.exp(logp)
        grad = p * share + tl.where(columns == token, at_token, 0.0)
        if ENTROPY:
            grad += of_entropy * p * logp
        for j in tl.static_range(TERMS):
            log_sum_q = tl.load(found + (5 + 4 * PLACES[j]) * count + at)
            y = _anchor_logits(terms[j], at * V, columns, inside)
            _, slope = _coordinate(terms[j], logp, y - log_sum_q, inside)
            grad += tl.load(coefficients + (3 + j) * count + at) * slope
        if CAPPED:
            grad *= 1.0 - bent * bent
        tl.store(row + columns, grad.to(z.dtype.element_ty), mask=inside)


@dataclass(frozen=True, kw_only=True)
class Other:
    """What a divergence over the vocabulary is taken of.

    Attributes:
        form: which divergence (``backend.form_of``).
        logits: (C, V), of the anchor; None for the uniform one.
        scale: they are multiplied by it.
        table: (S + 1, 4), float64, of a neural map (``Table.rows``).
    """

    form: Form
    logits: Tensor | None
    scale: float = 1.0
    table: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernels' ``term``: logits, scale, table, its last segment; as constants family, name, option, bound."""
        last = 0 if self.table is None else self.table.shape[0] - 2
        return (self.logits, self.scale, self.table, last, *(tl.constexpr(x) for x in self.form))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What ``measure`` finds of C rows; float32.

    Attributes:
        numbers: (3 + 4 J, C); the others are views of it.
    """

    numbers: Tensor

    @property
    def logp(self) -> Tensor:
        """(C,), of the tokens."""
        return self.numbers[0]

    @property
    def entropy(self) -> Tensor:
        """(C,), in nats."""
        return self.numbers[1]

    def of_term(self, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """(C,) each: the divergence, the sum of its slopes, the token's log-probability under the anchor."""
        first = _COMMON + _PER_TERM * j
        return self.numbers[first], self.numbers[first + 1], self.numbers[first + 3]


def measure(products: Tensor, tokens: Tensor, head: Head, others: Sequence[Other] = ()) -> Statistics:
    """Log-probabilities, entropies and divergences of a chunk.

    Args:
        products: (C, V), contiguous, float32 or 16-bit: h W^T, from which ``head`` makes logits.
        tokens: (C,), integers.
        head: its bias, soft cap, scale and temperature are read.
        others: of each divergence.
    """
    numbers = torch.empty(_COMMON + _PER_TERM * len(others), products.shape[0], device=products.device)
    _launch(_measure, products, tokens, head, (numbers,), others)
    return Statistics(numbers=numbers)


def gradient_(
    products: Tensor,
    tokens: Tensor,
    head: Head,
    found: Statistics,
    slope: Tensor,
    others: Sequence[Other] = (),
    weights: Sequence[Tensor | None] = (),
    entropy_weight: Tensor | None = None,
) -> None:
    """d loss / d products, in their place.

    Args:
        products: as in ``measure``; overwritten.
        tokens: (C,), integers.
        head: as in ``measure``.
        found: what ``measure`` found.
        slope: (C,), d loss / d logp of the tokens.
        others: as in ``measure``.
        weights: (C,), d loss / d value of each divergence; None: it is not in the loss.
        entropy_weight: (C,), d loss / d entropy.
    """
    places = tuple(j for j, weight in enumerate(weights) if weight is not None)
    coefficients = torch.zeros(3 + len(places), products.shape[0], device=products.device)
    coefficients[0], coefficients[1] = -slope, slope
    if entropy_weight is not None:
        # H = -sum p log p: dH/dz = -p (log p + H)
        coefficients[0] -= entropy_weight * found.entropy
        coefficients[2] = -entropy_weight
    for row, j in enumerate(places):
        weight = weights[j]
        assert weight is not None
        coefficients[3 + row] = weight
        coefficients[0] -= weight * found.of_term(j)[1]
    coefficients.mul_(head.factor)
    flags = {"PLACES": places, "ENTROPY": entropy_weight is not None}
    _launch(_gradient, products, tokens, head, (found.numbers, coefficients), [others[j] for j in places], **flags)


def _launch(
    kernel: Any, products: Tensor, tokens: Tensor, head: Head, buffers: tuple[Tensor, ...], others: Sequence[Other],
    **flags: Any,
) -> None:  # fmt: skip
    assert products.is_contiguous()
    vocabulary = products.shape[1]
    block = TERM_BLOCK if others else BLOCK
    if any(other.table is not None for other in others):
        block = TABLE_BLOCK
    cap_in = cap_out = 1.0
    if head.softcap is not None:
        cap_in, cap_out = head.scale / head.softcap, head.softcap / head.temperature
    with torch.cuda.device_of(products):
        kernel[(products.shape[0],)](
            products, tokens, head.bias, *buffers, head.factor, cap_in, cap_out,
            tuple(other.arguments for other in others), TERMS=len(others), CAPPED=head.softcap is not None,
            V=vocabulary, B=min(block, triton.next_power_of_2(vocabulary)), num_warps=WARPS, **flags,
        )  # fmt: skip


@dataclass
class TritonChunk(Chunk):
    """A chunk of the sweep whose logits Triton's kernels work on; ``z`` holds products until it holds the gradient."""

    scales_anchors: ClassVar[bool] = True
    statistics: Statistics = field(init=False)

    @cached_property
    def _others(self) -> tuple[Other, ...]:
        return tuple(self._other(term) for term in self.terms)

    def _other(self, term: VocabularyTerm) -> Other:
        form = form_of(term.divergence)
        assert form is not None
        table = term.divergence.table.rows(self.z.device) if isinstance(term.divergence, NeuralDivergence) else None
        if term.anchor is None:
            return Other(form=form, logits=None, table=table)
        assert isinstance(term.anchor, Anchor)
        head = term.anchor.head
        return Other(
            form=form,
            logits=self.others[id(term.anchor)],
            scale=head.factor if head.only_scales else 1.0,
            table=table,
        )

    def _normalise(self, found: Found) -> None:
        self.statistics = measure(self.z, self.tokens, self.head, self._others)
        found.logp[self.part], found.entropy[self.part] = self.statistics.logp, self.statistics.entropy
        for j in range(len(self.terms)):
            value, _, anchor_logp = self.statistics.of_term(j)
            found.values[j][self.part], found.anchor_logps[j][self.part] = value, anchor_logp

    def _measure(self, found: Found, numbers: list[int]) -> None:
        """Nothing: the values are there already."""

    def _logits_gradient(
        self, found: Found, slope: Tensor, weights: tuple[Tensor | None, ...], entropy_weight: Tensor | None
    ) -> None:
        gradient_(
            self.z, self.tokens, self.head, self.statistics, slope, self._others, weights, entropy_weight
        )  # fmt: skip


__all__ = ["Other", "Statistics", "TritonChunk", "gradient_", "measure"]
