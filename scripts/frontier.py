"""Analysis of studies/frontier as docs/evidence/frontier.md registered it, from its runs files alone.

    python scripts/frontier.py runs/frontier/runs.csv ... [--figure docs/evidence/frontier.png]

Part 1: accuracy at matched distance; part 2: which divergence predicts what is forgotten. An arm's curve is its name
without the coefficient; the arm `none` is a point of every curve.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from mirrorpo.statistics import equivalent, holm, mean_interval, permutation_p
from mirrorpo.statistics.curves import height_difference, rank_correlation

REFERENCE, LIMIT, VALUE = "reverse_kl", "none", "trained.policy.accuracy"
PRIMARY, SECONDARY = "trained.policy.reverse_kl_sum", "trained.start.forward_kl_sum"
AXES = {
    PRIMARY: "reverse KL, nats a response (primary)",
    SECONDARY: "forward KL, nats a response (secondary)",
    "trained.policy.reverse_kl": "reverse KL, nats a token (described)",
    "trained.start.forward_kl": "forward KL, nats a token (described)",
}
MARGIN, MIN_WIDTH, MIN_SEEDS = 0.03, math.log(2.0), 6
KNOWN, RESAMPLES = "easy", 2000
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "tv", "prob_l2", "chi2", "hellinger", "alpha_0.5", "neural")

Runs = Mapping[tuple[str, int], Mapping[str, str]]


def read(paths: Sequence[Path]) -> tuple[Runs, list[int]]:
    """Finished runs of seeds that are whole in one file, by arm and seed, and those seeds; the rest is printed.

    Raises:
        ValueError: a seed is whole in two files, or no seed is whole.
    """
    tables = []
    for path in paths:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["status"] == "finished"]
        tables.append({(row["arm"], int(row["seed"])): row for row in rows})
    arms = list(dict.fromkeys(arm for table in tables for arm, _ in table))
    found: dict[tuple[str, int], Mapping[str, str]] = {}
    seeds: list[int] = []
    for path, table in zip(paths, tables, strict=True):
        for seed in sorted({seed for _, seed in table}):
            if not all((arm, seed) in table for arm in arms):
                print(f"{path.name}: seed {seed} is left out, not every arm has it there")
            elif seed in seeds:
                raise ValueError(f"{path}: seed {seed} is whole in another file too")
            else:
                seeds.append(seed)
                found |= {(arm, seed): table[arm, seed] for arm in arms}
    if not seeds:
        raise ValueError("no seed has all arms in one file")
    if len(seeds) < MIN_SEEDS:
        print(f"{len(seeds)} seeds: by the plan fewer than {MIN_SEEDS} decide nothing\n")
    return found, sorted(seeds)


def number(row: Mapping[str, str], column: str) -> float:
    """A cell; NaN where nothing was measured."""
    return float(row[column]) if row[column] else math.nan


def curves(runs: Runs, seed: int, axis: str) -> dict[str, tuple[list[float], list[float]]]:
    """Curve to log distances and accuracies at one seed."""
    own = {arm: row for (arm, of), row in runs.items() if of == seed}
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name in dict.fromkeys(arm.rpartition("_")[0] for arm in own if arm != LIMIT):
        rows = [row for arm, row in own.items() if arm == LIMIT or arm.rpartition("_")[0] == name]
        found[name] = [math.log(number(row, axis)) for row in rows], [number(row, VALUE) for row in rows]
    return found


def matched(runs: Runs, seeds: Sequence[int], axis: str) -> str:
    """Every curve against the reference at matched distance, in Markdown."""
    by_seed = {seed: curves(runs, seed, axis) for seed in seeds}
    heights: dict[str, list[float]] = {}
    left_out: dict[str, int] = {}
    for found in by_seed.values():
        for name, (x, y) in found.items():
            if name == REFERENCE:
                continue
            height = height_difference(x, y, *found[REFERENCE], min_width=MIN_WIDTH)
            heights.setdefault(name, [])
            if height is None:
                left_out[name] = left_out.get(name, 0) + 1
            else:
                heights[name].append(height)
    names = [name for name, values in heights.items() if values]
    p_values = [permutation_p(heights[name]) for name in names]
    lines = [
        f"### By {AXES[axis]}, against `{REFERENCE}`",
        "",
        f"| curve | seeds | height difference, points (95 %) | p | p Holm | same within {100 * MARGIN:g} points |",
        "|---|---|---|---|---|---|",
    ]
    for name, p, corrected in zip(names, p_values, holm(p_values), strict=True):
        values = heights[name]
        mean = mean_interval(values)
        same = equivalent(values, MARGIN, 0.0, len(names))
        interval = f"{100 * mean.estimate:+.1f} [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"
        count = f"{len(values)}" + (f" ({left_out[name]} left out)" if name in left_out else "")
        lines.append(f"| `{name}` | {count} | {interval} | {p:.4f} | {corrected:.4f} | {'yes' if same else 'no'} |")
    needed = {name: seeds_needed(heights[name], len(names)) for name in names}
    lines += [
        "",
        "Seeds for a difference of 3 points, four times in five: " + ", ".join(f"`{n}` {k}" for n, k in needed.items()),
    ]
    return "\n".join(lines) + "\n"


def seeds_needed(values: Sequence[float], comparisons: int, effect: float = MARGIN) -> int:
    """Seeds for a power of 80 % by the t test at Holm's first step, if the spread stays what it is here."""
    spread, level = float(np.std(values, ddof=1)), 0.05 / comparisons
    for count in range(3, 1000):
        edge = stats.t.ppf(1 - level / 2, count - 1)
        if stats.nct.sf(edge, count - 1, effect * math.sqrt(count) / spread) >= 0.8:
            return count
    return 1000


