"""Reports of a study from run folders alone: ``report.html``, ``report.md``, ``runs.csv`` and its numbers.

The page is one HTML file that needs nothing else: the conclusion in words, then its evidence. Arm names, completions
and error messages are outside text: the template shows all of it through its filters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mirrorpo.errors import InputError
from mirrorpo.files import write_text_atomic
from mirrorpo.reports.conclusions import Verdicts, conclude_study, verdicts
from mirrorpo.reports.run_page import REFRESH, within_budget
from mirrorpo.reports.study_charts import Cloud, Row, draw_cloud, draw_curves, draw_rows, label_of, learning_curve
from mirrorpo.reports.tables import accuracy_tables, as_markdown, markdown_text, other_tables, runs_csv
from mirrorpo.reports.templates import cut, part, render
from mirrorpo.runs.reader import Sample, read_samples
from mirrorpo.statistics import MIN_EQUIVALENCE, Interval
from mirrorpo.studies.collection import Collection, FinishedRun, RunState
from mirrorpo.studies.compare import Comparison, compare
from mirrorpo.wording import duration, percent, printable

_STUDY_LIMIT = 200_000  # characters of the resolved study
_SAMPLE_BUDGET = 400_000  # characters of HTML for all completions
_PROMPTS = 4
_PATH_POINTS = 120  # of an arm's path in the divergence-reward plane
_DIVERGENCE = "divergence/reverse_kl/mean"
_FACT_LIMIT = 300  # characters

READING = (
    ("Seeds", "Seed k of one arm stands beside seed k of the baseline: they share the start and the problems' order."),
    (
        "Intervals",
        "95 %, studentised bootstrap over seeds (Student's t below 6 seeds), for these evaluation problems. They hold "
        "the noise between training runs, and are never narrower than drawing answers to so many problems allows.",
    ),
    (
        "The same",
        f"Shown only where the whole interval of the difference, at the level that holds for all arms at once, lies "
        f"within the margin, from {MIN_EQUIVALENCE} common seeds on (two one-sided tests). Inconclusive is neither "
        "different nor the same.",
    ),
    (
        "p",
        "Paired permutation test: the share of sign patterns of the differences that are as far out. Holm's "
        "correction over the arms makes 5 % hold for all comparisons of a measure together.",
    ),
    (
        "Detectable",
        "The true difference that four of five such studies would find at Holm's first step, from the spread of the "
        "differences. A smaller difference may be there and not show.",
    ),
    (
        "Variance ratio",
        "Over seeds, against the baseline's variance, with Bonett's interval, which estimates the kurtosis where an F "
        "interval assumes normal values, and counts in that the seeds are paired.",
    ),
    (
        "Steps to the target",
        "The first step at which the mean reward of 5 steps reaches it. Runs that never do are counted, not dropped: "
        "they enter the mean with all their steps, so it is a lower bound.",
    ),
    ("KL", "Exact KL(policy || start) at each token of 16 responses of the trained policy, over the whole vocabulary."),
)


def study_page(collection: Collection, comparison: Comparison | None, *, ended: bool = False) -> str:
    """The page; of a study that is not finished, with the state of each run, and nothing else if none is finished.

    Args:
        collection: what was compared.
        comparison: its numbers; None if no run is finished.
        ended: the study ends here, though its process still holds the folder.

    Returns:
        HTML.

    Raises:
        ValueError: a samples.jsonl is broken; the file and line are named.
    """
    kept, study_note = cut(collection.study or "", _STUDY_LIMIT)
    going_on = bool(collection.states) and collection.running and not ended
    return render(
        "study",
        version=next((run.summary.mirrorpo_version for run in collection.runs), ""),
        title=collection.title,
        refresh=REFRESH if going_on else 0,
        overview=_overview(collection),
        states=[(state, *_state_in_words(state, going_on)) for state in collection.states],
        whereabouts=_whereabouts(going_on),
        **({"conclusion": None} if comparison is None else _compared(collection, comparison)),
        baseline=collection.baseline,
        command=collection.command,
        changes=collection.changes,
        study=kept,
        study_note=study_note,
        versions=_versions(collection.runs),
        reading=READING,
        **_samples(collection),
    )


def _compared(collection: Collection, comparison: Comparison) -> dict[str, Any]:
    return {
        "conclusion": conclude_study(collection, comparison),
        "accuracy": accuracy_tables(collection, comparison),
        "kinds": _kinds(collection, comparison),
        "rows": _rows(collection, comparison),
        "others": other_tables(collection, comparison),
        "clouds": _clouds(collection) + _matched_curves(comparison),
        "curves": draw_curves({name: runs for name, runs in collection.arms.items() if runs}, collection.baseline),
    }


def _whereabouts(going_on: bool) -> str:
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    if going_on:
        return f"Written {now}. The page loads itself again while the study goes on."
    return f"Written {now}. No process works on the study; `--resume` goes on with it."


def _state_in_words(state: RunState, going_on: bool) -> tuple[str, str, bool]:
    """Where a run is, what it has reached, and whether it has a page of its own."""
    of = "" if state.steps is None else f" of {state.steps:,}"
    kind = "begun" if state.kind == "running" and not going_on else state.kind
    if kind in ("running", "begun"):
        return kind, f"step {state.step:,}{of}", True
    if state.accuracy is None:
        return kind, "", False
    took = "" if state.seconds is None else f" in {duration(state.seconds)}"
    return kind, f"accuracy {percent(state.accuracy)}{took}", True


def _overview(collection: Collection) -> list[tuple[str, str]]:
    runs = collection.runs
    facts = {
        "Arms": str(len(collection.arms)),
        "Seeds": str(len({run.seed for run in runs})),
        "Runs": f"{len(runs)} finished"
        + (f", {len(collection.failed)} failed" if collection.failed else "")
        + (f", {collection.num_missing} not yet run" if collection.num_missing else ""),
        "Task": _joined(run.summary.task for run in runs),
        "Model": _joined(run.summary.model or "not recorded" for run in runs),
        "Steps": _joined(f"{run.summary.steps:,}" for run in runs),
    }
    return [(name, cut(value, _FACT_LIMIT)[0]) for name, value in facts.items()]


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _kinds(collection: Collection, comparison: Comparison) -> dict[str, str]:
    """Arm to the class of its row: how its accuracy compares with the baseline's."""
    known = collection.baseline in comparison.accuracy
    found = verdicts(collection, comparison) if known else Verdicts(higher=(), lower=(), same=(), open=())
    return dict.fromkeys(found.higher, "higher") | dict.fromkeys(found.lower, "lower")


