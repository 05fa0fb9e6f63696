"""Exports of a study for papers and for other tools: learning curves and tables as CSV, a LaTeX table, one picture.

The picture has the learning curves, accuracy with intervals, the distance from the start, and from three seeds on the
performance profile. With many arms the baseline and the best arm have colours and the others are grey.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mirrorpo.files import write_bytes_atomic
from mirrorpo.reports.study_charts import learning_curve
from mirrorpo.reports.tables import csv_text
from mirrorpo.statistics import performance_profile
from mirrorpo.studies.collection import Collection
from mirrorpo.studies.compare import Comparison
from mirrorpo.wording import printable, three_digits

FORMATS = ("csv", "latex", "svg", "pdf", "png")
_PICTURES = ("svg", "pdf", "png")
_COLOURS = ("#59616e", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # baseline first; Okabe and Ito
_GREY, _INK, _GRID = "#c3c8cf", "#1a1d23", "#e4e7eb"
_MANY = len(_COLOURS)
_MIN_PROFILE = 3  # seeds from which a profile is more than a step or two
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def export(collection: Collection, comparison: Comparison, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the files of some formats.

    Args:
        collection: what was compared; at least one run.
        comparison: its numbers.
        folder: where they go; it exists.
        formats: of ``FORMATS``.

    Returns:
        Their paths: ``curves.csv``, ``accuracy.tex``, ``study.svg``, ``study.pdf``, ``study.png``.
    """
    files: dict[str, bytes] = {}
    if "csv" in formats:
        files["curves.csv"] = curves_csv(collection).encode()
    if "latex" in formats:
        files["accuracy.tex"] = latex_table(collection, comparison).encode()
    kinds = [kind for kind in _PICTURES if kind in formats]
    if kinds:
        figure = study_figure(collection, comparison)
        for kind in kinds:
            files[f"study.{kind}"] = _rendered(figure, kind)
    for name, content in files.items():
        write_bytes_atomic(folder / name, content)
    return [folder / name for name in files]


def curves_csv(collection: Collection) -> str:
    """Every step of every run, tidy: one row an arm, seed and step; a column for each metric that some run recorded."""
    names = sorted({name for run in collection.runs for name in run.metrics.columns if name != "step"})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "step", *map(csv_text, names)])
    for arm, runs in collection.arms.items():
        for run in runs:
            columns = [run.metrics.columns.get(name) for name in names]
            for row, step in enumerate(run.metrics.steps):
                values = ["" if column is None or column[row] is None else column[row] for column in columns]
                writer.writerow([csv_text(arm), run.seed, step, *values])
    return buffer.getvalue()


def latex_table(collection: Collection, comparison: Comparison) -> str:
    """Accuracy by arm, narrow enough for a column of text; needs the package booktabs."""
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"Arm & Seeds & Accuracy (\%) & Difference & $p$ (Holm) \\",
        r"\midrule",
    ]
    for arm, spread in comparison.accuracy.items():
        d = spread.difference
        sd = rf" $\pm$ {100 * spread.sd:.1f}" if len(spread.values) > 1 else ""
        change, p = "--", "--"
        if d is not None:
            ends = "" if len(d.seeds) < 2 else f" [{100 * d.mean.low:+.1f}, {100 * d.mean.high:+.1f}]"
            change = f"${100 * d.mean.estimate:+.1f}${ends.replace('-', '$-$')}"
            p = three_digits(d.p_holm) if len(d.seeds) > 1 else "--"
            change = rf"\textbf{{{change}}}" if d.significant else change
        cells = (latex_text(arm), str(len(spread.values)), f"{100 * spread.mean.estimate:.1f}{sd}", change, p)
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    note = "mean and standard deviation over seeds; difference to the first arm in points with its 95 % interval"
    return "\n".join([f"% {note}", *lines]) + "\n"


def latex_text(text: str) -> str:
    """Outside text as letters: nothing in it is a command."""
    return "".join(_LATEX.get(letter, "\\" + letter if letter in "&%$#_{}" else letter) for letter in printable(text))


def study_figure(collection: Collection, comparison: Comparison) -> Figure:
    """The picture."""
    arms = {arm: runs for arm, runs in collection.arms.items() if runs}
    colours = _colours(list(arms), collection.baseline, comparison)
    profiled = min(len(runs) for runs in arms.values()) >= _MIN_PROFILE
    figure = Figure(figsize=(9.0, 4.2), facecolor="white")
    grid = figure.add_gridspec(
        2, 2, width_ratios=(1.3, 1), left=0.07, right=0.975, top=0.9, bottom=0.12, wspace=0.42, hspace=0.75
    )
    _draw_curves(figure.add_subplot(grid[:, 0] if not profiled else grid[0, 0]), collection, colours)
    if profiled:
        _draw_profile(figure.add_subplot(grid[1, 0]), comparison, colours)
    _draw_accuracy(figure.add_subplot(grid[0, 1]), collection, comparison, colours)
    _draw_distance(figure.add_subplot(grid[1, 1]), collection, colours)
    return figure


