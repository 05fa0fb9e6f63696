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
from mirrorpo.escape import printable_lines
from mirrorpo.interrupts import go_on_with, stops_at_once
from mirrorpo.quiet import quiet

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)
JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

# Characters of an error's one line: the names in it are the user's, and may be of any length.
_MAX_LINE = 1_000
_INTERRUPTED = 128 + signal.SIGINT
# Typer's own complaint about arguments; the class has no public name of its own.
_USAGE_ERROR: Any = typer.BadParameter.__base__


def _say(text: str) -> None:
    """To stdout: no markup, no wrapping, and nothing in it that a terminal would obey."""
    sys.stdout.write(printable_lines(text) + "\n")


def _json(value: Any) -> str:
    """ASCII: what a terminal would obey is escaped as JSON has it, the delete character too, which JSON lets stand."""
    return json.dumps(value, indent=2).replace("\x7f", "\\u007f")


def _command() -> str:
    """What was typed."""
    return "mirrorpo " + shlex.join(sys.argv[1:])


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that is shipped.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.steps=5")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say what would run; nothing is written.")] = False,
    as_json: JSON = False,
) -> None:
    """Train a policy: evaluate, train, evaluate, report."""
    from mirrorpo.config.shipped import find_recipe
    from mirrorpo.config.train import load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [])
    if out is None and not plan_only:
        raise InputError("--out: missing; give the run folder, or --plan to see what would run")
    quiet()
    if plan_only:
        from mirrorpo.training.plan import plan, render

        planned = plan(loaded)
        _say(_json(planned) if as_json else render(planned))
        return
    assert out is not None
    from mirrorpo.training.run import train as run
    from mirrorpo.training.world import is_main

    summary = run(loaded, out, resume=resume, console=console, command=_command())
    if not is_main():
        return
    if as_json:
        _say(_json(summary))
        return
    if summary["accuracy_after"] is not None:
        before, after = summary["accuracy_before"], summary["accuracy_after"]
        _say(f"accuracy {before:.3f} -> {after:.3f} on {summary['problems']} unseen problems")
        _say(f"mean length {summary['mean_length_before']:.1f} -> {summary['mean_length_after']:.1f} tokens")
    _say(f"{summary['steps']} steps in {summary['seconds']:.0f} s; report: {out / 'report.html'}")


@app.command()
def evolve(
    recipe: Annotated[str, typer.Argument(help="An evolve recipe's file, or the name of one that is shipped.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as evolution.generations=3")] = None,
    out: Annotated[Path, typer.Option("--out", help="The run folder.")] = ...,  # pyright: ignore[reportArgumentType]
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search in the folder.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Default: one a core, or a GPU.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of each worker.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Run on Ray: local, auto or ray://HOST:PORT.")] = None,
    as_json: JSON = False,
) -> None:
    """Search a mirror map that trains better, and compare it with the first on unseen problems."""
    from mirrorpo.config.search import EvolveRecipe
    from mirrorpo.config.shipped import find_recipe
    from mirrorpo.config.train import load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [], EvolveRecipe)
    command = _command()
    with stops_at_once(lambda: go_on_with(command, out / "recipe.yaml")):
        quiet()
        from mirrorpo.search.command import run, sentences

        summary = run(loaded, out, resume, workers, threads, ray, console, command)
    _say(_json(summary) if as_json else sentences(summary, out))


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(help="builtin:tiny, a folder (a run's model/) or a hub name.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as task.difficulty=hard")] = None,
    task: Annotated[str, typer.Option("--task", help="A name of `mirrorpo list tasks`.")] = ...,  # pyright: ignore[reportArgumentType]
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Completions per problem.")] = None,
    k: Annotated[str, typer.Option("-k", help="pass@k for these, comma-separated.")] = "1",
    greedy: Annotated[bool, typer.Option("--greedy", help="The most likely token each time (temperature 0).")] = False,
    engine: Annotated[str, typer.Option("--engine", help="transformers or vllm.")] = "transformers",
    out: Annotated[Path | None, typer.Option("--out", help="A folder that keeps the samples.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the evaluation in the folder.")] = False,
    as_json: JSON = False,
) -> None:
    """Accuracy and unbiased pass@k on a task's unseen problems, with lengths, reasons and tokens a second."""
    from mirrorpo.config.train import recipe_from

    if engine not in ("transformers", "vllm"):
        raise InputError(f"--engine {engine}: must be transformers or vllm")
    if resume and out is None:
        raise InputError("--resume: needs --out, the folder of the evaluation")
    data: dict[str, Any] = {"task": {"name": task}, "model": {"path": model}}
    own = ["eval.temperature=0"] if greedy else []
    own += [] if samples is None else [f"eval.samples={samples}"]
    recipe = recipe_from(data, [*(overrides or []), *own], "eval")
    ks = _integers("-k", k)
    if max(ks) > recipe.eval.samples:
        raise InputError(f"-k {k}: k must be at most the number of samples, {recipe.eval.samples}")
    quiet()
    from mirrorpo.evaluation.run import evaluate_recipe, lines_of

    result = evaluate_recipe(recipe, ks, console, engine=engine, out=out, resume=resume)
    _say(_json(result) if as_json else "\n".join(lines_of(result, ks)))


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
    from mirrorpo.cli.listing import listing, render

    rows = listing(what)
    if as_json:
        _say(_json(rows))
    else:
        render(what, rows)


