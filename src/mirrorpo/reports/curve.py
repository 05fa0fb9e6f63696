"""Pictures made for the width of a README: ``curve.png`` of a run and ``evolution.png`` of a search.

Of a run, left: the mean reward of every step, and under it the accuracy on unseen problems before and after, and at the
steps of ``eval.every``, with its intervals. They have axes of their own: rollouts are drawn at the training's
temperature, for other problems, and an evaluation may be greedy. Right: how far the policy moved, how often the trust
region stopped it, how long it writes.
Of a search: fitness over generations, and the shape of h'.
Figures are built from objects: no pyplot, so nothing global changes and any thread may draw.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.files import write_bytes_atomic
from mirrorpo.reports.charts import Values, step_scale, value_scale
from mirrorpo.reports.conclusions import accuracy_line
from mirrorpo.reports.run_page import divergences
from mirrorpo.runs.reader import Evaluation, Metrics, Summary, read_metrics, read_summary
from mirrorpo.runs.unfinished import is_finished, metrics_so_far, read_evaluations, read_settings, read_unfinished
from mirrorpo.wording import duration, plural

_SIZE = (9.0, 4.5)  # inches; at 200 dots an inch twice the width of a README, so sharp on dense screens
_DPI = 200
_INK, _SOFT, _GRID = "#1a1d23", "#59616e", "#e4e7eb"
# from Okabe and Ito: told apart with any colour vision
_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_ACCURACY = "#d55e00"
_DENSE = 300  # steps from which a line is drawn thin, or its noise would be one broad band
_TOKENS = 16  # of a learned penalty's picture
_MAX_NAMED = 3  # more divergences than this do not fit a README's picture; report.html has them all


def write_curve(run_dir: Path) -> Path:
    """Write `curve.png` into a run folder.

    Args:
        run_dir: a folder with `summary.json` and `metrics.jsonl`.

    Returns:
        The path of the picture, 1800 by 900 pixels.

    Raises:
        FileNotFoundError: one of these files is missing; it is named.
        ValueError: one of them is broken; the file and the line or key are named.

    Example:
        >>> import tempfile
        >>> write_curve(Path(tempfile.mkdtemp()))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        FileNotFoundError: recipe.yaml: no such file in the run folder ...
    """
    run_dir = Path(run_dir)
    finished = is_finished(run_dir)
    metrics = read_metrics(run_dir) if finished else metrics_so_far(run_dir)
    summary = read_summary(run_dir) if finished else read_unfinished(run_dir, metrics)[0]
    points = [(point.step, point.evaluation) for point in read_evaluations(run_dir)]
    points = [(0, summary.before), *points, *([(summary.steps, summary.after)] if finished else [])]
    figure = _figure(summary, metrics, points, read_settings(run_dir).sampling, finished)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    target = run_dir / "curve.png"
    write_bytes_atomic(target, buffer.getvalue())
    return target


Points = Sequence[tuple[int, Evaluation]]


def _figure(summary: Summary, metrics: Metrics, points: Points, sampling: str, finished: bool) -> Figure:
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white")
    grid = figure.add_gridspec(
        3, 2, width_ratios=(1.15, 1), left=0.062, right=0.972, top=0.79, bottom=0.105, wspace=0.16, hspace=0.5
    )
    _heading(figure, summary, finished)
    left = grid[:, 0].subgridspec(2, 1, hspace=0.34)
    upper = figure.add_subplot(left[0])
    of_pairs = "reward" not in metrics.columns and "rewards/accuracies" in metrics.columns
    title, key = ("pairs ranked right", "rewards/accuracies") if of_pairs else ("mean reward of a step", "reward")
    _draw_row(upper, title, {key: ""}, metrics, share=of_pairs, may_be_log=False)
    upper.tick_params(labelbottom=False)
    lower = figure.add_subplot(left[1])
    _draw_accuracy(lower, metrics, points, sampling)
    upper.set_xlim(lower.get_xlim())
    names = divergences(metrics)
    shown = dict(list(names.items())[:_MAX_NAMED])
    more = len(names) - len(shown)
    rows = (
        ("divergence" + (f" ({more} more in the report)" if more else ""), shown),
        ("clipped tokens", {"clip/low/frac": "low side", "clip/high/frac": "high side"}),
        ("completion length, tokens", {"completions/mean_length": ""}),
    )
    if "rewards/margins" in metrics.columns:
        rows = (
            ("loss", {"loss": ""}),
            ("margin", {"rewards/margins": ""}),
            ("log-probabilities", {"logps/chosen": "preferred", "logps/rejected": "other"}),
        )
    for n, (title, keys) in enumerate(rows):
        axes = figure.add_subplot(grid[n, 1])
        _draw_row(axes, title, keys, metrics, share=n == 1, may_be_log=n == 0)
        axes.tick_params(labelbottom=n == len(rows) - 1)
    for axes in (lower, figure.axes[-1]):
        axes.set_xlabel("step", fontsize=8.5, color=_SOFT)
    return figure


def _heading(figure: Figure, summary: Summary, finished: bool) -> None:
    title = _ascii(f"{summary.objective} on {summary.task}", 72)
    effort = f"{plural(summary.steps, 'step')}, {duration(max(0.0, summary.seconds))}, seed {summary.seed}"
    outcome = accuracy_line(summary.before, summary.after, summary.problems) if finished else "Unfinished"
    left = 0.02
    figure.text(left, 0.945, title, fontsize=14, fontweight="bold", color=_INK, va="center", parse_math=False)
    figure.text(left, 0.885, f"{outcome} · {effort}", fontsize=9.5, color=_SOFT, va="center", parse_math=False)


def _draw_accuracy(axes: Axes, metrics: Metrics, points: Points, sampling: str) -> None:
    """Each evaluation with its interval, by the step it follows; the ends with their numbers."""
    _dress(axes, f"accuracy, unseen problems{f' ({sampling})' if sampling else ''}", metrics)
    found = [(step, one.accuracy, one.interval) for step, one in points if one.accuracy is not None]
    if not found:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", fontsize=9, color=_SOFT)
        axes.set_yticks([])
        return
    for step, accuracy, interval in found:
        low, high = interval or (accuracy, accuracy)
        axes.vlines(step, low, high, color=_ACCURACY, linewidth=3, alpha=0.4, zorder=3, clip_on=False)
    steps, values = [step for step, _, _ in found], [accuracy for _, accuracy, _ in found]
    axes.plot(steps, values, "o-", color=_ACCURACY, markersize=5, linewidth=1.2, zorder=4, clip_on=False)
    last = max(steps[-1], *(metrics.steps or (0,)), 1)
    axes.set_xlim(-0.16 * last, 1.16 * last)
    for side, step, value in ((-1, steps[0], values[0]), (1, steps[-1], values[-1]))[: len(found)]:
        # Beside the marker, outside the curve: nothing can lie under the letters.
        axes.annotate(
            f"{100 * value:.1f} %", (step, value), xytext=(7 * side, 0), textcoords="offset points",
            ha="right" if side < 0 else "left", va="center", fontsize=9, color=_ACCURACY,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0.0, 0.5, 1.0], labels=["0", "50%", "100%"])


def _draw_row(axes: Axes, title: str, keys: dict[str, str], metrics: Metrics, *, share: bool, may_be_log: bool) -> None:
    _dress(axes, title, metrics)
    columns = {key: metrics.columns.get(key, ()) for key in keys}
    values = [value for column in columns.values() for value in column if value is not None]
    if not values:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", fontsize=9, color=_SOFT)
        axes.set_yticks([])
        return
    scale = value_scale(values, may_be_log=may_be_log, share=share)
    fitting = {key: [value if scale.fits(value) else None for value in column] for key, column in columns.items()}
    for n, (key, column) in enumerate(fitting.items()):
        if any(value is not None for value in columns[key]):
            _draw_values(axes, metrics, column, n, _ascii(keys[key], 20))
    axes.set_yscale("log" if scale.log else "linear")
    axes.set_ylim(scale.low, scale.high)
    ticks = scale.ticks if len(scale.ticks) <= 4 else scale.ticks[:: -(-(len(scale.ticks) - 1) // 3)]
    axes.set_yticks([value for value, _ in ticks], labels=[_mathematical(label) for _, label in ticks])
    axes.minorticks_off()
    if any(keys.values()):
        _legend(axes, "lower right", (1.01, 1.0))


def _draw_values(axes: Axes, metrics: Metrics, values: Values, n: int, label: str) -> None:
    """A line that leaves missing values out, and dots where a value stands alone."""
    if not values:
        return
    numbers = [float("nan") if value is None else value for value in values]
    colour = _COLOURS[n]
    axes.plot(
        metrics.steps,
        numbers,
        color=colour,
        linewidth=1.8 if len(values) <= _DENSE else 0.8,
        label=label,
        clip_on=False,
    )
    padded = [None, *values, None]
    alone = [i for i, value in enumerate(values) if value is not None and padded[i] is None and padded[i + 2] is None]
    axes.plot(
        [metrics.steps[i] for i in alone], [numbers[i] for i in alone], "o", color=colour, markersize=4, clip_on=False
    )


def _dress(axes: Axes, title: str, metrics: Metrics) -> None:
    axes.set_title(title, fontsize=9.5, color=_INK, loc="left", pad=5, parse_math=False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=0, pad=4)
    axes.set_xticks([])
    if metrics.steps:
        scale = step_scale(metrics.steps)
        axes.set_xlim(scale.low, scale.high)
        axes.set_xticks([step for step, _ in scale.ticks], labels=[label for _, label in scale.ticks])


def _legend(axes: Axes, loc: Literal["lower left", "lower right"], anchor: tuple[float, float]) -> None:
    """In one row above the axes; none where nothing was drawn."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    legend = axes.legend(
        handles, labels, loc=loc, bbox_to_anchor=anchor, ncols=len(handles), fontsize=8.5, frameon=False,
        handlelength=1.5, handletextpad=0.5, columnspacing=1.2, borderpad=0, borderaxespad=0.4, labelcolor=_INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _ascii(text: str, limit: int) -> str:
    """Outside text for the picture: its font lacks most letters, and a missing one warns; there is little room."""
    safe = text.encode("ascii", "backslashreplace").decode("ascii")
    safe = "".join(character if character.isprintable() else "?" for character in safe)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


