"""Write the tables and the figure of docs/fixed_points.md: where training with a penalty ends, and where it should.

A bandit with five arms is small enough to write out the expected step of every estimator, in float64. Its flow is
followed from the reference to its end, and the end compared with ``mirrorpo.optimum``. Nothing is simulated. Runtime:
about 20 seconds on one CPU core.

Usage: python scripts/fixed_points.py [--page docs/fixed_points.md] [--check]

With --check nothing is written; the exit status is 1 if the page does not hold the tables that would be written. The
same numbers are kept for the explorer in scripts/explorer/fixed_points.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import mirrorpo

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ROOT / "scripts" / "explorer" / "fixed_points.json"
REFERENCE = (0.40, 0.30, 0.15, 0.10, 0.05)  # q
REWARDS = (0.0, 0.2, 1.0, 0.5, 0.8)
TARGET = 0.45  # reward at the optimum that the name promises; q earns 0.3. It sets each coefficient.
OPTIONS: dict[str, dict[str, float]] = {"beta": {"beta": 0.5}, "alpha": {"alpha": 0.5}}
PROMISED = {"k1": "reverse_kl", "k2": "reverse_kl", "k3": "reverse_kl"}  # k1 to k3 are estimates of KL(p || q)
NAMES = (
    *("kl", "prob_l2", "itakura_saito", "beta", "neural"),
    *("reverse_kl", "forward_kl", "jeffreys", "js", "chi2", "hellinger", "alpha", "k1", "k2", "k3"),
)
ESTIMATORS = ("sampled", "score", "weighted", "exact", "top_k")
TOP_K = 2
DRAWN = ("reverse_kl", "prob_l2", "itakura_saito", "neural")
FACTORS = {1.0: "", 2.0: "2 ", 0.5: "1/2 "}
SAME = 1e-6  # policies that differ by less are the same
# Of the flow: a logit this far below the largest is that of a dead arm (1e-26); growth of the time step; most steps.
FLOOR, GROWTH, MAX_STEPS = 60.0, 1.3, 2000
_DIFFERENCE = 1e-5


def built(name: str) -> mirrorpo.Divergence:
    """The divergence of a name, with the option that the page states."""
    return mirrorpo.divergence(name, **OPTIONS.get(name, {}))


def label(name: str) -> str:
    """The name as the tables print it."""
    return ", ".join([f"`{name}`", *(f"{key} = {value:g}" for key, value in OPTIONS.get(name, {}).items())])


def tensor(numbers: Sequence[float]) -> Tensor:
    """Float64."""
    return torch.tensor(numbers, dtype=torch.float64)


def optima(name: str, coefficients: Tensor) -> Tensor:
    """The policies that the name promises, one a row: only rewards over coefficient count."""
    rewards = tensor(REWARDS) / coefficients.unsqueeze(-1)
    return mirrorpo.optimum(built(PROMISED.get(name, name)), tensor(REFERENCE), rewards, 1.0)


def coefficient(name: str) -> float:
    """The one whose optimum earns ``TARGET``, to three digits; on finer and finer grids of its logarithm."""
    low, high = -14.0, 14.0
    for _ in range(3):
        grid = torch.linspace(low, high, 65, dtype=torch.float64)
        above = int((optima(name, grid.exp()) @ tensor(REWARDS) > TARGET).sum())
        low, high = grid[above - 1].item(), grid[above].item()
    return float(f"{math.exp((low + high) / 2):.3g}")


def step(name: str, estimator: str, c: float, logits: Tensor) -> Tensor:
    """The expected on-policy step of the logits (N, V), each divided by its probability: the natural gradient's."""
    d, logq = built(name), tensor(REFERENCE).log().expand_as(logits)
    logits = logits.detach().requires_grad_()
    logp = logits.log_softmax(-1)
    p = logp.detach().exp()
    if estimator == "exact":
        penalty = d.exact(logits, logq)
    elif estimator == "top_k":
        each = [d.top_k(logits, logq, torch.full_like(p[:, 0], y).long(), TOP_K) for y in range(p.shape[-1])]
        penalty = (p * torch.stack(each, dim=-1)).sum(-1)
    else:
        penalty = (p * d.estimate(estimator, logp, logq, logp.detach())).sum(-1)
    value = logp.exp() @ tensor(REWARDS) - c * penalty
    return torch.autograd.grad(value.sum(), logits)[0] / p