def _rows(collection: Collection, comparison: Comparison) -> Markup:
    """Accuracy by seed, and the differences to the baseline."""
    each, changes = [], []
    base = comparison.accuracy.get(collection.baseline)
    for n, (arm, spread) in enumerate(comparison.accuracy.items()):
        mean, d = spread.mean, spread.difference
        sd = f" ± {100 * spread.sd:.1f}" if len(spread.values) > 1 else ""
        dots = [(value, f"{arm}, seed {seed}: {100 * value:.1f} %") for seed, value in spread.values.items()]
        text = f"{100 * mean.estimate:.1f}{sd}"
        each.append(Row(name=arm, dots=dots, low=mean.low, high=mean.high, middle=mean.estimate, text=text, colour=n))
        if d is None or base is None:
            continue
        steps = {seed: 100 * (spread.values[seed] - base.values[seed]) for seed in d.seeds}
        changes.append(
            Row(
                name=arm,
                dots=[(step, f"{arm}, seed {seed}: {step:+.1f} points") for seed, step in steps.items()],
                low=100 * d.mean.low,
                high=100 * d.mean.high,
                middle=100 * d.mean.estimate,
                text=f"{100 * d.mean.estimate:+.1f}".replace("-", "\u2212") + " points",
                colour=n,
                strong=d.significant,
            )
        )
    figures = []
    if each:
        says = "One dot a seed; the bar is the mean with its 95 % interval, the dashed line the baseline's mean."
        figures.append(draw_rows("Accuracy after training", says, each, line=base and base.mean.estimate))
    if changes:
        says = "Arm minus baseline at each common seed, in points. Bold: significant after Holm's correction."
        figures.append(draw_rows("Difference to the baseline", says, changes, line=0.0, share=False))
    return Markup("").join(figures)


