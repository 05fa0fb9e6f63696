"""How many plain numeric answers a second does the maths verifier grade on one core? Expected: at least 25 000.

Three kinds of answers: bare (``#### 72``), as models write them (a sentence, currency, separators), and, if a file is
given, GSM8K's own worked answers. Each is graded once, and the cache of references is empty at the start.

    python benchmarks/maths.py [--gsm8k ../shared/data/gsm8k/train.jsonl] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from mirrorpo.rewards import maths

COUNT = 50_000


def cases(gsm8k: str | None) -> dict[str, list[tuple[str, str]]]:
    """Completions and answers by kind."""
    written = ["So the answer is ${:,}.", "**Answer:** {:,} clips", "#### {:,}.00", r"Thus \boxed{{{:,}}}."]
    kinds = {
        "bare": [(f"6 * 12 = 72\n#### {n}", str(n)) for n in range(COUNT)],
        "as written": [("step by step, " * 40 + written[n % 4].format(n), str(n)) for n in range(COUNT)],
    }
    if gsm8k is not None:
        rows = [json.loads(line) for line in Path(gsm8k).read_text(encoding="utf-8").splitlines()]
        kinds["gsm8k"] = [(row["answer"], row["answer"]) for row in rows]
    return kinds


def measure(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Answers a second and how many match."""
    maths.reference.cache_clear()
    verifier = maths.MathVerifier()
    started = time.process_time()
    matches = sum(verifier.grade(*pair).reward == 1.0 for pair in pairs)
    seconds = time.process_time() - started
    return {"answers": len(pairs), "matches": matches, "per_second_per_core": round(len(pairs) / seconds)}


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--gsm8k", help="GSM8K's original train.jsonl")
    parser.add_argument("--quick", action="store_true", help="a tenth of the answers")
    arguments = parser.parse_args()
    share = 10 if arguments.quick else 1
    result = {kind: measure(pairs[::share]) for kind, pairs in cases(arguments.gsm8k).items()}
    print(json.dumps(result) if arguments.json else "\n".join(f"{kind:12s} {value}" for kind, value in result.items()))


if __name__ == "__main__":
    main()