_POWER = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def _mathematical(label: str) -> str:
    """A label of the page as a label of the picture, whose font draws no superscript minus well."""
    if label.startswith("10") and not label.isascii():
        return f"$10^{{{label[2:].translate(_POWER)}}}$"
    return label


_SEARCH_SIZE = (9.0, 4.0)
# from Okabe and Ito: told apart with any colour vision
_BLUE, _ORANGE, _GREEN, _PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
# Where h' is pinned to -1: KL's h' has no finite value at 0.
_LEFT = 1e-3


def draw(path: Path, history: Sequence[dict[str, Any]], start: MirrorMap, best: MirrorMap) -> None:
    """Writes the picture.

    Args:
        path: the PNG file.
        history: as ``history.jsonl`` has it; only generations with a mean fitness.
        start: the first map.
        best: the evolved one.
    """
    figure = Figure(figsize=_SEARCH_SIZE, dpi=_DPI, facecolor="white")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.98, top=0.86, bottom=0.14, wspace=0.22)
    _draw_fitness(left, history)
    _draw_shapes(right, start, best)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_bytes_atomic(path, buffer.getvalue())


def _style(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=_INK)
    axes.set_xlabel(x, fontsize=8.5, color=_SOFT)
    axes.tick_params(labelsize=8, colors=_SOFT)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)


