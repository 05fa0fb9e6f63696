"""The part of a model card that names the objective and cites its paper and this library."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from mirrorpo.losses.objective import Objective
from mirrorpo.losses.presets import PRESETS

_HEADING = "### Objective"


def paper_of(objective: Objective) -> dict[str, str]:
    """Title, arXiv number and BibTeX entry of the paper behind an objective; empty if it comes from no preset.

    Example:
        >>> from mirrorpo import objective
        >>> paper_of(objective("dapo"))["id"]
        '2503.14476'
    """
    preset = objective.spec["preset"] if objective.spec is not None else objective.name.removeprefix("TRL's ")
    if preset == "grpo" and objective.level == "sequence":
        preset = "gspo"
    if preset not in PRESETS:
        return {}
    title, _, rest = PRESETS[preset].source.partition(", arXiv ")
    number = re.match(r"\d{4}\.\d{4,5}", rest)
    if number is None:
        return {}
    year = f"20{number[0][:2]}"
    citation = (
        f"@misc{{arxiv{number[0].replace('.', '_')},\n"
        f"    title         = {{{{{title}}}}},\n"
        f"    year          = {year},\n"
        f"    eprint        = {{{number[0]}}},\n"
        f"    archivePrefix = {{arXiv}},\n"
        f"    url           = {{https://arxiv.org/abs/{number[0]}}},\n"
        f"}}"
    )
    return {"title": title, "id": number[0], "citation": citation}


def add_objective(card: Path, objective: Objective) -> None:
    """Adds the objective's description and the citation of this library to a model card that TRL has written."""
    text = card.read_text(encoding="utf-8")
    if _HEADING in text:
        return
    section = f"{_HEADING}\n\n`{objective.describe()}`\n\n"
    before, heading, after = text.partition("### Framework versions")
    citation = (
        "\n\nCite mirrorpo as:\n\n```bibtex\n@software{mirrorpo,\n"
        "    title   = {{mirrorpo: policy divergences for reinforcement learning with verifiable rewards}},\n"
        f"    version = {{{version('mirrorpo')}}},\n    license = {{Apache-2.0}},\n}}\n```\n"
    )
    after = after.replace(f"{heading}\n\n", f"{heading}\n\n- mirrorpo: {version('mirrorpo')}\n", 1)
    card.write_text(f"{before}{section}{heading}{after.rstrip()}{citation}", encoding="utf-8")


__all__ = ["add_objective", "paper_of"]
