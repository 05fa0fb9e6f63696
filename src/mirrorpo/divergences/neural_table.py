r"""How is a map of 126 units evaluated at the price of two? As a table in one number, the probability.

**Every mirror map is, locally, a mixture of KL, ProbL2 and a cubic generator.** On each of a few thousand segments of
(0, 1] the curvature is replaced by

.. math:: \hat h''(s) = \beta / s + \alpha + \gamma s,

exact at both ends and near the middle of the segment. Its integrals T = h' and H = h are closed forms in x and log x,
continued over the segments without a jump. So the table holds a map in its own right: T is the derivative of H, and

- since :math:`d(x, z) = \int_z^x (x - s) h''(s) ds` and :math:`h'(x) - h'(z) = \int_z^x h''(s) ds` weigh h'' with one
  sign, the relative error of BOTH is at most that of h'' (``TABLE_ERROR``), everywhere, for every pair;
- h'' > 0 everywhere, so the table's own d is a divergence: non-negative, zero iff equal, with h' as its gradient;
- c log x and a x are represented exactly.

**Segments** have equal width in log x + m x. In log x every root and log unit is analytic in a strip of half-width pi,
wherever its singularity x = -b/w <= 0 lies, so one width serves all parameters, exact zeros of b included; m, the
largest rate of an exp unit, makes them fine where that unit turns.

**Near equality** H(x) - H(z) - T(z)(x - z) would lose every digit. Within a fraction of a segment both results are
factored differences of the segment's closed form instead; both ways are computed and one is selected, so nothing in the
evaluation depends on data or waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirrorpo.divergences.base import LOG_PROB_FLOOR, Term
from mirrorpo.divergences.neural_units import SLICES, UNITS_PER_GROUP, curvature

# The largest relative error of the table's h'', hence of d and of h'(x) - h'(z), for x and z >= exp(LOG_BOTTOM).
TABLE_ERROR = 1e-6
# Width of a segment in log x + m x. The error of h'' is at most 0.9 width^3 / 125, plus rounding.
WIDTH = 1.0 / 32.0
# Below exp(LOG_BOTTOM), the smallest positive float32, the map is continued as constant * x + c log x: still increasing,
# but no longer within TABLE_ERROR of the 126 units.
LOG_BOTTOM = -104.0
# Log-probabilities may exceed 0 by rounding (LOGP_TOLERANCE): the table reaches that far.
LOG_TOP = 2e-3
# The factored form is used where log x + m x changes by less than this: an eighth of a segment, so that the closed form
# of one segment still holds in the next.
NEAR = WIDTH / 8.0
# Below this rate the exp units need no finer segments: h'' of them changes by less than that of the others.
SMALLEST_RATE = 0.25
# Elements evaluated at once per CPU thread: the temporaries then stay in its cache, four times faster than in memory.
CPU_CHUNK = 8192
# Newton steps to invert log x + m x; convex and increasing, so it converges from above for every m.
_NEWTON_STEPS = 14


@dataclass(frozen=True, eq=False)
class Table:
    """The closed form of each segment: h'' = beta / s + alpha + 2 gamma s; a ``Coordinate`` of ``BregmanDivergence``.

    Attributes:
        columns: (5, S), float64: beta, alpha, gamma and the constants of integration of T and H; the first segment
            reaches down to 0.
        start: log x + rate * x at the low end of the second segment.
        rate: m, or 0.
    """

    columns: Tensor
    start: float
    rate: float
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The five columns on that device; copied there once."""
        if device not in self._on_device:
            self._on_device[device] = self.columns.to(device).unbind(0)
        return self._on_device[device]

    def __call__(self, logx: Tensor, logz: Tensor, delta: Tensor) -> Term:
        """d(x, z) and x (h'(x) - h'(z)), float64 in and out; ``delta`` is taken from the two log-probabilities."""
        chunk = CPU_CHUNK * torch.get_num_threads()
        if logx.device.type != "cpu" or logx.numel() <= chunk:
            value, slope = self._term(logx.reshape(-1), logz.reshape(-1))
            return value.view(logx.shape), slope.view(logx.shape)
        value, slope = torch.empty_like(delta), torch.empty_like(delta)
        parts = (u.reshape(-1).split(chunk) for u in (logx, logz))
        for into, into_slope, x, z in zip(
            value.view(-1).split(chunk), slope.view(-1).split(chunk), *parts, strict=True
        ):
            got, got_slope = self._term(x, z)
            into.copy_(got)
            into_slope.copy_(got_slope)
        return value, slope

    def _term(self, logx: Tensor, logz: Tensor) -> Term:
        """The same for (N,)."""
        both = torch.stack((logx, logz)).clamp_(min=LOG_PROB_FLOOR)
        points = both.exp()
        beta, alpha, gamma, offset, base = self._segments(both, points)
        # T = offset + beta log s + s (alpha + gamma s); H = base + s (T - beta - s (alpha / 2 + 2/3 gamma s))
        lower = torch.addcmul(offset, beta, both)
        inner = torch.addcmul(alpha, gamma, points, value=2.0 / 3.0)
        heights = torch.addcmul(lower - beta, inner, points, value=0.5).mul_(points).add_(base)
        slope_x, slope_z = lower.addcmul_(torch.addcmul(alpha, gamma, points, out=inner), points)

        (logx, logz), (x, z), (height_x, height_z) = both, points, heights
        beta, alpha, gamma = beta[1], alpha[1], gamma[1]
        delta = logx - logz
        gap = delta.expm1().mul_(z)
        near = (torch.add(delta, gap, alpha=self.rate) if self.rate else delta).abs() < NEAR
        far_value = (height_x - height_z).addcmul_(slope_z, gap, value=-1.0)
        # The factored differences: h'(x) - h'(z) of the closed form, and its integral by the trapezoid rule with the
        # rule's error added, which leaves a relative error of delta^3 / 10.
        tilt = beta * delta
        near_slope = torch.addcmul(alpha, gamma, x + z).mul_(gap).add_(tilt)
        bend = tilt.mul_(delta).addcmul_(gamma * gap, gap, value=-2.0)
        near_value = bend.add_(near_slope, alpha=6.0).mul_(gap).mul_(1.0 / 12.0)
        value = torch.where(near, near_value, far_value).clamp_(min=0.0)
        return value, torch.where(near, near_slope, slope_x - slope_z).mul_(x)

    def _segments(self, logs: Tensor, points: Tensor) -> list[Tensor]:
        """The five columns at each point, in the shape of ``logs``."""
        place = torch.add(torch.tensor(1.0 - self.start / WIDTH), logs, alpha=1.0 / WIDTH)
        if self.rate:
            place.add_(points, alpha=self.rate / WIDTH)
        # Clamped as integers: a NaN, which may stand where a mask will remove it, is no legal index.
        index = place.int().clamp_(0, self.columns.shape[1] - 1).view(-1)
        return [column.index_select(0, index).view(logs.shape) for column in self.on(logs.device)]


