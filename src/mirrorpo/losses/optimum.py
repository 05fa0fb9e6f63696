r"""The optimal policy of a penalised reward: what training with a divergence aims at.

:math:`\arg\max_p \sum_v p_v r_v - c \, D(p, q)` over the simplex. Its stationarity condition is
:math:`g(p_v, q_v) = (r_v - \lambda) / c` on the support, with the score g of ``mirrorpo.divergences.slope``, and
:math:`g(0, q_v) \ge (r_v - \lambda) / c` outside it: one root in :math:`\lambda`, around one root per entry. For ``kl``
it is :math:`q e^{r/c}`, normalised; for ``prob_l2`` the Euclidean projection of :math:`q + r/(2c)` on the simplex.

Both roots are found by a bracketing method on logarithms, in float64, without the inverse of h' or f': so every
divergence has its optimum, learned maps and your own functions included.
"""

from __future__ import annotations

from typing import Any

import torch

from mirrorpo._checks import Float, Num, Tensor
from mirrorpo.divergences.base import EXACT_CHUNK, Divergence, upcast
from mirrorpo.divergences.slope import reach, require_convex, score, score_without_anchor
from mirrorpo.errors import check_number
from mirrorpo.losses.regions import resolve_divergence
from mirrorpo.losses.solver import find_root

# Probabilities below exp(LOWEST) = 1e-260 become 0.
LOWEST = -600.0
# The multiplier (the largest reward minus lambda, over c) is searched from exp(-SPAN) to its largest value.
SPAN = 690.0
# Float32 probabilities over a large vocabulary sum to 1 up to this.
SUM_TOLERANCE = 1e-3


