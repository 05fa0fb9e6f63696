"""What is the conclusion? Sentences from the numbers of a summary, saying no more than they show.

Two Wilson intervals that do not overlap differ beyond the noise of drawing the evaluation's problems and samples.
Overlap proves nothing in the other direction, and neither says anything about another seed: the sentences say so.
Nothing here comes from outside except numbers, so the sentences are safe to escape as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirrorpo.reports.text import duration, number, percent, plural
from mirrorpo.runs.reader import Evaluation, Metrics, Summary

_DISPLAYED = 0.0005  # accuracies closer than this print as the same percentage


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """One headline and the sentences under it; `tone` is gain, loss or open."""

    headline: str
    sentences: tuple[str, ...]
    tone: str


def conclude(summary: Summary, metrics: Metrics) -> Conclusion:
    """Put the outcome of a run into words.

    Args:
        summary: what was measured before and after.
        metrics: the steps, for the reward during training.

    Returns:
        The conclusion; `tone` is `gain` or `loss` only where the intervals do not overlap.

    Example:
        >>> none = Evaluation(accuracy=None, interval=None, mean_length=None, reasons={})
        >>> accuracy_line(none, none, None)
        'Accuracy was not measured'
    """
    tone, noise = _noise(summary.before, summary.after)
    sentences = (noise, _length(summary), _reward(metrics), _effort(summary, metrics))
    return Conclusion(
        headline=accuracy_line(summary.before, summary.after, summary.problems) + ".",
        sentences=tuple(sentence for sentence in sentences if sentence),
        tone=tone,
    )


def accuracy_line(before: Evaluation, after: Evaluation, problems: int | None) -> str:
    """Say how accuracy changed, in one clause without a full stop.

    Args:
        before: the evaluation of the untrained policy.
        after: that of the trained one.
        problems: on how many unseen problems; None leaves that out.

    Returns:
        The clause.

    Example:
        >>> half = Evaluation(accuracy=0.5, interval=None, mean_length=None, reasons={})
        >>> accuracy_line(half, half, 8).replace(chr(160), " ")
        'Accuracy stayed at 50.0 % on 8 unseen problems'
    """
    where = "" if problems is None else f" on {plural(problems, 'unseen problem')}"
    if before.accuracy is None and after.accuracy is None:
        return "Accuracy was not measured"
    if before.accuracy is None or after.accuracy is None:
        moment, measured = ("before", before) if after.accuracy is None else ("after", after)
        missing = "after" if moment == "before" else "before"
        accuracy = percent(measured.accuracy or 0.0)
        return f"Accuracy {moment} training was {accuracy}{where}; it was not measured {missing}"
    if abs(after.accuracy - before.accuracy) < _DISPLAYED:
        return f"Accuracy stayed at {percent(after.accuracy)}{where}"
    verb = "rose" if after.accuracy > before.accuracy else "fell"
    return f"Accuracy {verb} from {percent(before.accuracy)} to {percent(after.accuracy)}{where}"


def interval_words(interval: tuple[float, float] | None) -> str:
    """Write an interval as percentages.

    Args:
        interval: low and high share, or None.

    Returns:
        For example "33.9–42.4 %"; empty for None.

    Example:
        >>> interval_words((0.339, 0.424)).replace(chr(160), " ")
        '33.9–42.4 %'
    """
    return "" if interval is None else f"{100 * interval[0]:.1f}–{percent(interval[1])}"


def _noise(before: Evaluation, after: Evaluation) -> tuple[str, str]:
    if before.accuracy is None or after.accuracy is None:
        return "open", ""
    if before.interval is None or after.interval is None:
        return "open", "No interval was recorded, so it stays open whether the difference is sampling noise."
    intervals = f"{interval_words(before.interval)} before and {interval_words(after.interval)} after"
    one_seed = "This is one seed: the intervals do not hold the noise between training runs."
    if before.interval[1] < after.interval[0]:
        tone, reading = "gain", "do not overlap: the gain is beyond sampling noise"
    elif after.interval[1] < before.interval[0]:
        tone, reading = "loss", "do not overlap: the loss is beyond sampling noise"
    else:
        tone, reading = "open", "overlap: these numbers alone do not set the difference apart from sampling noise"
    return tone, f"The 95\u00a0% intervals ({intervals}) {reading}. {one_seed}"


def _length(summary: Summary) -> str:
    before, after = summary.before.mean_length, summary.after.mean_length
    if before is None or after is None:
        return ""
    if f"{before:.1f}" == f"{after:.1f}":
        return f"Completions stayed at {after:.1f} tokens on average."
    verb = "grew" if after > before else "shrank"
    return f"Completions {verb} from {before:.1f} to {after:.1f} tokens on average."


def _reward(metrics: Metrics) -> str:
    values = [value for value in metrics.columns.get("reward", ()) if value is not None]
    if len(values) < 2:
        return ""
    few = max(1, min(10, len(values) // 4))
    first, last = (sum(part) / few for part in (values[:few], values[-few:]))
    over = "first and last step" if few == 1 else f"first and last {few} steps"
    return f"The mean reward on training prompts went from {first:.3g} to {last:.3g} ({over})."


def _effort(summary: Summary, metrics: Metrics) -> str:
    said = f"Training took {plural(summary.steps, 'step')} in {duration(max(0.0, summary.seconds))}"
    if summary.steps > 0:
        said += f", {number(max(0.0, summary.seconds) / summary.steps)}\u00a0s a step"
    if len(metrics.steps) != summary.steps:
        said += f"; metrics.jsonl holds {plural(len(metrics.steps), 'step')}"
    return said + "."