def _points(ends: Tensor, rate: float) -> Tensor:
    """The log x with log x + rate * x = ends."""
    logs = ends.clamp(max=LOG_TOP)
    if rate > 0.0:
        for _ in range(_NEWTON_STEPS):
            steep = rate * logs.exp()
            logs = logs - (logs + steep - ends) / (1.0 + steep)
    return logs


def _continued(jumps: Tensor) -> Tensor:
    """Constants of integration from the jumps at the inner ends; 0 in the first segment."""
    return torch.cat([jumps.new_zeros(1), jumps.cumsum(0)])


def build_table(parameters: Tensor) -> Table:
    """The table of a map; a few milliseconds.

    Args:
        parameters: (380,), non-negative, float64, on the CPU.

    Returns:
        A ``Table``. Its entries are not finite where the map itself is not (the caller checks).

    Example:
        >>> import torch
        >>> parameters = torch.zeros(380, dtype=torch.float64)
        >>> parameters[-1] = 1.0
        >>> x, z = torch.tensor([0.5], dtype=torch.float64).log(), torch.tensor([0.25], dtype=torch.float64).log()
        >>> build_table(parameters)(x, z, x - z)[1]  # x log(x / z)
        tensor([0.3466], dtype=torch.float64)
    """
    v, w, c = (parameters[SLICES[name]] for name in ("v", "w", "c"))
    rate = w[-UNITS_PER_GROUP:].masked_fill(v[-UNITS_PER_GROUP:] == 0, 0.0).amax().item()
    rate = rate if rate > SMALLEST_RATE else 0.0
    start = LOG_BOTTOM + rate * torch.tensor(LOG_BOTTOM).exp().item()
    stop = LOG_TOP + rate * torch.tensor(LOG_TOP).exp().item()
    segments = int((stop - start) / WIDTH) + 1
    ends = start + WIDTH / 2.0 * torch.arange(2 * segments + 1, dtype=torch.float64)
    logs = _points(ends, rate)
    s = logs.exp()
    m = curvature(parameters, s)
    # x h'' = beta + alpha s + gamma' s^2 through both ends and the middle of each segment, by divided differences
    (s0, s1, s2), (m0, m1, m2) = ((u[:-2:2], u[1:-1:2], u[2::2]) for u in (s, m))
    first, second = (m1 - m0) / (s1 - s0), (m2 - m1) / (s2 - s1)
    bend = (second - first) / (s2 - s0)
    beta = torch.cat([c, m0 - first * s0 + bend * s0 * s1])
    alpha = torch.cat([((m[:1] - c) / s[:1]).clamp(min=0.0), first - bend * (s0 + s1)])
    gamma = torch.cat([torch.zeros_like(c), 0.5 * bend])
    # T and H go on without a jump: what the forms on both sides of an end differ by is added up
    at, log_at = s[:-2:2], logs[:-2:2]
    beta_jump, alpha_jump, gamma_jump = (u[:-1] - u[1:] for u in (beta, alpha, gamma))
    offset = _continued(beta_jump * log_at + at * (alpha_jump + at * gamma_jump))
    # H jumps by s (offset + beta (log s - 1) + alpha s / 2 + gamma s^2 / 3); with T continuous that is what is left
    base = _continued(-at * (beta_jump + at * (0.5 * alpha_jump + at * (2.0 / 3.0) * gamma_jump)))
    return Table(torch.stack([beta, alpha, gamma, offset, base]), start, rate)
