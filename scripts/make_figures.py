"""Draw the figures of docs/choosing.md into docs/figures/: gradient.png, region.png, penalty.png, entropy.png.

Every curve is computed by the package, in float64; the entropy figure enumerates its vocabulary, so nothing in it is
simulated. Colours are those of Okabe and Ito, and no two lines of a panel share both colour and dash pattern. Runtime:
about 5 seconds on one CPU core.

Usage: python scripts/make_figures.py [--out docs/figures] [--only gradient,region,penalty,entropy]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

import mirrorpo

OUT = Path(__file__).resolve().parent.parent / "docs" / "figures"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
SKY, GOLD, BLACK, GREY = "#56b4e9", "#b8860b", "#000000", "#777777"
# name of the line -> (divergence, options, colour, dashes)
LINES: dict[str, tuple[str, dict[str, float], str, Any]] = {
    "reverse_kl = kl": ("reverse_kl", {}, BLUE, "-"),
    "forward_kl": ("forward_kl", {}, ORANGE, "-"),
    "js": ("js", {}, GREEN, "-"),
    "hellinger": ("hellinger", {}, PINK, "--"),
    "tv": ("tv", {}, GREY, ":"),
    "chi2": ("chi2", {}, SKY, "-."),
    "prob_l2": ("prob_l2", {}, BLACK, "-"),
    "itakura_saito": ("itakura_saito", {}, GOLD, "--"),
}


def number(x: float, _: object = None) -> str:
    """A tick label: 0.001 and 1e-5 rather than powers as superscripts."""
    if x == 0 or 1e-3 <= abs(x) < 1e5:
        return f"{x:g}".replace("-", "\N{MINUS SIGN}")
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-1e", "\N{MINUS SIGN}1e")


def plain(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Plain tick labels and no minor ticks on the axes named."""
    for wanted, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        if wanted:
            axis.set_major_formatter(FuncFormatter(number))
            axis.set_minor_locator(NullLocator())