def _clouds(collection: Collection) -> Markup:
    arms = collection.arms.items()
    length = [
        Cloud(
            name=arm,
            points=[
                (run.summary.after.mean_length, run.accuracy, label_of(run))
                for run in runs
                if run.summary.after.mean_length is not None
            ],
        )
        for arm, runs in arms
    ]
    drift = [
        Cloud(
            name=arm,
            points=[(run.divergence, run.accuracy, label_of(run)) for run in runs if run.divergence is not None],
        )
        for arm, runs in arms
    ]
    paths = [Cloud(name=arm, points=_path(runs)) for arm, runs in arms]
    return Markup("").join(
        (
            draw_cloud(
                "Accuracy against length",
                "One dot a run; the number in the ring is the arm's in the table, at the mean of its runs.",
                length,
                across="tokens of a response",
                up="accuracy after training",
            ),
            draw_cloud(
                "Accuracy against divergence",
                "How far each trained policy went from the start, and what it got for it.",
                drift,
                across="exact KL from the start, nats a token",
                up="accuracy after training",
                across_log=True,
            ),
            draw_cloud(
                "Divergence against reward, during training",
                "The path of each arm whose penalty measured it (sampled KL), mean over seeds; the ring is its end.",
                paths,
                across="sampled KL from the start, nats a token",
                up="mean reward",
                across_log=True,
                up_share=False,
                paths=True,
            ),
        )
    )


def _matched_curves(comparison: Comparison) -> Markup:
    """Each curve through the means of its arms, in the order of their distances."""
    found = comparison.matched
    if found is None:
        return Markup("")
    curves = []
    for curve, by_seed in found.points.items():
        arms: dict[str, list[tuple[float, float]]] = {}
        for points in by_seed.values():
            for far, high, arm in points:
                arms.setdefault(arm, []).append((far, high))
        means = {arm: np.exp(np.log([x for x, _ in own]).mean()) for arm, own in arms.items()}
        heights = {arm: float(np.mean([y for _, y in own])) for arm, own in arms.items()}
        ordered = sorted(means, key=lambda arm: means[arm])
        points = [(float(means[arm]), heights[arm], f"{curve}: {arm}") for arm in ordered]
        mark = (len(curves) + 1) * len(points) // (len(found.points) + 1)  # apart: curves may share their last arm
        curves.append(Cloud(name=curve, points=points, mark=mark))
    return draw_cloud(
        "Curves at matched distance",
        "Each curve joins the means of its arms (of the distance: geometric). Curves by number: "
        + ", ".join(f"{n} {curve}" for n, curve in enumerate(found.points, start=1))
        + ".",
        curves,
        across=found.distance,
        up=found.value,
        across_log=True,
        up_share=found.value.rpartition(".")[2].startswith(("accuracy", "pass@")),
        paths=True,
    )


