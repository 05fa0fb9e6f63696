"""Programs are found in completions, run, and judged by what they return."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

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


RAISES = "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"
STACK = """class S:
    def __init__(s): s.x = []
    def push(s, v): s.x.append(v)
    def __len__(s): return len(s.x)"""
FORMS = [
    # name, program, tests, setup, reason
    ("equal", "def f(x): return x", ["assert f(1) == 1"], "", "passed"),
    ("equal, wrong", "def f(x): return x", ["assert f(1) == 2"], "", "failed"),
    ("reversed", "def f(x): return x", ["assert [1] == f([1])"], "", "passed"),
    ("not equal", "def f(x): return x", ["assert f(1) != 2"], "", "passed"),
    ("not equal, wrong", "def f(x): return x", ["assert f(1) != 1"], "", "failed"),
    ("not", "def f(x): return x", ["assert not f(0)"], "", "passed"),
    ("not, wrong", "def f(x): return x", ["assert not f(1)"], "", "failed"),
    ("bare", "def f(x): return x", ["assert f(1), 'message'"], "", "passed"),
    ("is", "def f(x): return None", ["assert f(1) is None"], "", "passed"),
    ("is, wrong", "def f(x): return False", ["assert f(1) is None"], "", "failed"),
    ("isclose", "def f(x): return 0.1 + 0.2", ["import math\nassert math.isclose(f(1), 0.3)"], "", "passed"),
    ("isclose without import", "def f(x): return 0.3", ["assert math.isclose(f(1), 0.3)"], "", "passed"),
    (
        "isclose of its own",
        "class math:\n    isclose = lambda *a: True\ndef f(x): return 5",
        ["assert math.isclose(f(1), 0.3)"],
        "",
        "failed",
    ),
    ("set", "def f(x): return [2, 1, 1]", ["assert set(f(1)) == set([1, 2])"], "", "passed"),
    ("set of its own", "set = lambda x: 5\ndef f(x): return 1", ["assert set(f(1)) == set([1])"], "", "failed"),
    ("sorted", "def f(x): return (y for y in (2, 1))", ["assert sorted(f(1)) == [1, 2]"], "", "passed"),
    ("tolerance", "def f(x): return 1.0001", ["assert abs(f(1) - 1) < 1e-3"], "", "passed"),
    ("chained", "def f(x): return 1", ["assert 0 < f(1) < 2 and f(2) in (1, 2)"], "", "passed"),
    ("counter", "def f(x): return dict(a=2)", ["assert f('aa') == Counter('aa')"], "", "passed"),
    ("own counter", "Counter = lambda x: 5\ndef f(x): return 5", ["assert f('aa') == Counter('aa')"], "", "failed"),
    ("counter returned", "from collections import Counter as f", ["assert f('aab') == {'a': 2, 'b': 1}"], "", "passed"),
    ("two calls", "def f(x): return x * x", ["assert f(2) == f(-2)"], "", "passed"),
    ("named as a built-in", "def sum(a, b): return a - b", ["assert sum(3, 1) == 2"], "", "passed"),
    ("named as a built-in, wrong", "def sum(a, b): return 0", ["assert sum(3, 1) == 2"], "", "failed"),
    ("attribute of a result", "class P:\n    x = 3\ndef f(): return P()", ["assert f().x == 3"], "", "opaque"),
    ("setup after", "class Node:\n    def __init__(s, v): s.v = v\ndef f(n): return n.v", ["assert f(root) == 1"],
     "root = Node(1)", "passed"),
    ("setup import", "def f(x): return math.floor(x)", ["assert f(1.5) == 1"], "import math", "passed"),
    ("loop", "def f(x): return x + 1", ["for i in range(3):\n    assert f(i) == i + 1"], "", "passed"),
    ("loop, wrong", "def f(x): return 1", ["for i in range(3):\n    assert f(i) == i + 1"], "", "failed"),
    ("loop, wrong type", "def f(x): return None", ["for i in [1]:\n    assert abs(f(i) - i) < 1"], "", "failed"),
    ("comprehension", "def f(x): return x", ["assert all(f(i) == i for i in range(3))"], "", "passed"),
    ("raises", "def f(x): raise ValueError", [RAISES], "", "passed"),
    ("raises not", "def f(x): return 1", [RAISES], "", "failed"),
    ("check function", "def f(x): return x", ["def check(c):\n    assert c([1]) == [1]\ncheck(f)"], "", "passed"),
    ("in place", "def f(x): x.sort()", ["a = [2, 1]\nf(a)\nassert a == [1, 2]"], "", "passed"),
    ("expected in setup", "def f(x): return 1", ["assert f(1) == WANTED"], "WANTED = 1", "passed"),
    ("expected, patched", "def f(x):\n    globals()['WANTED'] = 5\n    return 5", ["assert f(1) == WANTED"],
     "WANTED = 1", "failed"),
    ("object", STACK,
     ["s = S()\ns.push(1)\nassert len(s) == 1\nassert s.x == [1]"], "", "passed"),
    ("object, always equal", "class S:\n    def __eq__(s, o): return True", ["s = S()\nassert s == 1"], "", "opaque"),
    ("object, never equal", "class S:\n    pass", ["s = S()\nassert s != 1"], "", "opaque"),
    ("big integers", "def f(): return 10 ** 5000", ["assert f() == 10 ** 5000"], "", "passed"),
    ("bytes and complex", "def f(): return (b'a', 1j, {1: {2}})", ["assert f() == (b'a', 1j, {1: {2}})"], "", "passed"),
    ("decimals", "from decimal import Decimal\ndef f(): return Decimal('1.5')", ["assert f() == 1.5"], "", "passed"),
    ("surrogate", "def f(): return '\\ud800'", ["assert f() == '\\ud800'"], "", "passed"),
    ("large result", "def f(): return list(range(20000))", ["assert f() == list(range(20000))"], "", "passed"),
    ("dataclass", "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\ndef f(): return P().x",
     ["assert f() == 1"], "", "passed"),
    ("raises in the call", "def f(x): return 1 / 0", ["assert f(1) == 1"], "", "error"),
    ("not defined", "def g(x): return 1", ["assert f(1) == 1"], "", "error"),
    ("syntax", "def f(x) return 1", ["assert f(1) == 1"], "", "syntax error"),
    ("surrogate in the source", "def f(x): return '\ud800'", ["assert f(1) == 1"], "", "syntax error"),
    ("NUL in the source", "def f(x): return 1\0", ["assert f(1) == 1"], "", "syntax error"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "tests", "setup", "reason"), [form[1:] for form in FORMS], ids=[f[0] for f in FORMS]
)
def test_forms_of_tests(verifier: CodeVerifier, program: str, tests: list[str], setup: str, reason: str) -> None:
    grade = verifier.grade(fenced(program), tests, setup)
    assert (grade.reason, grade.reward) == (reason, 1.0 if reason == "passed" else 0.0)


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ([], "no tests"),
        (None, "no tests"),
        ([3], "tests are not texts"),
        (["assert f("], "tests are not Python"),
        (["assert f(1) == 1", "\0"], "tests are not Python"),
        (["(" * 100_000], "tests are not Python"),
        (["assert True"], "tests use nothing of the program"),
        (["import numpy\nassert f(1) == numpy.array(1)"], "tests import numpy, which the sandbox does not have"),
        (["for i in nowhere.list: assert f(i)"], "tests use nowhere, which nothing defines"),
        (["for i in 3: assert f(i)"], "broken test"),
    ],
)
def test_unusable_tests_are_no_verdict(verifier: CodeVerifier, tests: list[str], reason: str) -> None:
    grade = verifier.grade(fenced("def f(x): return 1"), tests)
    assert (grade.reward, grade.reason) == (0.0 if reason == "error" else None, reason)


PASSES = "assert f(1) == 1"


@pytest.mark.parametrize(
    ("test", "setup", "reward", "reason"),
    [
        # The program was never asked for anything: whatever happens is the tests' own doing.
        ("while True: pass\n" + PASSES, "", None, "broken test"),
        ("import time\ntime.sleep(60)\n" + PASSES, "", None, "broken test"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n" + PASSES, "", None, "broken test"),
        ("x = 'a' * 10 ** 10\n" + PASSES, "", None, "broken test"),
        (PASSES, "import os; os._exit(0)", 1.0, "passed"),
        (PASSES, "import os; os._exit(1)", None, "broken test"),
        ("assert 1 == 2\n" + PASSES, "", None, "broken test"),
        # It was: it may be the cause.
        ("for i in (1,): assert f(i) == 1\nwhile True: pass", "", 0.0, "timeout"),
        ("import os\nfor i in (1,): assert f(i) == 1\nos._exit(0)", "", 1.0, "passed"),
        ("import os\nfor i in (1,): assert f(i) == 1\nos._exit(1)", "", 0.0, "failed"),
    ],
)
def test_what_the_tests_do_to_themselves_is_not_the_programs_fault(
    test: str, setup: str, reward: float | None, reason: str
) -> None:
    verifier = CodeVerifier(limits=Limits(wall_seconds=2.0, cpu_seconds=1), require="limits")
    try:
        one, other = verifier.grade_many(
            [(fenced("def f(x): return x"), [t], s) for t, s in ((test, setup), (PASSES, ""))]
        )
    finally:
        verifier.close()
    assert (one.reward, one.reason) == (reward, reason)
    assert other.reward == 1.0, "one row never ends a batch"


def test_a_program_that_loads_slowly_cannot_leave_the_count(verifier: CodeVerifier) -> None:
    slow = fenced("import time\ntime.sleep(1)\ndef f(x): return 2")
    assert verifier.grade(slow, ["x = [][0]\n" + PASSES]).reward == 0.0


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
