"""How is a run shown to a reader? One HTML file that needs nothing else.

The page loads nothing and runs nothing but its own few lines: its Content-Security-Policy forbids every source and
names the hashes of the one style sheet and the one script it carries. All outside text passes through `shown` or
`plain`; the policy is the second lock, should the first ever fail.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from mirrorpo.files import write_text_atomic
from mirrorpo.reports.assets import asset, source_hash
from mirrorpo.reports.charts import MAX_POINTS, draw_before_after, draw_panel
from mirrorpo.reports.examples import sample_section
from mirrorpo.reports.panels import plan_panels
from mirrorpo.reports.text import cut, number, percent, plain, shown
from mirrorpo.reports.words import conclude
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

_RECIPE_LIMIT = 20_000  # characters
_REASON_LIMIT = 200
_MAX_REASONS = 40


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
    evaluated = summary.before.accuracy is not None or summary.after.accuracy is not None
    samples = read_samples(run_dir) if evaluated or (run_dir / "samples.jsonl").is_file() else ()
    target = run_dir / "report.html"
    write_text_atomic(target, _page(summary, read_metrics(run_dir), samples, read_recipe(run_dir)))
    return target


def _page(summary: Summary, metrics: Metrics, samples: tuple[Sample, ...], recipe: str) -> str:
    style, script = asset("report.css"), asset("report.js")
    conclusion = conclude(summary, metrics)
    return Template(asset("report.template.html")).substitute(
        style=style,
        script=script,
        style_hash=source_hash(style),
        script_hash=source_hash(script),
        generator=plain(f"mirrorpo {summary.mirrorpo_version}"),
        title=plain(f"{summary.objective} on {summary.task}"),
        heading=f"{shown(summary.objective)} <span>on {shown(summary.task)}</span>",
        objective_line=f"<p>{shown(summary.objective_line)}</p>" if summary.objective_line else "",
        facts=_facts(summary),
        tone=conclusion.tone,
        headline=escape(conclusion.headline),
        sentences="".join(f"<p>{escape(sentence)}</p>" for sentence in conclusion.sentences),
        before_after=draw_before_after(summary.before, summary.after) if _evaluated(summary) else "",
        curves=_curves(metrics),
        reasons=_reasons(summary.before, summary.after),
        samples=sample_section(samples),
        again=_again(summary, recipe),
        metrics=_metric_table(metrics),
    )


def _evaluated(summary: Summary) -> bool:
    return summary.before.accuracy is not None or summary.after.accuracy is not None


def _facts(summary: Summary) -> str:
    facts = {"Model": summary.model, "Seed": str(summary.seed), "Steps": f"{summary.steps:,}", "Commit": summary.commit}
    return "".join(f"<div><dt>{name}</dt><dd>{shown(value)}</dd></div>" for name, value in facts.items() if value)


def _curves(metrics: Metrics) -> str:
    if not metrics.steps:
        return '<p class="note">metrics.jsonl holds no steps: there is nothing to draw.</p>'
    main, more, absent = plan_panels(metrics)
    parts = [f'<div class="panels">{"".join(draw_panel(panel, metrics.steps) for panel in main)}</div>']
    if more:
        titles = escape(", ".join(panel.title.lower() for panel in more))
        drawn = "".join(draw_panel(panel, metrics.steps) for panel in more)
        parts.append(f'<details><summary>More curves: {titles}</summary><div class="panels">{drawn}</div></details>')
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
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    return "".join(parts)


def _reasons(before: Evaluation, after: Evaluation) -> str:
    totals = {reason: before.reasons.get(reason, 0) for reason in (*before.reasons, *after.reasons)}
    if not totals:
        return '<p class="note">No verdicts were recorded.</p>'
    ordered = sorted(totals, key=lambda reason: (-after.reasons.get(reason, 0), -totals[reason], reason))
    rows = [
        f'<tr><th scope="row"><code>{shown(cut(reason, _REASON_LIMIT)[0])}</code></th>'
        f"{_count(before, reason, 'before')}{_count(after, reason, 'after')}</tr>"
        for reason in ordered[:_MAX_REASONS]
    ]
    left = len(ordered) - len(rows)
    note = f'<p class="note">{left:,} rarer verdicts are left out; summary.json has them.</p>' if left else ""
    return f"""<table class="reasons"><thead><tr><th scope="col">Verdict</th><th scope="col">Before</th>\
<th scope="col">After</th></tr></thead><tbody>{"".join(rows)}</tbody></table>{note}"""


def _count(evaluation: Evaluation, reason: str, when: str) -> str:
    total = sum(evaluation.reasons.values())
    if not total:
        return "<td>–</td>"
    count = evaluation.reasons.get(reason, 0)
    share = count / total
    rect = f'<rect class="{when}" width="{100 * share:.2f}%" height="6"/>'
    bar = f'<svg class="bar" width="100%" height="6" aria-hidden="true">{rect}</svg>'
    return f"<td>{count:,} <small>{percent(share)}</small>{bar}</td>"


def _again(summary: Summary, recipe: str) -> str:
    kept, note = cut(recipe, _RECIPE_LIMIT)
    command = f'<h3>Command</h3><pre class="command">{shown(summary.command)}</pre>' if summary.command else ""
    versions = {**summary.versions, "mirrorpo": summary.versions.get("mirrorpo", summary.mirrorpo_version)}
    rows = "".join(f"<div><dt>{shown(name)}</dt><dd>{shown(version)}</dd></div>" for name, version in versions.items())
    commit = shown(summary.commit) if summary.commit else "not recorded"
    return f"""{command}<h3>Recipe</h3><pre>{shown(kept)}</pre>{f'<p class="note">{note}</p>' if note else ""}
<h3>Versions</h3><dl class="facts">{rows}<div><dt>commit</dt><dd>{commit}</dd></div></dl>"""


def _metric_table(metrics: Metrics) -> str:
    if not metrics.columns:
        return '<p class="note">No metric was recorded.</p>'
    rows = []
    for name, column in sorted(metrics.columns.items()):
        values = [value for value in column if value is not None]
        cells = (values[0], values[-1], min(values), max(values)) if values else (None,) * 4
        texts = "".join(f"<td>{number(value)}</td>" for value in cells)
        rows.append(f'<tr><th scope="row"><code>{shown(name)}</code></th>{texts}<td>{len(values):,}</td></tr>')
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("Metric", "First", "Last", "Lowest", "Highest", "Steps")
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
