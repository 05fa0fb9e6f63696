"""No program earns a reward but by solving the task, gets at anything, or wears anything out."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from attacks import ALL, ESCAPES, EXHAUSTIONS, FORGERIES, Attack, program

from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.sandbox import Limits
from mirrorpo.rewards.verdict import Grade

TESTS = {"value": ["assert solve(3) == 9"], "live": ["def check(c):\n    assert c(3) == 9\ncheck(solve)"]}
LAYERS = {"isolated": ("namespaces", "landlock", "seccomp"), "confined": ("landlock", "seccomp")}
RIGHT = "def solve(x): return x * x"
CANARY = "canary-7d1f"


@dataclass
class Host:
    """What the attacks are after."""

    folder: Path
    secret: Path
    listener: socket.socket
    bystander: psutil.Popen

    def facts(self) -> dict[str, object]:
        return {"secret": self.secret, "port": self.listener.getsockname()[1], "pid": os.getpid()}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    secret = folder / "secret.txt"
    secret.write_text(CANARY)
    os.environ["MIRRORPO_CANARY"] = CANARY
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        bystander = psutil.Popen(["sleep", "600"])
        yield Host(folder, secret, listener, bystander)
        bystander.kill()
        bystander.wait()
    del os.environ["MIRRORPO_CANARY"]


def verifier_on(level: str, wall_seconds: float) -> CodeVerifier:
    limits = Limits(wall_seconds=wall_seconds, cpu_seconds=1 if wall_seconds < 5 else 10, memory_mb=256)
    verifier = CodeVerifier(limits=limits, require="limits", layers=LAYERS[level], in_flight=8)
    reached = verifier.reached()
    if reached.level != level:
        verifier.close()
        pytest.skip(f"this machine reaches level {reached.level}, not {level}: {reached.errors}")
    return verifier


def grades_of(attacks: list[Attack], level: str, form: str, host: Host, wall_seconds: float) -> list[Grade]:
    """The verdicts on the attacks, many at once, and one on an honest program that comes last."""
    verifier = verifier_on(level, wall_seconds)
    jobs = [(f"```python\n{program(attack, **host.facts())}\n```", TESTS[form], "") for attack in attacks]
    try:
        grades = verifier.grade_many(jobs)
        assert verifier.grade(RIGHT, TESTS[form]).reason == "passed", "the pool serves the next program"
    finally:
        verifier.close()
    return grades


def assert_earned_nothing(attacks: list[Attack], grades: list[Grade]) -> None:
    wrong = [
        f"{attack.name}: {grade.reward} {grade.reason!r}, expected one of {sorted(attack.reasons)}"
        for attack, grade in zip(attacks, grades, strict=True)
        if grade.reward != 0.0 or grade.reason not in attack.reasons
    ]
    assert not wrong, "\n".join(wrong)


def test_the_corpus_is_large_and_its_names_are_distinct() -> None:
    assert len({attack.name for attack in ALL}) == len(ALL) >= 60


@pytest.mark.parametrize("form", TESTS)
@pytest.mark.parametrize("level", LAYERS)
def test_forged_verdicts_earn_nothing(level: str, form: str, host: Host) -> None:
    assert_earned_nothing(FORGERIES, grades_of(FORGERIES, level, form, host, wall_seconds=5.0))


@pytest.mark.parametrize("form", TESTS)
@pytest.mark.parametrize("level", LAYERS)
def test_escapes_earn_nothing_and_reach_nothing(level: str, form: str, host: Host) -> None:
    before = sorted(host.folder.iterdir())
    assert_earned_nothing(ESCAPES, grades_of(ESCAPES, level, form, host, wall_seconds=10.0))
    assert sorted(host.folder.iterdir()) == before
    assert host.secret.read_text() == CANARY
    assert host.bystander.poll() is None, "another process of the user lives on"
    with pytest.raises(BlockingIOError):
        host.listener.accept()
    assert not Path("/tmp/mirrorpo-attack").exists()
    assert not Path("/dev/shm/mirrorpo-attack").exists()
    assert os.environ["MIRRORPO_CANARY"] == CANARY


@pytest.mark.parametrize("form", TESTS)
def test_exhaustion_is_ended_by_a_limit(form: str, host: Host) -> None:
    level = "isolated" if form == "value" else "confined"
    endless = [attack for attack in EXHAUSTIONS if "timeout" in attack.reasons]
    others = [attack for attack in EXHAUSTIONS if "timeout" not in attack.reasons]
    assert_earned_nothing(endless, grades_of(endless, level, form, host, wall_seconds=2.0))
    assert_earned_nothing(others, grades_of(others, level, form, host, wall_seconds=30.0))


def test_nothing_of_the_programs_is_left(host: Host) -> None:
    me = psutil.Process()
    before, memory = {child.pid for child in me.children(recursive=True)}, me.memory_info().rss
    descriptors = me.num_fds()
    grades_of(EXHAUSTIONS[:4] + ESCAPES[:4], "isolated", "value", host, wall_seconds=2.0)
    assert {child.pid for child in me.children(recursive=True)} == before
    assert me.num_fds() <= descriptors + 2
    assert me.memory_info().rss - memory < 100 << 20
    started, used = time.monotonic(), sum(os.times()[:4])
    time.sleep(0.3)
    assert sum(os.times()[:4]) - used <= 0.1 + 0.5 * (time.monotonic() - started), "no processor time goes on"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64, "limits are the programs', not ours"