@app.command()
def study(
    file: Annotated[str, typer.Argument(help="A study file, or the name of one that is shipped (studies/embedded).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as base.train.steps=5")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The study's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study in the folder; repeats no run.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="With --resume: try failed runs again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Time two steps; say how many runs, how long.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Runs side by side.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of each worker; else cores divided.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Run on Ray: local, auto or an address.")] = None,
    as_json: JSON = False,
) -> None:
    """Compare objectives (or any recipe keys) over seeds: run the grid, then report with statistics that hold up."""
    from mirrorpo.config.shipped import find_recipe
    from mirrorpo.config.study import load_study
    from mirrorpo.studies import commands

    if retry_failed and not resume:
        raise InputError("--retry-failed: needs --resume")
    if out is None and not dry_run:
        raise InputError("--out: give the study's folder")
    loaded = load_study(find_recipe(file), overrides or [])
    quiet()
    command = _command()
    if out is None or dry_run:
        with stops_at_once(lambda: f"start again with: {command}"):
            plan = commands.dry_run(loaded, out, workers, threads, ray, console)
        _say(_json(plan) if as_json else commands.plan_in_words(plan))
        return
    with stops_at_once(lambda: go_on_with(command, out / "study.yaml")):
        found = commands.study(
            loaded,
            out,
            console,
            resume=resume,
            retry_failed=retry_failed,
            workers=workers,
            threads=threads,
            ray=ray,
            command=command,
        )
    _say(_json(found.numbers) if as_json else "\n".join((found.headline, *found.written)))
    if found.nothing_finished:
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders and study folders.")],
    out: Annotated[Path | None, typer.Option("--out", help="Compare all of them in one report, written here.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="With --out: the arm to compare with.")] = None,
    target: Annotated[float | None, typer.Option("--target", help="With --out: reward whose step is told.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed-versions", help="Compare runs of different versions.")] = False,
    as_json: JSON = False,
) -> None:
    """Draw the reports of finished runs and studies again; with --out, compare them all in one."""
    from mirrorpo.studies import commands

    written = commands.report(folders, out, baseline=baseline, target=target, allow_mixed=mixed)
    _say(_json(written) if as_json else "\n".join(written))
    if out is None and len(folders) > 1:
        console.print("--out DIR compares them in one report", highlight=False)


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
    from mirrorpo.jsonlines import read_lines
    from mirrorpo.rewards import lines

    if kind not in ("math", "code"):
        raise InputError(f"grade {kind}: must be math or code")
    lines.check_file(file)
    for line in lines.graded(kind, read_lines(file), require, wall_seconds, last_number):
        _say(line)
        sys.stdout.flush()  # a reader may wait for this one


@app.command()
def doctor(as_json: JSON = False) -> None:
    """What this machine has, and what of it is outside the tested range."""
    from mirrorpo.cli.doctor import examine, render

    findings = examine()
    if as_json:
        _say(_json(findings))
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
        _fail("interrupted; what was finished is kept, --resume goes on", _INTERRUPTED)
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
    from mirrorpo.search.evolution import SearchError
    from mirrorpo.training.trainer import NonFiniteError
    from mirrorpo.workers import JobError

    if isinstance(error, NonFiniteError | RewardError | SearchError | JobError):
        _fail(f"failed: {error}", 1)
    sys.stderr.write(printable_lines(traceback.format_exc()))
    _fail(f"failed: {type(error).__name__}: {error}", 1)


__all__ = ["app", "main"]
