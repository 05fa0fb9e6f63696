"""Conclusions in sentences, from the numbers of a run or of a study, saying no more than they show.

**A run.** Two Wilson intervals that do not overlap differ beyond the noise of drawing the evaluation's problems and
samples. Overlap proves nothing in the other direction, and neither says anything about another seed: the sentences say
so.

**A study.** "Differs" means p <= 0.05 after Holm's correction. "The same" needs evidence too: the whole interval of the
difference, at the level that holds for all arms at once and with the noise of the evaluation in it, within the margin,
over enough seeds. Everything else is inconclusive, and the smallest effect that the study would have found says how
much that means. Arm names are outside text: the sentences are escaped where they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mirrorpo.runs.reader import Evaluation, Metrics, Summary
from mirrorpo.statistics import LEVEL, MIN_EQUIVALENCE, Interval, binomial_noise, smallest_p
from mirrorpo.studies.collection import Collection
from mirrorpo.studies.compare import Comparison, Difference, Spread
from mirrorpo.wording import duration, interval_words, number, percent, plural, signed, three_digits

_DISPLAYED = 0.0005  # accuracies closer than this print as the same percentage
_ALPHA = 1 - LEVEL
_MAX_FAILURES = 5


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """One headline and the sentences under it; `tone` is gain, loss or open."""

    headline: str
    sentences: tuple[str, ...]
    tone: str


def conclude_run(summary: Summary, metrics: Metrics) -> Conclusion:
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
    sentences = (noise, _length(summary), *training_so_far(metrics), _effort(summary, metrics))
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


def training_so_far(metrics: Metrics) -> tuple[str, str]:
    """How the reward went, and what kept it from going anywhere; empty where there is nothing to say."""
    return _reward(metrics), _signal(metrics)


def _reward(metrics: Metrics) -> str:
    values = [value for value in metrics.columns.get("reward", ()) if value is not None]
    if len(values) < 2:
        return ""
    few = max(1, min(10, len(values) // 4))
    first, last = (sum(part) / few for part in (values[:few], values[-few:]))
    over = "first and last step" if few == 1 else f"first and last {few} steps"
    return f"The mean reward on training prompts went from {first:.3g} to {last:.3g} ({over})."


def _signal(metrics: Metrics) -> str:
    """What kept a run from learning: nothing to learn from, or steps that the weights are too coarse for."""
    parts = []
    flat = [value for value in metrics.columns.get("frac_reward_zero_std", ()) if value is not None]
    silent = sum(value >= 1.0 for value in flat)
    if silent:
        parts.append(
            f"In {silent:,} of {plural(len(flat), 'step')} the rewards within every group were all equal: such a step "
            "has no policy gradient."
        )
    if _unmoved(metrics) and silent < len(flat or (0,)):
        parts.append(
            "The policy equals its reference at every step although its gradient is not 0: its steps are too small for "
            "the precision of its weights (raise the learning rate, or keep the weights in float32)."
        )
    return " ".join(parts)


def _unmoved(metrics: Metrics) -> bool:
    """Whether every recorded divergence from the reference is exactly 0 behind a step that should have moved it."""
    columns = [values for name, values in metrics.columns.items() if name.startswith("divergence/")]
    values = [value for column in columns for value in column[1:] if value is not None]
    pushed = (
        (norm or 0.0) > 0.0 and (rate or 0.0) > 0.0
        for norm, rate in zip(
            metrics.columns.get("grad_norm", ())[:-1], metrics.columns.get("learning_rate", ())[:-1], strict=False
        )
    )
    return bool(values) and not any(values) and any(pushed)


def _effort(summary: Summary, metrics: Metrics) -> str:
    said = f"Training took {plural(summary.steps, 'step')} in {duration(max(0.0, summary.seconds))}"
    if summary.steps > 0:
        said += f", {number(max(0.0, summary.seconds) / summary.steps)}\u00a0s a step"
    if len(metrics.steps) != summary.steps:
        said += f"; metrics.jsonl holds {plural(len(metrics.steps), 'step')}"
    return said + "."


# ---- a study


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The arms by what can be said of their accuracy, each list in the order of the arms."""

    higher: tuple[str, ...]
    lower: tuple[str, ...]
    same: tuple[str, ...]
    open: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StudyConclusion:
    """One headline, then titled paragraphs; `tone` is gain, loss or open."""

    headline: str
    paragraphs: tuple[tuple[str, str], ...]
    tone: str


