"""One run of a study in a worker: train, measure how far the policy went, drop what is not kept."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from mirrorpo.config.train import Recipe, recipe_from
from mirrorpo.divergences import divergence
from mirrorpo.evaluation.sampling import prompt_ids
from mirrorpo.files import write_text_atomic
from mirrorpo.interrupts import quiet
from mirrorpo.models import resolve_model
from mirrorpo.models.folder import loading
from mirrorpo.runs.folder import RECIPE_FILE, wait_until_free
from mirrorpo.runs.reader import read_samples
from mirrorpo.studies.collection import DIVERGENCE_FILE
from mirrorpo.training.setup import load_tokenizer

ATTEMPTS = 2  # a run that fails is tried once more, then recorded as failed
_SECONDS_TO_DIE = 60.0
_DROPPED = ("model", "checkpoints")
_REVERSE_KL = divergence("reverse_kl")


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run one job, twice if need be; a run that was interrupted goes on from its last checkpoint.

    Args:
        job: ``recipe`` (plain data), ``folder``, ``threads`` (of torch), ``keep_models``, ``measure_divergence`` and
            ``command``.

    Returns:
        Plain data for the record: ``status`` (``finished`` or ``failed``), ``attempts``, and ``seconds`` and
        ``accuracy_after``, or the ``reason`` of the second failure.
    """
    quiet()
    logging.getLogger("mirrorpo.training.trainer").setLevel(logging.ERROR)  # its line stands in the run's summary
    torch.set_num_threads(job["threads"])
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            summary = _train(job)
        except Exception as error:  # noqa: BLE001  untrusted: a recipe may name the user's own reward; it is recorded
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            continue
        numbers = {"seconds": summary["seconds"], "accuracy_after": summary["accuracy_after"]}
        return {"status": "finished", "attempts": attempt, **numbers}
    return {"status": "failed", "attempts": ATTEMPTS, "reason": reason}


def _train(job: Mapping[str, Any]) -> dict[str, Any]:
    """The run, its divergence from the start, and what is dropped afterwards."""
    folder, recipe = Path(job["folder"]), recipe_from(job["recipe"])
    wait_until_free(folder, _SECONDS_TO_DIE)  # then ``train`` says who holds it
    holds_run = (folder / RECIPE_FILE).exists()
    if folder.exists() and not holds_run:
        shutil.rmtree(folder)  # killed before its first file was whole
    folder.parent.mkdir(parents=True, exist_ok=True)
    from mirrorpo.training.run import train  # in a worker alone

    summary = train(recipe, folder, resume=holds_run, console=Console(quiet=True), command=job["command"])
    if job["measure_divergence"] and not (folder / DIVERGENCE_FILE).exists() and (folder / "model").is_dir():
        measured = divergence_from_start(recipe, folder)
        write_text_atomic(folder / DIVERGENCE_FILE, json.dumps(measured, indent=2, allow_nan=False) + "\n")
    if not job["keep_models"]:
        for name in _DROPPED:
            shutil.rmtree(folder / name, ignore_errors=True)
    return summary


@torch.no_grad()
def divergence_from_start(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Exact KL(policy || start), a mean over the tokens of the trained policy's kept responses.

    Args:
        recipe: of the run; its model is the start.
        folder: of the finished run, with ``model/`` and ``samples.jsonl``.

    Returns:
        ``reverse_kl`` in nats a token (None without a response) and ``tokens``, how many it is the mean of.
    """
    samples = [sample for sample in read_samples(folder) if sample.when == "after"]
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = loading(recipe.model.trust_remote_code)
    policy, start = (
        AutoModelForCausalLM.from_pretrained(path, dtype=recipe.model.dtype, **options).to(device).eval()  # pyright: ignore[reportArgumentType]
        for path in (folder / "model", resolve_model(recipe.model.path))
    )
    total, tokens = 0.0, 0
    for sample in samples:
        prompt = prompt_ids(tokenizer, {"prompt": sample.prompt})
        response = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
        # The state after the last token is one too, unless the response was cut off there.
        states = min(len(response) + 1, recipe.train.max_completion_length)
        ids = torch.tensor([prompt + response], device=device)
        first = len(prompt) - 1
        logits, logits_start = (m(input_ids=ids).logits[0, first : first + states].float() for m in (policy, start))
        total += float(_REVERSE_KL.exact(logits, logits_start).sum())
        tokens += states
    return {"reverse_kl": total / tokens if tokens else None, "tokens": tokens}


__all__ = ["divergence_from_start", "run_job"]
