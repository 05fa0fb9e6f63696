"""Tables of a study: the same cells for the page and for ``report.md``, and one line a run as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mirrorpo.statistics import Interval, equivalent
from mirrorpo.studies.collection import Collection, FinishedRun
from mirrorpo.studies.compare import Arrival, Comparison, Matched, Spread, area_under_curve, steps_to_target
from mirrorpo.wording import number, printable, signed, three_digits

NOTHING = "–"
# What Markdown would read as markup; an underscore within a word is not.
_SPECIAL = re.compile(r"[\\`*\[\]#|>~]|(?<![^\W_])_|_(?![^\W_])")
# What a spreadsheet takes for the start of a formula, behind blanks and in full width too; such a text gets an
# apostrophe in front.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is shown, and what it is sorted by (None: last)."""

    text: str
    value: float | None

    @property
    def sort_key(self) -> str:
        """As the page's script reads it."""
        return "" if self.value is None else repr(float(self.value))


@dataclass(frozen=True, kw_only=True)
class Table:
    """``heads`` are (title, explanation); ``rows`` are (arm, cells), cells one a head; arms are outside text."""

    heads: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def accuracy_tables(collection: Collection, comparison: Comparison) -> tuple[Table, Table]:
    """Accuracy after training, in percent and percentage points: what was reached, and how sure that is."""
    percent, change = _scaled(100, 1), _scaled(100, 1, signed=True)
    reached = (
        ("Seeds", "finished runs"),
        ("Accuracy %", "mean over seeds, after training, on unseen problems"),
        ("95 %", "studentised bootstrap interval of the mean"),
        ("Median", "over seeds"),
        ("IQM", "interquartile mean: of the middle half"),
        ("Difference", "to the baseline at common seeds, points"),
        ("95 % ", "its studentised bootstrap interval"),
        ("p", "paired permutation test"),
        ("p Holm", "corrected for the number of arms"),
    )
    noise = (
        ("SD", "standard deviation over seeds, points"),
        ("P(better)", "a run of the arm beats a run of the baseline, %"),
        ("Detectable", "smallest true difference found in four of five such studies, points"),
        ("Var ratio", "variance over seeds, over the baseline's; below 1: seeds agree better"),
        ("95 %", "its interval"),
    )
    rows, noise_rows = [], []
    for arm, spread in comparison.accuracy.items():
        d = spread.difference
        cells = (
            Cell(text=str(len(spread.values)), value=len(spread.values)),
            _cell(spread.mean.estimate, percent),
            _interval(spread.mean, percent),
            _cell(spread.median, percent),
            _cell(spread.iqm, percent),
            _cell(d and d.mean.estimate, change),
            _interval(d and d.mean, change),
            _cell(d and d.p, three_digits),
            _cell(d and d.p_holm, three_digits),
        )
        rows.append((arm, cells))
        cells = (
            _cell(spread.sd, percent),
            _cell(d and d.improvement.estimate, _scaled(100, 0)),
            _cell(d and d.detectable, percent),
            _cell(d and d.variance.estimate, three_digits),
            _interval(d and d.variance, three_digits),
        )
        noise_rows.append((arm, cells))
    return Table(heads=reached, rows=tuple(rows)), Table(heads=noise, rows=tuple(noise_rows))


