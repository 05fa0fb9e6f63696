"""Programs that would be paid for what they do not compute, if a test asked them.

``forgeries.txt`` has the form of ``honest_rows.txt``. The program never solves the task: it earns nothing, whatever
level of isolation there is.
"""

from __future__ import annotations

from pathlib import Path

from honest_rows import Row, rows_of_text

# An object with an answer to everything.
YES = """
class Yes:
    def __getattr__(s, n):
        if n.startswith("__"): raise AttributeError(n)
        return s
    def __call__(s, *a, **k): return s
    def __eq__(s, o): return True
    def __ne__(s, o): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __hash__(s): return 0
    def __bool__(s): return True
    def __len__(s): return 3
    def __iter__(s): return iter(())
    def __getitem__(s, i): return s
    def __add__(s, o): return 0
    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = __add__
    __pow__ = __rpow__ = __floordiv__ = __rfloordiv__ = __divmod__ = __and__ = __rand__ = __or__ = __ror__ = __add__
    def __abs__(s): return 0
    def __neg__(s): return 0
    def __round__(s, *a): return 9
    def __int__(s): return 9
    __index__ = __int__
    def __float__(s): return 9.0
    def __complex__(s): return 9 + 0j
    def __str__(s): return "9"
    __repr__ = __str__
    def __format__(s, f): return "9"
    def __reversed__(s): return iter(())
    def __enter__(s): return s
    def __exit__(s, *a): return True
"""

# Of each: a test that the object would pass if it were asked. ``solve(3)`` should be 9.
OPERATIONS = {
    "difference": "assert abs(solve(3) - 9.0) < 1e-6",
    "difference, reversed": "assert abs(9.0 - solve(3)) < 1e-6",
    "quotient": "assert abs(solve(3) / 9.0 - 1) <= 1",
    "remainder": "assert solve(3) % 2 == 0",
    "power": "assert solve(3) ** 0.5 == 0",
    "sum": "assert sum([solve(3), 1]) < 2",
    "between": "assert 8 < solve(3) < 10",
    "at least": "assert solve(3) >= 9",
    "at most, reversed": "assert 9 <= solve(3)",
    "membership": "assert 9 in solve(3)",
    "membership of it": "assert solve(3) in [9, 10]",
    "membership in a set": "assert solve(3) in {0, 9}",
    "no membership": "assert not (4 not in solve(3))",
    "count": "assert [9, 9].count(solve(3)) == 2",
    "index": "assert [9].index(solve(3)) == 0",
    "length": "assert len(solve(3)) == 3",
    "truth": "assert solve(3)",
    "truth by bool": "assert bool(solve(3)) is True",
    "truth of a comparison": "assert (solve(3) == 9) or False",
    "truth in if": "ok = False\nif solve(3):\n    ok = True\nassert ok",
    "conditional expression": "assert (1 if solve(3) == 9 else 0) == 1",
    "not equal": "assert not solve(3) != 9",
    "integer": "assert int(solve(3)) == 9",
    "float": "assert float(solve(3)) == 9.0",
    "rounded": "assert round(solve(3)) == 9",
    "rounded to digits": "assert round(solve(3), 2) == 9",
    "text": "assert str(solve(3)) == '9'",
    "representation": "assert repr(solve(3)) == '9'",
    "format": "assert f'{solve(3)}' == '9'",
    "percent": "assert '%s' % solve(3) == '9'",
    "index of a list": "assert 'abcdefghij'[solve(3)] == 'j'",
    "range": "assert len(range(solve(3))) == 9",
    "isclose": "import math\nassert math.isclose(solve(3), 9.0)",
    "square root": "import math\nassert math.sqrt(solve(3)) == 3",
    "item": "assert solve(3)[0] == 9",
    "method": "assert solve('x').startswith('9')",
    "method of a set": "assert solve(3).issubset({9})",
    "attribute": "assert solve(3).value == 9",
    "call": "assert solve(3)(9)",
    "iteration": "assert all(x == 9 for x in solve(3))",
    "iteration, reversed": "assert all(x == 9 for x in reversed(solve(3)))",
    "zip": "assert all(a == b for a, b in zip(solve(3), [9, 9]))",
    "sorted": "assert sorted(solve(3)) == []",
    "maximum": "assert max(9, solve(3)) == 9",
    "equal to another result": "assert solve(3) == solve(4)",
    "context": "with solve(3) as x:\n    assert x == 9",
    "in a list": "assert [solve(3)] == [9]",
    "in a dictionary": "assert {'a': solve(3)} == {'a': 9}",
    "key of a dictionary": "assert {9: 1}.get(solve(3), 1) == 1 and solve(3) == 9",
    "check function": "def check(candidate):\n    assert candidate(3) == 9\ncheck(solve)",
    "loop": "for x, y in [(3, 9), (4, 16)]:\n    assert solve(x) == y",
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(solve(3), 9)"
    ),
    "unittest, almost": (
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test(self):\n        self.assertAlmostEqual(solve(3), 9.0)"
    ),
    "unittest, true": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertTrue(solve(3) == 9)"
    ),
    "unittest, in": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertIn(solve(3), [9])"
    ),
    "test function": "def test_it():\n    assert solve(3) == 9",
    "caught": "try:\n    assert solve(3) == 9\nexcept BaseException:\n    pass",
    "copied": "import copy\nassert copy.deepcopy(solve(3)) == 9",
    "set of it": "assert {solve(3)} == {9}",
    "tuple order": "assert (solve(3), 1) >= (9, 0)",
}
# The object as it is, as the class that it is made by, and as subclasses of plain types.
CARRIERS = {
    "object": YES + "def solve(x): return Yes()",
    "class": YES.replace("class Yes", "class solve") + "    def __init__(s, x): pass\n",
    "int": YES.replace("class Yes", "class Yes(int)") + "def solve(x): return Yes(-1)",
    "str": YES.replace("class Yes", "class Yes(str)") + "def solve(x): return Yes('no')",
    "set": YES.replace("class Yes", "class Yes(set)") + "def solve(x): return Yes([77])",
}

OTHERS: list[Row] = rows_of_text(Path(__file__).with_suffix(".txt").read_text("utf-8"))
