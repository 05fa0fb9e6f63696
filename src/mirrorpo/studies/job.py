"""One run of a study in a worker: train, measure the policy, drop what is not kept.

Measures of a study's ``measure`` section are taken on the same problems for every run. A distance is the divergence
from the start over the whole vocabulary at every token of responses that are drawn from the policy, and once more of
responses drawn from the start: for ``reverse_kl`` on the former the sum over a response estimates KL(policy || start)
of whole responses without bias, and for ``forward_kl`` on the latter KL(start || policy).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from mirrorpo.config.measure import TRAINED, MeasureSpec, label_of_divergence
from mirrorpo.config.study import Study
from mirrorpo.config.train import Recipe, recipe_from
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.divergences import divergence
from mirrorpo.divergences.base import Divergence
from mirrorpo.errors import InputError
from mirrorpo.evaluation.sampling import Completion, Sampler, TransformersEngine, prompt_ids, sample_batches
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.files import write_text_atomic
from mirrorpo.interrupts import quiet
from mirrorpo.models import resolve_model
from mirrorpo.models.folder import loading
from mirrorpo.runs.folder import RECIPE_FILE, wait_until_free
from mirrorpo.runs.reader import read_json, read_recipe, read_samples
from mirrorpo.studies.collection import DIVERGENCE_FILE, MEASURES_FILE
from mirrorpo.studies.gather import RUNS_FOLDER, statuses
from mirrorpo.tasks.task import Grade, Row, Split, Task, grade_all
from mirrorpo.training.setup import build_task, load_tokenizer, sampler_of
from mirrorpo.wording import say
from mirrorpo.workers import Job, Record

ATTEMPTS = 2  # a run that fails is tried once more, then recorded as failed
_SECONDS_TO_DIE = 60.0
_DROPPED = ("model", "checkpoints")
_MEASURE = "mirrorpo.studies.job:measure_job"
_LOGITS_AT_ONCE = 2**20  # numbers in the logits of a batch, of each of the two models


def measure_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a finished run in a worker.

    Args:
        job: ``folder``, ``threads``, and ``measure``, plain data of a ``MeasureSpec``.

    Returns:
        Plain data: ``status`` (``measured`` or ``failed``) and the ``reason``.
    """
    quiet()
    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    try:
        recipe = recipe_from(parse_yaml(read_recipe(folder), str(folder / RECIPE_FILE)))
        measure_run(recipe, folder, MeasureSpec.model_validate(job["measure"]))
    except Exception as error:  # noqa: BLE001  untrusted: the user's own reward may run
        return {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    return {"status": "measured"}


def measure_study(study: Study, out: Path, record: Record, pool: Any, console: Console) -> list[str]:
    """Measure every finished run that has not been measured as the study says, and whose model was kept.

    Args:
        study: its ``measure`` says what; None: nothing is done.
        out, record, pool, console: as in ``run_study``.

    Returns:
        What could not be measured and why, a line each.
    """
    if study.measure is None:
        return []
    finished = {name for name, result in statuses(record).items() if result["status"] == "finished"}
    measure = study.measure.model_dump(mode="json")
    jobs, problems = [], []
    for name in (job.name for job in study.jobs() if job.name in finished):
        folder = out / RUNS_FOLDER / name
        if is_measured(folder, study.measure):
            continue
        if not (folder / "model").is_dir():
            problems.append(f"{name}: not measured, its model was not kept (keep_models)")
            continue
        payload = {"folder": str(folder.resolve()), "threads": pool.num_threads, "measure": measure}
        jobs.append(Job(key=name, function=_MEASURE, payload=payload))
    for count, done in enumerate(pool.run(jobs) if jobs else (), start=1):
        if done.result["status"] == "failed":
            problems.append(f"{done.job.key}: not measured ({done.result['reason']})")
        say(console, f"{count}/{len(jobs)} measured  {done.job.key}")
    for line in problems:
        say(console, line)
    return problems


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run one job, twice if need be; a run that was interrupted goes on from its last checkpoint.

    Args:
        job: ``recipe`` (plain data), ``folder``, ``threads`` (of torch), ``keep_models``, ``measure_divergence``,
            ``measure`` (plain data of a ``MeasureSpec``, or None) and ``command``.

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
    measure = None if job.get("measure") is None else MeasureSpec.model_validate(job["measure"])
    if measure is not None and not is_measured(folder, measure) and (folder / "model").is_dir():
        measure_run(recipe, folder, measure)
    if not job["keep_models"]:
        for name in _DROPPED:
            shutil.rmtree(folder / name, ignore_errors=True)
    return summary


def check_measured(recipe: Recipe, spec: MeasureSpec) -> None:
    """Raises ``InputError`` for a task that cannot be built, has too few problems, or begins in no such way."""
    for name, settings in {TRAINED: recipe.task, **spec.tasks}.items():
        task = build_task(recipe.model_copy(update={"task": settings}))
        rows = task.rows("test")[: spec.problems]
        if len(rows) < spec.problems:
            raise InputError(f"measure.problems: task {name!r} has {len(rows)} test problems, got {spec.problems}")
        for row in rows:
            _Begun(task, spec.begin.get(name, "")).beginning(row)


def digest_of(spec: MeasureSpec) -> str:
    """Which measures a file holds."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def is_measured(folder: Path, spec: MeasureSpec) -> bool:
    """Whether a run folder holds these measures."""
    try:
        found = read_json(folder, MEASURES_FILE)
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and found.get("digest") == digest_of(spec)


def measure_run(recipe: Recipe, folder: Path, spec: MeasureSpec) -> dict[str, Any]:
    """Measure a finished run's policy and write ``measures.json``.

    Args:
        recipe: of the run; its model is the start, its evaluation says how long completions are, and their seed.
        folder: of the run, with ``model/``.
        spec: what to measure.

    Returns:
        Column to number, such as ``trained.policy.accuracy``, ``easy.policy.reverse_kl`` (nats a token),
        ``easy.policy.reverse_kl_sum`` (nats a response) and ``easy.start.pass@4``; None where nothing could be scored.

    Raises:
        InputError: there is no model, or a task's data cannot be read.
    """
    if not (folder / "model").is_dir():
        raise InputError(f"{folder}: the model was not kept (keep_models): nothing can be measured")
    policy, start = (_loaded(recipe, path) for path in (str(folder / "model"), resolve_model(recipe.model.path)))
    numbers: dict[str, float | None] = {}
    for name, task in {TRAINED: recipe.task, **spec.tasks}.items():
        asked, begin = recipe.model_copy(update={"task": task}), spec.begin.get(name, "")
        from_start, from_policy = _from_start(asked, start, spec, begin), _draw(asked, policy, spec, begin)
        for source, drawn in (("policy", from_policy), ("start", from_start)):
            found = drawn.numbers(spec) | distances(policy, start, drawn.responses(spec.responses), spec)
            numbers |= {f"{name}.{source}.{key}": value for key, value in found.items()}
    numbers = {key: value if value is not None and math.isfinite(value) else None for key, value in numbers.items()}
    told = {"digest": digest_of(spec), "measures": numbers}
    write_text_atomic(folder / MEASURES_FILE, json.dumps(told, indent=2, allow_nan=False) + "\n")
    return numbers


@dataclass(frozen=True, kw_only=True)
class Response:
    """Token ids of a prompt and of its completion."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Graded completions with their tokens, in the order of problem and sample."""

    evaluation: Evaluation
    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]

    def numbers(self, spec: MeasureSpec) -> dict[str, float]:
        """Accuracy, pass@k, distinct right texts and mean length."""
        passed = {"accuracy" if k == 1 else f"pass@{k}": self.evaluation.pass_at(k)[0] for k in (1, *spec.pass_at)}
        lengths = [len(tokens) for tokens in self.tokens]
        return {
            **passed,
            "distinct_right": self.evaluation.distinct_right(),
            "length": sum(lengths) / len(lengths),
        }

    def responses(self, count: int) -> list[Response]:
        """The first completion of each problem, then the second ones, until there are so many."""
        each = self.evaluation.samples_per_problem
        order = sorted(range(len(self.tokens)), key=lambda n: (n % each, n // each))
        return [Response(prompt=self.prompts[n // each], tokens=self.tokens[n]) for n in order[:count]]


_DRAWN: dict[str, Drawn] = {}  # of starts, in this process
_MOST_DRAWN = 16


class _Recording:
    """An engine that remembers the tokens of what it completes."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine, self.batch_size = engine, engine.batch_size
        self.tokens: list[tuple[int, ...]] = []

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampler: Sampler) -> list[Completion]:
        found = self._engine.complete(prompts, seeds, sampler)
        self.tokens += [tuple(completion.tokens) for completion in found]
        return found


class _Begun:
    """A task whose responses all begin with a given text; what follows is drawn, and both are graded."""

    def __init__(self, task: Task, begin: str) -> None:
        self._task, self._begin, self.name = task, begin, task.name

    def rows(self, split: Split) -> list[Row]:
        return self._task.rows(split)

    def grade(self, completion: str, row: Row) -> Grade:
        return self.grade_many([completion], [row])[0]

    def grade_many(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Grade]:
        whole = [self.beginning(row) + text for text, row in zip(completions, rows, strict=True)]
        return grade_all(self._task, whole, rows)

    def beginning(self, row: Row) -> str:
        try:
            return self._begin.format(**row)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            said = f"{self._begin!r:.80} does not fit a row of the task {self.name!r} ({error})"
            raise InputError(f"measure.begin: {said}") from None


def _loaded(recipe: Recipe, path: str) -> Any:
    options = loading(recipe.model.trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(path, dtype=recipe.model.dtype, **options).to(device).eval()  # pyright: ignore[reportArgumentType]


def _from_start(recipe: Recipe, start: Any, spec: MeasureSpec, begin: str) -> Drawn:
    """What the start of a recipe draws: the same for all runs of a worker, whatever their objective and seed."""
    parts = [part.model_dump(mode="json") for part in (recipe.task, recipe.model, recipe.eval)]
    key = json.dumps([parts, recipe.train.max_completion_length, spec.problems, spec.samples, begin], sort_keys=True)
    if key not in _DRAWN:
        if len(_DRAWN) >= _MOST_DRAWN:
            _DRAWN.clear()
        _DRAWN[key] = _draw(recipe, start, spec, begin)
    return _DRAWN[key]


def _draw(recipe: Recipe, model: Any, spec: MeasureSpec, begin: str) -> Drawn:
    """Completions of the task's first test problems at temperature 1, without a nucleus, graded."""
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    task = build_task(recipe)
    rows = task.rows("test")[: spec.problems]
    ids = [prompt_ids(tokenizer, row, recipe.model.chat_template) for row in rows]
    if begin:
        task = _Begun(task, begin)
        ids = [
            [*prompt, *tokenizer(task.beginning(row), add_special_tokens=False)["input_ids"]]
            for prompt, row in zip(ids, rows, strict=True)
        ]
    samples: list[Sample] = []
    engine = _Recording(TransformersEngine(model, tokenizer))
    sampler = replace(sampler_of(recipe), temperature=1.0, top_p=1.0)
    sample_batches(engine, tokenizer, task, rows, ids, sampler, spec.samples, samples.extend)
    evaluation = Evaluation(samples=tuple(samples), samples_per_problem=spec.samples)
    return Drawn(evaluation=evaluation, prompts=tuple(map(tuple, ids)), tokens=tuple(engine.tokens))


@torch.no_grad()
def distances(policy: Any, start: Any, responses: Sequence[Response], spec: MeasureSpec) -> dict[str, float]:
    """Each divergence of the policy from the start: a mean over tokens, and ``_sum``, the mean over responses.

    Args:
        policy: a causal language model.
        start: another one, with the same vocabulary.
        responses: the states at which the two are compared: before each token of each.
        spec: its ``distances``.
    """
    kinds = {label_of_divergence(one): _divergence(one) for one in spec.distances}
    totals, count = dict.fromkeys(kinds, 0.0), sum(len(response.tokens) for response in responses)
    width = max((len(r.prompt) + len(r.tokens) for r in responses), default=1)
    size = max(1, _LOGITS_AT_ONCE // (width * policy.config.get_text_config().vocab_size))
    ordered = sorted(responses, key=lambda r: len(r.prompt) + len(r.tokens))
    for first in range(0, len(ordered), size):
        batch = ordered[first : first + size]
        logits, logits_start = (_states(model, batch) for model in (policy, start))
        for label, kind in kinds.items():
            totals[label] += float(kind.exact(logits, logits_start).double().sum())
    means = {label: total / count if count else math.nan for label, total in totals.items()}
    sums = {f"{label}_sum": total / len(responses) if responses else math.nan for label, total in totals.items()}
    return means | sums


def _divergence(spec: str | Mapping[str, Any]) -> Divergence:
    options = {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}
    return divergence(spec if isinstance(spec, str) else spec["name"], **options)


def _states(model: Any, batch: Sequence[Response]) -> Tensor:
    """(states, V): the logits before each token of the batch, in float32; sequences are padded on the right."""
    width = max(len(r.prompt) + len(r.tokens) for r in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, response in enumerate(batch):
        whole = (*response.prompt, *response.tokens)
        ids[row, : len(whole)] = torch.tensor(whole)
        mask[row, : len(whole)] = 1
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    before = [logits[n, len(r.prompt) - 1 : len(r.prompt) + len(r.tokens) - 1] for n, r in enumerate(batch)]
    return torch.cat(before).float()


def divergence_from_start(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Exact KL(policy || start), a mean over the tokens of the trained policy's kept responses.

    Args:
        recipe: of the run; its model is the start.
        folder: of the finished run, with ``model/`` and ``samples.jsonl``.

    Returns:
        ``reverse_kl`` in nats a token (None without a response) and ``tokens``, how many it is the mean of.
    """
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    policy, start = (_loaded(recipe, path) for path in (str(folder / "model"), resolve_model(recipe.model.path)))
    responses = []
    for sample in read_samples(folder):
        if sample.when == "after":
            tokens = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
            # The state after the last token is one too, unless the response was cut off there; the 0 is not read.
            tokens = (*tokens, 0)[: recipe.train.max_completion_length]
            prompt = prompt_ids(tokenizer, {"prompt": sample.prompt})
            responses.append(Response(prompt=tuple(prompt), tokens=tokens))
    found = distances(policy, start, responses, MeasureSpec(distances=["reverse_kl"]))
    count = sum(len(response.tokens) for response in responses)
    return {"reverse_kl": found["reverse_kl"] if count else None, "tokens": count}


__all__ = [
    "Drawn",
    "Response",
    "check_measured",
    "distances",
    "divergence_from_start",
    "is_measured",
    "measure_job",
    "measure_run",
    "measure_study",
    "run_job",
]
