"""Rows as data sets have them, each with a right program and, where one line makes it wrong, a wrong one.

``NAME``, then the program, the tests and perhaps a setup, divided by lines of dashes. A line that ends in
``# WRONG: text`` is replaced by that text in the wrong program.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row with its right program and a wrong one."""

    name: str
    code: str
    tests: list[str]
    setup: str

    @property
    def wrong(self) -> str:
        """The program with its marked lines replaced."""
        lines = []
        for line in self.code.split("\n"):
            kept, mark, other = line.partition("  # WRONG: ")
            lines.append(kept[: len(kept) - len(kept.lstrip())] + other if mark else line)
        return "\n".join(lines)


def rows_of_text(text: str) -> list[Row]:
    """Rows from a table in the form above."""
    rows = []
    for part in text.split("### ")[1:]:
        name, _, body = part.partition("\n")
        code, tests, *setup = [piece.strip("\n") for piece in body.split("\n---\n")]
        rows.append(Row(name, code, tests.split("\n--\n"), setup[0] if setup else ""))
    return rows


ROWS = rows_of_text(
    r"""
### check with a tolerance
def truncate(number):
    return number % 1.0  # WRONG: return number // 1.0
---
METADATA = {"author": "jt"}
def check(candidate):
    assert candidate(3.5) == 0.5
    assert abs(candidate(1.33) - 0.33) < 1e-6
    assert abs(candidate(123.456) - 0.456) < 1e-6
check(truncate)
### check whose parameter has the function's name
def double(x):
    return 2 * x  # WRONG: return x
---
def check(double):
    assert double(2) == 4
check(double)
### a tolerance helper in the setup
def mean_deviation(xs):
    m = sum(xs) / len(xs)
    return sum(abs(x - m) for x in xs) / len(xs)  # WRONG: return m
---
assert close(mean_deviation([1.0, 2.0, 3.0]), 2.0 / 3.0)
---
def close(a, b, eps=1e-6):
    return abs(a - b) < eps
### a reference solution in the setup
def fib(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a  # WRONG: return b
---
for n in range(15):
    assert fib(n) == reference(n)
---
def reference(n):
    return n if n < 2 else reference(n - 1) + reference(n - 2)
### expected values in the setup
def squares(n):
    return [i * i for i in range(n)]  # WRONG: return [i for i in range(n)]
---
assert squares(5) == EXPECTED
for n, wanted in CASES.items():
    assert squares(n) == wanted
---
EXPECTED = [0, 1, 4, 9, 16]
CASES = {1: [0], 3: [0, 1, 4]}
### methods of a text
def greet(name):
    return "Hello, " + name + "!"  # WRONG: return "Bye, " + name + "!"
---
assert greet("Ann").startswith("Hello")
assert greet("Ann").endswith("Ann!")
assert greet("Ann").upper() == "HELLO, ANN!"
assert len(greet("Ann").split(", ")) == 2
### methods of a set and a dictionary
def count(words):
    out = {}
    for w in words:
        out[w] = out.get(w, 0) + 1  # WRONG: out[w] = 1
    return out
---
assert count("a b a".split()).get("a") == 2
assert set(count("abc").keys()).issubset({"a", "b", "c"})
assert sorted(count("bca").items()) == [("a", 1), ("b", 1), ("c", 1)]
assert max(count("aab").values()) == 2
### membership and slices
def evens(n):
    return list(range(0, n, 2))  # WRONG: return list(range(1, n, 2))
---
assert 4 in evens(10)
assert 3 not in evens(10)
assert evens(10)[:2] == [0, 2]
assert evens(10)[-1] == 8
### arithmetic on results
def area(r):
    return 3.14159 * r * r  # WRONG: return 3.14159 * r
---
assert round(area(2), 2) == 12.57
assert area(2) / area(1) == 4
assert -area(1) < 0 < area(1)
assert int(area(10)) == 314
### a generator as a list
def countdown(n):
    while n > 0:
        yield n
        n -= 1  # WRONG: n -= 2
---
assert list(countdown(3)) == [3, 2, 1]
assert sum(countdown(4)) == 10
assert [x * x for x in countdown(2)] == [4, 1]
### a generator pulled by hand
def naturals():
    n = 0
    while True:
        yield n
        n += 1  # WRONG: n += 2
---
import itertools
it = naturals()
assert next(it) == 0
assert next(it) == 1
assert list(itertools.islice(naturals(), 5)) == [0, 1, 2, 3, 4]
assert list(zip("abc", naturals())) == [("a", 0), ("b", 1), ("c", 2)]
### a generator that ends
def two():
    yield 1
    yield 2
    return  # WRONG: yield 3
---
g = two()
assert next(g) == 1
assert next(g) == 2
try:
    next(g)
    assert False, "must end"
except StopIteration:
    pass
### a generator that is sent values
def averager():
    total, n, average = 0.0, 0, None
    while True:
        x = yield average
        total += x  # WRONG: total = x
        n += 1
        average = total / n
---
a = averager()
next(a)
assert a.send(10) == 10.0
assert a.send(20) == 15.0
a.close()
### an iterator of the library
def pairs(xs):
    return zip(xs, xs[1:])  # WRONG: return zip(xs, xs)
---
assert list(pairs([1, 2, 3])) == [(1, 2), (2, 3)]
assert dict(pairs("ab")) == {"a": "b"}
### a stack with methods
class Stack:
    def __init__(self):
        self.items = []
    def push(self, x):
        self.items.append(x)
    def pop(self):
        if not self.items:
            raise IndexError("empty")
        return self.items.pop()  # WRONG: return self.items.pop(0)
    def __len__(self):
        return len(self.items)
---
s = Stack()
s.push(1)
s.push(2)
assert len(s) == 2
assert s.pop() == 2
assert s.items == [1]
s.pop()
try:
    s.pop()
    raise AssertionError("no error")
except IndexError as error:
    assert str(error) == "empty"
### a class with operators
class Vector:
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __add__(self, o):
        return Vector(self.x + o.x, self.y + o.y)  # WRONG: return Vector(self.x, self.y)
    def __mul__(self, k):
        return Vector(self.x * k, self.y * k)
    def __eq__(self, o):
        return isinstance(o, Vector) and (self.x, self.y) == (o.x, o.y)
    def __abs__(self):
        return (self.x ** 2 + self.y ** 2) ** 0.5
    def __repr__(self):
        return f"Vector({self.x}, {self.y})"
---
v = Vector(3, 4)
assert abs(v) == 5.0
assert v + Vector(1, 1) == Vector(4, 5)
assert v * 2 == Vector(6, 8)
assert repr(v + v) == "Vector(6, 8)"
assert v != Vector(0, 0)
assert (v + v).x == 6
### a bank account with exceptions of its own
class InsufficientFunds(Exception):
    def __init__(self, need):
        super().__init__(f"need {need}")
        self.need = need
class Account:
    def __init__(self, balance=0):
        self.balance = balance
    def withdraw(self, n):
        if n > self.balance:  # WRONG: if n > self.balance + 100:
            raise InsufficientFunds(n - self.balance)
        self.balance -= n
        return self.balance
---
a = Account(10)
assert a.withdraw(3) == 7
try:
    a.withdraw(100)
except InsufficientFunds as error:
    assert error.need == 93
    assert "93" in str(error)
else:
    assert False
### a linked list walked node by node
class Node:
    def __init__(self, value):
        self.value = value
        self.next = None
class LinkedList:
    def __init__(self):
        self.head = None
    def add(self, value):
        node = Node(value)
        if self.head is None:
            self.head = node
            return
        at = self.head
        while at.next:
            at = at.next
        at.next = node  # WRONG: self.head = node
---
ll = LinkedList()
for i in (1, 2, 3):
    ll.add(i)
assert ll.head.value == 1
assert ll.head.next.value == 2
assert ll.head.next.next.next is None
found, node = [], ll.head
while node:
    found.append(node.value)
    node = node.next
assert found == [1, 2, 3]
### a solution class
class Solution:
    def twoSum(self, nums, target):
        seen = {}
        for i, n in enumerate(nums):
            if target - n in seen:
                return [seen[target - n], i]  # WRONG: return [i, i]
            seen[n] = i
---
assert Solution().twoSum([2, 7, 11, 15], 9) == [0, 1]
assert Solution().twoSum(nums=[3, 3], target=6) == [0, 1]
### nodes of a class in the setup
def depth(root):
    if root is None:
        return 0
    return 1 + max(depth(root.left), depth(root.right))  # WRONG: return 1 + depth(root.left)
---
assert depth(TreeNode(1, None, TreeNode(2, TreeNode(3)))) == 3
assert depth(None) == 0
---
class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right
### nodes of a class in the setup, made by the program
def build(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)  # WRONG: head = ListNode(value)
    return head
---
assert build([1, 2, 3]).to_list() == [1, 2, 3]
assert build([]) is None
assert isinstance(build([1]), ListNode)
---
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next
    def to_list(self):
        return [self.val] + (self.next.to_list() if self.next else [])
### nodes changed in place
def invert(root):
    if root:
        root.left, root.right = invert(root.right), invert(root.left)  # WRONG: pass
    return root
---
t = TreeNode(1, TreeNode(2), TreeNode(3))
same = invert(t)
assert same is t
assert t.left.val == 3 and t.right.val == 2
---
class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val = val
        self.left = left
        self.right = right
### the program brings its own copy of the setup's class
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next
def reverse(head):
    back = None
    while head:
        head.next, back, head = back, head, head.next  # WRONG: back, head = head, head.next
    return back
---
assert to_list(reverse(ListNode(1, ListNode(2, ListNode(3))))) == [3, 2, 1]
---
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next
def to_list(node):
    out = []
    while node is not None:
        out.append(node.val)
        node = node.next
    return out
### a data class in the setup
def move(p, dx):
    return Point(p.x + dx, p.y)  # WRONG: return Point(p.x, p.y)
---
assert move(Point(1, 2), 5) == Point(6, 2)
---
from dataclasses import dataclass
@dataclass
class Point:
    x: int
    y: int
### ValueError with a message
def parse(text):
    if not text.isdigit():
        raise ValueError("not a number: " + text)  # WRONG: return 0
    return int(text)
---
import re
assert parse("12") == 12
try:
    parse("x")
    assert False
except ValueError as error:
    assert re.search("not a number", str(error))
    assert error.args == ("not a number: x",)
### a subclass of the program's is caught by its base
import json
class ParseError(ValueError): pass
def load(text):
    if text == "own":
        raise ParseError("own")
    return json.loads(text)  # WRONG: return None
---
for bad in ("{", "own"):
    try:
        load(bad)
    except ValueError:
        pass
    else:
        raise AssertionError(bad)
### JSONDecodeError with its attributes
import json
def load(text):
    return json.loads(text)  # WRONG: return {}
---
import json
try:
    load("[1, 2")
    assert False
except json.JSONDecodeError as error:
    assert error.pos == 5
    assert error.lineno == 1
### KeyError, LookupError and chained causes
class Missing(Exception): pass
def get(d, k):
    try:
        return d[k]
    except KeyError as error:
        raise Missing(k) from error  # WRONG: return None
---
try:
    get({}, "a")
    assert False
except Missing as error:
    assert isinstance(error.__cause__, LookupError)
    assert error.args[0] == "a"
### pytest functions
def add(a, b):
    return a + b  # WRONG: return a - b
---
from solution import add
def test_small():
    assert add(1, 2) == 3
def test_negative():
    assert add(-1, -2) == -3
### a test class with set-up
class Counter2:
    def __init__(self): self.n = 0
    def hit(self): self.n += 1  # WRONG: def hit(self): self.n += 2
---
class TestCounter:
    def setup_method(self):
        self.c = Counter2()
    def test_one(self):
        self.c.hit()
        assert self.c.n == 1
### unittest with main
def mul(a, b):
    return a * b  # WRONG: return a + b
---
import unittest
class TestMul(unittest.TestCase):
    def setUp(self):
        self.cases = [(2, 3, 6), (0, 5, 0)]
    def test_cases(self):
        for a, b, c in self.cases:
            with self.subTest(a=a):
                self.assertEqual(mul(a, b), c)
    def test_float(self):
        self.assertAlmostEqual(mul(0.1, 3), 0.3)
    def test_type(self):
        with self.assertRaises(TypeError):
            mul({}, {})
if __name__ == "__main__":
    unittest.main()
### assertions in a main block
def cube(x):
    return x ** 3  # WRONG: return x ** 2
---
if __name__ == "__main__":
    assert cube(3) == 27
    print("ok")
### a higher-order function and lambdas
def apply_all(fs, x):
    return [f(x) for f in fs]  # WRONG: return [x for f in fs]
---
assert apply_all([lambda v: v + 1, lambda v: v * v, float], 3) == [4, 9, 3.0]
assert apply_all([abs, str], -2) == [2, "-2"]
### closures and composition
def compose(f, g):
    return lambda x: f(g(x))  # WRONG: return lambda x: g(f(x))
def adder(n):
    return lambda x: x + n
---
import math
inc_then_double = compose(lambda x: 2 * x, lambda x: x + 1)
assert inc_then_double(3) == 8
assert adder(5)(1) == 6
assert compose(adder(1), math.sqrt)(9) == 4.0
### a decorator
import functools
def memoize(f):
    known = {}
    @functools.wraps(f)
    def wrapper(*a):
        if a not in known:  # WRONG: if True:
            known[a] = f(*a)
        return known[a]
    return wrapper
---
calls = []
@memoize
def slow(x):
    calls.append(x)
    return x * x
assert slow(3) == 9
assert slow(3) == 9
assert calls == [3]
### sorting by a function of the tests
def sort_by(xs, key):
    return sorted(xs, key=key)  # WRONG: return sorted(xs)
---
assert sort_by(["bb", "a", "ccc"], key=lambda s: -len(s)) == ["ccc", "bb", "a"]
assert sort_by([3, 1, 2], lambda x: x) == [1, 2, 3]
### arguments changed in place
def rotate(m):
    m[:] = [list(r) for r in zip(*m[::-1])]  # WRONG: m = [list(r) for r in zip(*m[::-1])]
---
m = [[1, 2], [3, 4]]
rotate(m)
assert m == [[3, 1], [4, 2]]
### arguments left alone
def longest(xs):
    return sorted(xs, key=len)[-1]  # WRONG: xs.sort(key=len); return xs[-1]
---
words = ["ccc", "a"]
assert longest(words) == "ccc"
assert words == ["ccc", "a"]
### an iterator of the tests
def take(it, n):
    out = []
    for x in it:
        out.append(x)
        if len(out) == n:  # WRONG: if len(out) == n + 1:
            return out
    return out
---
import itertools
assert take(itertools.count(5), 3) == [5, 6, 7]
assert take((c for c in "ab"), 2) == ["a", "b"]
assert take(iter([1]), 1) == [1]
### types as arguments and results
def only(xs, kind):
    return [x for x in xs if type(x) is kind]  # WRONG: return xs
---
assert only([1, "a", 2.0], str) == ["a"]
assert type(only([1], int)) is list
assert isinstance(only([1], int), list)
### none and identity
def find(xs, x):
    return xs.index(x) if x in xs else None  # WRONG: return xs.index(x) if x in xs else -1
---
assert find([1], 2) is None
assert find([1, 2], 2) is not None
assert not find([], 1)
### randomized against a helper
def my_sort(xs):
    return sorted(xs)  # WRONG: return xs
---
import random
def check(candidate):
    random.seed(0)
    for _ in range(20):
        xs = [random.randint(0, 9) for _ in range(10)]
        out = candidate(list(xs))
        assert all(a <= b for a, b in zip(out, out[1:]))
        assert sorted(out) == sorted(xs)
check(my_sort)
### encode and decode together
def encode(s):
    return s[::-1]
def decode(s):
    return s[::-1]  # WRONG: return s
---
for text in ("abc", "", "xyz"):
    assert decode(encode(text)) == text
### counters and other types of the library
from collections import Counter, OrderedDict, defaultdict, namedtuple
def tally(s):
    return Counter(s)  # WRONG: return Counter()
def point():
    return namedtuple("P", "x y")(1, 2)
def grouped():
    d = defaultdict(list)
    d["a"].append(1)
    return d
---
from collections import Counter
assert tally("aab") == Counter("aab") == {"a": 2, "b": 1}
assert tally("aab").most_common(1) == [("a", 2)]
assert point() == (1, 2)
assert grouped() == {"a": [1]}
### printed output
def hello():
    print("hello")  # WRONG: print("bye")
---
import io
from contextlib import redirect_stdout
out = io.StringIO()
with redirect_stdout(out):
    hello()
assert out.getvalue() == "hello\n"
### coroutines
import asyncio
async def later(x):
    await asyncio.sleep(0)
    return x + 1  # WRONG: return x
---
import asyncio
assert asyncio.run(later(1)) == 2
async def main():
    return [await later(i) for i in range(3)]
assert asyncio.run(main()) == [1, 2, 3]
### a context manager of the program
from contextlib import contextmanager
log = []
@contextmanager
def tag(name):
    log.append("<" + name)  # WRONG: log.append(name)
    yield name.upper()
    log.append(">")
def get_log():
    return list(log)
---
with tag("b") as t:
    assert t == "B"
assert get_log() == ["<b", ">"]
### enumerations
from enum import Enum
class Color(Enum):
    RED = 1
    BLUE = 2
def favourite(n):
    return Color.RED if n == 1 else Color.BLUE  # WRONG: return Color.BLUE
---
assert favourite(1) == Color.RED
assert favourite(2) is Color.BLUE
assert Color.RED.value == 1
assert [c.name for c in Color] == ["RED", "BLUE"]
### inheritance and isinstance
class Shape:
    def area(self): raise NotImplementedError
class Square(Shape):
    def __init__(self, s): self.s = s
    def area(self): return self.s ** 2  # WRONG: def area(self): return self.s
---
q = Square(3)
assert isinstance(q, Shape)
assert issubclass(Square, Shape)
assert q.area() == 9
try:
    Shape().area()
    assert False
except NotImplementedError:
    pass
### class methods, properties and class attributes
class Temp:
    unit = "C"
    def __init__(self, c): self._c = c
    @property
    def fahrenheit(self): return self._c * 9 / 5 + 32  # WRONG: def fahrenheit(self): return self._c
    @classmethod
    def from_f(cls, f): return cls((f - 32) * 5 / 9)
    @staticmethod
    def freezing(): return 0
---
assert Temp(100).fahrenheit == 212
assert Temp.from_f(212).fahrenheit == 212
assert Temp.freezing() == 0
assert Temp.unit == "C"
### a container class
class Bag:
    def __init__(self, xs): self.xs = list(xs)
    def add(self, x): self.xs.append(x)
    def __contains__(self, x): return x in self.xs  # WRONG: def __contains__(self, x): return False
    def __getitem__(self, i): return self.xs[i]
    def __iter__(self): return iter(self.xs)
    def __len__(self): return len(self.xs)
---
b = Bag([1, 2])
b.add(3)
assert 3 in b
assert 4 not in b
assert b[0] == 1
assert list(b) == [1, 2, 3]
assert [x for x in b if x > 1] == [2, 3]
assert sum(b) == 6
### an iterator class
class Down:
    def __init__(self, n): self.n = n
    def __iter__(self): return self
    def __next__(self):
        if self.n == 0:
            raise StopIteration
        self.n -= 1
        return self.n  # WRONG: return self.n + 1
---
assert list(Down(3)) == [2, 1, 0]
d = Down(1)
assert next(d) == 0
try:
    next(d)
    assert False
except StopIteration:
    pass
### numbers of many kinds
from fractions import Fraction
from decimal import Decimal
def third(): return Fraction(1, 3)  # WRONG: def third(): return Fraction(1, 2)
def cents(): return Decimal("0.10")
def big(): return 10 ** 400
def root(): return 1j
---
from fractions import Fraction
from decimal import Decimal
assert third() + Fraction(2, 3) == 1
assert cents() == Decimal("0.1")
assert big() == 10 ** 400
assert root() ** 2 == -1
### dates
import datetime
def next_day(d):
    return d + datetime.timedelta(days=1)  # WRONG: return d
---
import datetime
assert next_day(datetime.date(2024, 2, 28)) == datetime.date(2024, 2, 29)
### several functions that depend on each other
def is_prime(n):
    return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))
def primes(n):
    return [i for i in range(n) if is_prime(i)]  # WRONG: return list(range(n))
---
assert is_prime(7)
--
assert primes(10) == [2, 3, 5, 7]
--
assert all(map(is_prime, primes(50)))
### names of built-in functions
def sum(a, b):
    return a + b  # WRONG: return a
---
assert sum(1, 2) == 3
assert sum(-1, 1) == 0
"""
)
