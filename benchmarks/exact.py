"""What does a divergence over the whole vocabulary cost, from hidden states of both models? (6 min; quick: 2)

1. GRPO with an ``exact`` penalty over the same with ``sampled``: head and objective alone (the reference's
   log-probabilities from its hidden states included), and whole policy steps of a 6-layer model with both forward
   passes and the backward pass. 1,024 tokens, H 512, V 32,000.
2. The mean divergence and its gradients, and nothing else: TRL's ``ChunkedDivergenceFunction`` (of its distillation
   trainer), Liger's ``LigerFusedLinearJSDLoss``, eager torch, over ours: time and peak memory.

``--widths``: instead of these, the head with a neural map over that with ``prob_l2``, by width, in processor time.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

import mirrorpo
from memory import peak_mib, peak_of, present
from mirrorpo.kernels import Anchor, Head, VocabularyTerm, objective_from_hidden, single_pass, token_logps
from timing import in_turns, interleaved, paired, parser, ratios, show, use

COMPLETIONS, LENGTH, WIDTH, VOCABULARY = 8, 128, 512, 32000
PENALTIES: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "forward_kl": {},
    "js": {},
    "tv": {},
    "alpha": {"alpha": 0.5},
    "prob_l2": {},
    "beta": {"beta": 0.5},
    "neural": {"seed": 0},
}
QUICK = ("reverse_kl", "js", "prob_l2", "neural")


@dataclass
class Inputs:
    """Hidden states and heads of a policy and a reference a small step away."""

    hidden: torch.Tensor
    weight: torch.Tensor
    hidden_ref: torch.Tensor
    weight_ref: torch.Tensor
    tokens: torch.Tensor
    advantages: torch.Tensor

    @classmethod
    def of(cls, count: int = COMPLETIONS * LENGTH, width: int = WIDTH, vocabulary: int = VOCABULARY) -> Inputs:
        torch.manual_seed(0)
        hidden, weight = torch.randn(count, width), 0.05 * torch.randn(vocabulary, width)
        hidden_ref = hidden + 0.1 * torch.randn(count, width)
        weight_ref = weight + 0.002 * torch.randn(vocabulary, width)
        tokens, advantages = torch.randint(vocabulary, (count,)), torch.randn(COMPLETIONS)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), hidden_ref, weight_ref, tokens, advantages)

    @property
    def reference(self) -> Anchor:
        return Anchor(hidden=self.hidden_ref, head=Head(self.weight_ref))


def penalised(name: str | None) -> mirrorpo.Objective:
    """GRPO with an exact penalty, or with its own k3 (None)."""
    if name is None:
        return mirrorpo.objective("grpo")
    with torch.device("cpu"):  # a neural map's table is made there
        return mirrorpo.objective("grpo", divergence={"name": name, **PENALTIES[name]}, estimator="exact")


def objective_loss(
    objective: mirrorpo.Objective,
    hidden: torch.Tensor,
    head: Head,
    reference: Anchor,
    tokens: torch.Tensor,
    advantages: torch.Tensor,
) -> torch.Tensor:
    shape = (len(advantages), -1)
    logp_ref = None
    if not objective.needs_logits:
        with torch.no_grad():
            logp_ref = token_logps(reference.hidden, reference.head, tokens)[0].view(shape)
    mask = torch.ones_like(tokens, dtype=torch.bool).view(shape)
    given = {"advantages": advantages, "mask": mask, "logp_ref": logp_ref}
    return objective_from_hidden(objective, hidden, head, tokens, reference=reference, **given)[0].loss


def over_head(names: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Head and objective with each penalty over ``sampled``."""
    x = Inputs.of()
    head = Head(x.weight)

    def stepped(name: str | None) -> Callable[[], None]:
        objective = penalised(name)

        def step() -> None:
            x.hidden.grad = x.weight.grad = None
            objective_loss(objective, x.hidden, head, x.reference, x.tokens, x.advantages).backward()

        return step

    calls = {"sampled": stepped(None)} | {f"exact {name}": stepped(name) for name in names}
    return ratios(interleaved(calls, rounds, warmup=1), "sampled")


def over_width(widths: tuple[int, ...], rounds: int, tokens: int) -> dict[str, float]:
    """Head and objective with a neural map over the same with ``prob_l2``, by the width of the hidden states."""
    found = {}
    for width in widths:
        x = Inputs.of(tokens, width)
        head = Head(x.weight)

        def step(objective: mirrorpo.Objective, x: Inputs = x, head: Head = head) -> None:
            x.hidden.grad = x.weight.grad = None
            objective_loss(objective, x.hidden, head, x.reference, x.tokens, x.advantages).backward()

        calls = {name: partial(step, penalised(name)) for name in ("prob_l2", "neural")}
        times = in_turns(calls, rounds, warmup=1, clock=time.process_time)
        found[f"H {width:,}"] = paired(times, "neural", "prob_l2")[0]
    return found


