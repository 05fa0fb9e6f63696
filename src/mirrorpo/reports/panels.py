"""Panels of a run: which metrics are drawn together, under which title, in the order of the page.

A metric that this table does not know is listed in the page's last table all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirrorpo.reports.charts import Curve, Panel
from mirrorpo.runs.reader import Metrics

_DIVERGENCE = ("divergence/", "/mean")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    title: str
    says: str
    keys: dict[str, str]  # metric -> label; no label where the title says it all
    share: bool = False
    may_be_log: bool = False


_FIRST = (
    _Plan(
        title="Reward",
        says="Over the rollouts of a step. Without spread among them there is nothing to learn from.",
        keys={"reward": "mean", "reward_std": "standard deviation"},
    ),
)
_THEN = (
    _Plan(
        title="Clip share",
        says="Tokens at which the trust region stopped the gradient, by the side of the ratio that was hit.",
        keys={"clip/low/frac": "low side", "clip/high/frac": "high side"},
        share=True,
    ),
    _Plan(title="Completion length", says="Mean tokens of a rollout.", keys={"completions/mean_length": ""}),
    _Plan(
        title="Entropy",
        says="Of the next-token distribution, in nats. Near zero, exploration is over.",
        keys={"entropy": ""},
    ),
    _Plan(title="Gradient norm", says="Before clipping by norm, if any.", keys={"grad_norm": ""}, may_be_log=True),
)
_MORE = (
    _Plan(title="Loss", says="Its value is no measure of success; jumps are worth a look.", keys={"loss": ""}),
    _Plan(
        title="Largest ratio",
        says="Highest probability ratio of any token, policy over rollout policy.",
        keys={"ratio/max": ""},
        may_be_log=True,
    ),
    _Plan(title="Learning rate", says="As scheduled.", keys={"learning_rate": ""}),
    _Plan(title="Seconds a step", says="Rollouts, rewards and updates together.", keys={"seconds": ""}),
)


def divergences(metrics: Metrics) -> dict[str, str]:
    """Find the divergences of a run.

    Args:
        metrics: the columns of the run.

    Returns:
        Column name -> name of the divergence, in the order of the file.

    Example:
        >>> columns = {"divergence/prob_l2/mean": (0.1,), "reward": (1.0,)}
        >>> divergences(Metrics(steps=(1,), columns=columns, num_not_finite=0, torn=False))
        {'divergence/prob_l2/mean': 'prob_l2'}
    """
    start, end = _DIVERGENCE
    return {
        name: name[len(start) : -len(end)]
        for name in metrics.columns
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
    }


def plan_panels(metrics: Metrics) -> tuple[list[Panel], list[Panel], list[str]]:
    """Lay out the panels of a run.

    Args:
        metrics: the columns of the run.

    Returns:
        The main panels, further panels, and the titles of those left out because no value was recorded.

    Example:
        >>> columns = {"reward": (1.0,), "loss": (0.5,)}
        >>> main, more, absent = plan_panels(Metrics(steps=(1,), columns=columns, num_not_finite=0, torn=False))
        >>> [panel.title for panel in main], [panel.title for panel in more], absent[0]
        (['Reward'], ['Loss'], 'Divergence')
    """
    divergence = _Plan(
        title="Divergence",
        says="From the reference policy, mean over tokens.",
        keys=divergences(metrics),
        may_be_log=True,
    )
    absent: list[str] = []
    main = _panels((*_FIRST, divergence, *_THEN), metrics, absent)
    more = _panels(_MORE, metrics, absent)
    return main, more, absent


def _panels(plans: tuple[_Plan, ...], metrics: Metrics, absent: list[str]) -> list[Panel]:
    panels = []
    for plan in plans:
        curves = tuple(
            Curve(label=label, values=metrics.columns[key])
            for key, label in plan.keys.items()
            if any(value is not None for value in metrics.columns.get(key, ()))
        )
        if not curves:
            absent.append(plan.title)
            continue
        panels.append(
            Panel(title=plan.title, says=plan.says, curves=curves, may_be_log=plan.may_be_log, share=plan.share)
        )
    return panels
