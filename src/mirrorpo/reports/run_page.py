"""The page of a run, ``report.html``: one HTML file that needs nothing else.

Of a run that is not finished it says so first, and loads itself again while a process works on it. A table says which
metrics are drawn together, under which title, in the order of the page; a metric that it does not know is listed in the
page's last table all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mirrorpo.files import write_text_atomic
from mirrorpo.reports.charts import MAX_POINTS, Curve, Panel, draw_before_after, draw_panel
from mirrorpo.reports.conclusions import Conclusion, conclude_run, training_so_far
from mirrorpo.reports.templates import cut, part, render
from mirrorpo.rewards.verdict import VERDICTS
from mirrorpo.runs.reader import (
    Evaluation,
    Metrics,
    Sample,
    Summary,
    read_before,
    read_metrics,
    read_recipe,
    read_samples,
    read_summary,
    sample_of,
)
from mirrorpo.runs.unfinished import (
    Point,
    Progress,
    Settings,
    is_finished,
    metrics_so_far,
    read_evaluations,
    read_settings,
    read_unfinished,
)
from mirrorpo.wording import duration, interval_words, number, percent, plural

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
    _Plan(title="Margin", says="Between the rewards beta s(y) of a pair's completions.", keys={"rewards/margins": ""}),
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
        title="Truncated completions",
        says="Rollouts that reached max_completion_length before an end. Many of them: answers are cut off.",
        keys={"completions/clipped_ratio": ""},
        share=True,
    ),
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
    _Plan(title="Tokens per second", says="Drawn while completions are generated.", keys={"tokens_per_second": ""}),
    _Plan(
        title="Verdicts",
        says="Shares of a step's rollouts.",
        keys={f"answers/{verdict}": verdict for verdict in VERDICTS},
        share=True,
    ),
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


REFRESH = 15  # seconds after which the page of a running run loads itself again


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a folder holds. ``progress`` is None of a finished run."""

    summary: Summary
    progress: Progress | None
    metrics: Metrics
    points: tuple[Point, ...]
    samples: tuple[Sample, ...]
    settings: Settings
    recipe: str


