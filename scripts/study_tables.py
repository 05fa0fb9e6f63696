"""Tables and figures of four pages of docs/evidence: estimator, staleness, over-optimisation, diversity.

Each is what the page's registered plan says, from the runs file beside the page; printed as Markdown.

    python scripts/study_tables.py estimator|staleness|overoptimisation|diversity [--runs FILE] [--figure FILE.png]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from make_figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE
from mirrorpo.statistics import ANY, CHANGE, detectable_effect, holm, mean_interval, permutation_p

EVIDENCE = Path(__file__).resolve().parent.parent / "docs" / "evidence"
REGIONS = ("ratio", "kl3", "binary_tv", "js", "spo", "drpo", "soft_prob_l2")
DIVERGENCES = {"reverse_kl": BLUE, "forward_kl": ORANGE, "js": GREEN, "prob_l2": PINK}
DIVERSITY = {"none": BLACK, "reverse_kl": BLUE, "forward_kl": ORANGE, "rehearsal": GREEN}
Runs = dict[str, dict[int, dict[str, float]]]  # arm, seed, column


def complete(rows: Sequence[Mapping[str, str]], ending: str = "") -> tuple[Runs, list[int]]:
    """The runs of the seeds that every arm has finished, and those seeds.

    Raises:
        ValueError: no seed is complete.
    """
    runs: Runs = defaultdict(dict)
    for row in rows:
        if row.get("status", "finished") == "finished":
            numbers = {name: float(x) for name, x in row.items() if _is_number(x)}
            runs[row["arm"] + (f"@{row[ending]}" if ending else "")][int(row["seed"])] = numbers
    seeds = sorted(set.intersection(*(set(own) for own in runs.values())))
    if not seeds:
        raise ValueError("no seed is finished in all arms")
    return runs, seeds


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def seeds_for(differences: NDArray[np.float64], effect: float, num_comparisons: int) -> str:
    """The number of seeds with which the test would find ``effect`` four times in five, at the spread seen."""
    spread = float(np.std(differences, ddof=1))
    for count in (*range(5, 41), *range(45, 205, 5)):
        # as many values as seeds, with mean 0 and the spread that was seen
        like = np.resize([-1.0, 1.0], count) if count % 2 == 0 else np.array([0.0, *np.resize([-1.0, 1.0], count - 1)])
        if detectable_effect(like * spread / np.std(like, ddof=1), num_comparisons) <= effect:
            return str(count)
    return "over 200"


def comparison(title: str, differences: Mapping[str, NDArray[np.float64]], effect: float, unit: float = 100) -> str:
    """One set of comparisons with Holm's correction; differences in points."""
    p_values, size = [permutation_p(x) for x in differences.values()], f"{unit * effect:g}"
    lines = [
        f"| {title} | mean difference (95 % interval) | p | Holm | within {size} | seeds to find {size} |",
        "|---|---|---|---|---|---|",
    ]
    legal = CHANGE if unit == 100 else ANY
    for (name, x), p, corrected in zip(differences.items(), p_values, holm(p_values), strict=True):
        mean = mean_interval(x, legal=legal)
        middle, low, high = (f"{unit * x:+.{1 if unit == 100 else 3}f}" for x in (mean.estimate, mean.low, mean.high))
        same = "yes" if -effect < mean.low and mean.high < effect else "no"
        needed = seeds_for(x, effect, len(differences))
        lines.append(f"| `{name}` | {middle} ({low} to {high}) | {p:.4f} | {corrected:.3f} | {same} | {needed} |")
    return "\n".join(lines)


def column(runs: Runs, seeds: Sequence[int], arm: str, name: str) -> NDArray[np.float64]:
    """One number of an arm, seed by seed."""
    return np.array([runs[arm][seed][name] for seed in seeds])


def shown(values: NDArray[np.float64], unit: float = 100, digits: int = 1) -> str:
    """Mean, lowest and highest."""
    mean, low, high = (f"{unit * x:.{digits}f}" for x in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} to {high})"


# ---- estimator

# The first one decides; the others share a correction.
ESTIMATORS = (
    ("kl_score", "kl_sampled"),
    ("kl_exact", "kl_score"),
    ("reverse_kl_score", "reverse_kl_sampled"),
    ("reverse_kl_exact", "reverse_kl_score"),
    ("kl_exact", "kl_sampled"),
)


