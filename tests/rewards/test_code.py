"""Programs are found in completions, run, and judged by what they return."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from data import MBPP, rows_of
from mutants import mutant

from mirrorpo.rewards.code import CodeVerifier, extract_code
from mirrorpo.rewards.sandbox import Limits, Pool, SandboxError

# Changes that the three tests of the row cannot see: id and why.
SURVIVORS = {
    6: "x & (x - 2) instead of x & (x - 1) agrees on the three pairs",
    511: "trial division up to num / 2 instead of its root finds the same factors",
    589: "changes the loop's variable at the end of its body, where it is set anew",
    605: "the first divisor tried says prime, right for 13 and 7",
    627: "a return that the three arrays do not reach",
    658: "never takes another value than the first, right for the three lists",
    663: "one more candidate, which is not congruent",
    685: "sieves up to n / 2 instead of the root of n: the same primes",
    698: "sorts by the sum of the pair instead of the product, and dicts are equal in any order",
    711: "stops one digit earlier where that digit is 1, a factor without effect",
    717: "a return for lists of one element, of which there are none",
    762: "month 9 is not asked for",
    799: "shifts to the right by more bits than the small numbers have: 0 either way",
    881: "takes the first non-zero number as odd, right for the three lists",
    909: "starts one lower, and the number right below is no palindrome",
    911: "changes the product of the two smallest, which is not the larger one",
    940: "heapifies from beyond the end, where nothing happens",
    950: "changes Horse, which is not asked for",
    952: "takes the complement of r: the same binomial coefficient",
    968: "takes one number more than B - 1, never reached or without effect",
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    verifier = CodeVerifier(limits=Limits(wall_seconds=20.0, cpu_seconds=4), require="limits")
    yield verifier
    verifier.close()


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\n"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\ndef f(): pass\n```\nUse it:\n```python\nf()\n```", "def f(): pass\n"),
        ("```python\ndef f(): return 1\n```\nBetter:\n```py\ndef f(): return 2\n```", "def f(): return 2\n"),
        ("```bash\nls\n```\n```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("Sure.\nimport math\ndef f(): pass", "import math\ndef f(): pass"),
        ("[BEGIN]\ndef f(): pass\n[DONE]\nmore", "def f(): pass\n"),
        ("<think>```python\ndef g(): pass\n```</think>```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("f = lambda x: x", "f = lambda x: x"),
        ("", None),
        ("I cannot do that.", None),
        ("\0" * 100, None),
    ],
)
def test_the_program_is_found(completion: str, code: str | None) -> None:
    assert extract_code(completion) == code


@pytest.mark.parametrize("filler", ["x", "```", "\n```python\n", "def ", "\ud800", "\0", "`", "=\n"])
def test_ten_megabytes_are_read_in_seconds(filler: str, verifier: CodeVerifier) -> None:
    completion = filler * (10_000_000 // len(filler))
    started = time.monotonic()
    grade = verifier.grade(completion, ["assert f() == 1"])
    assert grade.reward == 0.0
    assert grade.reason in ("no code", "code too long")
    assert time.monotonic() - started < 15.0


CASES = [json.loads(line) for line in Path(__file__).with_name("code_cases.jsonl").read_text("ascii").splitlines()]
ENDING = "tests that end by themselves"


def grade_of(reason: str) -> tuple[float | None, str]:
    unscored = reason.startswith(("no tests", "tests ", "broken test"))
    return None if unscored else float(reason == "passed"), reason


@pytest.mark.parametrize(("program", "tests", "setup", "reason"), [case[2:] for case in CASES if case[0] != ENDING])
def test_rows_get_the_verdict_of_the_table(
    verifier: CodeVerifier, program: str, tests: list[str], setup: str, reason: str
) -> None:
    grade = verifier.grade(fenced(program), tests, setup)
    assert (grade.reward, grade.reason) == grade_of(reason)


@pytest.mark.parametrize(("program", "tests", "setup", "reason"), [case[2:] for case in CASES if case[0] == ENDING])
def test_what_the_tests_do_to_themselves_is_not_the_programs_fault(
    program: str, tests: list[str], setup: str, reason: str
) -> None:
    verifier = CodeVerifier(limits=Limits(wall_seconds=2.0, cpu_seconds=1), require="limits")
    try:
        one, other = verifier.grade_many([(fenced(program), tests, setup), (fenced(program), ["assert f(1) == 1"], "")])
    finally:
        verifier.close()
    assert (one.reward, one.reason) == grade_of(reason)
    assert other.reward == 1.0, "one row never ends a batch"


def test_a_program_that_loads_slowly_cannot_leave_the_count(verifier: CodeVerifier) -> None:
    slow = fenced("import time\ntime.sleep(1)\ndef f(x): return 2")
    assert verifier.grade(slow, ["x = [][0]\nassert f(1) == 1"]).reward == 0.0


@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\n"])
def test_a_byte_order_mark_is_skipped(mark: str, verifier: CodeVerifier) -> None:
    program = "def f(x): return x"
    for completion in (mark + program, mark + fenced(program), fenced(mark + program)):
        grade = verifier.grade(completion, ["\ufeffassert f(1) == 1"], "\ufeffx = 1")
        assert (grade.reward, grade.reason) == (1.0, "passed")


def test_every_mbpp_reference_passes(verifier: CodeVerifier) -> None:
    rows = rows_of(MBPP)
    grades = verifier.grade_many([(fenced(row["code"]), row["test_list"], row["test_setup_code"]) for row in rows])
    assert {r["task_id"]: g.reason for r, g in zip(rows, grades, strict=True) if g.reward != 1.0} == {}


def test_mutated_mbpp_references_fail() -> None:
    rows = rows_of(MBPP)
    jobs = [(fenced(mutant(r["code"], r["task_id"])[0]), r["test_list"], r["test_setup_code"]) for r in rows]
    verifier = CodeVerifier(limits=Limits(wall_seconds=10.0, cpu_seconds=1), require="limits")
    try:
        grades = verifier.grade_many(jobs)
    finally:
        verifier.close()
    passed = {row["task_id"] for row, grade in zip(rows, grades, strict=True) if grade.reward}
    assert sum(grade.reward == 0.0 for grade in grades) >= 300
    assert passed == set(SURVIVORS)


def test_a_level_that_is_not_reached_is_refused() -> None:
    verifier = CodeVerifier(require="isolated", layers=())
    try:
        with pytest.raises(SandboxError, match=r"require is 'isolated', this machine reaches 'limits'"):
            verifier.grade("def f(): return 1", ["assert f() == 1"])
    finally:
        verifier.close()
    with pytest.raises(ValueError, match="must be one of limits, filtered, confined, isolated"):
        CodeVerifier(require="perfect")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"wall_seconds must be a number in \[0.05, 3600\], got 0"):
        Limits(wall_seconds=0)


def test_the_pool_runs_tens_at_once_and_does_not_block_the_loop() -> None:
    async def main() -> tuple[float, int]:
        job = {"role": "values", "imports": "", "setup": "", "code": "import time\ntime.sleep(0.5)", "calls": ["1"]}
        async with Pool(in_flight=20, require="limits") as pool:
            started, ticks = time.monotonic(), 0
            work = asyncio.gather(*(pool.run(job) for _ in range(20)))
            while not work.done():
                await asyncio.sleep(0.01)
                ticks += 1
            assert all(outcome.answer is not None for outcome in await work)
            return time.monotonic() - started, ticks

    seconds, ticks = asyncio.run(main())
    assert seconds < 5.0, "one after the other they would take 10 s"
    assert ticks > 5


def test_a_lost_template_process_is_replaced() -> None:
    verifier = CodeVerifier(require="limits")
    try:
        assert verifier.grade("def f(): return 1", ["assert f() == 1"]).reward == 1.0
        mine = [c for c in psutil.Process().children() if "mirrorpo.rewards.sandbox.zygote" in " ".join(c.cmdline())]
        for child in mine:
            os.kill(child.pid, signal.SIGKILL)
        psutil.wait_procs(mine, timeout=10)
        assert verifier.grade("def f(): return 1", ["assert f() == 1"]).reward == 1.0
    finally:
        verifier.close()


def test_programs_do_not_see_each_other(verifier: CodeVerifier) -> None:
    leave = "import builtins, sys\nbuiltins.left = 1\nsys.left = 1\ndef f(): return 0"
    look = "import builtins, sys\ndef f(): return [hasattr(builtins, 'left'), hasattr(sys, 'left')]"
    assert verifier.grade(leave, ["assert f() == 0"]).reward == 1.0
    assert verifier.grade(look, ["assert f() == [False, False]"]).reward == 1.0
