r"""The table that evaluates a map of 126 units at the price of a few: closed forms in one number, the probability.

**Every mirror map is, locally, a mixture of KL and ProbL2.** On each of some ten thousand segments of (0, 1] the
curvature is replaced by

.. math:: \hat h''(s) = \beta / s + \alpha, \quad \hat T = A + \beta \log s + \alpha s, \quad
          \hat G = B + \beta s + \alpha s^2 / 2,

where T = h' and G is the integral of s h''(s). s h'' is interpolated, so it is exact at both ends of every segment and
positive between them; A and B continue T and G without a jump. The divergence is a difference of these two functions,

.. math:: d(x, z) = x (T(x) - T(z)) - (G(x) - G(z)),

whose first term is the derivative of d in log x. So the table holds a map in its own right:

- :math:`d(x, z) = \int_z^x (x - s) h''(s) ds` and :math:`h'(x) - h'(z) = \int_z^x h''(s) ds` weigh h'' with one sign,
  so the relative error of BOTH is at most that of h'' (``TABLE_ERROR``), for every pair x, z;
- h'' > 0 everywhere, so what is evaluated is a Bregman divergence, with exactly the gradient that is returned;
- c log x (KL) and a x (ProbL2) are reproduced to rounding.

**Segments** have equal width in log x + m x. In log x every root and log unit is analytic in a strip of half-width pi,
wherever its singularity x = -b/w <= 0 lies, so one grid serves all parameters, exact zeros of b included; m, the
largest rate of an exp unit, makes it fine where that unit turns.

**Near equality** a difference of T or G would lose every digit. There both points are given the same segment: A and B
cancel exactly, and what is left are the factored differences of log s, s and s^2. One formula does for near and far,
nothing in it depends on data, nothing waits for the device.

**Float32** log-probabilities, of which there are as many as a batch has tokens times the vocabulary, are read from
``Nodes``: the values of T and G on a fine grid, subtracted in float64, and what remains from the nearest node as a
polynomial in float32. The log-probabilities' own rounding leaves of h'(x) - h'(z) and of d a relative error of about
1e-6 over the log-ratio. On top of it that of h'(x) - h'(z) is below ``NODES_ERROR`` plus ``NODES_NOISE`` over the
log-ratio, that of d below ``NODES_ERROR`` plus 5e-7 over it plus ten times the noise over its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, Term
from mirrorpo.divergences.neural.generator import SLICES, UNITS_PER_GROUP, curvature

# The largest relative error of h'', hence of d and of h'(x) - h'(z), for x and z >= exp(LOG_BOTTOM).
TABLE_ERROR = 1e-6
# What float32 adds to it, and what it adds near equality, by the log-ratio.
NODES_ERROR, NODES_NOISE = 2e-6, 5e-10
# What the width of a segment is chosen for; the rest of TABLE_ERROR is left to rounding.
_TARGET = 5e-7
# Below exp(LOG_BOTTOM), the smallest positive float32, the map is continued as constant * x + c log x: still
# increasing, but no longer within TABLE_ERROR of the 126 units.
LOG_BOTTOM = -104.0
# Log-probabilities may exceed 0 by rounding (LOGP_TOLERANCE): the table reaches that far.
LOG_TOP = 2e-3
# Both points are given one segment where log x + m x changes by less than this part of a segment: over so short a way
# the closed form of one segment still holds in the next.
_NEAR = 0.25
# The units are evaluated on a coarse grid only, five steps to a cell, and the table's ends are interpolated in it by
# the polynomial of degree 5: in log x + m x the relative error is below 1e-8.
_CELL = 0.125
_DEGREE = 5
# Cuts of a cell into segments, as powers of 2: widths from 1/256 down to 1/8192.
_LEAST_CUTS, _MOST_CUTS = 5, 10
# Up to this rate an exp unit bends no more than the others do.
_SMALLEST_RATE = 0.25
# Newton steps to invert log x + m x; it increases and is convex, so they converge from above for every m.
_NEWTON_STEPS = 14
# Elements evaluated at once per CPU thread: the temporaries then stay in its cache, several times faster than memory.
CPU_CHUNK = 8192
# The same in float32, where the temporaries are few and a call costs more than what it computes in less.
NODES_CHUNK = 32768
# Nodes are at most so far apart: what their polynomials leave out falls with the square.
_NODES_WIDTH = 2.0**-10
# Nodes made at once: memory for what they are made of stays small.
_NODES_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class Table:
    """The closed forms of all segments; a ``Coordinate`` of ``BregmanDivergence``.

    Attributes:
        columns: (4, S), float64: A, B, beta, alpha. The first segment reaches down to 0.
        width: of a segment, in log x + rate * x.
        rate: m, or 0.
        shift: (), float64: the place of log x + rate * x = 0, in segments.
    """

    columns: Tensor
    width: float
    rate: float
    shift: Tensor
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    _rows: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)
    _nodes: dict[torch.device, Nodes] = field(default_factory=dict, repr=False)

    def __call__(self, logx: Tensor, logz: Tensor, delta: Tensor) -> Term:
        """d(x, z) and x (h'(x) - h'(z)), float64 in and out; log x/z is taken from the first two."""
        return self.between(logx, logz)

    def between(self, logx: Tensor, logz: Tensor, guard: bool = True) -> Term:
        """d(x, z) and x (h'(x) - h'(z)), float64, any shape; log-probabilities of -inf need the guard."""
        if guard:
            logx, logz = logx.clamp(min=LOG_PROB_FLOOR), logz.clamp(min=LOG_PROB_FLOOR)
        return _in_chunks(self._term, logx, logz, CPU_CHUNK)

    def between_float32(self, logx: Tensor, logz: Tensor) -> Term:
        """The same in float32, any shape; -inf is read as ``LOG_PROB_FLOOR``."""
        return _in_chunks(self.nodes(logx.device).term, logx, logz, NODES_CHUNK)

    def _term(self, logx: Tensor, logz: Tensor) -> Term:
        """The same for (N,). In place where possible: on the CPU half of the time is memory."""
        # The coefficients of the larger point carry the factored differences: alpha of a much smaller point may be so
        # large that its product with a difference has none of the digits that are left.
        sign = logx - logz
        log_high, log_low = torch.maximum(logx, logz), torch.minimum(logx, logz)
        high, low, delta = log_high.exp(), log_low.exp(), sign.abs()
        total = high + low
        gap = torch.tanh(delta * 0.5).mul_(total)  # high - low, with all its digits
        at_high, at_low = self._segments(log_high, high, delta, gap)
        columns = self.on(logx.device)
        slope, part, beta, alpha = (column.index_select(0, at_high) for column in columns)
        offset_low, base_low, beta_low, alpha_low = (column.index_select(0, at_low) for column in columns)
        # What the segment of the larger point has more than the other: all 0 in the same segment.
        slope.sub_(offset_low)
        part.sub_(base_low)
        more_beta = beta_low.neg_().add_(beta)
        more_alpha = alpha_low.neg_().add_(alpha)
        # T(high) - T(low) = (more of A) + (more beta) log low + (more alpha) low + beta delta + alpha gap
        slope.addcmul_(more_beta, log_low).addcmul_(more_alpha, low).addcmul_(beta, delta).addcmul_(alpha, gap)
        # G(high) - G(low) likewise, with s and s^2 / 2 in the place of log s and s
        part.addcmul_(more_beta.addcmul_(more_alpha, low, value=0.5), low)
        part.addcmul_(beta.addcmul_(alpha, total, value=0.5), gap)
        slope.mul_(logx.exp())
        return part.neg_().add_(slope).abs_(), slope.copysign_(sign)

    def _segments(self, log_high: Tensor, high: Tensor, delta: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """The segments of the larger and the smaller point, (N,) each, int32."""
        scale = 1.0 / self.width
        place = torch.add(self.shift, log_high, alpha=scale)
        move = delta
        if self.rate:
            place.add_(high, alpha=self.rate * scale)
            move = torch.add(delta, gap, alpha=self.rate)
        # Clamped as integers: a NaN, which may stand where a mask will remove it, is not a legal index.
        last = self.columns.shape[1] - 1
        at_high = place.int().clamp_(0, last)
        at_low = place.sub_(torch.hardshrink(move, _NEAR * self.width), alpha=scale).int().clamp_(0, last)
        return at_high, at_low

    def nodes(self, device: torch.device) -> Nodes:
        """What float32 log-probabilities are read from, on that device; made there once."""
        if device not in self._nodes:
            self._nodes[device] = Nodes.of(self, device)
        return self._nodes[device]

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The four columns on that device; copied there once."""
        if device not in self._on_device:
            self._on_device[device] = self.columns.to(device).unbind(0)
        return self._on_device[device]

    def rows(self, device: torch.device) -> Tensor:
        """(S + 1, 4), float64, for a kernel: 1/width, rate, shift, _NEAR * width; then A, B, beta, alpha by segment."""
        if device not in self._rows:
            first = [1.0 / self.width, self.rate, self.shift.item(), _NEAR * self.width]
            rows = torch.cat([self.columns.new_tensor([first]), self.columns.t()])
            self._rows[device] = rows.to(device).contiguous()
        return self._rows[device]