def estimator(rows: list[dict[str, str]], figure: Path | None) -> str:
    """Accuracy by arm, and the plan's comparisons; two arms are the same by the plan's 90 % interval."""
    if figure is not None:
        raise SystemExit("--figure: this page has none")
    runs, seeds = complete(rows)
    accuracy = {arm: column(runs, seeds, arm, "accuracy_after") for arm in runs}
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]} ({len(seeds)}).",
        "",
        "| arm | accuracy % | from the start, nats a token |",
        "|---|---|---|",
    ]
    for arm, x in accuracy.items():
        mean, kl = mean_interval(x), column(runs, seeds, arm, "reverse_kl_from_start").mean()
        lines.append(
            f"| `{arm}` | {100 * mean.estimate:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}] | {kl:.3f} |"
        )
    found = {f"{one}` - `{other}": accuracy[one] - accuracy[other] for one, other in ESTIMATORS}
    primary, *others = (permutation_p(x) for x in found.values())
    lines += [
        "",
        "| comparison | difference | p | Holm over four | 90 % interval | spread | seeds to find 2 points |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, x), p, holms in zip(found.items(), (primary, *others), ("", *holm(others)), strict=True):
        mean, narrow = mean_interval(x, legal=CHANGE), mean_interval(x, level=0.9, legal=CHANGE)
        middle, *ends = (f"{100 * y:+.1f}" for y in (mean.estimate, mean.low, mean.high, narrow.low, narrow.high))
        corrected = holms if isinstance(holms, str) else f"{holms:.3f}"
        spread = f"{100 * np.std(x, ddof=1):.1f} | {seeds_for(x, 0.02, 1)}"
        inner = f"{ends[2]} to {ends[3]}"
        lines.append(f"| `{name}` | {middle} [{ends[0]}, {ends[1]}] | {p:.4f} | {corrected} | {inner} | {spread} |")
    return "\n".join(lines)


# ---- staleness


def staleness(rows: list[dict[str, str]], figure: Path | None) -> str:
    """Accuracy by arm, and the plan's comparisons at 16 and 4 updates a batch."""
    runs, seeds = complete(rows)
    accuracy = {arm: column(runs, seeds, arm, "accuracy_after") for arm in runs}
    kl = {arm: column(runs, seeds, arm, "reverse_kl_from_start") for arm in runs}
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]} ({len(seeds)}).",
        "",
        "| region | accuracy %, 4 updates | KL from the start | accuracy %, 16 updates | KL from the start |",
        "|---|---|---|---|---|",
        f"| one update, any region | {shown(accuracy['one'])} | {kl['one'].mean():.3f} | | |",
    ]
    for region in ("none", *REGIONS):
        cells = [f"{shown(accuracy[f'{region}_{u}'])} | {kl[f'{region}_{u}'].mean():.3f}" for u in (4, 16)]
        lines.append(f"| `{region}` | {' | '.join(cells)} |")
    for updates in (16, 4):
        for base, others in (("none", REGIONS), ("ratio", REGIONS[1:])):
            found = {name: accuracy[f"{name}_{updates}"] - accuracy[f"{base}_{updates}"] for name in others}
            lines += ["", comparison(f"{updates} updates, against `{base}`", found, 0.03)]
    lost = {arm: accuracy[arm] - accuracy["one"] for arm in accuracy if arm != "one"}
    lines += ["", comparison("against one update", lost, 0.03)]
    if figure is not None:
        _staleness_figure(accuracy, figure)
    return "\n".join(lines)


def _staleness_figure(accuracy: Mapping[str, NDArray[np.float64]], path: Path) -> None:
    with rc_context(STYLE):
        drawing = Figure(figsize=(9, 4.2), layout="constrained")
        axes = drawing.add_subplot()
        names = ("none", *REGIONS)
        for updates, colour, shift in ((4, BLUE, -0.13), (16, ORANGE, 0.13)):
            for place, name in enumerate(names):
                values = 100 * accuracy[f"{name}_{updates}"]
                label = f"{updates} updates a batch" if place == 0 else None
                axes.plot([place + shift] * len(values), values, "o", color=colour, alpha=0.35, markersize=5)
                axes.plot(
                    [place + shift], [values.mean()], "_", color=colour, markersize=18, markeredgewidth=3, label=label
                )
        axes.axhline(100 * accuracy["one"].mean(), color=GREY, linestyle="--", label="one update, any region")
        axes.set_xticks(range(len(names)), names, fontsize=10)
        axes.set_ylim(0)
        axes.set_ylabel("accuracy after training, %")
        axes.legend(loc="upper right", ncols=3, fontsize=9, bbox_to_anchor=(1, 1.12))
        save(drawing, path)


# ---- over-optimisation


