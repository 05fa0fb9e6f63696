"""``mirrorpo list``: the names that recipes and functions take.

The tables are plain data in ``catalogue.json``, so that listing a name imports no torch. ``python -m
mirrorpo.cli.listing`` writes the file again from the code; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mirrorpo.cli import output
from mirrorpo.errors import InputError

_MAX_NARROW_COLUMNS, _WIDE = 5, 140
TABLES = (
    "divergences",
    "regions",
    "objectives",
    "estimators",
    "surrogates",
    "anchors",
    "behaviours",
    "acts",
    "levels",
    "sides",
    "placements",
    "supports",
    "baselines",
    "advantages",
    "aggregations",
    "tasks",
    "recipes",
)


def listing(what: str) -> Rows:
    """The rows of a table.

    Raises:
        InputError: no such table.

    Example:
        >>> [row["name"] for row in listing("aggregations")][:2]
        ['sequence_mean', 'token_mean']
    """
    if what not in TABLES:
        import difflib

        near = difflib.get_close_matches(what, TABLES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"unknown list {what!r}{hint} Legal: {', '.join(TABLES)}")
    if what == "recipes":
        return _recipes()
    return [*read()[what], *_plugins(what)]


def _recipes() -> Rows:
    from mirrorpo.config.shipped import shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        rows.append({"name": name, "what": first.lstrip("# ") if first.startswith("#") else ""})
    return rows


def _plugins(what: str) -> Rows:
    """What installed packages add; none of their code is run."""
    from importlib.metadata import entry_points

    points = entry_points(group=f"mirrorpo.{what}")
    package = [point.dist.name if point.dist else "an installed package" for point in points]
    if what == "tasks":
        return [{"name": p.name, "what": f"{p.value} of {name}"} for p, name in zip(points, package, strict=True)]
    return [
        {"name": p.name, "family": "plugin", "formula": p.value, "options": "", "source": name}
        for p, name in zip(points, package, strict=True)
    ]


def render(what: str, rows: Rows) -> None:
    """Draws the table on stdout; a wide one as paragraphs where the terminal is narrow."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if rows and len(rows[0]) > _MAX_NARROW_COLUMNS and console.width < _WIDE:
        for row in rows:
            console.print(Text(row["name"], style="bold"))
            console.print(Text("  " + "; ".join(f"{key} {value}" for key, value in row.items() if key != "name")))
        return
    table = Table(title=what, title_justify="left", pad_edge=False, show_lines=False)
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    console.print(table)


def command(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}.")],
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """The names that recipes and functions take, with formulas and papers."""
    rows = listing(what)
    if as_json:
        output.say(output.as_json(rows))
    else:
        render(what, rows)


Rows = list[dict[str, str]]
FILE = Path(__file__).with_name("catalogue.json")


