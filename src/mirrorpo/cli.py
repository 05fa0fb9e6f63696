"""The command line: ``mirrorpo --help``. Exit status 0 done, 1 failed, 2 bad input with a one-line reason on stderr."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mirrorpo.errors import InputError, Interrupted, RunError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)
JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

# Characters of an error's one line: the names in it are the user's, and may be of any length.
_MAX_LINE = 1_000
_INTERRUPTED = 128 + signal.SIGINT
# Typer's own complaint about arguments; the class has no public name of its own.
_USAGE_ERROR: Any = typer.BadParameter.__base__


def _say(text: str) -> None:
    """To stdout, as it is: no markup, no wrapping."""
    sys.stdout.write(text + "\n")


def _quiet() -> None:
    """Libraries' bars and notices off: this program draws its own, and raises on what matters."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that is shipped.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=5")] = None,
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = ...,  # pyright: ignore[reportArgumentType]
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    as_json: JSON = False,
) -> None:
    """Train a policy: evaluate, train, evaluate, report."""
    from mirrorpo.recipes import find_recipe
    from mirrorpo.training.recipe import load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [])
    _quiet()
    from mirrorpo.training.run import train as run

    command = "mirrorpo " + shlex.join(sys.argv[1:])
    summary = run(loaded, out, resume=resume, console=console, command=command)
    if as_json:
        _say(json.dumps(summary, indent=2))
        return
    if summary["accuracy_after"] is not None:
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        _say(f"accuracy {before:.3f} -> {after:.3f} on {summary['problems']} unseen problems")
        _say(f"mean length {summary['mean_length_before']:.1f} -> {summary['mean_length_after']:.1f} tokens")
    _say(f"{summary['steps']} steps in {summary['seconds']:.0f} s; report: {out / 'report.html'}")


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(help="builtin:tiny, a folder (a run's model/) or a hub name.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as task.difficulty=hard")] = None,
    task: Annotated[str, typer.Option("--task", help="A name of `mirrorpo list tasks`.")] = ...,  # pyright: ignore[reportArgumentType]
    samples: Annotated[int, typer.Option("--samples", min=1, help="Completions per problem.")] = 1,
    k: Annotated[str, typer.Option("-k", help="pass@k for these, comma-separated.")] = "1",
    as_json: JSON = False,
) -> None:
    """Accuracy and unbiased pass@k on a task's unseen problems."""
    from mirrorpo.training.recipe import recipe_from

    data: dict[str, Any] = {"task": {"name": task}, "model": {"path": model}}
    recipe = recipe_from(data, overrides or [], "eval")
    ks = _integers("-k", k)
    if max(ks) > samples:
        raise InputError(f"-k {k}: k must be at most the number of samples, {samples}")
    _quiet()
    from mirrorpo.evaluation.run import evaluate_recipe

    result = evaluate_recipe(recipe, samples, ks, console)
    if as_json:
        _say(json.dumps(result, indent=2))
        return
    for n in ks:
        low, high = result[f"pass@{n}_interval"]
        _say(f"pass@{n} {result[f'pass@{n}']:.4f}  [{low:.4f}, {high:.4f}]")
    _say(f"{result['problems']} problems, mean length {result['mean_length']:.1f} tokens, reasons {result['reasons']}")


def _integers(option: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise InputError(f"{option} {text}: must be integers >= 1, comma-separated, such as 1,8")
    return values


@app.command("list")
def list_names(
    what: Annotated[str, typer.Argument(help="divergences, regions, objectives, tasks or recipes")],
    as_json: JSON = False,
) -> None:
    """The names that recipes and functions take, with formulas and papers."""
    from mirrorpo.listing import listing, render

    rows = listing(what)
    if as_json:
        _say(json.dumps(rows, indent=2))
    else:
        render(what, rows)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    as_json: JSON = False,
) -> None:
    """Draw curve.png and report.html of finished runs again."""
    from mirrorpo.reporting import write_curve, write_report

    written = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        try:
            written += [str(write_curve(folder)), str(write_report(folder))]
        except (ValueError, FileNotFoundError) as error:
            raise InputError(str(error)) from error
    _say(json.dumps(written, indent=2) if as_json else "\n".join(written))


@app.command()
def grade(
    kind: Annotated[str, typer.Argument(help="math or code")],
    file: Annotated[Path, typer.Argument(help="JSON lines: completion and answer, or completion, tests and setup.")],
    require: Annotated[str, typer.Option(help="Code: the least level of the sandbox.")] = "confined",
    wall_seconds: Annotated[float, typer.Option(help="Code: time limit of a program.")] = 10.0,
    last_number: Annotated[bool, typer.Option("--last-number", help="Math: without a mark, the last number.")] = False,
    _as_json: JSON = False,  # what it prints is JSON anyway
) -> None:
    """Grade completions: one line in, one JSON line out, in order."""
    from mirrorpo.rewards import lines

    if kind not in ("math", "code"):
        raise InputError(f"grade {kind}: must be math or code")
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    with file.open("rb") as source:
        for line in lines.graded(kind, source, require, wall_seconds, last_number):
            _say(line)
            sys.stdout.flush()  # a reader may wait for this one


@app.command()
def doctor(as_json: JSON = False) -> None:
    """What this machine has, and what of it is outside the tested range."""
    from mirrorpo.doctor import examine, render

    findings = examine()
    if as_json:
        _say(json.dumps(findings, indent=2))
    else:
        render(findings)
    if any(finding["state"] == "bad" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """The entry point: errors become one line and a status."""
    sys.path.insert(0, str(Path.cwd()))  # so that "module:function" finds the user's own file
    try:
        # Typer turns Ctrl-C and Exit into a returned status.
        status = app(standalone_mode=False)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(status or 0)
    except InputError as error:
        _fail(f"error: {error}", 2)
    except _USAGE_ERROR as error:
        _fail(f"error: {error.format_message()}", 2)
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except RunError as error:
        _fail(f"failed: {error}", 1)
    except Interrupted as error:
        _fail(str(error), error.status)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; the last checkpoint is intact", _INTERRUPTED)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  (the last line of defence: report, do not swallow)
        _fail_unexpected(error)


def _fail(message: str, status: int) -> None:
    if len(message) > _MAX_LINE:
        message = f"{message[: _MAX_LINE // 2]} ... {message[-_MAX_LINE // 2 :]}"
    line = "".join(c if c.isprintable() else " " for c in message)
    sys.stderr.write(" ".join(line.split()) + "\n")
    sys.exit(status)


def _fail_unexpected(error: Exception) -> None:
    import traceback

    from mirrorpo.rewards import RewardError
    from mirrorpo.training.trainer import NonFiniteError

    if isinstance(error, NonFiniteError | RewardError):
        _fail(f"failed: {error}", 1)
    traceback.print_exc()
    _fail(f"failed: {type(error).__name__}: {error}", 1)


__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
