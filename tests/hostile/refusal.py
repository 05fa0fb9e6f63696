"""A command that must refuse its input: status 2, one line on stderr, and every file and folder as it was."""

from __future__ import annotations

import io
import os
import sys
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from mirrorpo.cli import main

TINY_RUN = ["task.train_size=64", "train.steps=1", "train.prompts_per_step=2", "train.group_size=2", "eval.problems=0"]


def refused(arguments: list[str], cwd: Path) -> str:
    """The line of a command that must end with status 2 and leave everything as it was."""
    before = snapshot(cwd)
    from mirrorpo.training import run

    out, err = io.StringIO(), io.StringIO()
    status: object = None
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(chdir(cwd))
        stack.enter_context(patch.object(sys, "argv", ["mirrorpo", *arguments]))
        for name in ("run_evaluation", "_resume_point"):  # what comes behind the last check
            stack.enter_context(patch.object(run, name, side_effect=AssertionError("was not refused")))
        path = list(sys.path)
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code
        sys.path[:] = path
    assert status == 2, (status, err.getvalue()[-2000:])
    assert out.getvalue() == ""
    line = err.getvalue()
    assert line.count("\n") == 1, line
    assert line.startswith("error: ")
    assert line.rstrip("\n").isprintable()
    assert len(line) < 2_000
    assert snapshot(cwd) == before
    return line


def snapshot(folder: Path) -> dict[str, object]:
    """Names and contents of everything under a folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = None
    return found