def legend_below(figure: Figure, axes: Axes, columns: int, room: float) -> None:
    """One legend for all panels, in the strip of height ``room`` at the bottom."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=columns, handlelength=2.6, columnspacing=1.6)
    figure.get_layout_engine().set(rect=(0.0, room, 1.0, 1.0 - room))


def new(height: float) -> Figure:
    """A figure 9 inches wide."""
    return Figure(figsize=(9.0, height), layout="constrained")


def gradient() -> Figure:
    """The weight g of grad log p_y against p_y, for four reference probabilities."""
    figure = new(7.6)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    logp = torch.linspace(-6, 0, 601, dtype=torch.float64) * torch.log(torch.tensor(10.0, dtype=torch.float64))
    for axes, q in zip(panels.flat, (1e-4, 1e-2, 0.3, 0.9), strict=True):
        logq = torch.full_like(logp, q).log()
        for label, (name, options, colour, dashes) in LINES.items():
            weight = mirrorpo.divergence(name, **options).score(logp, logq)
            axes.plot(logp.exp(), weight, color=colour, linestyle=dashes, label=label)
        axes.axvline(q, color=GREY, linewidth=1, zorder=0)
        axes.annotate("q", (q, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_yscale("asinh", linear_width=0.05)
        axes.set_ylim(-2e3, 2e3)
        axes.set_yticks([-1000, -100, -10, -1, -0.1, 0, 0.1, 1, 10, 100, 1000])
        axes.set_title(f"q = {number(q)}")
        plain(axes, x=True, y=True)
    for axes in panels[1]:
        axes.set_xlabel("p, probability of the token now")
    for axes in panels[:, 0]:
        axes.set_ylabel("g  (> 0: pushes the token down)")
    legend_below(figure, panels[0, 0], 4, 0.08)
    return figure


def bregman_constraint(name: str, ratio: float, b: float, **options: float) -> float:
    """d(w b, b)."""
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in (ratio * b, b))
    return mirrorpo.divergence(name, **options).term(p, q)[0].item()


def bernoulli_kl(ratio: float, b: float) -> float:
    """KL(Bernoulli(b) || Bernoulli(w b))."""
    q, p = (torch.distributions.Bernoulli(torch.tensor(x, dtype=torch.float64)) for x in (b, ratio * b))
    return torch.distributions.kl_divergence(q, p).item()


def region() -> Figure:
    """Bounds of the ratio against the rollout probability; every region has the upper bound 1.2 at b = 0.5."""
    ratio, b0 = 1.2, 0.5
    kl3 = torch.tensor(ratio, dtype=torch.float64)
    radii: list[tuple[str, dict[str, float], float | None, str, Any]] = [
        ("ratio", {"epsilon_low": 0.2}, None, GREY, ":"),
        ("kl3", {}, (kl3 - 1 - kl3.log()).item(), BLUE, "-"),
        ("beta", {"beta": 0.5}, bregman_constraint("beta", ratio, b0, beta=0.5), GREEN, "-."),
        ("kl", {}, bregman_constraint("kl", ratio, b0), PINK, "--"),
        ("binary_kl", {}, bernoulli_kl(ratio, b0), ORANGE, "-"),
        ("binary_tv", {}, 0.1, BLACK, "-"),
    ]
    figure = new(5.4)
    rare, confident = figure.subplots(1, 2, width_ratios=(3, 2))
    logit = torch.linspace(-9.2, 6.9, 700, dtype=torch.float64)
    b = logit.sigmoid()
    for name, options, radius, colour, dashes in radii:
        own = options if radius is None else {**options, "radius": radius}
        low, high = mirrorpo.trust_region(name, **own).ratio_bounds(b.log())
        shown = {"binary_tv": "binary_tv = prob_l2", "kl3": "kl3 = itakura_saito", "beta": "beta = 0.5"}.get(name, name)
        size = "epsilon 0.2" if radius is None else f"radius {radius:.3g}"
        for index, side in enumerate((low, high)):
            curve = torch.where(side > 0, side, torch.nan).expand_as(b)
            for axes in (rare, confident):
                axes.plot(b, curve, color=colour, linestyle=dashes, label=f"{shown}, {size}" if index else None)
    for axes, ticks in ((rare, [1e-4, 1e-3, 0.01, 0.1, 0.5]), (confident, [0.5, 0.9, 0.99, 0.999])):
        axes.fill_between(b, 1 / b, 1e4, color="#eceff2", zorder=0)
        axes.set_xscale("logit", one_half="0.5")
        axes.set_xlabel("b, rollout probability of the token")
        axes.set_xticks(ticks)
        axes.set_xlim(ticks[0], ticks[-1])
    rare.set(yscale="log", ylim=(0.02, 200), ylabel="bounds of w = p / b", title="rare tokens (w logarithmic)")
    confident.set(ylim=(0.75, 1.25), title="confident tokens (w linear)")
    rare.text(0.05, 60, "p > 1", color="#555555")
    confident.text(0.99, 1.22, "p > 1", color="#555555", ha="center")
    plain(rare, x=True, y=True)
    plain(confident, x=True)
    legend_below(figure, rare, 2, 0.16)
    return figure


def penalty() -> Figure:
    """What a token pays under ``sampled``, against the log-ratio."""
    figure = new(4.9)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    delta = torch.linspace(-3, 2.99, 600, dtype=torch.float64)
    logq = torch.full_like(delta, 0.05).log()
    both = {"log_l2": ("log_l2", {}, GOLD, "--"), "reverse_kl = k3": ("reverse_kl", {}, BLUE, "-")}
    names = ("forward_kl", "js", "hellinger", "tv", "chi2")
    f_lines = {**both, **{name: LINES[name] for name in names}}
    bregman_lines = {
        "itakura_saito": LINES["itakura_saito"],
        "beta = 0.5": ("beta", {"beta": 0.5}, GREEN, "-."),
        "kl": ("kl", {}, PINK, "--"),
        "prob_l2": LINES["prob_l2"],
    }
    for axes, lines in ((left, f_lines), (right, bregman_lines)):
        for label, (name, options, colour, dashes) in lines.items():
            value = mirrorpo.divergence(name, **options).sampled(delta + logq, logq)
            axes.plot(delta, value.where(value > 0, torch.nan), color=colour, linestyle=dashes, label=label)
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 100)
        axes.set_xlabel("log p - log q".replace("-", "\N{MINUS SIGN}"))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, handlelength=2.6, columnspacing=1.2)
        plain(axes, y=True)
    left.set_title("functions of the ratio: the same for every q")
    right.set_title("Bregman, at q = 0.05: rare tokens pay less")
    left.set_ylabel("sampled value at the token")
    return figure


def entropy_slopes(name: str, options: dict[str, float], logp: Tensor, logq: Tensor) -> tuple[float, float]:
    """Change of entropy, in nats, under a descent step on D in logits: per learning rate and per length of step."""
    logits = logp.clone().requires_grad_()
    (step,) = torch.autograd.grad(mirrorpo.divergence(name, **options).exact(logits, logq), logits)
    now = logits.log_softmax(-1)
    (slope,) = torch.autograd.grad(-(now.exp() * now).sum(), logits)
    change, size = -(slope @ step).item(), step.norm().item()
    return change, change / size if size > 1e-9 else float("nan")  # at p = q there is no direction


def entropy() -> Figure:
    """Expected change of entropy under one step of each penalty, by enumeration."""
    logq = (-torch.arange(1, 33, dtype=torch.float64).log()).log_softmax(-1)  # Zipf, 32 tokens
    rare = 19  # q = 0.012
    raised = torch.zeros_like(logq).index_fill(0, torch.tensor(rare), 1.0)
    temperatures = torch.logspace(-0.7, 0.7, 81, dtype=torch.float64)
    sharpened = [(logq / t).log_softmax(-1) for t in temperatures]
    pushed = [(logq + shift * raised).log_softmax(-1) for shift in torch.linspace(0.05, 9, 80, dtype=torch.float64)]
    columns = (
        ("p is q at temperature T", "T", temperatures.tolist(), sharpened),
        (
            "p raised one rare token",
            "p of that token (q = 0.012)",
            [logp[rare].exp().item() for logp in pushed],
            pushed,
        ),
    )
    figure = new(7.4)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (title, xlabel, places, policies) in enumerate(columns):
        strength, direction = panels[:, column]
        for label, (name, options, colour, dashes) in LINES.items():
            slopes = [entropy_slopes(name, options, logp, logq) for logp in policies]
            for axes, values in zip((strength, direction), zip(*slopes, strict=True), strict=True):
                axes.plot(places, values, color=colour, linestyle=dashes, label=label)
        for axes in (strength, direction):
            axes.axhline(0, color=BLACK, linewidth=0.8)
        strength.set_title(title)
        direction.set_xlabel(xlabel)
    panels[0, 0].set_yscale("asinh", linear_width=0.005)
    panels[0, 0].set_yticks([-100, -10, -1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10, 100])
    panels[0, 0].set_ylim(-3, 60)
    plain(panels[0, 0], y=True)
    panels[1, 0].set_xscale("log")
    panels[1, 0].set_xticks([0.2, 0.5, 1, 2, 5])
    plain(panels[1, 0], x=True)
    panels[0, 0].set_ylabel("entropy change per learning rate")
    panels[1, 0].set_ylabel("entropy change per length of step")
    legend_below(figure, panels[0, 0], 4, 0.08)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "gradient": gradient,
    "region": region,
    "penalty": penalty,
    "entropy": entropy,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write to (default: docs/figures)")
    parser.add_argument("--only", default=",".join(FIGURES), help="names, separated by commas (default: all)")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only.split(","):
        if name not in FIGURES:
            parser.error(f"unknown figure {name!r}. Legal: {', '.join(FIGURES)}")
        with rc_context(STYLE):
            figure = FIGURES[name]()
            FigureCanvasAgg(figure)
            figure.savefig(given.out / f"{name}.png", dpi=160, metadata={"Software": None})
        print(f"wrote {name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
