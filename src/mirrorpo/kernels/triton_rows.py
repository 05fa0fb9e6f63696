# type: ignore  (the language of these functions is Triton's, and the package an extra)
r"""Two Triton kernels that are the sweep over a chunk of logits: one measures, one writes the gradient.

Each program has one row of (C, V) and goes through it block by block, in float32 whatever the logits are in.

============  ==========================================  ===========================================================
kernel        reads                                       writes
============  ==========================================  ===========================================================
``measure``   the row; for each divergence the anchor's   log-probability of the token, entropy, log-sum-exp; of each
              row, then both again, now that both         divergence its sum, the sum of its slopes, the anchor's
              log-sum-exps are known                      log-sum-exp and log-probability of the token
``gradient``  the row, the anchors' rows                  d loss / d products, over the row or in another place
============  ==========================================  ===========================================================

Between the two the objective's loss and its derivative are taken in torch, on (C,) numbers. What is computed is that of
``sweep`` and ``Divergence.over_vocabulary``; differences of first order near equality are written as series, so a term
loses fewer digits here than there.

The largest number is followed through the row, as in Milakov & Gimelshein 2018, arXiv 1805.02867; with
:math:`l = \sum e^{z - m}` and :math:`s = \sum e^{z - m} (z - m)` the entropy is :math:`\log l - s / l`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mirrorpo.divergences.base import LOG_PROB_FLOOR, LOG_ZERO, MAX_MAGNITUDE

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
def measure(
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
def gradient(
    z, tokens, bias, found, coefficients, into, scale, cap_in, cap_out, terms,
    TERMS: tl.constexpr, PLACES: tl.constexpr, ENTROPY: tl.constexpr, CAPPED: tl.constexpr,
    V: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """d loss / d products. coefficients: (3 + J, C): of p, of the token's entry, of p log p; of each term's slope."""
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
        tl.store(into + at * V + columns, grad.to(into.dtype.element_ty), mask=inside)


__all__ = ["gradient", "measure"]
