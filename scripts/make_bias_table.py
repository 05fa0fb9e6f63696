"""Write the bias tables of docs/estimators.md: every divergence, every estimator, by enumeration.

A vocabulary of seven tokens is small enough to write out every possible sample, so bias and standard deviation are
exact sums in float64: no simulation, no error bars. The tables stand between markers in the page and are replaced;
the rest of the page is left alone. Runtime: about 5 seconds on one CPU core, most of it the import of torch.

Usage: python scripts/make_bias_table.py [--page docs/estimators.md] [--check]

With --check nothing is written; the exit status is 1 if the page does not hold the tables that would be written.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import mirrorpo
from mirrorpo.divergences import DIVERGENCES, Divergence

PAGE = Path(__file__).resolve().parent.parent / "docs" / "estimators.md"
POLICY = (0.52, 0.12, 0.20, 0.05, 0.04, 0.05, 0.02)  # p, the policy being trained
REFERENCE = (0.40, 0.25, 0.15, 0.10, 0.06, 0.03, 0.01)  # q, the anchor
ROLLOUT = (0.46, 0.16, 0.18, 0.08, 0.05, 0.05, 0.02)  # b, the rollout policy of the off-policy columns
OPTIONS: dict[str, dict[str, float]] = {"beta": {"beta": 0.5}, "alpha": {"alpha": 0.5}}
K = 3  # of top_k
ZERO = 1e-12  # a relative error below this is rounding of float64
FACTORS = {1.0: "", 2.0: "2 ", 0.5: "1/2 ", 4.0: "4 ", 0.25: "1/4 "}


@dataclass(frozen=True)
class Estimate:
    """Mean and spread of an estimator, each relative to the size of what it estimates.

    Attributes:
        bias: (E[value] - D) / D.
        error: |E[gradient] - grad D| / |grad D|, in logits, L2.
        value_noise: standard deviation of the value / D.
        gradient_noise: root of the summed variances of the gradient's entries / |grad D|.
        gradient: E[gradient], (V,).
    """

    bias: float
    error: float
    value_noise: float
    gradient_noise: float
    gradient: Tensor


def log(probabilities: Sequence[float]) -> Tensor:
    """Log-probabilities, (V,), float64."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


def built(name: str) -> Divergence:
    """The divergence of the table, with the option that the page states."""
    return mirrorpo.divergence(name, **OPTIONS.get(name, {}))


def label(name: str) -> str:
    """The name as the tables print it."""
    return ", ".join([f"`{name}`", *(f"{key} = {value:g}" for key, value in OPTIONS.get(name, {}).items())])


