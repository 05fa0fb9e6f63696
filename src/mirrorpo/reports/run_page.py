"""The page of a run, ``report.html``: one HTML file that needs nothing else.

A table says which metrics are drawn together, under which title, in the order of the page; a metric that it does not
know is listed in the page's last table all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mirrorpo.files import write_text_atomic
from mirrorpo.reports.charts import MAX_POINTS, Curve, Panel, draw_before_after, draw_panel
from mirrorpo.reports.conclusions import conclude_run
from mirrorpo.reports.templates import cut, part, render
from mirrorpo.runs.reader import (
    Evaluation,
    Metrics,
    Sample,
    Summary,
    read_metrics,
    read_recipe,
    read_samples,
    read_summary,
)

_DIVERGENCE = ("divergence/", "/mean")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    title: str
    says: str
    keys: dict[str, str]  # metric -> label; no label where the title says it all
    share: bool = False
    may_be_log: bool = False


_FIRST = (
    _Plan(
        title="Reward",
        says="Over the rollouts of a step. Without spread among them there is nothing to learn from.",
        keys={"reward": "mean", "reward_std": "standard deviation"},
    ),
)
_OF_PAIRS = (
    _Plan(
        title="Margin",
        says="Between the rewards beta s(y) of the preferred and of the other completion of a pair.",
        keys={"rewards/margins": ""},
    ),
    _Plan(
        title="Pairs ranked right",
        says="Share of pairs whose preferred completion has the larger reward.",
        keys={"rewards/accuracies": ""},
        share=True,
    ),
    _Plan(
        title="Log-probabilities",
        says="Of whole completions. A margin may also come from both falling.",
        keys={"logps/chosen": "preferred", "logps/rejected": "other"},
    ),
)
_THEN = (
    _Plan(
        title="Clip share",
        says="Tokens at which the trust region stopped the gradient, by the side of the ratio that was hit.",
        keys={"clip/low/frac": "low side", "clip/high/frac": "high side"},
        share=True,
    ),
    _Plan(title="Completion length", says="Mean tokens of a rollout.", keys={"completions/mean_length": ""}),
    _Plan(
        title="Entropy",
        says="Of the next-token distribution, in nats. Near zero, exploration is over.",
        keys={"entropy": ""},
    ),
    _Plan(title="Gradient norm", says="Before clipping by norm, if any.", keys={"grad_norm": ""}, may_be_log=True),
)
_MORE = (
    _Plan(title="Loss", says="Its value is no measure of success; jumps are worth a look.", keys={"loss": ""}),
    _Plan(
        title="Largest ratio",
        says="Highest probability ratio of any token, policy over rollout policy.",
        keys={"ratio/max": ""},
        may_be_log=True,
    ),
    _Plan(title="Learning rate", says="As scheduled.", keys={"learning_rate": ""}),
    _Plan(title="Seconds a step", says="Rollouts, rewards and updates together.", keys={"seconds": ""}),
)


def divergences(metrics: Metrics) -> dict[str, str]:
    """Find the divergences of a run.

    Args:
        metrics: the columns of the run.

    Returns:
        Column name -> name of the divergence, in the order of the file.

    Example:
        >>> columns = {"divergence/prob_l2/mean": (0.1,), "reward": (1.0,)}
        >>> divergences(Metrics(steps=(1,), columns=columns, num_not_finite=0, torn=False))
        {'divergence/prob_l2/mean': 'prob_l2'}
    """
    start, end = _DIVERGENCE
    return {
        name: name[len(start) : -len(end)]
        for name in metrics.columns
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
    }


def plan_panels(metrics: Metrics) -> tuple[list[Panel], list[Panel], list[str]]:
    """Lay out the panels of a run.

    Args:
        metrics: the columns of the run.

    Returns:
        The main panels, further panels, and the titles of those left out because no value was recorded.

    Example:
        >>> columns = {"reward": (1.0,), "loss": (0.5,)}
        >>> main, more, absent = plan_panels(Metrics(steps=(1,), columns=columns, num_not_finite=0, torn=False))
        >>> [panel.title for panel in main], [panel.title for panel in more], absent[0]
        (['Reward'], ['Loss'], 'Divergence')
    """
    divergence = _Plan(
        title="Divergence",
        says="From the reference policy, mean over tokens.",
        keys=divergences(metrics),
        may_be_log=True,
    )
    absent: list[str] = []
    main = _panels((*_FIRST, divergence, *_THEN), metrics, absent)
    if "rewards/margins" in metrics.columns:  # trained on pairs: there are no rollouts
        absent = []
        main = _panels(_OF_PAIRS, metrics, absent) + main
    more = _panels(_MORE, metrics, absent)
    return main, more, absent


def _panels(plans: tuple[_Plan, ...], metrics: Metrics, absent: list[str]) -> list[Panel]:
    panels = []
    for plan in plans:
        curves = tuple(
            Curve(label=label, values=metrics.columns[key])
            for key, label in plan.keys.items()
            if any(value is not None for value in metrics.columns.get(key, ()))
        )
        if not curves:
            absent.append(plan.title)
            continue
        panels.append(
            Panel(title=plan.title, says=plan.says, curves=curves, may_be_log=plan.may_be_log, share=plan.share)
        )
    return panels


_RECIPE_LIMIT = 20_000  # characters
_MAX_REASONS = 40
_MAX_METRICS = 500
_PER_SIDE = 2  # completions of one prompt, before and after each
_OPEN = 4  # problems that are visible without a click
_BUDGET = 250_000  # characters of HTML for all samples: hostile text can be twenty times as long as its source


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run_dir: a folder with `summary.json`, `metrics.jsonl` and `recipe.yaml`, and with `samples.jsonl` if the run
            was evaluated.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: one of these files is missing; it is named.
        ValueError: one of them is broken; the file and the line or key are named.

    Example:
        >>> import tempfile
        >>> write_report(Path(tempfile.mkdtemp()))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        FileNotFoundError: summary.json: no such file in the run folder ...
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir)
    try:
        samples = read_samples(run_dir)
    except FileNotFoundError:
        if _evaluated(summary):
            raise
        samples = ()
    target = run_dir / "report.html"
    write_text_atomic(target, _page(summary, read_metrics(run_dir), samples, read_recipe(run_dir)))
    return target


def _evaluated(summary: Summary) -> bool:
    return summary.before.accuracy is not None or summary.after.accuracy is not None


def _page(summary: Summary, metrics: Metrics, samples: tuple[Sample, ...], recipe: str) -> str:
    kept, recipe_note = cut(recipe, _RECIPE_LIMIT)
    versions = {**summary.versions, "mirrorpo": summary.versions.get("mirrorpo", summary.mirrorpo_version)}
    return render(
        "run",
        version=summary.mirrorpo_version,
        title=f"{summary.objective} on {summary.task}",
        summary=summary,
        overview=[
            ("Model", summary.model),
            ("Seed", str(summary.seed)),
            ("Steps", f"{summary.steps:,}"),
            ("Commit", summary.commit),
        ],
        conclusion=conclude_run(summary, metrics),
        before_after=draw_before_after(summary.before, summary.after) if _evaluated(summary) else "",
        recipe=kept,
        recipe_note=recipe_note,
        versions=[*versions.items(), ("commit", summary.commit or "not recorded")],
        **_curves(metrics),
        **_verdicts(summary.before, summary.after),
        **_samples(samples),
        **_metric_rows(metrics),
    )


def _curves(metrics: Metrics) -> dict[str, Any]:
    if not metrics.steps:
        notes = ["metrics.jsonl holds no steps: there is nothing to draw."]
        return {"panels": "", "more_panels": "", "more_titles": "", "curve_notes": notes}
    main, more, absent = plan_panels(metrics)
    notes = []
    if len(metrics.steps) > MAX_POINTS:
        notes.append(
            f"The {len(metrics.steps):,} steps are thinned for drawing: every short stretch keeps the lowest and the "
            "highest value of each curve, so no peak is lost. metrics.jsonl holds every step."
        )
    if metrics.num_not_finite:
        notes.append(f"Values that are not finite, left out as gaps: {metrics.num_not_finite:,}.")
    if metrics.torn:
        notes.append("The last line of metrics.jsonl was cut off and is left out.")
    if absent:
        notes.append(f"Not recorded in this run: {', '.join(title.lower() for title in absent)}.")
    return {
        "panels": Markup("").join(draw_panel(panel, metrics.steps) for panel in main),
        "more_panels": Markup("").join(draw_panel(panel, metrics.steps) for panel in more),
        "more_titles": ", ".join(panel.title.lower() for panel in more),
        "curve_notes": notes,
    }


def _verdicts(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Each verdict with its count and share on both sides, the most frequent first."""
    totals = {reason: before.reasons.get(reason, 0) for reason in (*before.reasons, *after.reasons)}
    ordered = sorted(totals, key=lambda reason: (-after.reasons.get(reason, 0), -totals[reason], reason))
    rows = [
        (reason, [(when, *_count(side, reason)) for when, side in (("before", before), ("after", after))])
        for reason in ordered[:_MAX_REASONS]
    ]
    return {"verdicts": rows, "num_rare": len(ordered) - len(rows)}