def other_tables(collection: Collection, comparison: Comparison) -> tuple[Table, ...]:
    """Length and drift, reward, target: mean, interval, difference and corrected p of each measure."""

    def measured(*measures: tuple[str, str, str]) -> Table:
        found = [(comparison.measures[name], title, says) for name, title, says in measures if name in known]
        heads = tuple(head for _, title, says in found for head in _measure_heads(title, says))
        return Table(
            heads=heads,
            rows=tuple((arm, tuple(c for of, *_ in found for c in _measure_cells(of.get(arm)))) for arm in arms),
        )

    arms = tuple(comparison.accuracy)
    known = {name for name, spreads in comparison.measures.items() if spreads}
    steps = measured(("steps", "Steps", "to the target; runs that never did count with all their steps"))
    arrival = (
        (f"Reached {collection.target:g}", "runs whose reward, mean of 5 steps, reached the target"),
        ("Median steps", "to the target; a dash: half of the runs or more never did"),
    )
    tables = (
        measured(
            ("length", "Length", "mean tokens of a response after training"),
            ("divergence", "KL", "exact KL(policy || start) a token, on its own responses, nats"),
        ),
        measured(("area", "Area", "mean reward over the steps: area under the learning curve")),
        Table(
            heads=(*arrival, *steps.heads),
            rows=tuple((arm, (*_arrival_cells(comparison.arrivals[arm]), *cells)) for arm, cells in steps.rows),
        ),
    )
    tasks = dict.fromkeys(name.partition(".")[0] for name in known if "." in name)
    of_tasks = (measured(*(_titled(name) for name in known if name.startswith(f"{task}."))) for task in tasks)
    matched = () if comparison.matched is None else (matched_table(comparison.matched, collection.margin),)
    return tuple(table for table in (*tables, *of_tasks, *matched) if table.heads)


def _titled(name: str) -> tuple[str, str, str]:
    """Column, title and explanation of a measure."""
    task, _, what = name.split(".", 2)
    says = {
        "accuracy": "share of right completions",
        "distinct_right": "different right texts of a problem, mean over problems",
        "reverse_kl": "exact KL(policy || start) a token, on responses of the policy, nats",
        "forward_kl": "exact KL(start || policy) a token, on responses of the start, nats",
    }.get(what, "a problem is solved by one of so many completions")
    return name, f"{task} {what.replace('_', ' ')}", f"{says}; task {task}"


def matched_table(found: Matched, margin: float) -> Table:
    """Curves against the reference where they went equally far; a value that is a share is shown in points."""
    share = found.value.rpartition(".")[2].startswith(("accuracy", "pass@"))
    show = _scaled(100, 1, signed=True) if share else signed
    heads = (
        ("Height", f"{found.value} above {found.reference} at the same {found.distance}, mean over what both cover"),
        ("95 %", "studentised bootstrap over seeds"),
        ("Seeds", "with a common range of more than a factor of 2"),
        ("p", "paired permutation test"),
        ("p Holm", "corrected for the number of curves"),
        ("Same", f"the interval for all curves at once lies within {margin:g}"),
    )
    rows = []
    for curve, d in found.heights.items():
        same = share and equivalent(d.values, margin, 0.0, d.num_comparisons)
        cells = (
            _cell(d.mean.estimate, show),
            _interval(d.mean, show),
            Cell(text=str(len(d.seeds)), value=len(d.seeds)),
            _cell(d.p, three_digits),
            _cell(d.p_holm, three_digits),
            Cell(text="yes" if same else "no", value=float(same)),
        )
        rows.append((curve, cells))
    return Table(heads=heads if rows else (), rows=tuple(rows))


def _measure_heads(title: str, says: str) -> list[tuple[str, str]]:
    return [
        (title, says),
        (f"{title} difference", "to the baseline at common seeds, with its 95 % interval"),
        (f"{title} p Holm", "paired permutation test, corrected for the number of arms"),
    ]


def _measure_cells(spread: Spread | None) -> tuple[Cell, ...]:
    if spread is None:
        return (Cell(text=NOTHING, value=None),) * 3
    d = spread.difference
    change = Cell(text=NOTHING, value=None)
    if d is not None:
        text = f"{signed(d.mean.estimate)} {_interval(d.mean, signed).text}"
        change = Cell(text=text, value=d.mean.estimate)
    return _cell(spread.mean.estimate, number), change, _cell(d and d.p_holm, three_digits)


def _arrival_cells(found: Arrival) -> tuple[Cell, ...]:
    return (
        Cell(text=f"{found.reached} of {found.total}", value=found.reached / max(1, found.total)),
        _cell(found.median, number),
    )