def verdicts(collection: Collection, comparison: Comparison) -> Verdicts:
    """Sort the arms by what can be said of their accuracy."""
    found: dict[str, list[str]] = {"higher": [], "lower": [], "same": [], "open": []}
    for arm, spread in comparison.accuracy.items():
        if arm != collection.baseline:
            found[_verdict(spread.difference, collection.margin)].append(arm)
    return Verdicts(**{kind: tuple(arms) for kind, arms in found.items()})


def _verdict(difference: Difference | None, margin: float) -> str:
    if difference is None or len(difference.seeds) < 2:
        return "open"
    if difference.significant:
        return "higher" if difference.mean.estimate > 0 else "lower"
    return "same" if difference.same_within(margin) else "open"


def conclude_study(collection: Collection, comparison: Comparison) -> StudyConclusion:
    """Put a comparison into words.

    Args:
        collection: what was compared.
        comparison: its numbers.

    Returns:
        The conclusion; nothing in it goes beyond the numbers.
    """
    if collection.baseline not in comparison.accuracy:
        return _without_baseline(collection, comparison)
    found = verdicts(collection, comparison)
    base = comparison.accuracy[collection.baseline]
    paragraphs = [
        ("Baseline", _baseline(collection, base)),
        ("Differs", _differs(comparison, found)),
        ("Does not differ", _same(collection, comparison, found)),
        ("Inconclusive after correction", _open(collection, comparison, found)),
        ("Agreement between seeds", _variances(collection, comparison)),
        ("Speed, length and drift", _others(collection, comparison)),
        ("At matched distance", _matched(comparison)),
        ("Left out", _failures(collection)),
        *(("Note", note) for note in collection.notes),
    ]
    tone = "gain" if found.higher else "loss" if found.lower else "open"
    return StudyConclusion(
        headline=_headline(collection, comparison, found),
        paragraphs=tuple((title, text) for title, text in paragraphs if text),
        tone=tone,
    )


def _headline(collection: Collection, comparison: Comparison, found: Verdicts) -> str:
    count = comparison.num_comparisons
    if max(len(spread.values) for spread in comparison.accuracy.values()) < 2:
        return "One seed: nothing can be concluded."
    if len(comparison.accuracy) == 1:
        mean = comparison.accuracy[collection.baseline].mean
        return f"One arm: {collection.baseline} reached {percent(mean.estimate)} on average."
    if not any(spread.difference for spread in comparison.accuracy.values()):
        return f"Nothing can be compared with {collection.baseline}: no other arm shares a seed with it."
    parts = []
    if found.higher:
        parts.append(f"{_counted(found.higher, count)} higher accuracy than {collection.baseline}")
    if found.lower:
        parts.append(f"{_counted(found.lower, count)} lower accuracy than {collection.baseline}")
    if not parts:
        parts.append(f"No arm's accuracy differs demonstrably from that of {collection.baseline}")
    if found.same:
        parts.append(f"{len(found.same)} the same within {_points(collection.margin)}")
    if found.open and (found.higher or found.lower or found.same):
        parts.append(f"{len(found.open)} inconclusive after correction")
    return "; ".join(parts) + "."


def _counted(arms: Sequence[str], count: int) -> str:
    return f"{len(arms)} of {plural(count, 'arm')} reached a"


def _baseline(collection: Collection, base: Spread) -> str:
    mean = base.mean
    said = f"{collection.baseline} reached {percent(mean.estimate)} on average over {_seeds(len(base.values))}"
    if len(base.values) < 2:
        return (
            f"{said}. One seed holds no trace of the noise between seeds, which is often several points: no arm is "
            "better or worse for it. Run more seeds."
        )
    noise = _evaluation_noise(collection, base)
    return (
        f"{said} (95\u00a0% interval {100 * mean.low:.1f} to {percent(mean.high)}, standard deviation "
        f"{_points(base.sd)}{noise})."
    )