def write_report(run_dir: Path, *, ended: bool = False) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run_dir: a folder with `summary.json`, `metrics.jsonl` and `recipe.yaml`, and with `samples.jsonl` if the run
            was evaluated; of a run that is not finished, a folder with `recipe.yaml` and whatever else is there.
        ended: the run ends here, though its process still holds the folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: one of these files is missing; it is named.
        ValueError: one of them is broken; the file and the line or key are named.

    Example:
        >>> import tempfile
        >>> write_report(Path(tempfile.mkdtemp()))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        FileNotFoundError: recipe.yaml: no such file in the run folder ...
    """
    run_dir = Path(run_dir)
    found = _finished(run_dir) if is_finished(run_dir) else _unfinished(run_dir, ended)
    target = run_dir / "report.html"
    write_text_atomic(target, _page(found))
    return target


def _finished(run_dir: Path) -> _Run:
    summary = read_summary(run_dir)
    try:
        samples = read_samples(run_dir)
    except FileNotFoundError:
        if _evaluated(summary):
            raise
        samples = ()
    return _Run(
        summary=summary,
        progress=None,
        metrics=read_metrics(run_dir),
        points=read_evaluations(run_dir),
        samples=samples,
        settings=read_settings(run_dir),
        recipe=read_recipe(run_dir),
    )


def _unfinished(run_dir: Path, ended: bool) -> _Run:
    metrics = metrics_so_far(run_dir)
    summary, progress = read_unfinished(run_dir, metrics)
    points, before = read_evaluations(run_dir), read_before(run_dir)
    first = () if before is None else before["samples"]
    return _Run(
        summary=summary,
        progress=replace(progress, running=False) if ended else progress,
        metrics=metrics,
        points=points,
        samples=(
            *(sample_of({**sample, "when": "before"}, str(run_dir / "before.json")) for sample in first),
            *(points[-1].samples if points else ()),
        ),
        settings=read_settings(run_dir),
        recipe=read_recipe(run_dir),
    )


def _evaluated(summary: Summary) -> bool:
    return summary.before.accuracy is not None or summary.after.accuracy is not None


def _page(run: _Run) -> str:
    summary, progress, metrics = run.summary, run.progress, run.metrics
    kept, recipe_note = cut(run.recipe, _RECIPE_LIMIT)
    versions = {**summary.versions, "mirrorpo": summary.versions.get("mirrorpo", summary.mirrorpo_version)}
    steps = summary.steps if progress is None else progress.steps
    now = f"Step {run.points[-1].step:,}" if progress is not None and run.points else "After"
    conclusion = (
        conclude_run(summary, metrics) if progress is None else _conclude_unfinished(summary, progress, metrics, now)
    )
    return render(
        "run",
        version=summary.mirrorpo_version,
        title=f"{summary.objective} on {summary.task}" + ("" if progress is None else ", unfinished"),
        refresh=REFRESH if progress is not None and progress.running else 0,
        summary=summary,
        unfinished=progress is not None,
        overview=[
            ("Model", summary.model),
            ("Seed", str(summary.seed)),
            ("Steps", "" if steps is None else f"{steps:,}"),
            ("Commit", summary.commit),
        ],
        conclusion=conclusion,
        before_after=draw_before_after(summary.before, summary.after, now) if _evaluated(summary) else "",
        now=now,
        recipe=kept,
        recipe_note=recipe_note,
        versions=[*versions.items(), ("commit", summary.commit or "not recorded")],
        phases=_phases(metrics, run.points),
        rollout_step=None if progress is None else progress.rollout_step,
        rollouts=() if progress is None else _rollouts(progress.rollouts),
        **_curves(metrics, _accuracy(run)),
        **_verdicts(summary.before, summary.after),
        **_samples(run.samples, now),
        **_metric_rows(metrics),
    )


def _conclude_unfinished(summary: Summary, progress: Progress, metrics: Metrics, now: str) -> Conclusion:
    """Put into words how far a run has come, and where it ended if nobody works on it any more.

    Args:
        summary: what was measured so far; its ``after`` is the last evaluation.
        progress: how far it has come.
        metrics: the steps so far.
        now: what the last evaluation is called, such as "Step 12".
    """
    of = "" if progress.steps is None else f" of {progress.steps:,}"
    headline = f"Unfinished: step {progress.step:,}{of}."
    sentences = [_whereabouts(progress), _left(summary, progress), _accuracy_so_far(summary, now)]
    sentences += training_so_far(metrics)
    return Conclusion(headline=headline, sentences=tuple(filter(None, sentences)), tone="open")


def _whereabouts(progress: Progress) -> str:
    when = None if progress.written is None else datetime.fromtimestamp(progress.written, UTC)
    written = "" if when is None else f"Last written {when:%Y-%m-%d %H:%M:%S} UTC"
    if progress.running:
        return f"{written or 'Running'}, while {progress.phase}. The page loads itself again while the run goes on."
    why = progress.ended or "no process works on it any more, and it did not say why"
    kept = "there is no checkpoint"
    if progress.checkpoint is not None:
        kept = f"the newest checkpoint is that of step {progress.checkpoint:,}"
    return f"{written + '. ' if written else ''}It ended while {progress.phase}: {why}; {kept}."


def _left(summary: Summary, progress: Progress) -> str:
    if not progress.step:
        return ""
    pace = summary.seconds / progress.step
    said = f"{plural(progress.step, 'step')} took {duration(summary.seconds)}, {number(pace)}\u00a0s a step"
    if progress.running and progress.steps is not None and progress.steps > progress.step:
        said += f"; about {duration((progress.steps - progress.step) * pace)} left, evaluations aside"
    return f"{said}."


def _accuracy_so_far(summary: Summary, now: str) -> str:
    if summary.before.accuracy is None and summary.after.accuracy is None:
        return "Accuracy was not measured yet."
    parts = [
        f"{percent(one.accuracy)}{f' ({interval_words(one.interval)})' if one.interval else ''} {when}"
        for when, one in (("before training", summary.before), (f"at {now.lower()}", summary.after))
        if one.accuracy is not None
    ]
    where = "" if summary.problems is None else f" on {plural(summary.problems, 'unseen problem')}"
    return f"Accuracy{where}: {', '.join(parts)}."


def _accuracy(run: _Run) -> Markup:
    """The panel of ``eval.every``: accuracy at the start, between the steps and at the end; empty without it.

    On axes of its own: evaluations may draw otherwise than rollouts do, and the reward is of other problems.
    """
    if not run.points:
        return Markup("")
    found = [(0, run.summary.before), *((point.step, point.evaluation) for point in run.points)]
    if run.progress is None:
        found.append((run.summary.steps, run.summary.after))
    low = [None if one.interval is None else one.interval[0] for _, one in found]
    high = [None if one.interval is None else one.interval[1] for _, one in found]
    values = tuple(one.accuracy for _, one in found)
    if all(value is None for value in values):
        return Markup("")
    problems = plural(run.points[-1].problems, "unseen problem")
    how = f", {run.settings.sampling}" if run.settings.sampling else ""
    curve = Curve(label="", values=values, band=(low, high))
    says = f"On {problems}{how}; band: 95 % interval."
    return draw_panel(Panel(title="Accuracy", says=says, curves=(curve,), share=True), [step for step, _ in found])


# Name of a phase, the metrics whose seconds it is, those that are to be taken off.
_PHASES = (
    ("Generation of completions", ("generation_seconds",), ()),
    ("Rewards", ("reward_seconds",), ()),
    ("Scoring by old policy, reference and teacher", ("scoring_seconds",), ()),
    ("Forward and backward passes", ("step_time",), ("generation_seconds", "reward_seconds", "scoring_seconds")),
    ("Optimiser, checkpoints and the rest", ("seconds",), ("step_time",)),
)


def _phases(metrics: Metrics, points: tuple[Point, ...]) -> list[tuple[str, float, float]]:
    """Each phase of the steps with its seconds and its share; empty for a run that did not record them."""

    def total(names: Iterable[str]) -> float:
        return sum(value or 0.0 for name in names for value in metrics.columns.get(name, ()))

    if not total(["generation_seconds"]):
        return []
    rows = [(name, max(0.0, total(of) - total(without))) for name, of, without in _PHASES]
    if evaluating := sum(point.seconds or 0.0 for point in points):
        rows.append(("Evaluations between the steps", evaluating))
    whole = sum(seconds for _, seconds in rows)
    return [(name, seconds, seconds / whole) for name, seconds in rows]


def _rollouts(samples: Iterable[Sample]) -> list[Markup]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    return within_budget((part("rollouts_of", prompt, group) for prompt, group in groups.items()), _BUDGET)


def _curves(metrics: Metrics, accuracy: Markup) -> dict[str, Any]:
    if not metrics.steps:
        notes = ["metrics.jsonl holds no steps: there is nothing to draw."]
        return {"panels": accuracy, "more_panels": "", "more_titles": "", "curve_notes": notes}
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
        "panels": accuracy + Markup("").join(draw_panel(panel, metrics.steps) for panel in main),
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


def _samples(samples: Iterable[Sample], now: str) -> dict[str, Any]:
    """Samples of the same prompt side by side, as many problems as the budget allows."""
    problems: dict[tuple[str, str | None], list[Sample]] = {}
    for sample in samples:
        problems.setdefault((sample.prompt, sample.answer), []).append(sample)
    pairs = (part("pair_of_answers", *problem, group, _PER_SIDE, now) for problem, group in problems.items())
    articles = within_budget(pairs, _BUDGET)
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
