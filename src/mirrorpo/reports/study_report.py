"""Report files of a study, from run folders alone: ``report.html``, ``report.md`` and ``runs.csv``; and its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirrorpo.errors import InputError
from mirrorpo.escape import printable
from mirrorpo.files import write_text_atomic
from mirrorpo.reports.conclusions import conclude_study, verdicts
from mirrorpo.reports.study_page import READING, study_page
from mirrorpo.reports.tables import accuracy_table, as_markdown, markdown_text, other_table, runs_csv
from mirrorpo.statistics import Interval
from mirrorpo.studies.collection import Collection
from mirrorpo.studies.compare import Comparison, compare

FILES = ("report.html", "report.md", "runs.csv")


def write_study_report(collection: Collection, folder: Path) -> list[Path]:
    """Write the three files.

    Args:
        collection: what is compared.
        folder: where they go; it exists.

    Returns:
        Their paths.

    Raises:
        InputError: no finished run, or a broken file in a run folder.
    """
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
    return written


def markdown(collection: Collection, comparison: Comparison) -> str:
    """The report as Markdown: conclusion, tables, how to run it again."""
    conclusion = conclude_study(collection, comparison)
    lines = [f"# {markdown_text(collection.title)}", "", f"**{markdown_text(conclusion.headline)}**", ""]
    for title, text in conclusion.paragraphs:
        lines += [f"**{title}.** {markdown_text(text)}", ""]
    lines += ["## Accuracy by arm", "", as_markdown(accuracy_table(collection, comparison)), ""]
    lines += ["## Length, speed and drift", "", as_markdown(other_table(collection, comparison)), ""]
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


__all__ = ["FILES", "as_json", "markdown", "write_study_report"]
