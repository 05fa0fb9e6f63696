"""How many programs a second does the sandbox run, compared with starting an isolated process for each?

Both sides run the same programs (MBPP's reference solutions if a file is given, else one small function) on the same
level of isolation. The slow side starts as many processes at a time as there are cores, without the imports that only
pay when shared. Expected: a ratio of at least 5. Takes about 20 s on two CPU cores.

    python benchmarks/sandbox.py [--mbpp ../shared/data/mbpp/mbpp.jsonl] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.sandbox import LEVELS, Pool, Template

SMALL = ("def f(x): return x + 1", ["assert f(1) == 2"], "")


def programs(path: str | None) -> list[tuple[str, list[str], str]]:
    """Completion, tests and setup of each program."""
    if path is None:
        return [SMALL] * 400
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [(f"```python\n{row['code']}\n```", row["test_list"], row["test_setup_code"]) for row in rows]


def pooled(jobs: list[Any], require: Any) -> tuple[float, str, int]:
    """Programs a second in copies of one template process, the level, and how many passed."""
    verifier = CodeVerifier(require=require)
    level = verifier.reached().level
    started = time.perf_counter()
    grades = verifier.grade_many(jobs)
    seconds = time.perf_counter() - started
    verifier.close()
    return len(jobs) / seconds, level, sum(grade.reward == 1.0 for grade in grades)


def one_by_one(jobs: list[Any], require: Any) -> tuple[float, int]:
    """The same with an isolated process started, used once and ended for each, as many at a time as there are cores."""

    async def work() -> tuple[float, int]:
        slots = asyncio.Semaphore(os.cpu_count() or 1)

        async def one(job: Any) -> float:
            async with slots:
                verifier = CodeVerifier(require=require, in_flight=1)
                # Started in a thread, so that the starts overlap.
                template = await asyncio.to_thread(Template, preload=False)
                verifier.pool.adopt(template)
                grade = await verifier.grade_async(*job)
                await verifier.pool.close()
                return grade.reward or 0.0

        started = time.perf_counter()
        rewards = await asyncio.gather(*(one(job) for job in jobs))
        return len(jobs) / (time.perf_counter() - started), int(sum(rewards))

    return asyncio.run(work())


def latency(require: Any) -> float:
    """Seconds from handing over one small program to its answer, the median of 50."""

    async def work() -> list[float]:
        async with Pool(require=require) as pool:
            job = {"role": "values", "imports": "", "setup": "", "code": SMALL[0], "calls": ["f(1)"]}
            seconds = []
            for _ in range(50):
                started = time.perf_counter()
                await pool.run(job)
                seconds.append(time.perf_counter() - started)
            return seconds

    return sorted(asyncio.run(work()))[25]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--mbpp", help="MBPP's original file: its reference solutions are the programs")
    parser.add_argument("--require", choices=LEVELS, default="confined", help="least level of isolation")
    parser.add_argument("--one-by-one", type=int, default=80, help="programs of the slow side (default 80)")
    parser.add_argument("--quick", action="store_true", help="20 programs on the slow side")
    arguments = parser.parse_args()
    slow_programs = min(20, arguments.one_by_one) if arguments.quick else arguments.one_by_one
    jobs = programs(arguments.mbpp)
    fast, level, passed = pooled(jobs, arguments.require)
    slow, _ = one_by_one(jobs[:slow_programs], arguments.require)
    result = {
        "level": level,
        "programs": len(jobs),
        "passed": passed,
        "pool_programs_per_second": round(fast, 1),
        "process_each_programs_per_second": round(slow, 1),
        "ratio": round(fast / slow, 1),
        "latency_ms": round(1000 * latency(arguments.require), 2),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:34s} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