def at_distance(own: Mapping[int, Mapping[str, float]], distance: float, measure: str) -> float | None:
    """The gold of a run of ``none`` where its distance was this one; None beyond its largest distance.

    Linear in the square root of the distance between the two measurements around it. Where the way goes back and forth
    the first crossing counts.

    Args:
        own: step to columns; step 0 is at distance 0.
        distance: at least 0.
        measure: the column of the distance.
    """
    steps = sorted(own)
    for before, after in itertools.pairwise(steps):
        low, high = (math.sqrt(own[step][measure]) for step in (before, after))
        if low <= math.sqrt(distance) <= high:
            share = (math.sqrt(distance) - low) / (high - low) if high > low else 0.0
            return own[before]["gold"] + share * (own[after]["gold"] - own[before]["gold"])
    return None


def matched(runs: Runs, seeds: Sequence[int], last: int, measure: str) -> tuple[dict[str, NDArray[np.float64]], str]:
    """Gold minus that of ``none`` at the same distance, a mean over a divergence's coefficients; who has no partner."""
    arms = sorted({name.partition("@")[0] for name in runs} - {"none"})
    steps = sorted(int(name.partition("@")[2]) for name in runs if name.startswith("none@"))
    found: dict[str, list[float]] = {name: [] for name in DIVERGENCES}
    alone = 0
    for seed in seeds:
        way = {step: runs[f"none@{step}"][seed] for step in steps}
        for name in DIVERGENCES:
            values = []
            for arm in arms:
                if arm.rpartition("_")[0] == name:
                    run = runs[f"{arm}@{last}"][seed]
                    partner = at_distance(way, run[measure], measure)
                    values += [] if partner is None else [run["gold"] - partner]
                    alone += partner is None
            if values:
                found[name].append(sum(values) / len(values))
    note = f"{alone} of {len(seeds) * len(arms)} runs lie beyond the largest distance of `none` and have no partner."
    return {name: np.array(values) for name, values in found.items()}, note


def overoptimisation(rows: list[dict[str, str]], figure: Path | None) -> str:
    """Gold, proxy and distance by arm, and the plan's comparisons."""
    runs, seeds = complete([row for row in rows if row["step"] != "0"], "step")
    for row in rows:
        if row["step"] == "0":
            runs["none@0"][int(row["seed"])] = {name: float(x) for name, x in row.items() if _is_number(x)}
    last = max(int(name.partition("@")[2]) for name in runs)
    arms = [name.partition("@")[0] for name in runs if name.endswith(f"@{last}")]
    start = runs["none@0"]
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]} ({len(seeds)}).",
        "",
        "| arm | gold % | proxy % | guesses % | KL(policy, start), nats a response | KL(start, policy) |",
        "|---|---|---|---|---|---|",
    ]

    def line(name: str, own: Mapping[int, Mapping[str, float]]) -> str:
        shares = [shown(np.array([own[s][key] for s in seeds])) for key in ("gold", "proxy", "guesses")]
        ways = [f"{np.mean([own[s][key] for s in seeds]):.2f}" for key in ("reverse_kl", "forward_kl")]
        return f"| {name} | {' | '.join(shares + ways)} |"

    lines += [line("start", start), *(line(f"`{arm}`", runs[f"{arm}@{last}"]) for arm in arms)]
    for run in (run for own in runs.values() for run in own.values()):
        run["token"] = run["reverse_kl"] / run["length"]
    for measure, title in (("reverse_kl", "the same distance, a response"), ("token", "the same distance, a token")):
        found, note = matched(runs, seeds, last, measure)
        lines += ["", comparison(f"gold against `none` at {title}", found, 0.03), "", note]
    for key in ("gold", "proxy", "guesses"):
        base = column(runs, seeds, f"none@{last}", key)
        found = {arm: column(runs, seeds, f"{arm}@{last}", key) - base for arm in arms if arm != "none"}
        lines += ["", comparison(f"{key} after {last} steps, against `none`", found, 0.03)]
    if figure is not None:
        _overoptimisation_figure(runs, seeds, figure)
    return "\n".join(lines)


def _overoptimisation_figure(runs: Runs, seeds: Sequence[int], path: Path) -> None:
    steps: dict[str, list[int]] = defaultdict(list)
    for name in runs:
        arm, _, step = name.partition("@")
        steps[arm].append(int(step))
    with rc_context(STYLE):
        drawing = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = drawing.subplots(1, 2, sharey=True)
        for arm, own in steps.items():
            name, _, number = arm.rpartition("_")
            colour, weak = DIVERGENCES.get(name, BLACK), arm.endswith(("0.055", "0.1", "0.35"))
            ways = [0] * (arm != "none") + sorted(own)
            numbers = [[runs[f"{'none' if s == 0 else arm}@{s}"][seed] for seed in seeds] for s in ways]
            mean = {
                key: [np.mean([x[key] for x in found]) for found in numbers] for key in ("gold", "proxy", "reverse_kl")
            }
            style = ":" if weak and arm != "none" else "-"
            label = "none" if arm == "none" else f"{name} {number}"
            left.plot(
                np.sqrt(mean["reverse_kl"]), 100 * np.array(mean["gold"]), style, color=colour, marker="o", markersize=4
            )
            right.plot(
                100 * np.array(mean["proxy"]),
                100 * np.array(mean["gold"]),
                style,
                color=colour,
                marker="o",
                markersize=4,
                label=label,
            )
        left.set_xlabel("square root of KL(policy, start), nats a response")
        right.set_xlabel("proxy: accepted by the faulty verifier, %")
        left.set_ylabel("gold: right answers, %")
        right.legend(fontsize=9)
        save(drawing, path)


