"""Picture of a search, ``evolution.png``: fitness over generations, and the shape of h'."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mirrorpo.divergences.neural.map import MirrorMap
from mirrorpo.files import write_bytes_atomic

_SIZE, _DPI = (9.0, 4.0), 200
_INK, _SOFT, _GRID = "#1a1d23", "#59616e", "#e4e7eb"
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
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white")
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


__all__ = ["draw"]