def samples(d: Divergence, estimator: str, logp_old: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from the policy's logits, (V,), to the estimate at each possible sample, (V,)."""
    logq = log(REFERENCE)
    size = len(POLICY)
    if estimator == "exact":
        return lambda logits: d.exact(logits.expand(size, size), logq.expand(size, size))
    if estimator == "top_k":
        tokens = torch.arange(size)
        return lambda logits: d.top_k(logits.expand(size, size), logq.expand(size, size), tokens, K)
    return lambda logits: d.estimate(estimator, logits.log_softmax(-1), logq, logp_old)


def jacobian(fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Values, (V,), and the gradient in the logits of each, (V, V), at the policy."""
    logits = log(POLICY).requires_grad_()
    values = fn(logits)
    rows = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values]
    return values.detach(), torch.stack(rows)


def estimate(name: str, estimator: str, rollout: Sequence[float]) -> Estimate:
    """Enumerate the estimator over every token that the rollout policy can sample."""
    d, logb = built(name), log(rollout)
    chance = logb.exp()
    truth, slopes = jacobian(samples(d, "exact", logb))
    target, slope = truth[0], slopes[0]
    values, gradients = jacobian(samples(d, estimator, logb))
    mean, gradient = chance @ values, chance @ gradients
    spread = (chance @ (values - mean) ** 2).sqrt()
    gradient_spread = (chance @ ((gradients - gradient) ** 2).sum(-1)).sqrt()
    size = slope.norm()
    return Estimate(
        bias=((mean - target) / target).item(),
        error=((gradient - slope).norm() / size).item(),
        value_noise=(spread / target).item(),
        gradient_noise=(gradient_spread / size).item(),
        gradient=gradient,
    )


def gradient_name(gradient: Tensor, rollout: Sequence[float]) -> str:
    """Which known gradient this one is, up to a simple factor; "none" if it is none of them."""
    if gradient.norm() < ZERO:
        return "0"
    known = {
        "KL(p \\|\\| q)": built("reverse_kl"),
        "KL(q \\|\\| p)": built("forward_kl"),
        **{f"`{name}`": built(name) for name in DIVERGENCES},
    }
    anchors = [(name, d, log(REFERENCE), 1.0) for name, d in known.items()]
    anchors.append(("-KL(b \\|\\| p)", built("forward_kl"), log(rollout), -1.0))
    for name, d, anchor, sign in anchors:
        logits = log(POLICY).requires_grad_()
        (candidate,) = torch.autograd.grad(d.exact(logits, anchor), logits)
        for factor, text in FACTORS.items():
            if (gradient - sign * factor * candidate).norm() < ZERO * 10 * (1.0 + candidate.norm()):
                return text + name
    return "none"


def number(x: float) -> str:
    """Three digits; 0 for what is rounding."""
    if abs(x) < ZERO:
        return "0"
    return f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.1e}"


def signed(x: float) -> str:
    """A bias, with its sign."""
    return number(x) if abs(x) < ZERO else f"{x:+.3g}"


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    return "\n".join([row(head), row(["---", *("---:" for _ in head[1:])]), *map(row, rows)])


def sampled_table() -> str:
    """``sampled``: the only estimator whose gradient is not the one of its divergence."""
    head = ["divergence", "value bias", "off", "gradient error", "off", "its gradient is that of", "off"]
    rows = []
    for name in DIVERGENCES:
        on, off = estimate(name, "sampled", POLICY), estimate(name, "sampled", ROLLOUT)
        names = [gradient_name(on.gradient, POLICY), gradient_name(off.gradient, ROLLOUT)]
        rows.append([label(name), signed(on.bias), signed(off.bias), number(on.error), number(off.error), *names])
    return table(head, rows)


def weighted_table() -> str:
    """``weighted`` and ``score``: unbiased, so what is left to compare is the noise."""
    head = ["divergence", "`weighted` value bias", "off", "`score` value bias", "off", "gradient error of both", "off"]
    rows = []
    for name in DIVERGENCES:
        sides = [[estimate(name, kind, b) for b in (POLICY, ROLLOUT)] for kind in ("weighted", "score")]
        for weighted, score in zip(*sides, strict=True):
            assert (weighted.gradient - score.gradient).norm() < ZERO, name
        (on, off), (score_on, score_off) = sides
        biases = [on.bias, off.bias, score_on.bias, score_off.bias]
        rows.append([label(name), *map(signed, biases), number(on.error), number(off.error)])
    return table(head, rows)


def noise_table() -> str:
    """Standard deviations relative to what is estimated, one token."""
    head = ["divergence", "value: `sampled`", "off", "value: `weighted`", "off"]
    head += ["gradient: `sampled`", "off", "gradient: `weighted`, `score`", "off"]
    rows = []
    for name in DIVERGENCES:
        cases = [estimate(name, kind, b) for kind in ("sampled", "weighted") for b in (POLICY, ROLLOUT)]
        noises = [case.value_noise for case in cases] + [case.gradient_noise for case in cases]
        rows.append([label(name), *map(number, noises)])
    return table(head, rows)


def vocabulary_table() -> str:
    """``exact`` and ``top_k``: no or little noise, logits needed."""
    head = ["divergence", "D(p, q)", "`exact` bias", "gradient error"]
    head += [f"`top_k` (k = {K}) bias", "off", "gradient error", "off", "value noise", "gradient noise"]
    rows = []
    for name in DIVERGENCES:
        truth, _ = jacobian(samples(built(name), "exact", log(POLICY)))
        exact = estimate(name, "exact", ROLLOUT)
        on, off = (estimate(name, "top_k", b) for b in (POLICY, ROLLOUT))
        assert exact.value_noise < ZERO, name
        cells = [f"{truth[0].item():.5f}", signed(exact.bias), number(exact.error), signed(on.bias), signed(off.bias)]
        cells += [number(x) for x in (on.error, off.error, on.value_noise, on.gradient_noise)]
        rows.append([label(name), *cells])
    return table(head, rows)


def distribution_table() -> str:
    """The three distributions."""
    rows = [
        ["p, policy", *map(str, POLICY)],
        ["q, reference", *map(str, REFERENCE)],
        ["b, rollout", *map(str, ROLLOUT)],
    ]
    return table(["", *(f"token {v}" for v in range(1, len(POLICY) + 1))], rows)


TABLES: dict[str, Callable[[], str]] = {
    "distributions": distribution_table,
    "sampled": sampled_table,
    "weighted": weighted_table,
    "noise": noise_table,
    "vocabulary": vocabulary_table,
}


def rewritten(page: str) -> str:
    """The page with every table between its markers replaced."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise SystemExit(f"the page must hold '<!-- begin {name} -->' and '<!-- end {name} -->' once")
        text = make()
        page = pattern.sub(lambda found, text=text: found[1] + "\n" + text + "\n\n" + found[2], page)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to rewrite (default: docs/estimators.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    given = parser.parse_args(arguments)
    old = given.page.read_text(encoding="utf-8")
    new = rewritten(old)
    if given.check:
        difference = list(
            difflib.unified_diff(old.splitlines(), new.splitlines(), "committed", "computed", lineterm="")
        )
        print("\n".join(difference) if difference else f"{given.page.name}: up to date")
        return int(bool(difference))
    given.page.write_text(new, encoding="utf-8")
    print(f"wrote {len(TABLES)} tables to {given.page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
