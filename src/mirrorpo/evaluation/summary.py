"""Summary of graded samples: accuracy, pass@k and intervals, lengths, reasons, speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mirrorpo.rewards.verdict import VERDICTS, Grade
from mirrorpo.statistics import clustered_interval, pass_at_k, quantile

QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of one problem, graded.

    Attributes:
        problem: index in the rows that were evaluated.
        sample: its number among the problem's samples.
        prompt, completion, answer: texts.
        num_tokens: of the completion, with its end token.
        truncated: the length ran out before an end token.
        reward, reason: the verdict; reward None is not scorable.
        seconds: its share of the time that its batch was generated in.
    """

    problem: int
    prompt: str
    completion: str
    answer: str
    num_tokens: int
    reward: float | None
    reason: str
    sample: int = 0
    truncated: bool = False
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Graded samples, ``samples_per_problem`` in a row for each problem."""

    samples: tuple[Sample, ...]
    samples_per_problem: int

    def _groups(self) -> list[Sequence[Sample]]:
        step = self.samples_per_problem
        groups = [self.samples[i : i + step] for i in range(0, len(self.samples), step)]
        # A sample that cannot be scored is no wrong answer: the problem is left out, and counted under its reason.
        return [group for group in groups if all(sample.reward is not None for sample in group)]

    def pass_at(self, k: int) -> tuple[float, tuple[float, float]]:
        """The mean over problems of the unbiased pass@k, with its 95 % interval (``clustered_interval``)."""
        groups = self._groups()
        if not groups:
            return float("nan"), (0.0, 1.0)
        values = [pass_at_k(len(g), sum((s.reward or 0.0) >= 1.0 for s in g), k) for g in groups]
        return sum(values) / len(values), clustered_interval(values, len(values) * self.samples_per_problem)

    def distinct_right(self) -> float:
        """The mean over problems of the number of different right texts; blanks at the ends make no difference."""
        groups = self._groups()
        counts = [len({s.completion.strip() for s in group if (s.reward or 0.0) >= 1.0}) for group in groups]
        return sum(counts) / len(counts) if counts else float("nan")

    def summary(self, ks: Sequence[int] = (1,)) -> dict[str, Any]:
        """Plain numbers: accuracy, pass@k, intervals, verdicts, reasons, lengths, tokens a second.

        ``accuracy`` counts right samples among those of scored problems. ``verdicts`` separates what earns nothing:
        ``wrong`` (an answer that was read, or a program that ran), ``unreadable`` (none could be read), ``unscored``.
        """
        accuracy, interval = self.pass_at(1)
        verdicts = Counter(Grade(reward=s.reward, reason=s.reason).verdict for s in self.samples)
        result: dict[str, Any] = {
            "problems": len(self.samples) // self.samples_per_problem,
            "problems_scored": len(self._groups()),
            "samples_per_problem": self.samples_per_problem,
            "accuracy": accuracy,
            "accuracy_interval": list(interval),
            "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS},
            "reasons": dict(Counter(s.reason for s in self.samples).most_common()),
            **self._lengths(),
        }
        for k in ks:
            value, bounds = self.pass_at(k)
            result[f"pass@{k}"], result[f"pass@{k}_interval"] = value, list(bounds)
        return result

    def _lengths(self) -> dict[str, Any]:
        lengths = sorted(s.num_tokens for s in self.samples)
        count, seconds = max(1, len(lengths)), sum(s.seconds for s in self.samples)
        return {
            "mean_length": sum(lengths) / count,
            "length_quantiles": {f"{q:g}": quantile(lengths, q) for q in QUANTILES} if lengths else {},
            "max_length": lengths[-1] if lengths else 0,
            "truncated": sum(s.truncated for s in self.samples) / count,
            "tokens": sum(lengths),
            "generation_seconds": round(seconds, 3),
            "tokens_per_second": round(sum(lengths) / seconds, 1) if seconds > 0 else None,
        }
