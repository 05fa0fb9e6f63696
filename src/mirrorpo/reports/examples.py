"""What did the model write, before and after? Samples side by side, paired by their prompt.

Everything here is text a model or a data set wrote: it is shown letter by letter and never interpreted.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from mirrorpo.reports.text import cut, number, shown
from mirrorpo.runs.reader import Sample

_TEXT_LIMIT = 1_200  # characters of one prompt or completion
_PER_SIDE = 2  # completions of one prompt, before and after each
_OPEN = 4  # problems that are visible without a click
_BUDGET = 250_000  # characters of HTML for all samples: hostile text can be twenty times as long as its source


def sample_section(samples: Iterable[Sample]) -> str:
    """Show samples, those of the same prompt side by side.

    Args:
        samples: in the order of the file.

    Returns:
        HTML: the first few problems, the others folded, and a note on what was left out.

    Example:
        >>> sample = Sample(when="after", prompt="1+1", completion="<b>2", answer="2", reward=1.0, reason="match")
        >>> "&lt;b&gt;2" in sample_section([sample])
        True
    """
    problems: dict[tuple[str, str | None], list[Sample]] = {}
    for sample in samples:
        problems.setdefault((sample.prompt, sample.answer), []).append(sample)
    if not problems:
        return '<p class="note">No samples were recorded.</p>'
    articles: list[str] = []
    left = _BUDGET
    for (prompt, answer), group in problems.items():
        article = _article(prompt, answer, group)
        if articles and len(article) > left:
            break
        left -= len(article)
        articles.append(article)
    parts = ["".join(articles[:_OPEN])]
    if len(articles) > _OPEN:
        more = len(articles) - _OPEN
        parts.append(f"<details><summary>{more:,} more</summary>{''.join(articles[_OPEN:])}</details>")
    if len(articles) < len(problems):
        parts.append(
            f'<p class="note">{len(articles):,} of {len(problems):,} problems shown; samples.jsonl has them all.</p>'
        )
    return "".join(parts)


def _article(prompt: str, answer: str | None, group: list[Sample]) -> str:
    expected = "" if answer is None else f'<p class="expected">Expected <code>{shown(cut(answer, 200)[0])}</code></p>'
    sides = "".join(_side(when, [sample for sample in group if sample.when == when]) for when in ("before", "after"))
    return (
        f'<article class="sample"><div class="prompt"><h4>Prompt</h4>{verbatim(prompt)}{expected}</div>'
        f'<div class="pair">{sides}</div></article>'
    )


def _side(when: str, samples: list[Sample]) -> str:
    if not samples:
        return f'<section class="{when}"><h4>{when.capitalize()}</h4><p class="note">No sample.</p></section>'
    parts = []
    for sample in samples[:_PER_SIDE]:
        parts.append(f"<h4>{when.capitalize()} {verdict(sample)}</h4>{verbatim(sample.completion)}")
    left = len(samples) - _PER_SIDE
    if left > 0:
        parts.append(f'<p class="note">{left:,} more of this prompt in samples.jsonl.</p>')
    return f'<section class="{when}">{"".join(parts)}</section>'


def verdict(sample: Sample) -> str:
    """A sample's verdict and reward as a short piece of HTML."""
    reason = shown(cut(sample.reason, 200)[0])
    if sample.reward is None:
        return f'<span class="verdict none">not scored: {reason}</span>'
    kind, mark = ("right", "✓") if sample.reward > 0 else ("wrong", "✗")
    return f'<span class="verdict {kind}">{mark} {reason}, reward {number(sample.reward)}</span>'


def verbatim(text: str) -> str:
    """A text as it is, cut where it is too long, with a note that says so."""
    kept, note = cut(text, _TEXT_LIMIT)
    body = shown(kept) if kept else "<i>empty</i>"
    return f'<pre dir="ltr">{body}</pre>' + (
        f'<p class="note">{escape(note)}; samples.jsonl has it all.</p>' if note else ""
    )
