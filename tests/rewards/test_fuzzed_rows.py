"""Whatever stands in a row: a verdict, no traceback, no hang. ``MIRRORPO_FUZZ_ROWS=5000`` makes it long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from honest_rows import ROWS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.sandbox import Limits
from mirrorpo.rewards.verdict import Grade

BATCH = 25
BATCHES = max(1, int(os.environ.get("MIRRORPO_FUZZ_ROWS", "150")) // BATCH)

NAMES = st.sampled_from(["f", "g", "Stack", "x", "np", "EXPECTED", "check", "self", "sum", "solution", "test_f", "é"])
LITERALS = st.one_of(
    st.integers(), st.floats(), st.text(max_size=5), st.none(), st.booleans(), st.binary(max_size=3),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
).map(repr)  # fmt: skip
EXPRESSIONS = st.recursive(
    st.one_of(NAMES, LITERALS),
    lambda inner: st.one_of(
        st.builds("{}({})".format, NAMES, inner),
        st.builds("{}({}, key={})".format, NAMES, inner, inner),
        st.builds(
            "({} {} {})".format,
            inner,
            st.sampled_from(["+", "-", "*", "/", "%", "**", "<", "==", "!=", "in", "is", "and", "or", "not@"]),
            inner,
        ),
        st.builds("{}.{}".format, inner, NAMES),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("[{} for {} in {}]".format, inner, NAMES, inner),
        st.builds("(lambda {}: {})".format, NAMES, inner),
        st.builds("list(map({}, {}))".format, inner, inner),
        st.builds("(yield {})".format, inner),
        st.builds("await {}".format, inner),
    ),
    max_leaves=6,
)
STATEMENTS = st.recursive(
    st.one_of(
        st.builds("assert {}".format, EXPRESSIONS),
        st.builds("assert {} == {}".format, EXPRESSIONS, LITERALS),
        st.builds("assert abs({} - {}) < 1e-6".format, EXPRESSIONS, LITERALS),
        st.builds("{} = {}".format, NAMES, EXPRESSIONS),
        st.builds("{}".format, EXPRESSIONS),
        st.builds(
            "import {}".format, st.sampled_from(["math", "numpy", "solution", "os.path as p", "unittest", "sys"])
        ),
        st.builds("from {} import {}".format, st.sampled_from(["solution", "math", ".", "collections"]), NAMES),
        st.builds("raise {}".format, EXPRESSIONS),
        st.builds("del {}".format, NAMES),
        st.builds("global {}".format, NAMES),
        st.just("return 1"),
    ),
    lambda inner: st.one_of(
        st.builds("for {} in {}:\n {}".format, NAMES, EXPRESSIONS, inner.map(lambda s: s.replace("\n", "\n "))),
        st.builds("try:\n {}\nexcept {}: pass".format, inner.map(lambda s: s.replace("\n", "\n ")), NAMES),
        st.builds("def {}({}):\n {}".format, NAMES, NAMES, inner.map(lambda s: s.replace("\n", "\n "))),
        st.builds("class {}({}):\n {}".format, NAMES, NAMES, inner.map(lambda s: s.replace("\n", "\n "))),
        st.builds("with {} as {}:\n {}".format, EXPRESSIONS, NAMES, inner.map(lambda s: s.replace("\n", "\n "))),
        st.builds("{}\n{}".format, inner, inner),
    ),
    max_leaves=4,
)
ODD = [
    "assert f(1) == " + "1+" * 5000 + "1",
    "assert f(1) == " + "-" * 5000 + "1",
    "assert f(1) == " + "(" * 150 + "1" + ")" * 150,
    "assert f(1) == " + "[" * 90 + "1" + "]" * 90,
    "assert f(1) == " + "9" * 10_000,
    "assert f(1) == 0x" + "f" * 10_000,
    "assert f(1) == 1e999999",
    "assert f('\\ud800') == 1",
    "assert f('\ud800') == 1",
    "assert f(1) == 1\0",
    "\ufeffassert f(1) == 1",
    "assert f(1) == 1\r\n" * 3,
    "assert f" + ".a" * 3000 + " == 1",
    "assert f" + "(1)" * 3000 + " == 1",
    "if f(1):\n" + "".join(" " * i + "if f(1):\n" for i in range(1, 95)) + " " * 95 + "assert f(1)",
    "x = " + "f(" * 80 + "1" + ")" * 80 + "\nassert x",
    "assert f(1) == 1 #" + "x" * 900_000,
    "while True: f(1)",
    "assert f(9**9**9) == 1",
    "import sys\nsys.setrecursionlimit(10**9)\ndef r(): return r()\nassert f(r())",
    "import os\nos._exit(0)\nassert f(1)",
    "import sys\nsys.exit(0)\nassert f(1)",
    "exit()\nassert f(1)",
    "class f: pass\nassert f(1)",
    "assert f(**{'a': 1}) == f(*[1])",
    "match f(1):\n case 1: pass\n case _: assert False",
    "async def t():\n assert await f(1)\nt()",
    "assert f(...) is Ellipsis",
    "assert f(NotImplemented) == NotImplemented",
    "assert f(f) == f",
    "assert f(print) and f(type) and f(open) and f(__import__)",
    "assert f(globals()) == locals()",
    "def test_f(fixture): assert f(1)",
    "_mirrorpo_settle = 1\nassert f(1) == 1",
]
TESTS: Any = st.one_of(
    st.lists(STATEMENTS, max_size=3),
    st.lists(st.text(max_size=30), max_size=2),
    st.sampled_from(ODD).map(lambda text: [text]),
    st.sampled_from([row.tests for row in ROWS]),
    st.one_of(st.none(), st.integers(), st.just([None]), st.just([[]]), st.just({}), st.just("assert f(1)")),
)
PROGRAMS = st.one_of(
    st.sampled_from([row.code for row in ROWS]),
    st.sampled_from(["def f(*a, **k): return a[0] if a else 1", "class f:\n    def __init__(s, *a): pass", "f = 3"]),
    STATEMENTS,
)


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    verifier = CodeVerifier(limits=Limits(wall_seconds=2.0, cpu_seconds=1), require="limits")
    yield verifier
    verifier.close()


@settings(max_examples=BATCHES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(PROGRAMS, TESTS, st.one_of(st.just(""), STATEMENTS)), min_size=BATCH, max_size=BATCH))
def test_any_row_gets_a_verdict(verifier: CodeVerifier, rows: list[tuple[str, Any, str]]) -> None:
    grades = verifier.grade_many([(f"```python\n{code}\n```", tests, setup) for code, tests, setup in rows])
    assert all(isinstance(grade, Grade) and grade.reward in (None, 0.0, 1.0) and grade.reason for grade in grades)


@pytest.mark.parametrize("odd", ODD, ids=[text[:20] for text in ODD])
def test_an_odd_row_is_no_end_of_the_batch(verifier: CodeVerifier, odd: str) -> None:
    program = "```python\ndef f(*a, **k): return 1\n```"
    honest = (program, ["assert f(1) == 1"], "")
    before, grade, after = verifier.grade_many([honest, (program, [odd], ""), honest])
    assert (before.reward, after.reward) == (1.0, 1.0)
    assert grade.reward in (None, 0.0, 1.0)
    assert verifier.grade(program, ["assert f(1) == 1"], odd).reward in (None, 0.0, 1.0)