def _evaluation_noise(collection: Collection, base: Spread) -> str:
    """How much of the spread is the sampling of problems and completions in the evaluation."""
    problems = collection.arms[collection.baseline][0].summary.problems
    if not problems:
        return ""
    noise = binomial_noise(base.mean.estimate, problems, len(base.values))
    return f"; drawing answers to {plural(problems, 'problem')} alone gives up to {_points(noise)}"


def _differs(comparison: Comparison, found: Verdicts) -> str:
    parts = []
    for arm in (*found.higher, *found.lower):
        difference = _of(comparison.accuracy, arm)
        change = difference.mean
        word = "higher" if change.estimate > 0 else "lower"
        parts.append(
            f"{arm} is {word} by {_points(abs(change.estimate))} [{_signed(change.low)}, {_signed(change.high)}], "
            f"p\u00a0=\u00a0{three_digits(difference.p_holm)} after Holm, "
            f"above the baseline in {percent(difference.improvement.estimate)} of all pairs of runs"
        )
    return ". ".join(parts) + "." if parts else ""


def _same(collection: Collection, comparison: Comparison, found: Verdicts) -> str:
    if not found.same:
        return ""
    parts = [f"{arm} [{_range(_of(comparison.accuracy, arm).mean, _signed)}]" for arm in found.same]
    return (
        "At the level that holds for all arms at once, the whole interval of the difference lies within "
        f"{_points(collection.margin)}: {', '.join(parts)} (in brackets the 95\u00a0% intervals)."
    )


def _open(collection: Collection, comparison: Comparison, found: Verdicts) -> str:
    told = {arm: comparison.accuracy[arm].difference for arm in found.open}
    known = {arm: difference for arm, difference in told.items() if difference and len(difference.seeds) > 1}
    if not found.open:
        return ""
    if not known:
        return f"{', '.join(found.open)}: fewer than two seeds in common with the baseline."
    parts = [f"{arm} ({_signed(d.mean.estimate)} [{_range(d.mean, _signed)}])" for arm, d in known.items()]
    said = f"The data neither show a difference nor rule one out for {', '.join(parts)}. "
    said += _no_equivalence(collection, known)
    effects = [d.detectable for d in known.values() if not math.isnan(d.detectable)]
    few = min(len(d.seeds) for d in known.values())
    if not effects:
        return said.rstrip()
    if math.isinf(max(effects)):
        return said + _too_few(few, comparison.num_comparisons)
    low, high = min(effects), max(effects)
    span = _points(low) if f"{low:.4f}" == f"{high:.4f}" else f"{_points(low)} to {_points(high)}, depending on the arm"
    return said + f"This study would have found a difference of {span}, four times in five; a smaller one can hide."


def _no_equivalence(collection: Collection, known: Mapping[str, Difference]) -> str:
    """Why arms whose differences are small are not called the same."""
    reasons = []
    if any(len(d.seeds) < MIN_EQUIVALENCE for d in known.values()):
        reasons.append(f"is claimed from {MIN_EQUIVALENCE} common seeds on")
    if any(d.noise is None for d in known.values()):
        reasons.append("needs the number of evaluated problems, which was not recorded")
    same = f"That an arm is the same within {_points(collection.margin)}"
    return f"{same} {' and '.join(reasons)}. " if reasons else ""


def _too_few(seeds: int, comparisons: int) -> str:
    needed = next(n for n in range(seeds, 64) if smallest_p(n) * comparisons <= _ALPHA)
    return (
        f"With {_seeds(seeds)} and {plural(comparisons, 'comparison')} no difference could be significant, however "
        f"large: the smallest p value is {three_digits(min(1.0, smallest_p(seeds) * comparisons))} after Holm. "
        f"It takes at least {needed} seeds."
    )


