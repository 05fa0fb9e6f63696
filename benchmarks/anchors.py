"""What do a mask, a second penalty and a teacher cost? Ratios of whole policy steps, packed, in turns (10 min).

A step is forward, loss and backward; with a teacher or a reference as anchor its forward pass too: at rollout time for
``score``, in the loss for ``exact``. Processor time of one thread, so that other work on the machine counts little. The
ratios are medians over rounds with bootstrap intervals. A mask and a second penalty cost less than such ratios can
show: the seconds that they add are measured by themselves, without model and head, and put over a step's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import mirrorpo
from mirrorpo.kernels import Head, objective_from_hidden
from mirrorpo.kernels.head import chunk_rows
from mirrorpo.models import builtin_path
from mirrorpo.training import MirrorTrainer
from policy_model import Shape, build, micro_batch, save_model
from timing import in_turns, paired, parser, show

CLIP = {"name": "ratio", "epsilon_low": 0.2, "epsilon_high": 0.28}
MASK = {"name": "kl3", "radius": 0.5, "act": "mask", "anchor": "reference"}
SECOND = {"divergence": "js", "coefficient": 0.01, "estimator": "score"}
FIRST = {"divergence": "reverse_kl", "coefficient": 0.04}


def penalised(*penalties: dict[str, Any], mask: bool = False) -> dict[str, Any]:
    return {"preset": "dapo", "regions": [CLIP, *([MASK] if mask else [])], "penalties": list(penalties)}


def toward(anchor: str, estimator: str) -> dict[str, Any]:
    penalty = {"divergence": "reverse_kl", "coefficient": 1.0, "anchor": anchor, "estimator": estimator}
    return {"preset": "opd", "penalties": [penalty]}


OBJECTIVES = {
    "one penalty": penalised(FIRST),
    "and a mask": penalised(FIRST, mask=True),
    "and a second penalty": penalised(FIRST, SECOND),
    "teacher, score": toward("teacher", "score"),
    "teacher, exact": toward("teacher", "exact"),
    "reference, score": toward("reference", "score"),
    "reference, exact": toward("reference", "exact"),
}
ADDED = ("and a mask", "and a second penalty")  # to "one penalty"; too small for a ratio of whole steps
BASES = {
    "teacher, exact": "teacher, score",
    "teacher, score": "reference, score",
    "reference, exact": "reference, score",
}


def step_of(
    objective: dict[str, Any], model: str, teacher: str, folder: Path, shape: Shape
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A step: the anchor's scores, as at rollout time, where they are read, then forward, loss and backward; and the
    scoring alone.
    """
    anchor = objective["penalties"][0].get("anchor")
    trainer = build(
        MirrorTrainer,
        model,
        folder,
        shape,
        use_cpu=True,
        objective=objective,
        gradient_share_every=0,  # measured once in 100 steps, by two sweeps: no part of an ordinary one
        teacher={"path": teacher} if anchor == "teacher" else None,
    )
    if trainer.ref_model is not None:  # away from the policy, as the teacher is: equal models have no gradient
        scale(trainer.ref_model)
    inputs = micro_batch(shape)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"] - 0.1
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

    def scored() -> dict[str, torch.Tensor]:
        if anchor == "teacher":
            return trainer._teacher_scores([], dict(inputs))
        if anchor == "reference" and not trainer.policy_objective.needs_logits:
            given = (trainer.ref_model, ids, attention, shape.longest)
            with torch.no_grad():  # as TRL does at rollout time
                found = trainer._get_per_token_logps_and_entropies(*given, batch_size=shape.group * shape.groups)
            return {"ref_per_token_logps": found[0]}
        return {}

    def step() -> None:
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, {**inputs, **scored()}).backward()

    return step, scored


def token_part(objective: dict[str, Any], shape: Shape) -> Callable[[], Any]:
    """What the objective costs beside the head: in the chunks of the vocabulary, with a head of next to nothing."""
    made = mirrorpo.objective_from(objective)
    inputs = micro_batch(shape)
    mask = inputs["completion_mask"]
    tokens = int(mask.sum())
    chunk = chunk_rows(tokens, shape.vocabulary, mask.device, None)
    head = Head(torch.zeros(2, 1, requires_grad=True))
    old = inputs["old_per_token_logps"]

    def part() -> None:
        hidden, zeros = torch.zeros(tokens, 1, requires_grad=True), torch.zeros(tokens, dtype=torch.long)
        out, _, _ = objective_from_hidden(
            made, hidden, head, zeros, mask=mask, advantages=inputs["advantages"], logp_old=old, logp_ref=old - 0.1,
            num_tokens=inputs["num_items_in_batch"], chunk=chunk,
        )  # fmt: skip
        out.loss.backward()

    return part


def scale(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def models(folder: Path, vocabulary: int, hidden: int) -> tuple[str, str]:
    """Folders of a policy and of a teacher of the same size with other weights."""
    model, teacher = save_model(folder, vocabulary, hidden, 6), str(folder / "teacher")
    wise = AutoModelForCausalLM.from_pretrained(model)
    scale(wise)
    wise.save_pretrained(teacher)
    for path in (model, teacher):
        AutoTokenizer.from_pretrained(str(builtin_path("tiny"))).save_pretrained(path)
    return model, teacher


def measure(folder: Path, shape: Shape, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of whole steps with their intervals, and each addition's own seconds as a percentage of a step's."""
    model, teacher = models(folder, shape.vocabulary, 256)
    whole = {name: objective for name, objective in OBJECTIVES.items() if name not in ADDED}
    made = {name: step_of(objective, model, teacher, folder, shape) for name, objective in whole.items()}
    times = in_turns({name: step for name, (step, _) in made.items()}, rounds, warmup=1, clock=time.process_time)
    found: dict[str, float] = {}
    for name, base in BASES.items():
        middle, low, high = paired(times, name, base)
        label = f"{name} / {base}"
        found |= {label: middle, f"{label}, 95 % from": low, f"{label}, 95 % to": high}
    pair = ("teacher, score", "reference, score")
    scoring = in_turns({name: made[name][1] for name in pair}, 3 * rounds, warmup=1, clock=time.process_time)
    label = "scoring alone, teacher / reference"
    found |= dict(zip((label, f"{label}, 95 % from", f"{label}, 95 % to"), paired(scoring, *pair), strict=True))
    names = ("one penalty", *ADDED)
    parts = in_turns({n: token_part(OBJECTIVES[n], shape) for n in names}, 20 * rounds, clock=time.process_time)
    step = statistics.median(times["one penalty"])
    shares = {}
    for name in ADDED:
        more = statistics.median(a - b for a, b in zip(parts[name], parts["one penalty"], strict=True))
        shares[f"{name}, {1e3 * more:.2f} ms"] = 100 * more / step
    return found, shares


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vocabulary", type=int, nargs="+", default=[1_000, 32_000], help="V (default both)")
    args = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        for vocabulary in args.vocabulary:
            found, shares = measure(Path(name) / str(vocabulary), Shape(vocabulary=vocabulary), 3 if args.quick else 15)
            show(f"whole policy step, vocabulary {vocabulary:,}", found, "x", args.json)
            show("what it adds by itself, over the step", shares, "%", args.json)


if __name__ == "__main__":
    main()
