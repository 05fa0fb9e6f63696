"""What do head and objective cost, from hidden states to gradients? Time and peak memory over TRL's (4 min; quick: 1).

GRPO with its k3 penalty: loss, entropies, gradients of hidden states and weight. Contenders, on the same inputs:

- ``eager``: full logits and autograd;
- ``TRL``: ``ChunkedLogProbFunction`` as its GRPO trainer calls it, then its loss;
- ``Liger``: ``LigerFusedLinearGRPOLoss``, as it comes and compiled by torch where a compiler is at hand;
- ``mirrorpo``: ``objective_from_hidden``, metrics included, and its two-pass form;
- ``6 N H V``: three bare matrix products, the limit of every method that stores no logits.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

import mirrorpo
from memory import peak_in_process, peak_mib
from mirrorpo.kernels import Head, objective_from_hidden
from timing import interleaved, parser, ratios

EPSILON, BETA = 0.2, 0.04
COMPLETIONS = 8
# tokens, hidden size, vocabulary
SHAPES = {"small": (1024, 512, 32000), "long": (4096, 512, 32000), "wide": (512, 1024, 151936)}
QUICK = ("small",)


@dataclass
class Inputs:
    """One batch of completions of equal length."""

    hidden: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor
    logp_old: torch.Tensor
    logp_ref: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, shape: str) -> Inputs:
        count, width, vocabulary = SHAPES[shape]
        torch.manual_seed(0)
        hidden, weight = torch.randn(count, width), 0.05 * torch.randn(vocabulary, width)
        tokens = torch.randint(vocabulary, (COMPLETIONS, count // COMPLETIONS))
        logp = -3.0 - 10.0 * torch.rand(tokens.shape)
        old, ref = (logp + 0.1 * torch.randn(tokens.shape) for _ in range(2))
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        return cls(hidden, weight, tokens, old, ref, torch.randn(COMPLETIONS), mask).with_grads()

    def with_grads(self) -> Inputs:
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        return self

    def loss(self, logp: torch.Tensor) -> torch.Tensor:
        """GRPO as TRL 1.16 writes it: clip, k3, mean over each completion, then over completions."""
        ratio = torch.exp(logp - self.logp_old)
        clipped = torch.clamp(ratio, 1 - EPSILON, 1 + EPSILON)
        advantages = self.advantages.unsqueeze(1)
        policy = -torch.min(ratio * advantages, clipped * advantages)
        k3 = torch.exp(self.logp_ref - logp) - (self.logp_ref - logp) - 1
        per_token = policy + BETA * k3
        return ((per_token * self.mask).sum(-1) / self.mask.sum(-1).clamp(min=1.0)).mean()


def contenders(x: Inputs, names: tuple[str, ...] | None = None) -> dict[str, Callable[[], None]]:
    """Name to a call that leaves fresh gradients in ``x``."""
    limit = {
        "logits": torch.empty(x.hidden.shape[0], x.weight.shape[0]),
        "hidden": torch.empty_like(x.hidden),
        "weight": torch.empty_like(x.weight),
    }
    head, objective = Head(x.weight), mirrorpo.objective("grpo")

    def stepped(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            x.hidden.grad = x.weight.grad = None
            loss().backward()

        return step

    def eager() -> torch.Tensor:
        logps = (x.hidden @ x.weight.t()).log_softmax(-1)
        with torch.no_grad():
            _ = -(logps.exp() * logps).sum(-1)
        return x.loss(logps.gather(-1, x.tokens.view(-1, 1)).view_as(x.tokens))

    def trl() -> torch.Tensor:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        logp, *_ = ChunkedLogProbFunction.apply(
            x.hidden, x.weight, None, x.tokens.view(-1), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
        )
        return x.loss(logp.view_as(x.tokens))

    def liger(compiled: bool) -> Callable[[], torch.Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=BETA, compiled=compiled, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="grpo"
        )
        shape = (*x.tokens.shape, x.hidden.shape[1])
        return lambda: loss(
            x.hidden.view(shape),
            x.weight,
            x.tokens,
            x.mask.float(),
            x.advantages,
            ref_per_token_logps=x.logp_ref,
            old_per_token_logps=x.logp_old,
        )[0]

    def ours(two_passes: bool) -> torch.Tensor:
        return objective_from_hidden(
            objective,
            x.hidden,
            head,
            x.tokens.view(-1),
            advantages=x.advantages,
            mask=x.mask,
            logp_old=x.logp_old,
            logp_ref=x.logp_ref,
            weight=(lambda logp, entropy: None) if two_passes else None,
        )[0].loss

    @torch.no_grad()
    def products() -> None:
        torch.mm(x.hidden, x.weight.t(), out=limit["logits"])
        torch.mm(limit["logits"], x.weight, out=limit["hidden"])
        torch.mm(limit["logits"].t(), x.hidden, out=limit["weight"])

    made = {
        "eager": stepped(eager),
        "TRL": stepped(trl),
        "Liger": stepped(lambda: liger(False)()),
        "Liger, compiled": stepped(lambda: liger(True)()),
        "mirrorpo": stepped(lambda: ours(False)),
        "mirrorpo, two passes": stepped(lambda: ours(True)),
        "6 N H V": products,
    }
    return made if names is None else {name: made[name] for name in names}


def check_equal(x: Inputs) -> None:
    """All contenders give the gradients of ``eager``, to 1e-5."""
    found = {}
    for name, step in contenders(x).items():
        if name != "6 N H V":
            step()
            assert x.hidden.grad is not None
            assert x.weight.grad is not None
            found[name] = (x.hidden.grad, x.weight.grad)
    for name, grads in found.items():
        for got, expected in zip(grads, found["eager"], strict=True):
            error = ((got - expected).norm() / expected.norm()).item()
            if not error < 1e-5:
                raise SystemExit(f"{name}: a gradient is {error:.2g} away from eager's")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--peak", nargs=2, metavar=("SHAPE", "NAME"), help=argparse.SUPPRESS)
    args = made.parse_args()
    warnings.simplefilter("ignore")
    if args.peak:
        shape, name = args.peak
        warm = Inputs.of(shape)
        call = contenders(warm, (name,))[name]
        warm_up_libraries()
        print(peak_mib(call))
        return
    results = {}
    for shape in QUICK if args.quick else SHAPES:
        x = Inputs.of(shape)
        check_equal(x)
        calls = contenders(x)
        medians = interleaved(calls, rounds=7 if args.quick else 9, warmup=1)
        peaks = {name: peak_in_process(__file__, shape, name) for name in calls if name != "6 N H V"}
        results[shape] = {
            "seconds": medians,
            "time over mirrorpo": ratios(medians, "mirrorpo"),
            "peak MiB": peaks,
        }
        if not args.json:
            table(shape, results[shape])
    if args.json:
        print(json.dumps({"title": "head and objective", "shapes": SHAPES, "values": results}))


def warm_up_libraries() -> None:
    """What imports and first calls allocate is not the contender's."""
    left = torch.randn(256, 256)
    torch.mm(left, left).softmax(-1).sum()


def table(shape: str, found: dict[str, dict[str, float]]) -> None:
    count, width, vocabulary = SHAPES[shape]
    print(f"N {count}, H {width}, V {vocabulary}, float32, {torch.get_num_threads()} threads")
    for name, seconds in found["seconds"].items():
        peak = found["peak MiB"].get(name)
        print(
            f"  {name:<22}{seconds * 1e3:9.0f} ms {found['time over mirrorpo'][name]:7.2f} x mirrorpo's"
            + (f" {peak:9.0f} MiB" if peak is not None else "")
        )


if __name__ == "__main__":
    main()
