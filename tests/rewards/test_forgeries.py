"""No test can be answered by the program it tests; honest programs beside the forgeries keep their reward."""

from __future__ import annotations

import itertools

import pytest
from forgeries import CARRIERS, OPERATIONS, OTHERS
from honest_rows import ROWS

from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.sandbox import Limits

LAYERS = {
    "isolated": ("namespaces", "landlock", "seccomp"),
    "confined": ("landlock", "seccomp"),
    "filtered": ("seccomp",),
    "limits": (),
}


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


# What the subclasses of plain types hold, which is what crosses.
CONTENTS = {"int": -1, "str": "no", "set": {77}}


def content_passes(name: str, tests: list[str]) -> bool:
    """Whether a weak test passes with the plain content of a subclass, so that nothing is forged."""
    carrier = name.rpartition(", ")[2]
    if carrier not in CONTENTS:
        return False
    try:
        exec("\n".join(tests), {"solve": lambda _: CONTENTS[carrier], "__name__": "rows"})
    except Exception:  # noqa: BLE001  (any failure is one)
        return False
    return "unittest" not in tests[0] and "def test" not in tests[0]


def verifier_on(level: str) -> CodeVerifier:
    limits = Limits(wall_seconds=10.0, cpu_seconds=3)
    verifier = CodeVerifier(limits=limits, require="limits", layers=LAYERS[level], in_flight=8)
    reached = verifier.reached()
    if reached.level != level:
        verifier.close()
        pytest.skip(f"this machine reaches level {reached.level}, not {level}: {reached.errors}")
    return verifier


def test_the_corpus_is_large() -> None:
    assert len(OPERATIONS) + len({row.name for row in OTHERS}) >= 100
    assert len({row.name for row in OTHERS}) == len(OTHERS)


@pytest.mark.parametrize("level", LAYERS)
def test_forgeries_earn_nothing_and_honest_programs_beside_them_all(level: str) -> None:
    bad = [(f"{row.name}", (fenced(row.code), row.tests, row.setup)) for row in OTHERS]
    carriers = CARRIERS if level == "isolated" else {"object": CARRIERS["object"]}
    for carrier, code in carriers.items():
        bad += [(f"{name}, {carrier}", (fenced(code), [test], "")) for name, test in OPERATIONS.items()]
    bad = [(name, job) for name, job in bad if not content_passes(name, job[1])]
    good = [(row.name, (fenced(row.code), row.tests, row.setup)) for row in ROWS]
    assert len(bad) > len(good)  # each honest program between two forgeries
    jobs = [job for pair in itertools.zip_longest(bad, good) for job in pair if job is not None]
    verifier = verifier_on(level)
    try:
        grades = verifier.grade_many([job for _, job in jobs])
    finally:
        verifier.close()
    forged = {id(job) for _, job in bad}
    graded = [(name, id(job) in forged, grade) for (name, job), grade in zip(jobs, grades, strict=True)]
    earned = [(name, grade.reason) for name, is_forged, grade in graded if is_forged and grade.reward]
    lost = [(name, grade.reason) for name, is_forged, grade in graded if not is_forged and grade.reward != 1.0]
    assert (earned, lost) == ([], [])
