"""How is a study shown to a reader? One HTML file that needs nothing else: the conclusion in words, then its evidence.

Like a run's page it loads nothing, and its Content-Security-Policy names the hashes of its one style sheet and one
script. Arm names, completions and error messages are outside text: all of it passes through ``shown`` or ``plain``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from string import Template

from mirrorpo.reports.assets import asset, source_hash
from mirrorpo.reports.examples import verbatim, verdict
from mirrorpo.reports.study_charts import Cloud, Row, draw_cloud, draw_curves, draw_rows, label_of, learning_curve
from mirrorpo.reports.study_tables import Cell, Table, accuracy_table, other_table
from mirrorpo.reports.study_words import Verdicts, conclude, verdicts
from mirrorpo.reports.text import cut, plain, plural, shown
from mirrorpo.runs.reader import Sample, read_samples
from mirrorpo.statistics import MIN_EQUIVALENCE
from mirrorpo.studies.compare import Comparison
from mirrorpo.studies.runs import Collection, FinishedRun

_STUDY_LIMIT = 200_000  # characters of the resolved study
_SAMPLE_BUDGET = 400_000  # characters of HTML for all completions
_PROMPTS = 4
_PATH_POINTS = 120  # of an arm's path in the divergence-reward plane
_DIVERGENCE = "divergence/reverse_kl/mean"

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


def study_page(collection: Collection, comparison: Comparison) -> str:
    """The page.

    Args:
        collection: what was compared.
        comparison: its numbers.

    Returns:
        HTML.

    Raises:
        ValueError: a samples.jsonl is broken; the file and line are named.
    """
    style = asset("report.css") + asset("study.css")
    script = asset("report.js") + asset("study.js")
    conclusion = conclude(collection, comparison)
    version = next((run.summary.mirrorpo_version for run in collection.runs), "")
    known = collection.baseline in comparison.accuracy
    found = verdicts(collection, comparison) if known else Verdicts(higher=(), lower=(), same=(), open=())
    findings = "".join(f"<dt>{escape(title)}</dt><dd>{_sentence(text)}</dd>" for title, text in conclusion.paragraphs)
    return Template(asset("study.template.html")).substitute(
        style=style,
        script=script,
        style_hash=source_hash(style),
        script_hash=source_hash(script),
        generator=plain(f"mirrorpo {version}"),
        title=plain(collection.title),
        facts=_facts(collection),
        tone=conclusion.tone,
        headline=_sentence(conclusion.headline),
        findings=findings,
        accuracy=_table(accuracy_table(collection, comparison), collection.baseline, found),
        baseline_note=f"The shaded row is the baseline, {shown(collection.baseline)}.",
        rows=_rows(collection, comparison),
        others=_table(other_table(collection, comparison), collection.baseline, None),
        clouds=_clouds(collection),
        curves=draw_curves({name: runs for name, runs in collection.arms.items() if runs}, collection.baseline),
        samples=_samples(collection),
        again=_again(collection),
        reading='<dl class="reading">'
        + "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in READING)
        + "</dl>",
    )


def _sentence(text: str) -> str:
    """A sentence of ours, which may quote outside text; the no-break spaces in it are layout."""
    return "\u00a0".join(shown(part) for part in text.split("\u00a0"))


def _facts(collection: Collection) -> str:
    runs = collection.runs
    seeds = {run.seed for run in runs}
    facts = {
        "Arms": str(len(collection.arms)),
        "Seeds": str(len(seeds)),
        "Runs": f"{len(runs)} finished"
        + (f", {len(collection.failed)} failed" if collection.failed else "")
        + (f", {collection.num_missing} not yet run" if collection.num_missing else ""),
        "Task": ", ".join(dict.fromkeys(run.summary.task for run in runs)),
        "Model": ", ".join(dict.fromkeys(run.summary.model or "not recorded" for run in runs)),
        "Steps": ", ".join(dict.fromkeys(f"{run.summary.steps:,}" for run in runs)),
    }
    return "".join(f"<div><dt>{name}</dt><dd>{shown(cut(value, 300)[0])}</dd></div>" for name, value in facts.items())


def _table(table: Table, baseline: str, found: Verdicts | None) -> str:
    heads = "".join(
        f'<th scope="col" title="{plain(says)}"><span>{escape(title.strip())}</span></th>'
        for title, says in (("Arm", "in the order of the study"), *table.heads)
    )
    rows = []
    for n, (arm, cells) in enumerate(table.rows):
        kinds = ["baseline"] if arm == baseline else []
        if found is not None:
            kinds += [kind for kind, arms in (("higher", found.higher), ("lower", found.lower)) if arm in arms]
        texts = "".join(_data(title, cell) for (title, _), cell in zip(table.heads, cells, strict=True))
        name = f'<span class="index">{n + 1}</span>{shown(arm)}'
        rows.append(
            f'<tr data-arm="{plain(arm)}" class="{" ".join(kinds)}"><th scope="row" data-value="{n}">{name}</th>'
            f"{texts}</tr>"
        )
    return (
        f'<div class="wide" tabindex="0"><table class="numbers"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _data(title: str, cell: Cell) -> str:
    value = "" if cell.value is None else repr(float(cell.value))
    kind = ' class="verdict-cell"' if title == "Difference" else ""
    return f'<td data-value="{value}"{kind}>{escape(cell.text)}</td>'


def _rows(collection: Collection, comparison: Comparison) -> str:
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
    return f'<div class="pair-of-rows">{"".join(figures)}</div>'


def _clouds(collection: Collection) -> str:
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
    return "".join(
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


def _path(runs: Sequence[FinishedRun]) -> list[tuple[float, float, str]]:
    """Divergence and reward at each step, means over seeds."""
    drift, reward = learning_curve(runs, _DIVERGENCE), learning_curve(runs, "reward")
    steps = [step for step in drift if step in reward]
    stride = max(1, len(steps) // _PATH_POINTS)
    kept = steps[::stride] + (steps[-1:] if steps and (len(steps) - 1) % stride else [])
    return [(drift[step][0], reward[step][0], f"step {step}") for step in kept]


def _samples(collection: Collection) -> str:
    """The same problems in every arm, at the seed that most arms have."""
    seeds = [run.seed for run in collection.runs]
    if not seeds:
        return '<p class="note">No run is finished.</p>'
    seed = max(sorted(set(seeds)), key=seeds.count)
    answers: dict[tuple[str, str | None], dict[str, Sample]] = {}
    for arm, runs in collection.arms.items():
        for run in runs:
            if run.seed == seed and (run.folder / "samples.jsonl").is_file():
                for sample in read_samples(run.folder):
                    if sample.when == "before":
                        answers.setdefault((sample.prompt, sample.answer), {}).setdefault("", sample)
                    else:
                        answers.setdefault((sample.prompt, sample.answer), {}).setdefault(arm, sample)
    if not answers:
        return '<p class="note">No samples were recorded.</p>'
    parts, left = [], _SAMPLE_BUDGET
    for (prompt, answer), found in list(answers.items())[:_PROMPTS]:
        article = _article(prompt, answer, found)
        if parts and len(article) > left:
            break
        left -= len(article)
        parts.append(article)
    first = f'<p class="note">Seed {seed}, before training and after it in each arm.</p>{parts[0]}'
    if len(parts) == 1:
        return first
    return f"{first}<details><summary>{plural(len(parts) - 1, 'more problem')}</summary>{''.join(parts[1:])}</details>"


def _article(prompt: str, answer: str | None, found: Mapping[str, Sample]) -> str:
    expected = "" if answer is None else f'<p class="expected">Expected <code>{shown(cut(answer, 200)[0])}</code></p>'
    cards = []
    for arm in sorted(found, key=lambda name: name != ""):  # before training first, then the order of the arms
        sample = found[arm]
        mark = f' data-arm="{plain(arm)}"' if arm else ""
        title = shown(arm) if arm else "before training"
        cards.append(f"<section{mark}><h4>{title} {verdict(sample)}</h4>{verbatim(sample.completion)}</section>")
    return (
        f'<article class="sample"><div class="prompt"><h4>Prompt</h4>{verbatim(prompt)}{expected}</div>'
        f'<div class="answers">{"".join(cards)}</div></article>'
    )


def _again(collection: Collection) -> str:
    parts = []
    if collection.command:
        parts.append(f'<h3>Command</h3><pre class="command">{shown(collection.command)}</pre>')
    changes = "".join(
        f'<tr data-arm="{plain(arm)}"><th scope="row">{shown(arm)}</th><td>{shown(cut(text, 2000)[0])}</td></tr>'
        for arm, text in collection.changes.items()
    )
    if changes:
        parts.append(
            '<h3>What the arms change</h3><div class="wide changes"><table><thead><tr><th scope="col">Arm</th>'
            f'<th scope="col">Keys</th></tr></thead><tbody>{changes}</tbody></table></div>'
        )
    if collection.study:
        kept, note = cut(collection.study, _STUDY_LIMIT)
        said = f'<p class="note">{note}</p>' if note else ""
        parts.append(
            f"<details><summary>The resolved study, every key of every arm</summary><pre>{shown(kept)}</pre>{said}"
            "</details>"
        )
    parts.append(f'<h3>Versions</h3><dl class="facts">{_versions(collection.runs)}</dl>')
    return "".join(parts)


def _versions(runs: Sequence[FinishedRun]) -> str:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in {**run.summary.versions, "mirrorpo": run.summary.mirrorpo_version}.items():
            found.setdefault(name, {})[version] = None
        found.setdefault("commit", {})[run.summary.commit or "not recorded"] = None
    return "".join(
        f"<div><dt>{shown(name)}</dt><dd>{shown(', '.join(versions))}</dd></div>" for name, versions in found.items()
    )


__all__ = ["READING", "study_page"]