def _path(runs: Sequence[FinishedRun]) -> list[tuple[float, float, str]]:
    """Divergence and reward at each step, means over seeds."""
    drift, reward = learning_curve(runs, _DIVERGENCE), learning_curve(runs, "reward")
    steps = [step for step in drift if step in reward]
    stride = max(1, len(steps) // _PATH_POINTS)
    kept = steps[::stride] + (steps[-1:] if steps and (len(steps) - 1) % stride else [])
    return [(drift[step][0], reward[step][0], f"step {step}") for step in kept]


def _samples(collection: Collection) -> dict[str, Any]:
    """The same problems in every arm, at the seed that most arms have."""
    seeds = [run.seed for run in collection.runs]
    seed = max(sorted(set(seeds)), key=seeds.count, default=None)
    answers: dict[tuple[str, str | None], dict[str, Sample]] = {}
    for arm, run in ((arm, run) for arm, runs in collection.arms.items() for run in runs if run.seed == seed):
        for sample in _samples_of(run):
            column = "" if sample.when == "before" else arm
            answers.setdefault((sample.prompt, sample.answer), {}).setdefault(column, sample)
    if not answers:
        return {"articles": [], "samples_note": "No samples were recorded."}
    articles = within_budget(
        # Before training first, then the order of the arms.
        (
            part("answers_of_arms", prompt, answer, sorted(found.items(), key=lambda item: item[0] != ""))
            for (prompt, answer), found in list(answers.items())[:_PROMPTS]
        ),
        _SAMPLE_BUDGET,
    )
    return {"articles": articles, "samples_note": f"Seed {seed}, before training and after it in each arm."}


def _samples_of(run: FinishedRun) -> tuple[Sample, ...]:
    try:
        return read_samples(run.folder)
    except FileNotFoundError:
        return ()


def _versions(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in {**run.summary.versions, "mirrorpo": run.summary.mirrorpo_version}.items():
            found.setdefault(name, {})[version] = None
        found.setdefault("commit", {})[run.summary.commit or "not recorded"] = None
    return [(name, ", ".join(versions)) for name, versions in found.items()]


FILES = ("report.html", "report.md", "runs.csv")


def write_study_report(collection: Collection, folder: Path, exports: Sequence[str] = ()) -> list[Path]:
    """Write the three files, and those of the formats that are asked for.

    Args:
        collection: what is compared.
        folder: where they go; it exists.
        exports: of ``mirrorpo.reports.export.FORMATS``.

    Returns:
        Their paths.

    Raises:
        InputError: no finished run, or a broken file in a run folder.
    """
    if not collection.runs and any(state.kind != "failed" for state in collection.states):
        return [write_study_page(collection, folder)]
    if not collection.runs:
        raise InputError(f"{folder}: no run is finished: there is nothing to report")
    comparison = compare(collection)
    try:
        texts = (study_page(collection, comparison), markdown(collection, comparison), runs_csv(collection))
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    written = []
    for name, text in zip(FILES, texts, strict=True):
        write_text_atomic(folder / name, text)
        written.append(folder / name)
    if exports:
        from mirrorpo.reports.export import export  # matplotlib

        written += export(collection, comparison, folder, exports)
    return written


def write_study_page(collection: Collection, folder: Path, *, ended: bool = False) -> Path:
    """Write ``report.html`` alone, of a study that may go on; arguments as for ``study_page``."""
    page = study_page(collection, compare(collection) if collection.runs else None, ended=ended)
    write_text_atomic(folder / FILES[0], page)
    return folder / FILES[0]


def markdown(collection: Collection, comparison: Comparison) -> str:
    """The report as Markdown: conclusion, tables, how to run it again."""
    conclusion = conclude_study(collection, comparison)
    lines = [f"# {markdown_text(collection.title)}", "", f"**{markdown_text(conclusion.headline)}**", ""]
    for title, text in conclusion.paragraphs:
        lines += [f"**{title}.** {markdown_text(text)}", ""]
    for title, tables in (
        ("Accuracy by arm", accuracy_tables(collection, comparison)),
        ("Length, drift and speed", other_tables(collection, comparison)),
    ):
        lines += [f"## {title}", ""]
        for table in tables:
            lines += [as_markdown(table), ""]
    if collection.changes:
        lines += ["## What the arms change", ""]
        lines += [f"- {markdown_text(arm)}: {markdown_text(text)}" for arm, text in collection.changes.items()]
        lines.append("")
    if collection.command:
        fence = "`" * max(3, _longest_ticks(collection.command) + 1)
        lines += ["## Command", "", fence, printable(collection.command), fence, ""]
    lines += ["## How to read the numbers", ""]
    lines += [f"- **{term}**: {markdown_text(text)}" for term, text in READING]
    return "\n".join(lines) + "\n"


def _longest_ticks(text: str) -> int:
    longest = run = 0
    for letter in text:
        run = run + 1 if letter == "`" else 0
        longest = max(longest, run)
    return longest


def as_json(collection: Collection) -> dict[str, Any]:
    """The numbers of a comparison as plain data; infinite ends and missing values are None."""
    comparison = compare(collection)
    conclusion = conclude_study(collection, comparison)
    found = verdicts(collection, comparison) if collection.baseline in comparison.accuracy else None
    return {
        "title": collection.title,
        "baseline": collection.baseline,
        "headline": conclusion.headline,
        "conclusion": [{"title": title, "text": text} for title, text in conclusion.paragraphs],
        "verdicts": None if found is None else {kind: list(arms) for kind, arms in vars(found).items()},
        "runs": len(collection.runs),
        "missing": collection.num_missing,
        "failed": [vars(failure) for failure in collection.failed],
        "measures": {
            measure: {arm: _plain(spread) for arm, spread in spreads.items()}
            for measure, spreads in comparison.measures.items()
        },
        "arrivals": {arm: _plain(found) for arm, found in comparison.arrivals.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN compares false
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Interval):
        return {"estimate": _plain(value.estimate), "low": _plain(value.low), "high": _plain(value.high)}
    return _plain(vars(value)) if type(value).__module__.startswith("mirrorpo.") else value


__all__ = ["FILES", "READING", "as_json", "markdown", "study_page", "write_study_page", "write_study_report"]