def _colours(arms: list[str], baseline: str, comparison: Comparison) -> dict[str, str]:
    """A colour for each arm; with many, only the baseline's and the best one's differ from grey."""
    rest = [arm for arm in arms if arm != baseline]
    if len(arms) > _MANY:
        best = max(rest, key=lambda arm: comparison.accuracy[arm].mean.estimate)
        return dict.fromkeys(arms, _GREY) | {baseline: _INK, best: _COLOURS[2]}
    return {baseline: _COLOURS[0]} | dict(zip(rest, _COLOURS[1:], strict=False))


def _draw_curves(axes: Axes, collection: Collection, colours: dict[str, str]) -> None:
    _dress(axes, "mean reward of a step", "step")
    for arm, colour in sorted(colours.items(), key=lambda item: item[1] != _GREY):  # grey below
        curve = learning_curve(collection.arms[arm], "reward")
        steps, rows = list(curve), list(curve.values())
        if colour != _GREY and any(high > low for _, low, high in rows):
            axes.fill_between(steps, [r[1] for r in rows], [r[2] for r in rows], color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            steps, [row[0] for row in rows], color=colour, linewidth=1.6, label=None if colour == _GREY else _name(arm)
        )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_accuracy(axes: Axes, collection: Collection, comparison: Comparison, colours: dict[str, str]) -> None:
    _dress(axes, "accuracy on unseen problems, %", "")
    for place, arm in enumerate(colours):
        spread = comparison.accuracy[arm]
        low, high = spread.mean.low, spread.mean.high
        if len(spread.values) < 2:  # one seed: what the number of problems alone allows
            low, high = collection.arms[arm][0].summary.after.interval or (spread.mean.estimate,) * 2
        axes.hlines(place, 100 * low, 100 * high, color=colours[arm], linewidth=3, alpha=0.45)
        axes.plot([100 * spread.mean.estimate], [place], "o", color=colours[arm], markersize=6)
        if len(spread.values) > 1:
            dots = [100 * value for value in spread.values.values()]
            axes.plot(dots, [place] * len(dots), "|", color=colours[arm], markersize=9, alpha=0.7)
    _names(axes, list(colours))


def _draw_distance(axes: Axes, collection: Collection, colours: dict[str, str]) -> None:
    _dress(axes, "distance from the start: exact KL, nats a token", "")
    for place, arm in enumerate(colours):
        values = [run.divergence for run in collection.arms[arm] if run.divergence is not None]
        if values:
            axes.barh(place, sum(values) / len(values), height=0.5, color=colours[arm])
    _names(axes, list(colours))
    axes.set_xlim(left=0)


def _draw_profile(axes: Axes, comparison: Comparison, colours: dict[str, str]) -> None:
    _dress(axes, "performance profile: share of runs above an accuracy", "accuracy, %")
    every = [value for spread in comparison.accuracy.values() for value in spread.values.values()]
    low, high = min(every), max(every)
    margin = 0.05 * (high - low) or 0.01
    thresholds = [low - margin + (high - low + 2 * margin) * n / 200 for n in range(201)]
    for arm, colour in colours.items():
        shares = performance_profile(list(comparison.accuracy[arm].values.values()), thresholds)
        axes.step([100 * value for value in thresholds], shares, color=colour, linewidth=1.4)
    axes.set_ylim(-0.03, 1.03)


def _dress(axes: Axes, title: str, across: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.set_xlabel(across, fontsize=8.5)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _names(axes: Axes, arms: list[str]) -> None:
    axes.set_yticks(range(len(arms)), [_name(arm) for arm in arms], parse_math=False)
    axes.set_ylim(len(arms) - 0.5, -0.5)


def _name(arm: str) -> str:
    text = printable(arm)
    return (text if len(text) <= 22 else text[:21] + "...").replace("$", r"\$")


def _rendered(figure: Figure, kind: str) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    nothing = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    figure.savefig(buffer, format=kind, dpi=200, metadata=nothing[kind])
    return buffer.getvalue()


__all__ = ["FORMATS", "curves_csv", "export", "latex_table", "latex_text", "study_figure"]
