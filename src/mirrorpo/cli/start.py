"""The entry point of the command line: every way in which a command ends becomes one line and an exit status.

0 done, 1 failed, 2 bad input, 128 and the signal's number when interrupted. An error that nobody foresaw is one line
too; its traceback goes to a log file, or to stderr with ``--debug``.
"""

from __future__ import annotations

import sys
from typing import Any

_INTERRUPTED = 130
# Characters of an error's one line: the names in it are the user's, and may be of any length.
_MAX_LINE = 1_000
# Lines of a traceback that ``--debug`` prints: an endless recursion has thousands.
_MAX_TRACEBACK = 200


def main(module_run: bool = False) -> None:
    """Runs the command in ``sys.argv`` and exits.

    Args:
        module_run: started by ``python -m``, which puts the current folder in front of ``sys.path``: a file there must
            not stand for an installed package. It is taken out again.
    """
    if module_run and not sys.flags.safe_path:
        del sys.path[0]
    from mirrorpo.errors import missing, needs_train

    absent = missing()
    if absent:
        fail(needs_train("mirrorpo on the command line", absent), 1)
    _run()


def _run() -> None:
    import os
    from pathlib import Path

    import typer

    from mirrorpo.cli import output
    from mirrorpo.cli.app import app
    from mirrorpo.errors import InputError, Interrupted, RunError, unimportable_vllm
    from mirrorpo.user_code import look_in

    # No code from the hub: a model's config may name a kernel in a stranger's repository.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    output.reset()
    look_in(Path.cwd())
    # Typer's own complaint about arguments; the class has no public name of its own.
    usage_error: Any = typer.BadParameter.__base__
    try:
        # Typer turns Ctrl-C and Exit into a returned status.
        status = app(prog_name="mirrorpo", standalone_mode=False)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(status or 0)
    except InputError as error:
        fail(f"error: {error}", 2)
    except usage_error as error:
        fail(f"error: {_usage(error)}", 2)
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except RunError as error:
        fail(f"failed: {error}", 1)
    except Interrupted as error:
        fail(str(error), error.status)
    except (typer.Abort, KeyboardInterrupt):
        fail("interrupted; what was finished is kept, --resume goes on", _INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001  (the last line of defence; Rust's panics are no Exception)
        if line := unimportable_vllm(error):
            fail(f"error: {line}", 2)
        _fail_unexpected(error, debug=output.chosen.debug)


def _usage(error: BaseException) -> str:
    """What is wrong with the arguments, and where the legal ones are listed."""
    message = error.format_message().rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
    context = error.ctx  # pyright: ignore[reportAttributeAccessIssue]
    see = " See" if message.endswith("?") else "; see"
    return f"{message}{see} `{context.command_path if context else 'mirrorpo'} --help`"


def fail(message: str, status: int) -> None:
    """Ends the process with one line on stderr, whatever the message holds."""
    if len(message) > _MAX_LINE:
        message = f"{message[: _MAX_LINE // 2]} ... {message[-_MAX_LINE // 2 :]}"
    line = "".join(c if c.isprintable() else " " for c in message)
    sys.stderr.write(" ".join(line.split()) + "\n")
    sys.exit(status)


def _fail_unexpected(error: BaseException, *, debug: bool) -> None:
    import traceback

    from mirrorpo.wording import printable_lines

    lines = printable_lines("".join(traceback.format_exception(error))).splitlines()
    said = f"failed: {type(error).__name__}: {' '.join(str(error).split())[: _MAX_LINE // 2]}"
    if debug:
        if len(lines) > _MAX_TRACEBACK:
            half = _MAX_TRACEBACK // 2
            lines = [*lines[:half], f"... {len(lines) - 2 * half} lines", *lines[-half:]]
        sys.stderr.write("\n".join(lines) + "\n")
        fail(said, 1)
    log = _log(lines)
    where = f"traceback in {log}" if log else "--debug prints the traceback"
    fail(f"{said} (a mistake of mirrorpo, or of a library below it: {where})", 1)


def _log(lines: list[str]) -> str | None:
    """The path of a new file with the command and the traceback; None where no file can be written."""
    import os
    import tempfile

    from mirrorpo.cli.output import typed

    try:
        handle, path = tempfile.mkstemp(prefix="mirrorpo-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join([typed(), sys.version.replace("\n", " "), *lines]) + "\n")
    except OSError:  # no folder for temporary files, or a full disk
        return None
    return path


__all__ = ["fail", "main"]