def _draw_fitness(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    _style(axes, "Validation accuracy after inner training", "generation")
    rows = [(line["generation"] + 1, row["fitness"]) for line in history for row in line["members"]]
    dots = [(x, y) for x, y in rows if y is not None]
    axes.scatter(*zip(*dots, strict=True), s=13, color=_BLUE, alpha=0.4, linewidths=0, label="members")
    again = [
        (line["generation"] + 1, row["fitness"])
        for line in history
        for row in line["elites"]
        if row["fitness"] is not None
    ]
    if again:
        axes.scatter(*zip(*again, strict=True), s=24, marker="D", color=_ORANGE, linewidths=0, label="elites again")
    generations = [line["generation"] + 1 for line in history]
    axes.plot(
        generations, [line["mean_fitness"] for line in history], color=_BLUE, linewidth=1.8, label="mean of pairs"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=_INK)


def _draw_shapes(axes: Axes, start: MirrorMap, best: MirrorMap) -> None:
    _style(axes, f"Shape of h': 0 at p = 1, scaled to \N{MINUS SIGN}1 at p = {_LEFT:g}", "probability p")
    x = torch.logspace(torch.tensor(_LEFT).log10().item(), 0.0, 400, dtype=torch.float64)
    for label, values, colour, style in (
        ("KL", x.log(), _GREEN, "--"),
        ("ProbL2", 2.0 * x, _PINK, "--"),
        ("first map", start.phi_inv(x), _SOFT, "-"),
        ("evolved map", best.phi_inv(x), _ORANGE, "-"),
    ):
        width = 2.2 if label == "evolved map" else 1.4
        axes.plot(x.tolist(), _pinned(values).tolist(), color=colour, linestyle=style, linewidth=width, label=label)
    axes.set_xscale("log")
    axes.legend(fontsize=8, frameon=False, loc="best", labelcolor=_INK)


def _pinned(values: Tensor) -> Tensor:
    """A divergence knows h' up to a constant, its coefficient up to a factor: both are taken out."""
    return (values - values[-1]) / (values[-1] - values[0])


def draw_learning(
    path: Path, history: Sequence[dict[str, Any]], grid: Sequence[float], anchor: float, by_token: Tensor, names: Any
) -> None:
    """Writes the picture of a learned penalty: its pull over time, kappa by token, and who wants a looser leash.

    Args:
        path: the PNG file.
        history: as ``learning.jsonl`` has it, at least one row.
        grid: the probabilities of ``pull``.
        anchor: the reference's probability that the pull is against.
        by_token: (3, V): times seen, sums of kappa and of what the validation reward gains without the pull.
        names: of the vocabulary's tokens.
    """
    figure = Figure(figsize=(11.0, 4.2), dpi=_DPI, facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.88, bottom=0.14, wspace=0.3)
    _style(left, f"c (h'(p) - h'({anchor:g})) over time", "p")
    chosen = sorted({round(i * (len(history) - 1) / 5) for i in range(6)})
    for i in chosen:
        shade = 0.25 + 0.75 * (i / max(1, len(history) - 1))
        row = history[i]
        left.plot(grid, row["pull"], color=_BLUE, alpha=shade, label=f"step {row['step']}")
    left.set_xscale("log")
    left.set_yscale("symlog", linthresh=1.0)
    left.axvline(anchor, color=_GRID)
    left.legend(fontsize=7.5, frameon=False)
    times, kappa, leash = by_token
    times = times.where(times >= len(history), 0.0)  # of a token that is seen less than once a step a mean says little
    _bars(middle, "Mean kappa by token", kappa / times.clamp(min=1.0), times, names)
    _bars(right, "Wants a looser leash (> 0)", leash, times, names)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_bytes_atomic(path, buffer.getvalue())


def _bars(axes: Axes, title: str, values: Tensor, times: Tensor, names: Any) -> None:
    """The tokens with the largest values, of either sign."""
    _style(axes, title, "")
    order = values.abs().masked_fill(times == 0, -1.0).argsort(descending=True)[:_TOKENS].flip(0)
    order = order[times[order] > 0]
    axes.barh(range(len(order)), values[order].tolist(), color=[_BLUE if values[i] > 0 else _ORANGE for i in order])
    axes.set_yticks(
        range(len(order)), [_ascii(repr(names[int(i)]), 14).replace("$", r"\$") for i in order], fontsize=7.5
    )
    axes.axvline(0.0, color=_SOFT, linewidth=0.8)


__all__ = ["draw", "draw_learning"]