def linearised(name: str, estimator: str, c: float, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``step`` at (V,) logits, and its derivative (V, V) by central differences."""
    ways = torch.eye(len(logits), dtype=torch.float64) * _DIFFERENCE
    at, *ends = step(name, estimator, c, torch.cat([logits.unsqueeze(0), logits + ways, logits - ways])).split(
        [1, len(ways), len(ways)]
    )
    return at[0], ((ends[0] - ends[1]) / (2 * _DIFFERENCE)).T


def fixed_point(name: str, estimator: str, c: float) -> Tensor:
    """The policy at which training ends that starts at the reference; exact zeros where arms die out.

    The flow of the natural gradient, d logits / dt = ``step``, by implicit Euler steps that grow: small ones follow the
    flow, large ones are Newton's. An arm whose probability falls for ever is dead once it is below exp(-FLOOR).
    """
    logits, length = tensor(REFERENCE).log(), 0.1
    residual = torch.full_like(logits, math.inf)
    for _ in range(MAX_STEPS):
        logits = logits - logits.max()
        dead = logits <= -FLOOR
        residual, slope = linearised(name, estimator, c, logits)
        if residual[~dead].abs().max() < 1e-11 and not (residual[dead] > 0.0).any():
            break
        system = torch.eye(len(logits), dtype=torch.float64) / length - slope
        move = torch.linalg.solve(system, residual)
        bounded = min(1.0, 1.0 / move[~dead].abs().max().item())  # a linear model holds over about one nat
        logits = (logits + bounded * move).clamp(min=logits.max().item() - FLOOR)
        length *= GROWTH if bounded == 1.0 else 1.0
    else:
        raise RuntimeError(f"{name} {estimator}: no end after {MAX_STEPS} steps, residual {residual.tolist()}")
    growth = torch.linalg.eigvals(slope[~dead][:, ~dead]).real
    assert growth.max() < 1e-6, (name, estimator, growth)  # 0: the direction that moves all logits alike
    return logits.masked_fill(dead, -torch.inf).softmax(-1)


@dataclass(frozen=True)
class End:
    """Where an estimator ends.

    Attributes:
        policy: (V,).
        distance: total variation to the optimum that the name promises.
        known: in words: the optimum that it is, up to a factor of the coefficient, and the arms that die out.
    """

    policy: Tensor
    distance: float
    known: str


Found = dict[str, tuple[float, Tensor, dict[str, End]]]


def ends() -> Found:
    """Coefficient, promised optimum and ends by estimator, for each divergence."""
    coefficients = {name: coefficient(name) for name in NAMES}
    all_of = torch.outer(tensor(list(FACTORS)), tensor(list(coefficients.values())))
    known = {other: optima(other, all_of) for other in NAMES if other not in PROMISED}  # (factors, names, V)
    found = {}
    for index, (name, c) in enumerate(coefficients.items()):
        best = known[PROMISED.get(name, name)][0, index]
        others = {
            f"{text}{label(other)}": policies[i, index]
            for i, text in enumerate(FACTORS.values())
            for other, policies in known.items()
        }
        by_estimator = {}
        for estimator in ESTIMATORS:
            p = fixed_point(name, estimator, c)
            distance = (p - best).abs().sum().item() / 2
            by_estimator[estimator] = End(p, distance, in_words(p, distance, others))
        found[name] = (c, best, by_estimator)
    return found


def in_words(p: Tensor, distance: float, others: dict[str, Tensor]) -> str:
    """What a policy is."""
    if distance < SAME:
        return "the optimum promised"
    alive = [str(arm + 1) for arm in range(len(p)) if p[arm] > 0.0]
    if len(alive) == 1:
        return f"arm {alive[0]} alone"
    same = [text for text, other in others.items() if (p - other).abs().max() < SAME]
    if same:
        return f"the optimum of {same[0]}"
    return "no optimum of this table" + (f"; arms {', '.join(alive)} alone" if len(alive) < len(p) else "")


def written(x: float) -> str:
    """A distance, 0 where it is rounding."""
    return "0" if x < SAME else f"{x:.3f}"


def tables(found: Found) -> dict[str, str]:
    """The tables by marker."""
    lines = ["| divergence | coefficient | " + " | ".join(f"`{e}`" for e in ESTIMATORS) + " | `sampled` ends at |"]
    lines.append("| --- | ---: |" + " ---: |" * len(ESTIMATORS) + " --- |")
    for name, (c, _, by_estimator) in found.items():
        cells = [written(end.distance) for end in by_estimator.values()]
        lines.append(f"| {label(name)} | {c:.4g} | {' | '.join(cells)} | {by_estimator['sampled'].known} |")
    policies = ["| divergence | | arm 1 | arm 2 | arm 3 | arm 4 | arm 5 | reward |", "| --- | --- |" + " ---: |" * 6]
    policies.append("| | reward of the arm | " + " | ".join(f"{r:g}" for r in REWARDS) + " | |")
    policies.append(f"| | reference | {_row(tensor(REFERENCE))} |")
    for name in DRAWN:
        _, best, by_estimator = found[name]
        policies.append(f"| {label(name)} | optimum | {_row(best)} |")
        policies.append(f"| | `sampled` | {_row(by_estimator['sampled'].policy)} |")
    return {"distances": "\n".join(lines), "policies": "\n".join(policies)}


def _row(p: Tensor) -> str:
    return " | ".join("0" if x == 0.0 else f"{x:.3f}" for x in [*p.tolist(), (p @ tensor(REWARDS)).item()])


def numbers(found: Found) -> str:
    """What the explorer draws, as JSON."""
    rows = {
        name: {
            "coefficient": c,
            "optimum": _rounded(best),
            **{
                estimator: {"policy": _rounded(end.policy), "distance": round(end.distance, 6), "known": end.known}
                for estimator, end in by_estimator.items()
            },
        }
        for name, (c, best, by_estimator) in found.items()
    }
    content = {"reference": REFERENCE, "rewards": REWARDS, "options": OPTIONS, "ends": rows}
    return json.dumps(content, separators=(",", ":")) + "\n"


def _rounded(p: Tensor) -> list[float]:
    return [round(x, 6) for x in p.tolist()]


def draw(found: Found, path: Path) -> None:
    """Bars: the optimum beside where ``sampled`` ends, for four divergences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, len(DRAWN), sharey=True)
    arms = torch.arange(len(REFERENCE))
    for ax, name in zip(axes, DRAWN, strict=True):
        _, best, by_estimator = found[name]
        shown = {
            "reference": tensor(REFERENCE),
            "optimum: the end of score, weighted, exact": best,
            "end of sampled": by_estimator["sampled"].policy,
        }
        for i, ((text, policy), colour) in enumerate(zip(shown.items(), ("0.8", "#0072b2", "#d55e00"), strict=True)):
            ax.bar(arms + 0.27 * (i - 1), policy.tolist(), 0.27, label=text, color=colour)
        ax.set_title(name, fontsize=10)
        ax.set_xticks(arms.tolist(), [f"{r:g}" for r in REWARDS])
        ax.set_xlabel("reward of the arm")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "fixed_points.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page differs")
    given = parser.parse_args(arguments)
    found = ends()
    before = text = given.page.read_text(encoding="utf-8")
    for name, table in tables(found).items():
        marked = re.compile(rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        text, count = marked.subn(lambda m, table=table: f"{m[1]}\n{table}\n{m[2]}", text)
        assert count == 1, name
    if given.check:
        same = text == before and NUMBERS.read_text(encoding="utf-8") == numbers(found)
        print(f"{given.page.name}: {'up to date' if same else 'differs: run scripts/fixed_points.py'}")
        return int(not same)
    given.page.write_text(text, encoding="utf-8")
    NUMBERS.write_text(numbers(found), encoding="utf-8")
    draw(found, given.page.parent / "figures" / "fixed_points.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