def _in_chunks(term: Callable[[Tensor, Tensor], Term], logx: Tensor, logz: Tensor, chunk: int) -> Term:
    """``term`` of any shape; on a CPU so many elements at once per thread."""
    chunk *= torch.get_num_threads()
    flat_x, flat_z = logx.reshape(-1), logz.reshape(-1)
    if logx.device.type != "cpu" or logx.numel() <= chunk:
        value, slope = term(flat_x, flat_z)
        return value.view(logx.shape), slope.view(logx.shape)
    value, slope = torch.empty_like(flat_x), torch.empty_like(flat_x)
    for into, into_slope, x, z in zip(*(u.split(chunk) for u in (value, slope, flat_x, flat_z)), strict=True):
        part, part_slope = term(x, z)
        into.copy_(part)
        into_slope.copy_(part_slope)
    return value.view(logx.shape), slope.view(logx.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Nodes:
    """A map on a grid, for float32 log-probabilities.

    Attributes:
        integrals: T and G, (n,) each, float64.
        rates: m = dT / d log s, (n,), and half of its derivative in log s, float32.
        logs: (n,), float32: log s, which are exact in it; None where they are multiples of the width.
        width: from node to node, in log s + rate * s; a power of 2.
        rate: as in ``Table``.
        first: the number of the first node, counted from log s + rate * s = 0.
    """

    integrals: tuple[Tensor, Tensor]
    rates: tuple[Tensor, Tensor]
    logs: Tensor | None
    width: float
    rate: float
    first: int

    @classmethod
    def of(cls, table: Table, device: torch.device) -> Nodes:
        parts = max(1, round(table.width / _NODES_WIDTH))
        width, number = table.width / parts, (table.columns.shape[1] - 1) * parts + 1
        first = round((1.0 - table.shift.item()) * parts)
        slope, part, m = (torch.empty(number, dtype=torch.float64, device="cpu") for _ in range(3))
        logs, bend = (torch.empty(number, dtype=torch.float32, device="cpu") for _ in range(2))
        for start in range(0, number, _NODES_AT_ONCE):
            at = slice(start, min(start + _NODES_AT_ONCE, number))
            numbers = torch.arange(at.start, at.stop, device="cpu")
            logs[at] = _points(width * (first + numbers).double(), table.rate)
            log_s = logs[at].double()
            s = log_s.exp()
            segment = (numbers // parts + 1).clamp_(max=table.columns.shape[1] - 1)
            offset, base, beta, alpha = table.columns[:, segment]
            slope[at] = torch.addcmul(offset, beta, log_s).addcmul_(alpha, s)
            part[at] = torch.addcmul(base, beta, s).addcmul_(alpha, s.square(), value=0.5)
            m[at] = torch.addcmul(beta, alpha, s)
        for start in range(0, number, _NODES_AT_ONCE):
            at = torch.arange(start, min(start + _NODES_AT_ONCE, number), device="cpu")
            low, high = (at - 1).clamp_(min=0), (at + 1).clamp_(max=number - 1)
            bend[at] = (0.5 * (m[high] - m[low]) / (logs[high].double() - logs[low].double())).float()
        bend[0] = 0.0  # below the first node the map is continued as c log x + constant
        m[0] = table.columns[2, 0]
        return cls(
            integrals=(slope.to(device), part.to(device)),
            rates=(m.float().to(device), bend.to(device)),
            logs=logs.to(device) if table.rate else None,
            width=width,
            rate=table.rate,
            first=first,
        )

    def term(self, logx: Tensor, logz: Tensor) -> Term:
        """d(x, z) and x (h'(x) - h'(z)) for (N,), float32."""
        at_x, of_x, part_x, x = self._from_node(logx)
        at_z, of_z, part_z, _ = self._from_node(logz)
        slope, part = (
            column.index_select(0, at_x).sub_(column.index_select(0, at_z)).to(logx.dtype) for column in self.integrals
        )
        slope.add_(of_x).sub_(of_z).mul_(x)
        return part.add_(part_x).sub_(part_z).neg_().add_(slope).abs_(), slope

    def _from_node(self, logs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The nearest node's number, T and G from there on, and s; (N,) each."""
        logs = logs.clamp(min=LOG_PROB_FLOOR)
        s = logs.exp()
        place = torch.mul(logs, 1.0 / self.width)
        if self.rate:
            place.add_(s, alpha=self.rate / self.width)
        place.round_().clamp_(min=self.first)
        move = None if self.rate else torch.sub(logs, place, alpha=self.width)  # exact: both in steps of 2^-k
        # Clamped as integers: a NaN, which may stand where a mask will remove it, is not a legal index.
        at = place.sub_(self.first).int().clamp_(0, len(self.rates[0]) - 1)
        if self.logs is not None:
            move = logs.sub_(self.logs.index_select(0, at))
        assert move is not None
        m, bend = (column.index_select(0, at) for column in self.rates)
        slope = torch.addcmul(m, bend, move).mul_(move)
        # e^v = s (1 - (move - v) + ...) under the integral, v from the node to log s
        part = bend.sub_(m, alpha=0.5).mul_(move).add_(m).mul_(move).mul_(s)
        return at, slope, part, s


def build_table(parameters: Tensor) -> Table:
    """The table of a map; a few milliseconds.

    Args:
        parameters: (380,), non-negative, float64, on the CPU.

    Returns:
        A ``Table``. Entries are not finite where the map itself is not in float64 (the caller checks).

    Example:
        >>> import torch
        >>> parameters = torch.zeros(380, dtype=torch.float64)
        >>> parameters[-1] = 1.0
        >>> x, z = torch.tensor([[0.5], [0.25]], dtype=torch.float64).log()
        >>> build_table(parameters).between(x, z)[1]  # x log(x / z)
        tensor([0.3466], dtype=torch.float64)
    """
    v, w, c = (parameters[SLICES[name]] for name in ("v", "w", "c"))
    rate = w[-UNITS_PER_GROUP:].masked_fill(v[-UNITS_PER_GROUP:] == 0, 0.0).amax().item()
    rate = rate if _SMALLEST_RATE < rate < math.inf else 0.0
    start = LOG_BOTTOM + rate * math.exp(LOG_BOTTOM)
    cells = math.ceil((LOG_TOP + rate * math.exp(LOG_TOP) - start) / _CELL)
    coarse = start + _CELL / _DEGREE * torch.arange(_DEGREE * cells + 1, dtype=torch.float64, device="cpu")
    coarse_s = _points(coarse, rate).exp()
    m = curvature(parameters, coarse_s)
    cuts = _cuts(coarse_s, m)
    width = _CELL / cuts
    m = torch.cat([(m.unfold(0, _DEGREE + 1, _DEGREE) @ _lagrange(cuts)).view(-1), m[-1:]])
    logs = _points(start + width * torch.arange(cells * cuts + 1, dtype=torch.float64, device="cpu"), rate)
    s = logs.exp()
    slope = m.diff() / s.diff()
    beta = torch.cat([c, torch.addcmul(m[:-1], slope, s[:-1], value=-1.0)])
    alpha = torch.cat([((m[:1] - c) / s[:1]).clamp_(min=0.0), slope])
    # A and B: what the closed forms on the two sides of an end differ by, added up
    logs, s = logs[:-1], s[:-1]
    fall_beta, fall_alpha = -beta.diff(), -alpha.diff()
    offset = torch.addcmul(fall_beta * logs, fall_alpha, s).cumsum(0)
    base = fall_beta.addcmul_(fall_alpha, s, value=0.5).mul_(s).cumsum(0)
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    columns = torch.stack([torch.cat([zero, offset]), torch.cat([zero, base]), beta, alpha])
    return Table(columns, width, rate, torch.tensor(1.0 - start / width, dtype=torch.float64, device="cpu"))


def _points(ends: Tensor, rate: float) -> Tensor:
    """The log x with log x + rate * x = ends."""
    if not rate:
        return ends
    logs = ends.clamp(max=2.0 * LOG_TOP + _CELL)
    for _ in range(_NEWTON_STEPS):
        steep = rate * logs.exp()
        logs = logs - (logs + steep - ends) / (1.0 + steep)
    return logs


def _cuts(s: Tensor, m: Tensor) -> int:
    """Into how many segments a cell must be cut: the chord's error falls with the square of the width."""
    share = (s[1:-1] - s[:-2]) / (s[2:] - s[:-2])
    chord = torch.lerp(m[:-2], m[2:], share)
    error = ((chord - m[1:-1]) / m[1:-1]).abs().amax().item()  # over two coarse steps
    wanted = 2.0 / _DEGREE * math.sqrt(_TARGET / max(error, 1e-300)) if math.isfinite(error) else 1.0
    return 2 ** min(_MOST_CUTS, max(_LEAST_CUTS, math.ceil(-math.log2(wanted))))


def _lagrange(cuts: int) -> Tensor:
    """(6, cuts): the weights of a cell's six coarse values at 0, 1/cuts, 2/cuts, ... of the cell."""
    nodes = torch.linspace(0.0, 1.0, _DEGREE + 1, dtype=torch.float64, device="cpu")
    at = torch.arange(cuts, dtype=torch.float64, device="cpu") / cuts
    rows = []
    for i, node in enumerate(nodes):
        others = torch.cat([nodes[:i], nodes[i + 1 :]]).unsqueeze(-1)
        rows.append(((at - others) / (node - others)).prod(0))
    return torch.stack(rows)
