"""Completions, right answers and rewards by family, from ``maths_cases.jsonl``; `docs/rewards.md` shows some of each.

Every reward was reasoned out by hand: 1 if the text's final answer equals the right answer, else 0. The family "formats
from bug reports" holds inputs that public reports name as misjudged by other graders.
"""

from __future__ import annotations

import json
from pathlib import Path

# Family, then (completion, right answer, reward).
CASES: dict[str, list[tuple[str, str, int]]] = {}
with (Path(__file__).parent / "maths_cases.jsonl").open(encoding="ascii") as _lines:
    for _family, _completion, _answer, _reward in map(json.loads, _lines):
        CASES.setdefault(_family, []).append((_completion, _answer, _reward))
