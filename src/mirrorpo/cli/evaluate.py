"""``mirrorpo eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mirrorpo.cli import output
from mirrorpo.cli.output import OVERRIDES, check_overrides, files_and_folder, integers
from mirrorpo.errors import InputError


def command(
    model: Annotated[str, typer.Argument(help="builtin:tiny, a folder (a run's model/) or a hub name.")],
    overrides: OVERRIDES = None,
    task: Annotated[str, typer.Option("--task", help="A name of `mirrorpo list tasks`.")] = ...,  # pyright: ignore[reportArgumentType]
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Completions per problem.")] = None,
    k: Annotated[str, typer.Option("-k", help="pass@k for these, comma-separated.")] = "1",
    greedy: Annotated[bool, typer.Option("--greedy", help="The most likely token each time (temperature 0).")] = False,
    engine: Annotated[str, typer.Option("--engine", help="transformers or vllm.")] = "transformers",
    out: Annotated[Path | None, typer.Option("--out", help="A folder that keeps the samples.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the evaluation in the folder.")] = False,
    as_json: output.JSON = False,
    _quiet: output.QUIET = False,
    _debug: output.DEBUG = False,
) -> None:
    """Accuracy and unbiased pass@k on a task's unseen problems, with lengths, reasons and tokens a second."""
    if engine not in ("transformers", "vllm"):
        raise InputError(f"--engine {engine}: must be transformers or vllm")
    if resume and out is None:
        raise InputError("--resume: needs --out, the folder of the evaluation")
    changes, ks = check_overrides(overrides), integers("-k", k)
    from mirrorpo.config.train import recipe_from
    from mirrorpo.interrupts import quiet

    data: dict[str, Any] = {"task": {"name": task}, "model": {"path": model}}
    own = ["eval.temperature=0"] if greedy else []
    own += [] if samples is None else [f"eval.samples={samples}"]
    recipe = recipe_from(data, [*changes, *own], "eval", early=files_and_folder(None))
    if max(ks) > recipe.eval.samples:
        raise InputError(f"-k {k}: k must be at most the number of samples, {recipe.eval.samples}")
    quiet()
    from mirrorpo.evaluation.eval_run import evaluate_recipe, lines_of

    result = evaluate_recipe(recipe, ks, output.console(), engine=engine, out=out, resume=resume)
    output.say(output.as_json(result) if as_json else "\n".join(lines_of(result, ks)))
