"""Signals: raised as one line at once, held where nothing may be left half-way, and put back as they were."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorpo.errors import Interrupted
from mirrorpo.interrupts import SIGNALS, go_on_with, handlers_kept, signals_held, stops_at_once


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is when a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_is_done_with_its_status_and_a_line(number: int, status: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted) as raised, stops_at_once(lambda: "go on"):
        signal.raise_signal(number)
    assert raised.value.status == status
    assert str(raised.value) == f"stopped by {signal.Signals(number).name}; go on"
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_held_acts_behind_the_held_lines(number: int) -> None:
    done = []

    def work() -> None:
        with signals_held():
            signal.raise_signal(number)
            done.append("held")
        done.append("behind")

    with pytest.raises(Interrupted), stops_at_once(lambda: ""):
        work()
    assert done == ["held"]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stops_at_once(lambda: ""):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_library_that_sets_handlers_leaves_ours() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handlers_kept():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_line_says_resume_only_where_resume_would_be_taken(tmp_path: Path) -> None:
    begun = tmp_path / "study.yaml"
    assert go_on_with("mirrorpo study x", begun) == "nothing was begun; start again with: mirrorpo study x"
    begun.touch()
    for command in ("mirrorpo study x", "mirrorpo study x --resume"):
        line = go_on_with(command, begun)
        assert line == "what was finished is kept; continue with: mirrorpo study x --resume"