# ---- diversity


def diversity(rows: list[dict[str, str]], figure: Path | None) -> str:
    """Measures by arm, and the plan's comparisons."""
    start = next({k: float(x) for k, x in row.items() if _is_number(x)} for row in rows if row["arm"] == "start")
    runs, seeds = complete([row for row in rows if row["arm"] != "start"])
    names = [*(f"hard.pass@{k}" for k in (1, 4, 16, 64)), "medium.pass@1"]
    counts = ("medium.distinct", "medium.rarefied", "hard.distinct", "reverse_kl", "forward_kl")
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]} ({len(seeds)}).",
        "",
        f"| arm | {' | '.join((*names, *counts))} |",
        "|" + "---|" * (1 + len(names) + len(counts)),
        "| start | "
        + " | ".join([*(f"{100 * start[name]:.1f}" for name in names), *(f"{start[name]:.3f}" for name in counts)])
        + " |",
    ]
    for arm in DIVERSITY:
        cells = [shown(column(runs, seeds, arm, name)) for name in names]
        cells += [f"{column(runs, seeds, arm, name).mean():.3f}" for name in counts]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    for name, effect, unit in (("hard.pass@64", 0.02, 100), ("hard.pass@1", 0.02, 100), ("medium.rarefied", 0.02, 1)):
        base = column(runs, seeds, "none", name)
        found = {arm: column(runs, seeds, arm, name) - base for arm in DIVERSITY if arm != "none"}
        lines += ["", comparison(f"{name}, against `none`", found, effect, unit)]
        found = {arm: column(runs, seeds, arm, name) - start[name] for arm in DIVERSITY}
        lines += ["", comparison(f"{name}, against the start", found, effect, unit)]
    if figure is not None:
        _diversity_figure(runs, seeds, start, figure)
    return "\n".join(lines)


def _diversity_figure(runs: Runs, seeds: Sequence[int], start: Mapping[str, float], path: Path) -> None:
    with rc_context(STYLE):
        drawing = Figure(figsize=(9, 4.2), layout="constrained")
        left, right = drawing.subplots(1, 2, width_ratios=[3, 2])
        ks = (1, 4, 16, 64)
        left.plot(ks, [100 * start[f"hard.pass@{k}"] for k in ks], "--", color=GREY, marker="o", label="start")
        for place, (arm, colour) in enumerate(DIVERSITY.items()):
            mean = [100 * column(runs, seeds, arm, f"hard.pass@{k}").mean() for k in ks]
            left.plot(ks, mean, color=colour, marker="o", label=arm)
            values = column(runs, seeds, arm, "medium.rarefied")
            right.plot([place] * len(values), values, "o", color=colour, alpha=0.4)
            right.plot([place], [values.mean()], "_", color=colour, markersize=22, markeredgewidth=3)
        left.set_xscale("log", base=4)
        left.set_xticks(ks, [str(k) for k in ks])
        left.set_xlabel("k")
        left.set_ylabel("pass@k on hard problems, %")
        left.legend(fontsize=9)
        right.axhline(start["medium.rarefied"], color=GREY, linestyle="--")
        right.set_xticks(range(len(DIVERSITY)), [*DIVERSITY], fontsize=9)
        right.set_ylabel("distinct texts among 8 right ones, medium")
        save(drawing, path)


def save(drawing: Figure, path: Path) -> None:
    """As PNG, without the time of day."""
    FigureCanvasAgg(drawing)
    drawing.savefig(path, dpi=150, metadata={"Software": None})


PAGES: dict[str, Any] = {
    "estimator": estimator,
    "staleness": staleness,
    "overoptimisation": overoptimisation,
    "diversity": diversity,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("page", choices=PAGES)
    options.add_argument("--runs", type=Path, help="default: docs/evidence/PAGE.csv")
    options.add_argument("--figure", type=Path)
    args = options.parse_args()
    path = args.runs or EVIDENCE / f"{args.page}.csv"
    with path.open(newline="") as file:
        print(PAGES[args.page](list(csv.DictReader(file)), args.figure))


if __name__ == "__main__":
    main()