def _variances(collection: Collection, comparison: Comparison) -> str:
    tighter, wider, known = [], [], 0
    for arm, spread in comparison.accuracy.items():
        if spread.difference is None or math.isinf(spread.difference.variance_wide.high):
            continue
        known += 1
        ratio = spread.difference.variance_wide
        if ratio.excludes(1.0):
            said = f"{arm} (variance ratio {three_digits(ratio.estimate)} [{_range(ratio, three_digits)}])"
            (tighter if ratio.estimate < 1 else wider).append(said)
    if not known:
        return ""
    if not tighter and not wider:
        return (
            f"No arm's seeds demonstrably agree better or worse than those of {collection.baseline}: every interval of "
            "the variance ratio (at the level that holds for all arms at once) contains 1."
        )
    parts = [f"better than the baseline's: {', '.join(tighter)}"] if tighter else []
    parts += [f"worse: {', '.join(wider)}"] if wider else []
    return "Seeds agree " + "; ".join(parts) + ". Intervals hold for all arms at once."


def _others(collection: Collection, comparison: Comparison) -> str:
    """Differences in the other measures, each measure corrected on its own."""
    sentences = []
    for measure, noun, show in _SECONDARY:
        changed = [
            f"{arm} {show(spread.difference.mean.estimate)}"
            for arm, spread in comparison.measures.get(measure, {}).items()
            if spread.difference is not None and spread.difference.significant
        ]
        if changed:
            sentences.append(f"{noun} differs from {collection.baseline}'s for {', '.join(changed)}")
    if not sentences:
        return ""
    return ". ".join(sentences) + ". Each measure is corrected for the number of arms, not for the other measures."


def _matched(comparison: Comparison) -> str:
    """Which curves lie above or below the reference where both went equally far."""
    found = comparison.matched
    if found is None or not found.heights:
        return ""
    kinds = {"above": [], "below": [], "not shown to differ from": []}
    for curve, d in found.heights.items():
        side = "above" if d.mean.estimate > 0 else "below"
        kinds[side if d.significant else "not shown to differ from"].append(curve)
    said = [f"{', '.join(curves)} {kind} {found.reference}" for kind, curves in kinds.items() if curves]
    left = sum(found.left_out.values())
    rest = f" Left out for want of a common range: {left}." if left else ""
    return f"{found.value} over {found.distance}, after correction: {'; '.join(said)}.{rest}"


def _failures(collection: Collection) -> str:
    parts = []
    if collection.failed:
        named = [f"{f.arm} seed {f.seed} ({f.reason[:120]})" for f in collection.failed[:_MAX_FAILURES]]
        more = len(collection.failed) - len(named)
        tail = f" and {more} more" if more > 0 else ""
        parts.append(
            f"Failed twice, and left out of every number: {plural(len(collection.failed), 'run')}, "
            f"{', '.join(named)}{tail}. The seed stays for the other arms; "
            "if failing and doing badly go together, the arm looks better than it is"
        )
    if collection.num_missing:
        parts.append(f"Not run yet: {plural(collection.num_missing, 'run')} of the study")
    return ". ".join(parts) + "." if parts else ""


def _without_baseline(collection: Collection, comparison: Comparison) -> StudyConclusion:
    return StudyConclusion(
        headline=f"Nothing can be compared: no run of the baseline {collection.baseline} is finished.",
        paragraphs=tuple(
            (title, text)
            for title, text in (("Left out", _failures(collection)), *(("Note", note) for note in collection.notes))
            if text
        ),
        tone="open",
    )


def _of(spreads: Mapping[str, Spread], arm: str) -> Difference:
    difference = spreads[arm].difference
    assert difference is not None  # an arm with a verdict has one
    return difference


def _seeds(count: int) -> str:
    return plural(count, "seed")


def _points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:.1f}\u00a0points"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def _range(interval: Interval, show: Callable[[float], str]) -> str:
    return f"{show(interval.low)}, {show(interval.high)}"


_SECONDARY: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("area", "Mean reward over training", signed),
    ("steps", "The restricted mean of steps to the target", signed),
    ("length", "Response length in tokens", signed),
    ("divergence", "Exact KL from the start", signed),
)


__all__ = [
    "Conclusion",
    "StudyConclusion",
    "Verdicts",
    "accuracy_line",
    "conclude_run",
    "conclude_study",
    "verdicts",
]