def _cell(value: float | None, show: Callable[[float], str]) -> Cell:
    if value is None or math.isnan(value):
        return Cell(text=NOTHING, value=None)
    return Cell(text=_shown(value, show), value=value if math.isfinite(value) else math.copysign(1e300, value))


def _interval(found: Interval | None, show: Callable[[float], str]) -> Cell:
    if found is None or (math.isinf(found.low) and math.isinf(found.high)):
        return Cell(text=NOTHING, value=None)
    return Cell(text=f"[{_shown(found.low, show)}, {_shown(found.high, show)}]", value=found.low)


def _shown(value: float, show: Callable[[float], str]) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    return show(value)


def _scaled(factor: float, digits: int, *, signed: bool = False) -> Callable[[float], str]:
    return lambda value: f"{factor * value:{'+' if signed else ''}.{digits}f}".replace("-", "\u2212")


def as_markdown(table: Table) -> str:
    """The table in Markdown; bars in names are escaped."""
    heads = ["Arm", *(title.strip() for title, _ in table.heads)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, cells in table.rows:
        lines.append("| " + " | ".join([markdown_text(arm), *(cell.text for cell in cells)]) + " |")
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Outside text as one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\g<0>", printable(text).replace("&", "&amp;").replace("<", "&lt;"))


_COLUMNS: tuple[tuple[str, Callable[[FinishedRun, Collection], object]], ...] = (
    ("arm", lambda run, _: run.arm),
    ("seed", lambda run, _: run.seed),
    ("status", lambda run, _: "finished"),
    ("accuracy_before", lambda run, _: run.summary.before.accuracy),
    ("accuracy_after", lambda run, _: run.accuracy),
    ("problems", lambda run, _: run.summary.problems),
    ("mean_length_before", lambda run, _: run.summary.before.mean_length),
    ("mean_length_after", lambda run, _: run.summary.after.mean_length),
    ("area_under_curve", lambda run, _: area_under_curve(run.rewards)),
    ("steps_to_target", lambda run, found: steps_to_target(run.metrics.steps, run.rewards, found.target)),
    ("reverse_kl_from_start", lambda run, _: run.divergence),
    ("steps", lambda run, _: run.summary.steps),
    ("seconds", lambda run, _: run.summary.seconds),
    ("objective", lambda run, _: run.summary.objective_line or run.summary.objective),
    ("model", lambda run, _: run.summary.model),
    ("task", lambda run, _: run.summary.task),
    ("mirrorpo_version", lambda run, _: run.summary.mirrorpo_version),
    ("commit", lambda run, _: run.summary.commit),
    ("reason", lambda run, _: ""),
)


def runs_csv(collection: Collection) -> str:
    """One line a run, failed ones too; texts that a spreadsheet would take for a formula get an apostrophe in front.

    Args:
        collection: the runs.

    Returns:
        CSV with a header; an empty cell where there is no value.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measures = list(dict.fromkeys(name for run in collection.runs for name in run.measures))
    writer.writerow([*(name for name, _ in _COLUMNS), *measures])
    for run in collection.runs:
        own = [_safe(of(run, collection)) for _, of in _COLUMNS]
        writer.writerow([*own, *(_safe(run.measures.get(name)) for name in measures)])
    for failure in collection.failed:
        known: Mapping[str, object] = {
            "arm": failure.arm, "seed": failure.seed, "status": "failed", "reason": failure.reason
        }  # fmt: skip
        writer.writerow([*(_safe(known.get(name, "")) for name, _ in _COLUMNS), *("" for _ in measures)])
    return out.getvalue()


def _safe(value: object) -> object:
    return csv_text(value) if isinstance(value, str) else "" if value is None else value


def csv_text(text: str) -> str:
    """Outside text as a cell that no spreadsheet takes for a formula."""
    return f"'{printable(text)}" if text.lstrip().startswith(_FORMULA) else printable(text)


__all__ = [
    "Cell",
    "Table",
    "accuracy_tables",
    "as_markdown",
    "csv_text",
    "markdown_text",
    "matched_table",
    "other_tables",
    "runs_csv",
]
