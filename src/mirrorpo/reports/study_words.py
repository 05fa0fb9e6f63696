"""Conclusions of a study in sentences: what differs, what does not, and what is inconclusive.

"Differs" means p <= 0.05 after Holm's correction. "Does not" needs evidence too: the whole interval of the difference,
at the level that holds for all arms at once and with the noise of the evaluation in it, within the margin, over enough
seeds. Everything else is inconclusive, and the smallest effect that the study would have found says how much that
means. Arm names are outside text: the sentences are escaped where they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mirrorpo.reports.text import number, percent, plural
from mirrorpo.statistics import LEVEL, MIN_EQUIVALENCE, Interval, binomial_noise, smallest_p
from mirrorpo.studies.compare import Comparison, Difference, Spread
from mirrorpo.studies.runs import Collection

_ALPHA = 1 - LEVEL
_MAX_FAILURES = 5


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


def conclude(collection: Collection, comparison: Comparison) -> StudyConclusion:
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
            f"p\u00a0=\u00a0{_three(difference.p_holm)} after Holm, "
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
        f"large: the smallest p value is {_three(min(1.0, smallest_p(seeds) * comparisons))} after Holm. "
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
            said = f"{arm} (variance ratio {_three(ratio.estimate)} [{_range(ratio, _three)}])"
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


def _failures(collection: Collection) -> str:
    parts = []
    if collection.failed:
        named = [f"{f.arm} seed {f.seed} ({f.reason[:120]})" for f in collection.failed[:_MAX_FAILURES]]
        more = len(collection.failed) - len(named)
        tail = f" and {more} more" if more > 0 else ""
        parts.append(
            f"Failed twice, and in no number: {plural(len(collection.failed), 'run')}, {', '.join(named)}{tail}. "
            "The seed stays for the other arms; if failing and doing badly go together, the arm looks better than it is"
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


def _three(value: float) -> str:
    """Three digits: more would be noise."""
    return number(float(f"{value:.3g}"))


def _plus(value: float) -> str:
    return ("+" if value > 0 else "\u2212" if value < 0 else "") + _three(abs(value))


_SECONDARY: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("area", "Mean reward over training", _plus),
    ("steps", "The restricted mean of steps to the target", _plus),
    ("length", "Response length in tokens", _plus),
    ("divergence", "Exact KL from the start", _plus),
)


__all__ = ["StudyConclusion", "Verdicts", "conclude", "verdicts"]
