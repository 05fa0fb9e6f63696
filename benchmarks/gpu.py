"""What holds on an accelerator, and what it costs: the parts of ``make gpu`` that no other benchmark measures.

``python benchmarks/gpu.py PART --device cuda [--quick]`` prints one JSON document a line. Parts:

- ``paths``: packed rows against padded ones in three dtypes: errors against float64 on the same (rounded) weights,
  time and peak memory; and the attention of packed rows alone, against one masked attention in float64;
- ``sweep``: objective and gradients from hidden states against float64 on full logits, with time and peak memory
  against full logits in the same dtype;
- ``triton``: the Triton form of that sweep against the torch one, whole and without the matrix products, with the share
  of the card's memory bandwidth that it reaches;
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import mirrorpo
from mirrorpo.kernels import Anchor, Head, objective_from_hidden, prefix_attention
from mirrorpo.kernels.attention import masked_attention
from mirrorpo.kernels.packing import pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the error over the norm of what is wanted."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or the error as text: one failure leaves the other numbers."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  what a GPU's library refuses is a finding here
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]}


class Found(dict[str, Any]):
    """Results, each printed as a line of JSON when it is there: a part that runs out of time loses only the rest."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        print(json.dumps({key: value}), flush=True)


class Clock:
    """Time and memory of calls on one device."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def ready(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Median of the rounds, after three that do not count."""
        times = []
        for number in range(3 + self.rounds):
            self.ready()
            start = time.perf_counter()
            call()
            self.ready()
            if number >= 3:
                times.append(time.perf_counter() - start)
        return round(1e3 * statistics.median(times), 4)

    def peak_mib(self, call: Callable[[], Any]) -> float | None:
        """Allocated at the peak over what was allocated before; None on a CPU."""
        if self.device != "cuda":
            return None
        self.ready()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.ready()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def costs(self, call: Callable[[], Any]) -> dict[str, float | None]:
        return {"ms": self.milliseconds(call), "peak MiB": self.peak_mib(call)}


# ---- packed rows against padded ones


def paths(device: str, quick: bool) -> dict[str, Any]:
    """Both paths of the trainer in each dtype."""
    from policy_model import Shape

    clock = Clock(device, 5 if quick else 20)
    shape = Shape(vocabulary=32_000) if device == "cuda" else Shape(20, 5, 12, 4, 1, 500)
    found = Found()
    found["shape"] = str(shape)
    with tempfile.TemporaryDirectory() as name:
        for dtype in DTYPES:
            found[dtype] = attempt(lambda dtype=dtype: _both(dtype, shape, Path(name), clock))
    for dtype in DTYPES:
        found[f"attention, {dtype}"] = attempt(lambda dtype=dtype: attention(dtype, clock))
    return found


def _both(dtype: str, shape: Any, folder: Path, clock: Clock) -> dict[str, Any]:
    from mirrorpo.training import MirrorTrainer
    from policy_model import build, micro_batch, save_model

    wide = clock.device == "cuda"
    model = save_model(folder, shape.vocabulary, 512 if wide else 128, 8 if wide else 2, key_heads=4 if wide else 1)
    more = {"model_init_kwargs": {"dtype": dtype}, "use_cpu": not wide}
    found: dict[str, Any] = {}
    truth: tuple[torch.Tensor, ...] | None = None
    for name, fast in (("padded", "off"), ("packed", "auto")):
        trainer = build(MirrorTrainer, model, folder, shape, fast=fast, **more)
        inputs = {key: value.to(clock.device) for key, value in micro_batch(shape).items()}
        if truth is None:
            truth = _in_float64(model, dtype, inputs, shape.longest)
        found[name] = _against(truth, trainer, inputs, clock)
        reason = trainer.packed.reason or trainer.packed.found
        found[name]["packed"] = reason is None
        if reason is not None:
            found[name]["reason"] = reason
    for key in ("ms", "peak MiB"):
        if found["packed"][key]:
            found[f"{key}, padded over packed"] = round(found["padded"][key] / found["packed"][key], 3)
    return found


