"""Progress without a terminal: lines with count, share, rate and time left."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mirrorpo.progress import counted, so_far
from mirrorpo.training import monitors
from mirrorpo.training.records import MetricsWriter


class Told(io.StringIO):
    """A stream that tells when a whole line has come."""

    def __init__(self) -> None:
        super().__init__()
        self.line = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if "\n" in text:
            self.line.set()
        return written


def test_without_a_terminal_lines_come_while_the_count_stands_still() -> None:
    out = Told()
    with counted(Console(file=out, width=200), "evaluating", 8, every=0.01):
        assert out.line.wait(60)
    assert out.getvalue().replace("\u00a0", " ").startswith("evaluating: 0 of 8 (0.0 %) after ")
    assert not any(thread.name == "progress" for thread in threading.enumerate()), "the thread ends with the work"


def test_a_resumed_count_starts_where_it_was_and_its_rate_is_that_of_the_new_work() -> None:
    out = Told()
    with counted(Console(file=out, width=200), "evaluating", 8, done=4, every=0.01) as advance:
        advance(2)
        out.line.clear()
        assert out.line.wait(60)
    last = out.getvalue().replace("\u00a0", " ").splitlines()[-1]
    assert last.startswith("evaluating: 6 of 8 (75.0 %), ")
    assert " a second, about " in last
    # Half of the count was there before: 32 in 16 seconds are 2 a second, and the other 64 take 32.
    assert so_far(64, 128, 32, 16.0).replace("\u00a0", " ") == "64 of 128 (50.0 %), 2 a second, about 32 s left"


def test_work_that_ends_at_once_prints_nothing() -> None:
    out = io.StringIO()
    with counted(Console(file=out), "evaluating", 1) as advance:
        advance(1)
    assert out.getvalue() == ""


def test_a_step_of_minutes_is_not_silent_without_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(monitors, "EVERY", 0.01)
    out = Told()
    bar = monitors.ProgressBar(Console(file=out, width=200), 24, MetricsWriter(tmp_path / "metrics.jsonl", 1))
    before = threading.active_count()
    bar.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=6), None)
    assert out.line.wait(60)
    bar.silent = True  # an evaluation tells how far it is
    bar.stop()
    assert out.getvalue().replace("\u00a0", " ").startswith("training: 6 of 24 (25.0 %) after ")
    assert threading.active_count() == before, "the thread ends with the training"