def arms_table(runs: Runs, seeds: Sequence[int]) -> str:
    """Means over seeds by arm."""
    columns = {VALUE: "accuracy %", PRIMARY: "reverse KL", SECONDARY: "forward KL", "trained.policy.length": "tokens"}
    known = f"{KNOWN}.policy.accuracy"
    lines = [f"| arm | {' | '.join(columns.values())} | `{KNOWN}` % |", "|---" * (len(columns) + 2) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in runs):
        means = {c: float(np.mean([number(runs[arm, seed], c) for seed in seeds])) for c in (*columns, known)}
        distances = f"{means[PRIMARY]:.3g} | {means[SECONDARY]:.3g} | {means['trained.policy.length']:.1f}"
        lines.append(f"| `{arm}` | {100 * means[VALUE]:.1f} | {distances} | {100 * means[known]:.1f} |")
    return "\n".join(lines) + "\n"


def standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of each row, centred and of length 1: the product of two is Spearman's correlation."""
    ranks = stats.rankdata(np.where(np.isnan(values), np.inf, values), axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    return ranks / np.linalg.norm(ranks, axis=1, keepdims=True)


def forgetting(runs: Runs, seeds: Sequence[int]) -> str:
    """Rank correlations of each distance with the loss on the second task, and the primary question."""
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    columns = [
        f"{task}.{source}.{name}_sum"
        for task in ("trained", KNOWN)
        for source in ("policy", "start")
        for name in DIVERGENCES
    ]
    lost = np.array(
        [
            [
                number(runs[a, s], f"{KNOWN}.start.accuracy") - number(runs[a, s], f"{KNOWN}.policy.accuracy")
                for a in arms
            ]
            for s in seeds
        ]
    )
    far = {c: np.array([[number(runs[a, s], c) for a in arms] for s in seeds]) for c in columns}
    within = {
        c: np.array([rank_correlation(far[c][n], lost[n]) for n in range(len(seeds))]) for c in (PRIMARY, SECONDARY)
    }
    change = within[SECONDARY] - within[PRIMARY]
    found = mean_interval(change, legal=(-2.0, 2.0))
    lines = [
        f"Loss on `{KNOWN}`: mean {100 * lost.mean():.1f} points, {100 * lost.min():.1f} to {100 * lost.max():.1f}.",
        f"Within a seed, Spearman's rho of forward KL {within[SECONDARY].mean():.3f}, of reverse KL "
        f"{within[PRIMARY].mean():.3f}; difference {found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}], "
        f"p = {permutation_p(change):.4f} over {len(seeds)} seeds (primary).",
        "",
        "| distance, a response | rho over all runs (95 %, resampled seeds) |",
        "|---|---|",
    ]
    draws = np.random.default_rng(0).integers(0, len(seeds), size=(RESAMPLES, len(seeds)))
    lost_ranks = standard_ranks(lost[draws].reshape(RESAMPLES, -1))
    table = []
    for column, values in far.items():
        whole = rank_correlation(values.ravel(), lost.ravel())
        resampled = (standard_ranks(values[draws].reshape(RESAMPLES, -1)) * lost_ranks).sum(axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        table.append((whole, f"| `{column.removesuffix('_sum')}` | {whole:.3f} [{low:.3f}, {high:.3f}] |"))
    return "\n".join([*lines, *(line for _, line in sorted(table, reverse=True))]) + "\n"


def figure(runs: Runs, seeds: Sequence[int], path: Path) -> None:
    """Mean curves with bands, by either distance; faint dots are runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from mirrorpo.statistics.curves import band

    drawing = Figure(figsize=(9.0, 4.4), facecolor="white")
    FigureCanvasAgg(drawing)
    colours = ("#1a1d23", "#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00")
    for place, axis in enumerate((PRIMARY, SECONDARY), start=1):
        axes = drawing.add_subplot(1, 2, place)
        by_seed = [curves(runs, seed, axis) for seed in seeds]
        for name, colour in zip(by_seed[0], colours, strict=False):
            own = [found[name] for found in by_seed]
            logs = np.concatenate([x for x, _ in own])
            places = np.linspace(*np.quantile(logs, [0.02, 0.98]), 60)
            mean = band(own, places, max(2, len(seeds) - 1))
            kept = [(x, h) for x, h in zip(mean.places, mean.heights, strict=True) if h is not None]
            x = np.exp([x for x, _ in kept])
            axes.fill_between(
                x, [100 * h.low for _, h in kept], [100 * h.high for _, h in kept], color=colour, alpha=0.12, lw=0
            )
            axes.plot(x, [100 * h.estimate for _, h in kept], color=colour, lw=1.8, label=name)
            axes.plot(np.exp(logs), 100 * np.concatenate([y for _, y in own]), ".", color=colour, ms=2, alpha=0.35)
        start = 100 * np.mean([number(runs[LIMIT, seed], "trained.start.accuracy") for seed in seeds])
        axes.axhline(start, color="#59616e", lw=0.8, ls=":")
        axes.annotate("start", (0.99, start), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set_ylim(0, 60)
        axes.set_xscale("log")
        axes.set_xlabel(AXES[axis].partition(" (")[0])
        axes.set_ylabel("accuracy %")
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1:
            axes.legend(frameon=False, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("runs", type=Path, nargs="+", help="one file, or one for each machine; seeds are whole in one")
    options.add_argument("--figure", type=Path)
    args = options.parse_args()
    runs, seeds = read(args.runs)
    print(f"## Accuracy at matched distance, {len(seeds)} seeds\n")
    for axis in AXES:
        print(matched(runs, seeds, axis))
    print(arms_table(runs, seeds))
    print("## Forgetting\n")
    print(forgetting(runs, seeds))
    if args.figure is not None:
        figure(runs, seeds, args.figure)


if __name__ == "__main__":
    main()