@torch.no_grad()
def optimum(
    divergence: Any, probs: Num[Tensor, ...], rewards: Num[Tensor, ...], coefficient: float
) -> Float[Tensor, "... V"]:
    r"""The policy that maximises the expected reward minus a divergence.

    :math:`\arg\max_p \sum_v p_v r_v - c \, D(p, q)`; exactly 0 where the optimum leaves the support of q, which
    happens for divergences with a finite derivative at 0 (``prob_l2``, ``chi2``, ``tv``, ``alpha`` > 1, ``beta`` > 1).
    A token that the anchor gives probability 0 stays at 0 if D is infinite there (``kl``, ``reverse_kl``, ``chi2``);
    for the others (``prob_l2``, ``forward_kl``, ``js``) a sufficient reward gives it mass. Where several policies are
    best (``tv``), it is one of them.

    Args:
        divergence: D: a name, a ``Divergence``, a function, or a mapping with ``name`` and options.
        probs: q, the anchor's probabilities, (..., V), float32 or float64; sums to 1.
        rewards: r, of a shape that broadcasts with ``probs``.
        coefficient: c > 0, in reward units per nat.

    Returns:
        p, the broadcast shape, float64 if ``probs`` or ``rewards`` are, else float32; sums to 1 and is right to 1e-10
        (computed in float64). No gradient flows through it.

    Raises:
        ValueError: shapes that do not broadcast, probabilities that are negative or do not sum to 1, a reward or a
            coefficient that is not finite, a divergence that is not convex (``k2``, ``log_l2``).

    Reference: Beck and Teboulle 2003, "Mirror descent and nonlinear projected subgradient methods", Eq. 3.11 for
        ``kl``; f-DPO, arXiv 2309.16240, Theorem 1, for f-divergences with full support.

    Example:
        >>> import torch, mirrorpo
        >>> q, r = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 0.0])
        >>> mirrorpo.optimum("prob_l2", q, r, coefficient=0.5)  # the projection of q + r on the simplex
        tensor([0.1000, 0.9000, 0.0000])
    """
    d = resolve_divergence(divergence)
    require_convex(d, "optimum")
    c = check_number("coefficient", coefficient, 0.0, open_low=True)
    q, r, dtype = _checked(probs, rewards)
    chunk = max(1, EXACT_CHUNK // max(1, q.shape[-1]))
    rows = [_Rows(d, some_q, some_r, c).solve() for some_q, some_r in zip(q.split(chunk), r.split(chunk), strict=True)]
    shape = torch.broadcast_shapes(probs.shape, rewards.shape)
    return torch.cat(rows).view(shape).to(dtype)


def _checked(probs: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """(N, V) probabilities and rewards, float64, and the dtype of the answer."""
    for name, given in (("probs", probs), ("rewards", rewards)):
        if not given.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating tensor, got dtype {given.dtype}")
    try:
        shape = torch.broadcast_shapes(probs.shape, rewards.shape)
    except RuntimeError:
        shape = torch.Size()
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(
            f"probs and rewards must have shapes (..., V) that broadcast, V >= 1, got {tuple(probs.shape)} and "
            f"{tuple(rewards.shape)}"
        )
    dtype = torch.promote_types(upcast(probs).dtype, upcast(rewards).dtype)
    q, r = (given.detach().double().expand(shape).reshape(-1, shape[-1]) for given in (probs, rewards))
    if not bool((q >= 0.0).all()):
        raise ValueError(f"probs must be in [0, 1], got {q[~(q >= 0.0)][0].item()}")
    total = q.sum(-1, keepdim=True)
    if not bool(((total - 1.0).abs() <= SUM_TOLERANCE).all()):
        wrong = total[~((total - 1.0).abs() <= SUM_TOLERANCE)][0].item()
        raise ValueError(f"probs must sum to 1 over the last dimension, got a sum of {wrong:g}")
    if not bool(r.isfinite().all()):
        raise ValueError(f"rewards must be finite, got {r[~r.isfinite()][0].item()}")
    return q / total, r, dtype


class _Rows:
    """The optimum of each row: entries as functions of the multiplier, and the multiplier at which they sum to 1.

    With u = (r - max r) / c + m, an entry is the root x of g(x, q) = u, clipped to [0, 1]. At m = 0 every u is at most
    0, so x <= q and the sum is at most 1; it grows with m. All N V entries lie in one row of tensors.
    """

    def __init__(self, d: Divergence, q: Tensor, r: Tensor, c: float) -> None:
        self.d, self.shape = d, q.shape
        flat = q.reshape(-1)
        self.logz = flat.log().clamp_(min=-reach(d))
        absent, end = flat == 0.0, score_without_anchor(d)
        closed = absent if end is None else torch.zeros_like(absent)  # entries that stay at 0
        best = r.masked_fill(closed.view(q.shape), -torch.inf).amax(-1, keepdim=True)
        self.gap = ((r - best) / c).reshape(-1).masked_fill_(closed, -torch.inf)
        # g = scale * score + offset; the score of q itself is 0, but for k1, whose derivative has a constant in it
        self.offset = -score(d, self.logz, self.logz)
        self.scale = torch.ones_like(flat)
        if end is not None:
            at_floor = score(d, torch.zeros_like(self.logz), self.logz) + self.offset
            self.offset = torch.where(absent, self.offset + end - at_floor, self.offset)
            if not d.depends_on_token:  # an f-divergence without anchor: f' at infinity, whatever x is
                self.scale.masked_fill_(absent, 0.0)
                self.offset.masked_fill_(absent, end)
        everything = torch.arange(len(flat), device=q.device)
        self.at_none = self._score(torch.full_like(flat, LOWEST), everything)
        self.at_full = self._score(torch.zeros_like(flat), everything)
        self.below, self.above = torch.zeros_like(q), torch.ones_like(q)  # the entries at both ends of the multiplier

    def _score(self, logx: Tensor, index: Tensor) -> Tensor:
        return self.scale[index] * score(self.d, logx, self.logz[index]) + self.offset[index]

    def solve(self) -> Tensor:
        """(N, V), float64; each row sums to 1."""
        highest = (self.at_full - self.gap).view(self.shape).amin(-1)  # here one entry is 1
        top = highest.clamp(min=0.0).log().add_(1e-12).clamp_(-SPAN, SPAN)  # no rounding may leave it below
        bottom = torch.full_like(top, -SPAN)
        latest = bottom.clone()

        def excess(at: Tensor, index: Tensor) -> Tensor:
            latest[index] = at
            return self._excess(latest)[index]

        find_root(excess, bottom, top, self._excess(bottom), self._excess(top))
        total_below, total_above = (x.sum(-1, keepdim=True) for x in (self.below, self.above))
        # Between the two last multipliers (neighbouring floats, or the sides of a jump) every entry lies between its
        # values; on a jump all of these are optimal.
        share = ((1.0 - total_below) / (total_above - total_below).clamp(min=1e-300)).clamp_(0.0, 1.0)
        p = self.below + share * (self.above - self.below)
        return p / p.sum(-1, keepdim=True)

    def _excess(self, log_multiplier: Tensor) -> Tensor:
        """(N,): the sum of the entries minus 1; remembers the entries, which bracket all later ones."""
        u = self.gap + log_multiplier.exp().unsqueeze(-1).expand(self.shape).reshape(-1)
        x = (self.at_full <= u).double()
        inside = ((self.at_none < u) & (x == 0.0)).nonzero().squeeze(-1)
        u = u[inside]
        low, high = (end.view(-1)[inside].log().clamp_(min=LOWEST) for end in (self.below, self.above))
        ends = (self._score(end, inside) - u for end in (low, high))
        roots = find_root(lambda at, index: self._score(at, inside[index]) - u[index], low, high, *ends)
        x[inside] = roots.exp()
        x = x.view(self.shape)
        excess = x.sum(-1) - 1.0
        self.below = torch.where((excess <= 0.0).unsqueeze(-1), torch.maximum(self.below, x), self.below)
        self.above = torch.where((excess >= 0.0).unsqueeze(-1), torch.minimum(self.above, x), self.above)
        return excess


__all__ = ["optimum"]