def _in_float64(path: str, dtype: str, inputs: dict[str, torch.Tensor], longest: int) -> tuple[torch.Tensor, ...]:
    """Loss, log-probabilities and the flat gradient from full logits, on the weights as rounded, in float64."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).double().to(inputs["prompt_ids"].device)  # pyright: ignore
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = exact(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, -longest - 1 : -1]
    logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    loss = mirrorpo.objective("dr_grpo")(
        logp=logp,
        logp_old=inputs["old_per_token_logps"].double(),
        advantages=inputs["advantages"].double(),
        mask=inputs["completion_mask"].bool(),
        max_completion_length=longest,
    ).loss
    loss.backward()
    return loss.detach(), logp.detach(), _gradient(exact)


def _gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def _against(truth: tuple[torch.Tensor, ...], trainer: Any, inputs: dict[str, torch.Tensor], clock: Clock) -> Any:
    from policy_model import step_of

    step = step_of(trainer, inputs)
    loss = step()
    mask = inputs["completion_mask"].bool()
    gradient = _gradient(trainer.model)
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.shape[1])[0]
    errors = (logp.double() - truth[1])[mask]
    return {
        "loss": loss.item(),
        "loss in float64": truth[0].item(),
        "loss error": abs(loss.item() - truth[0].item()),
        "log-probability error, rms": errors.square().mean().sqrt().item(),
        "log-probability error, max": errors.abs().max().item(),
        "gradient error, relative": relative(gradient, truth[2]),
        **clock.costs(step),
    }


def attention(dtype: str, clock: Clock) -> dict[str, Any]:
    """One packed row: value and gradients against one masked attention in float64; cost against it in this dtype."""
    prompt, length, group, width = (500, 250, 8, 64) if clock.device == "cuda" else (12, 6, 3, 16)
    torch.manual_seed(0)
    ids = torch.randint(1, 99, (2 * group, prompt + length))
    ids[:, :prompt] = ids[:1, :prompt].clone()
    ids[group:, 0] += 1
    mask = torch.ones_like(ids)
    mask[1::2, prompt + length // 2 :] = 0
    row = pack(ids.to(clock.device), mask.to(clock.device), num_completion=length).rows[0]
    tokens = row.segments.length
    query, grad = (torch.randn(1, 8, tokens, width) for _ in range(2))
    key, value = (torch.randn(1, 2, tokens, width) for _ in range(2))
    leaves = [x.to(clock.device, DTYPES[dtype]).requires_grad_() for x in (query, key, value)]
    pull, scale = grad.transpose(1, 2).to(clock.device, DTYPES[dtype]), width**-0.5

    def ours() -> list[torch.Tensor]:
        out = prefix_attention(*leaves, row.segments, scale)
        return [out.detach(), *torch.autograd.grad(out, leaves, pull)]

    def masked(inputs: list[torch.Tensor] = leaves) -> list[torch.Tensor]:
        q, k, v = inputs
        out = masked_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), row.segments, scale)
        return [out.detach(), *torch.autograd.grad(out, inputs, pull.to(out.dtype))]

    truth = masked([x.detach().double().requires_grad_() for x in leaves])
    names = ("value", "query", "key", "value's gradient")
    return {
        "tokens in the row": tokens,
        "errors": {n: relative(a, b) for n, a, b in zip(names, ours(), truth, strict=True)},
        "errors of the mask": {n: relative(a, b) for n, a, b in zip(names, masked(), truth, strict=True)},
        "ours": clock.costs(ours),
        "one masked attention": clock.costs(masked),
    }


# ---- from hidden states to gradients

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo, k3": {},
    "reverse_kl exact": {"divergence": "reverse_kl", "estimator": "exact"},
    "prob_l2 exact": {"divergence": "prob_l2", "estimator": "exact"},
    "neural exact": {"divergence": {"name": "neural", "seed": 0}, "estimator": "exact"},
}


def sweep(device: str, quick: bool) -> dict[str, Any]:
    """The sweep over chunks of logits, by each objective, dtype and vocabulary."""
    clock = Clock(device, 5 if quick else 20)
    sizes = ((1024, 512, 32_000), (512, 896, 151_936)) if device == "cuda" else ((16, 8, 300),)
    found = Found()
    for size in sizes:
        for dtype in DTYPES:
            for name in OBJECTIVES:
                place = f"N {size[0]}, H {size[1]}, V {size[2]}; {dtype}; {name}"
                found[place] = attempt(lambda s=size, d=dtype, n=name: _swept(s, d, n, clock))
    return found


def _swept(size: tuple[int, int, int], dtype: str, name: str, clock: Clock, other: str | None = None) -> dict[str, Any]:
    """Ours against full logits; with ``other``, the sweep of that name against the torch one."""
    count, width, vocabulary = size
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, width), 0.05 * torch.randn(vocabulary, width)
    hidden_ref, weight_ref = hidden + 0.1 * torch.randn_like(hidden), weight + 0.002 * torch.randn_like(weight)
    own, ref = (
        [x.to(clock.device, DTYPES[dtype]) for x in pair] for pair in ((hidden, weight), (hidden_ref, weight_ref))
    )
    tokens = torch.randint(vocabulary, (count,)).to(clock.device)
    rows = (8, count // 8)
    advantages, mask = torch.randn(8).to(clock.device), torch.ones(rows, dtype=torch.bool, device=clock.device)
    with torch.no_grad():
        logp_ref = _picked(ref[0].double() @ ref[1].double().t(), tokens).view(rows)
    objective = mirrorpo.objective("grpo", **OBJECTIVES[name])
    shared = {"advantages": advantages, "mask": mask}
    leaves = [x.requires_grad_() for x in own]

    def ours(**kernels: Any) -> list[torch.Tensor]:
        anchor = Anchor(hidden=ref[0], head=Head(ref[1], **kernels))
        head = Head(leaves[1], **kernels)
        loss = objective_from_hidden(
            objective, leaves[0], head, tokens, reference=anchor, logp_ref=logp_ref.float(), **shared
        )[0].loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def full(inputs: list[torch.Tensor] = leaves) -> list[torch.Tensor]:
        work = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        logits = (inputs[0] @ inputs[1].t()).to(work)
        given: dict[str, Any] = {"logp": _picked(logits, tokens).view(rows), "logp_ref": logp_ref.to(work)}
        if objective.needs_logits:
            with torch.no_grad():
                of_ref = (ref[0].to(inputs[0].dtype) @ ref[1].to(inputs[0].dtype).t()).to(work)
            given |= {"logits": logits.view(*rows, -1), "logits_ref": of_ref.view(*rows, -1)}
        loss = objective(**given, advantages=advantages.to(work), mask=mask).loss
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    truth = full([x.detach().double().requires_grad_() for x in leaves])
    names = ("loss", "hidden", "weight")

    def errors(of: list[torch.Tensor]) -> dict[str, float]:
        return {n: relative(a, b) for n, a, b in zip(names, of, truth, strict=True)}

    found: dict[str, Any] = {"errors": errors(ours()), "ours": clock.costs(ours)}
    if other is not None:
        found[f"errors, {other}"] = errors(ours(kernels=other))
        found[other] = clock.costs(lambda: ours(kernels=other))
        found[f"ours over {other}"] = round(found["ours"]["ms"] / found[other]["ms"], 3)
        return found
    with suppress(torch.OutOfMemoryError):
        found["errors of full logits"] = errors(full())
        found["full logits"] = clock.costs(full)
    return found


def _picked(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


# ---- the Triton sweep

FORMS = (None, "reverse_kl", "prob_l2", "neural")


def triton(device: str, quick: bool) -> dict[str, Any]:
    """Whole, then without the matrix products."""
    clock = Clock(device, 5 if quick else 20)
    sizes = ((1024, 512, 32_000), (1024, 64, 151_936)) if device == "cuda" else ((16, 8, 300),)
    found = Found()
    for size in sizes:
        for dtype in DTYPES:
            for form in FORMS:
                place = f"sweep alone, N {size[0]}, V {size[2]}; {dtype}; {form or 'no divergence'}"
                found[place] = attempt(lambda s=size, d=dtype, f=form: _sweep_alone(s, d, f, clock))
        for dtype in DTYPES if size is sizes[0] else ():
            for name in OBJECTIVES:
                place = f"N {size[0]}, H {size[1]}, V {size[2]}; {dtype}; {name}"
                found[place] = attempt(lambda s=size, d=dtype, n=name: _swept(s, d, n, clock, "triton"))
    return found


def _sweep_alone(size: tuple[int, int, int], dtype: str, form: str | None, clock: Clock) -> dict[str, Any]:
    """Both passes over logits; its time, and the bytes that it must move over that time."""
    from mirrorpo.kernels import triton_kernels as kernels
    from mirrorpo.kernels.backend import form_of

    count, _, vocabulary = size
    torch.manual_seed(0)
    z, q = (torch.randn(count, vocabulary, device=clock.device).to(DTYPES[dtype]) for _ in range(2))
    tokens = torch.randint(vocabulary, (count,), device=clock.device)
    slope, weights = (torch.randn(count, device=clock.device) for _ in range(2))
    head, others = Head(torch.empty(vocabulary, 1, device=clock.device)), []
    if form is not None:
        divergence = mirrorpo.divergence(form)
        table = {"table": divergence.table.rows(q.device)} if form == "neural" else {}
        others = [kernels.Other(form=form_of(divergence), logits=q, **table)]

    def both() -> None:
        found = kernels.measure(z, tokens, head, others)
        kernels.gradient_(z, tokens, head, found, slope, others, [weights] * len(others), entropy_weight=None)

    costs = clock.costs(both)
    entries = (2 + 1 + 2 * len(others)) * z.numel() * z.element_size()  # two reads of each, one write
    return {**costs, "GB/s": round(entries / costs["ms"] / 1e6)}


PARTS = {"paths": paths, "sweep": sweep, "triton": triton}


def arguments(made: argparse.ArgumentParser) -> argparse.Namespace:
    """``--device`` and ``--quick``; warnings and progress bars are off from here on."""
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    made.add_argument("--quick", action="store_true", help="fewer rounds")
    warnings.simplefilter("ignore")
    with suppress(ImportError):
        from transformers.utils import logging

        logging.disable_progress_bar()
    return made.parse_args()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("part", choices=PARTS)
    args = arguments(made)
    PARTS[args.part](args.device, args.quick)


if __name__ == "__main__":
    main()