def _count(evaluation: Evaluation, reason: str) -> tuple[int, float | None]:
    total, count = sum(evaluation.reasons.values()), evaluation.reasons.get(reason, 0)
    return count, count / total if total else None


def _samples(samples: Iterable[Sample]) -> dict[str, Any]:
    """Samples of the same prompt side by side, as many problems as the budget allows."""
    problems: dict[tuple[str, str | None], list[Sample]] = {}
    for sample in samples:
        problems.setdefault((sample.prompt, sample.answer), []).append(sample)
    articles = within_budget(
        (part("pair_of_answers", prompt, answer, group, _PER_SIDE) for (prompt, answer), group in problems.items()),
        _BUDGET,
    )
    note = "" if problems else "No samples were recorded."
    if len(articles) < len(problems):
        note = f"{len(articles):,} of {len(problems):,} problems shown; samples.jsonl has them all."
    return {"articles": articles, "num_open": _OPEN, "samples_note": note}


def within_budget(articles: Iterable[Markup], budget: int) -> list[Markup]:
    """The first of some pieces of HTML, at least one, whose length together is within a budget."""
    kept: list[Markup] = []
    for article in articles:
        if kept and len(article) > budget:
            break
        budget -= len(article)
        kept.append(article)
    return kept


def _metric_rows(metrics: Metrics) -> dict[str, Any]:
    rows = []
    for name, column in sorted(metrics.columns.items())[:_MAX_METRICS]:
        values = [value for value in column if value is not None]
        cells = (values[0], values[-1], min(values), max(values)) if values else (None,) * 4
        rows.append((name, cells, len(values)))
    return {"metric_rows": rows, "num_more_metrics": len(metrics.columns) - len(rows)}


__all__ = ["within_budget", "write_report"]
