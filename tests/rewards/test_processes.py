"""Processor time is what counts, no process outlives its parent, nothing passes from one program to the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.sandbox import Limits, pool, zygote

LAYERS = {
    "isolated": ("namespaces", "landlock", "seccomp"),
    "confined": ("landlock", "seccomp"),
    "filtered": ("seccomp",),
    "limits": (),
}
each_level = pytest.mark.parametrize("level", LAYERS)
SPIN = "def f(x):\n    while True: pass"
# Half a second of work in one thread.
WORK = "import time\ndef f(x):\n    while time.process_time() < 0.5: pass\n    return x"


def verifier_on(level: str, **limits: float) -> CodeVerifier:
    verifier = CodeVerifier(
        limits=Limits(**limits),  # pyright: ignore[reportArgumentType]
        require="limits",
        layers=LAYERS[level],
        in_flight=8,
    )
    reached = verifier.reached()
    if reached.level != level:
        verifier.close()
        pytest.skip(f"this machine reaches level {reached.level}, not {level}: {reached.errors}")
    return verifier


@pytest.fixture(scope="module")
def confined() -> Iterator[CodeVerifier]:
    verifier = verifier_on("confined", wall_seconds=20.0)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("test", ["assert f(1) == 1", "for i in (1,): assert f(i) == i"])
def test_an_honest_program_passes_beside_seven_that_spin(test: str) -> None:
    # It works for half a second, and the limit is one: with the cores shared by eight it takes longer than that.
    verifier = verifier_on("confined", wall_seconds=1.0, cpu_seconds=2)
    try:
        grades = verifier.grade_many([(SPIN, [test], "")] * 7 + [(WORK, [test], "")])
    finally:
        verifier.close()
    assert [grade.reason for grade in grades] == ["timeout"] * 7 + ["passed"]


def test_the_clock_of_the_limits_counts_what_programs_could_have_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now, used = [0.0], {1: 0.0, 2: 0.0}
    monkeypatch.setattr(zygote.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(zygote, "_processor_seconds", used.__getitem__)
    clock = zygote.FairClock()

    def pass_on(seconds: float, *work: float) -> float:
        before, now[0] = clock.now, now[0] + seconds
        for pid, share in enumerate(work, 1):
            used[pid] += share * seconds
        assert clock.advance(used)
        return clock.now - before

    assert pass_on(1.0, 0.0, 0.0) == 1.0, "all sleep: as any clock"
    assert pass_on(1.0, 1.0, 1.0) == 1.0, "each has a core for itself"
    assert pass_on(1.0, 0.25, 0.5) == pytest.approx(0.375), "the mean share of those that work"
    assert pass_on(1.0, 0.25, 0.0) == pytest.approx(0.125), "one that got nothing in one tick may be starved"
    assert pass_on(1.0, 0.001, 0.001) == pytest.approx(1 / 32), "never slower than that"
    assert pass_on(60.0, 1.0, 1.0) == 1.0, "this process was kept from a core for most of the minute"


def test_a_program_that_sleeps_is_ended(confined: CodeVerifier) -> None:
    verifier = verifier_on("confined", wall_seconds=0.5)
    try:
        grade = verifier.grade("import time\ndef f():\n    time.sleep(1000)", ["assert f() == 1"])
    finally:
        verifier.close()
    assert (grade.reward, grade.reason) == (0.0, "timeout")


@each_level
def test_a_program_that_stops_itself_is_ended_and_counts_as_late(level: str) -> None:
    verifier = verifier_on(level, wall_seconds=1.0)
    stop = "import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGSTOP)\n    return 1"
    try:
        assert verifier.grade(stop, ["assert f() == 1"]).reason in ("timeout", "error")
        assert verifier.grade("def f(): return 1", ["assert f() == 1"]).reason == "passed"
    finally:
        verifier.close()


TRAINER = """
import sys, threading, time
from mirrorpo.rewards.code import CodeVerifier
verifier = CodeVerifier(require="limits", layers={layers!r})
verifier.reached()
threading.Thread(target=verifier.grade, args=({code!r}, ["assert f(1) == 1"]), daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""


@each_level
@pytest.mark.parametrize("stopped", [False, True])
def test_no_process_outlives_a_killed_trainer(level: str, stopped: bool) -> None:
    verifier_on(level).close()
    text = TRAINER.format(layers=LAYERS[level], code=SPIN)
    trainer = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"ready\n"
    wanted = 3 if level == "isolated" else 2
    children: list[psutil.Process] = []
    while len(children) < wanted:
        children = psutil.Process(trainer.pid).children(recursive=True)
        time.sleep(0.02)
    if stopped:
        for child in children:
            child.suspend()
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert alive == []


@each_level
def test_a_stopped_template_process_is_replaced(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_SILENCE_SECONDS", 2.0)
    verifier = verifier_on(level, wall_seconds=0.05)
    try:
        template = verifier.pool._template
        assert template is not None
        os.kill(template.process.pid, signal.SIGSTOP)
        for child in psutil.Process(template.process.pid).children():
            child.suspend()
        grade = verifier.grade("import time\ndef f():\n    time.sleep(9)", ["assert f() == 1"])
        assert grade.reason in ("timeout", "crashed")
    finally:
        verifier.close()


@each_level
def test_flags_of_the_null_device_do_not_pass_on(level: str) -> None:
    verifier = verifier_on(level)
    leave = "import os\nfor fd in (0, 1, 2): os.set_blocking(fd, False)\ndef f(): return 1"
    look = "import os\ndef f(): return [os.get_blocking(fd) for fd in (0, 1, 2)]"
    try:
        assert verifier.grade(leave, ["assert f() == 1"]).reward == 1.0
        assert verifier.grade(look, ["assert f() == [True, True, True]"]).reason == "passed"
    finally:
        verifier.close()


def test_a_program_learns_nothing_from_the_command_line(confined: CodeVerifier) -> None:
    look = "import sys\ndef f(): return [sys.argv, sys.orig_argv]"
    assert confined.grade(look, ["assert f() == [[''], ['python']]"]).reason == "passed"


def test_a_program_is_in_a_group_of_its_own(confined: CodeVerifier) -> None:
    look = "import os\ndef f(): return os.getpgrp() == os.getpid()"
    assert confined.grade(look, ["assert f() is True"]).reason == "passed"