def read() -> dict[str, Rows]:
    """The tables by name."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def build() -> dict[str, Rows]:
    """The same from the code itself; imports torch."""
    return {
        "divergences": _divergences(),
        "regions": _regions(),
        "objectives": _objectives(),
        "estimators": _estimators(),
        "surrogates": _surrogates(),
        "anchors": _anchors(),
        **_choices(),
        "advantages": _advantages(),
        "aggregations": _aggregations(),
        "tasks": _tasks(),
    }


def _divergences() -> Rows:
    from mirrorpo.divergences import DIVERGENCES

    return [
        {
            "name": name,
            "family": entry.family,
            "formula": entry.formula,
            "options": ", ".join((*entry.options, *entry.optional)),
            "source": entry.source,
        }
        for name, entry in DIVERGENCES.items()
    ]


def _regions() -> Rows:
    from mirrorpo.divergences import DIVERGENCES
    from mirrorpo.losses.facts import REGION_FACTS
    from mirrorpo.losses.regions import DIVERGENCE_REGIONS, REGIONS

    rows = [
        {
            "name": name,
            "constraint": entry.constraint,
            "options": ", ".join(REGION_FACTS[name].takes),
            "source": entry.source,
        }
        for name, entry in REGIONS.items()
    ]
    for name in DIVERGENCE_REGIONS:
        entry = DIVERGENCES[name]
        if name in REGIONS:
            continue
        constraint = "d(p_y, b_y) <= radius" if entry.family == "bregman" else "f(w) - f'(1)(w - 1) <= radius"
        rows.append(
            {
                "name": name,
                "constraint": f"{constraint}, {entry.formula}",
                "options": ", ".join(("radius", *entry.options, *entry.optional)),
                "source": entry.source,
            }
        )
    return rows


def _objectives() -> Rows:
    from mirrorpo.losses.presets import PRESETS

    rows = []
    for name, preset in PRESETS.items():
        rows.append(
            {
                "name": name,
                "region": " + ".join(map(_region_name, preset.regions)) or "none",
                "penalty": " + ".join(map(_penalty_name, preset.penalties)) or "none",
                "surrogate": preset.surrogate,
                "level": preset.level,
                "advantage": preset.advantage,
                "aggregation": preset.aggregation,
                "source": preset.source,
            }
        )
    return rows


def _region_name(spec: Mapping[str, Any]) -> str:
    numbers = {key.removeprefix("epsilon_"): value for key, value in spec.items() if isinstance(value, float)}
    words = [str(value) for key, value in spec.items() if key in ("act", "level")]
    words += [f"{key} {spec[key]}" for key in ("of", "anchor", "side") if key in spec]
    shown = ", ".join([f"{key} {value:g}" for key, value in numbers.items()] + words)
    return f"{spec['name']} ({shown})"


def _penalty_name(spec: Mapping[str, Any]) -> str:
    words = [str(spec[key]) for key in ("estimator", "anchor") if key in spec]
    shown = f" ({', '.join(words)})" if words else ""
    return f"{spec['coefficient']:g} {_divergence_name(spec['divergence'])}{shown}"


def _divergence_name(chosen: str | Mapping[str, Any]) -> str:
    if isinstance(chosen, str):
        return chosen
    options = ", ".join(f"{key} {value}" for key, value in chosen.items() if key != "name")
    return f"{chosen['name']} ({options})"


def _first_line(function: Any) -> str:
    """What a function is, in its own words."""
    text = (function.__doc__ or "").strip()
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def _estimators() -> Rows:
    from mirrorpo.divergences import ESTIMATORS, LOGITS_ESTIMATORS, Divergence

    return [
        {
            "name": name,
            "what": _first_line(getattr(Divergence, name)),
            "needs": "logits" if name in LOGITS_ESTIMATORS else "log-probabilities of the sampled tokens",
        }
        for name in ESTIMATORS
    ]


def _surrogates() -> Rows:
    from mirrorpo.losses.surrogates import SURROGATES

    return [{"name": name, "loss of a token": _first_line(entry.fn)} for name, entry in SURROGATES.items()]


def _anchors() -> Rows:
    from mirrorpo.losses.anchors import ANCHORS

    return [
        {"name": name, "log-probabilities": anchor.logp or "", "logits": anchor.logits or "", "how": anchor.how}
        for name, anchor in ANCHORS.items()
    ]


def _choices() -> dict[str, Rows]:
    """What the keys of a region and of a penalty take; each name needs its sentence below."""
    from mirrorpo.losses.keys import BASELINES, BEHAVIOURS, PLACEMENTS, SUPPORTS
    from mirrorpo.losses.rules import ACTS, LEVELS, MASK_LEVELS, SIDES

    names = {
        "behaviours": BEHAVIOURS,
        "acts": ACTS,
        "levels": (*LEVELS, *MASK_LEVELS),
        "sides": SIDES,
        "placements": PLACEMENTS,
        "supports": SUPPORTS,
        "baselines": BASELINES,
    }
    return {what: [{"name": name, "what": _CHOICES[what][name]} for name in chosen] for what, chosen in names.items()}


def _advantages() -> Rows:
    from mirrorpo.losses.advantages import ADVANTAGES

    return [{"name": name, "advantage": _ADVANTAGES[name]} for name in ADVANTAGES]


def _aggregations() -> Rows:
    from mirrorpo.losses.aggregation import AGGREGATIONS

    return [{"name": name, "average": _AGGREGATIONS[name]} for name in AGGREGATIONS]


def _tasks() -> Rows:
    from mirrorpo.tasks import TASKS

    return [{"name": name, "what": entry.summary} for name, entry in TASKS.items()]


_CHOICES = {
    "behaviours": {
        "old": "tokens count as drawn from the policy at the start of the batch, scored by the trainer (default)",
        "sampler": "tokens count as drawn from what the inference engine reported",
    },
    "acts": {
        "clip": "the policy gradient stops where the advantage pushes further out; at most one (default)",
        "mask": "the policy term is dropped on either side of the region; any number",
        "soft": "no bound: the loss gains |A| / (2 radius) times the divergence; SPO, DRPO",
        "truncate": "the policy term is multiplied by old / anchor, clamped into the region; at most one",
    },
    "levels": {
        "token": "the ratio of each token (default)",
        "sequence": "exp of the mean log-ratio of the completion",
        "product": "exp of the sum of its log-ratios: the ratio of whole completions",
        "mean_divergence": "of a mask: the mean of the completion's divergences, against the radius",
        "sum_divergence": "of a mask: their sum",
        "max_divergence": "of a mask: the largest of them",
    },
    "sides": {
        "both": "whatever the advantage (default)",
        "positive": "where the advantage is positive",
        "negative": "where it is negative; DeepSeek's sequence mask",
    },
    "placements": {
        "loss": "the estimate times its coefficient is added to the loss (default)",
        "reward": "the completion's sum is taken from its reward, before advantages; sampled or weighted",
        "advantage": "coefficient * g is taken from the token's advantage: the trust region applies to it; score",
    },
    "supports": {
        "anchor": "of top_k: the K likeliest tokens of the anchor (default)",
        "policy": "of top_k: the K likeliest tokens of the policy",
        "union": "of top_k: both",
    },
    "baselines": {
        "none": "of score: nothing is taken from the weight g (default)",
        "exact": "of score: sum_v p_v g_v is taken from g: the same gradient with less noise; needs logits",
    },
}
_ADVANTAGES = {
    "grpo": "(r - mean) / (standard deviation + eps) of the group; GRPO, arXiv 2402.03300",
    "dr_grpo": "r - mean of the group; Dr. GRPO, arXiv 2503.20783",
    "maxrl": "(r - mean) / mean of the group, for rewards >= 0; MaxRL, arXiv 2602.02710",
    "rloo": "r - mean of the others in the group; RLOO, arXiv 2402.14740",
    "soft_value": "r - tau log mean exp(r / tau) of the group, tau 0.5; A*-PO, arXiv 2505.20686",
}
_AGGREGATIONS = {
    "sequence_mean": "mean over completions of the mean over their tokens; GRPO, arXiv 2402.03300",
    "token_mean": "mean over all tokens; DAPO, arXiv 2503.14476",
    "constant": "sum over tokens / (completions x max_completion_length); Dr. GRPO, arXiv 2503.20783",
    "sequence_sum": "mean over completions of the sum over their tokens; LUSPO in TRL",
}


def main() -> None:
    """Writes the file."""
    FILE.write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