def over_step(names: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Whole policy steps: both models' forward passes, head, objective, backward pass."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    prompt, length = 100, 120
    ids = torch.randint(VOCABULARY, (COMPLETIONS, prompt + length))
    tokens, advantages = ids[:, prompt:].reshape(-1), torch.randn(COMPLETIONS)

    def hidden_of(model: torch.nn.Module) -> torch.Tensor:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1].flatten(0, 1)

    def stepped(name: str | None) -> Callable[[], None]:
        objective = penalised(name)

        def step() -> None:
            policy.zero_grad()
            with torch.no_grad():
                anchor = Anchor(hidden=hidden_of(reference), head=Head(reference.lm_head.weight))
            head = Head(policy.lm_head.weight)
            objective_loss(objective, hidden_of(policy), head, anchor, tokens, advantages).backward()

        return step

    calls = {"sampled": stepped(None)} | {f"exact {name}": stepped(name) for name in names}
    return ratios(interleaved(calls, rounds, warmup=1), "sampled")


# The mean divergence alone. TRL's and Liger's beta: 1 is the reverse KL, KL(p || q), 0.5 the Jensen-Shannon divergence.
BETAS = {"reverse_kl": 1.0, "js": 0.5}


def eager(x: Inputs, name: str) -> torch.Tensor:
    logp = (x.hidden @ x.weight.t()).log_softmax(-1)
    logq = (x.hidden_ref @ x.weight_ref.t()).log_softmax(-1)
    if name == "reverse_kl":
        return functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1).mean()
    log_mean = torch.logaddexp(logp, logq) - torch.log(torch.tensor(2.0))
    sides = (functional.kl_div(log_mean, side, log_target=True, reduction="none").sum(-1) for side in (logp, logq))
    return 0.5 * sum(sides).mean()


def trl(x: Inputs, name: str) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    given = (x.hidden, x.weight, None, x.hidden_ref, x.weight_ref, None, BETAS[name])
    return ChunkedDivergenceFunction.apply(*given)[0].mean()


def liger(x: Inputs, name: str) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[name], compiled=False)
    return loss(x.hidden, x.weight, x.hidden_ref, x.weight_ref, x.tokens)


def ours(x: Inputs, name: str) -> torch.Tensor:
    term = VocabularyTerm(divergence=mirrorpo.divergence(name), anchor=x.reference)
    weights = torch.full((len(x.tokens),), 1.0 / len(x.tokens))
    return single_pass(x.hidden, Head(x.weight), x.tokens, None, terms=(term,), term_weights=(weights,)).loss


MEANS: dict[str, Callable[[Inputs, str], torch.Tensor]] = {"eager": eager, "TRL": trl, "Liger": liger, "mirrorpo": ours}


def step_of(x: Inputs, contender: str, name: str) -> torch.Tensor:
    x.hidden.grad = x.weight.grad = None
    loss = MEANS[contender](x, name)
    loss.backward()
    return loss.detach()


def means(name: str, rounds: int) -> dict[str, dict[str, float]]:
    x, names = Inputs.of(), present(MEANS)
    values = {contender: step_of(x, contender, name).item() for contender in names}
    calls: dict[str, Callable[[], Any]] = {c: lambda c=c: step_of(x, c, name) for c in names}
    medians = interleaved(calls, rounds, warmup=1)
    return {
        "value": values,
        "seconds": medians,
        "time over mirrorpo": ratios(medians, "mirrorpo"),
        "peak MiB": {contender: peak_of(calls[contender], __file__, name, contender) for contender in names},
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--peak", nargs=2, metavar=("DIVERGENCE", "NAME"), help=argparse.SUPPRESS)
    made.add_argument("--widths", type=int, nargs="+", help="hidden sizes, 256 tokens; nothing else is measured")
    args = made.parse_args()
    use(args.device)
    warnings.simplefilter("ignore")
    if args.peak:
        name, contender = args.peak
        step_of(Inputs.of(8, 4, 16), contender, name)  # imports and first calls are not the contender's
        x = Inputs.of()
        print(peak_mib(lambda: step_of(x, contender, name)))
        return
    if args.widths:
        show("neural head over prob_l2's", over_width(tuple(args.widths), 4 if args.quick else 9, 256), "x", args.json)
        return
    rounds = 7 if args.quick else 9
    names = QUICK if args.quick else tuple(PENALTIES)
    results: dict[str, Any] = {
        "head and objective over sampled": over_head(names, rounds),
        "policy step over sampled": over_step(names if not args.quick else ("reverse_kl", "neural"), rounds),
    } | {f"mean {name}": means(name, rounds) for name in BETAS}
    if args.json:
        print(json.dumps({"title": "exact divergences", "values": results}))
        return
    for title, rows in results.items():
        print(title)
        if title.startswith("mean"):
            for contender, seconds in rows["seconds"].items():
                print(
                    f"  {contender:<12}{seconds * 1e3:8.0f} ms {rows['time over mirrorpo'][contender]:6.2f} x mirrorpo "
                    f"{rows['peak MiB'][contender]:8.0f} MiB   value {rows['value'][contender]:.6f}"
                )
        else:
            for row, ratio in rows.items():
                print(f"  {row:<20}{ratio:6.2f} x")


if __name__ == "__main__":
    main()
