"""What do head and objective cost, from hidden states to gradients? Time and peak memory (7 min; quick: 2).

GRPO with its k3 penalty: loss, entropies, gradients of hidden states and weight. Contenders, on the same inputs:

- ``eager``: full logits and autograd;
- ``TRL``: ``ChunkedLogProbFunction`` as its GRPO trainer calls it on this device, then its loss;
- ``Liger``: ``LigerFusedLinearGRPOLoss``; compiled by torch too, if not quick and a compiler is at hand;
- ``mirrorpo``: ``objective_from_hidden``, metrics included, and its two-pass form;
- ``--compiled`` instead: what lies between the products (log-sum-exp, entropy, gradient of the logits), by
  ``torch.compile`` over ours; processor time;
- ``6 N H V``: three bare matrix products over the tokens that count, the limit of what stores no logits.

Ragged completions are padded to the longest, as a GRPO batch is: ``eager``, ``TRL`` (on a CPU) and ``Liger`` project
the padding too, ``mirrorpo`` gathers the tokens first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

import mirrorpo
from memory import peak_mib, peak_of, present
from mirrorpo.kernels import Head, objective_from_hidden, single_pass
from mirrorpo.kernels.sweep import Chunk, Found
from timing import interleaved, on_gpu, parser, ratios, show, use

EPSILON, BETA, COMPLETIONS = 0.2, 0.04, 8


@dataclass(frozen=True)
class Shape:
    """Eight completions of these lengths."""

    shortest: int
    longest: int
    width: int
    vocabulary: int

    def __str__(self) -> str:
        span = str(self.longest) if self.shortest == self.longest else f"{self.shortest}-{self.longest}"
        return f"{COMPLETIONS} completions of {span} tokens, H {self.width}, V {self.vocabulary}"


SHAPES = {
    "equal": Shape(128, 128, 512, 32000),
    "ragged": Shape(40, 200, 512, 32000),
    "wide": Shape(64, 64, 896, 151936),
}
QUICK = ("equal", "ragged")
LIMIT = "6 N H V"


@dataclass
class Inputs:
    """One batch, padded."""

    hidden: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor
    logp_old: torch.Tensor
    logp_ref: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, shape: Shape) -> Inputs:
        torch.manual_seed(0)
        size = (COMPLETIONS, shape.longest)
        lengths = torch.linspace(shape.shortest, shape.longest, COMPLETIONS).long()
        weight = (0.05 * torch.randn(shape.vocabulary, shape.width)).requires_grad_()
        hidden = torch.randn(*size, shape.width).requires_grad_()
        tokens = torch.randint(shape.vocabulary, size)
        logp = -3.0 - 10.0 * torch.rand(size)
        old, ref = (logp + 0.1 * torch.randn(size) for _ in range(2))
        mask = torch.arange(shape.longest) < lengths.unsqueeze(1)
        return cls(hidden, weight, tokens, old, ref, torch.randn(COMPLETIONS), mask)

    def loss(self, logp: torch.Tensor) -> torch.Tensor:
        """GRPO as TRL 1.16 writes it: clip, k3, mean over each completion, then over completions."""
        ratio = torch.exp(logp - self.logp_old)
        clipped = torch.clamp(ratio, 1 - EPSILON, 1 + EPSILON)
        advantages = self.advantages.unsqueeze(1)
        policy = -torch.min(ratio * advantages, clipped * advantages)
        k3 = torch.exp(self.logp_ref - logp) - (self.logp_ref - logp) - 1
        per_token = policy + BETA * k3
        return ((per_token * self.mask).sum(-1) / self.mask.sum(-1).clamp(min=1.0)).mean()


def eager(x: Inputs) -> torch.Tensor:
    logps = (x.hidden @ x.weight.t()).log_softmax(-1)
    with torch.no_grad():
        _ = -(logps.exp() * logps).sum(-1)
    return x.loss(logps.gather(-1, x.tokens.unsqueeze(-1)).squeeze(-1))


def trl(x: Inputs) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    flat, tokens = x.hidden.reshape(-1, x.hidden.shape[-1]), x.tokens.reshape(-1)
    logp, *_ = ChunkedLogProbFunction.apply(
        flat, x.weight, None, tokens, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    return x.loss(logp.view_as(x.tokens))


def liger(x: Inputs, compiled: bool = False) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=BETA, compiled=compiled, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="grpo"
    )
    given = {"ref_per_token_logps": x.logp_ref, "old_per_token_logps": x.logp_old}
    return loss(x.hidden, x.weight, x.tokens, x.mask.float(), x.advantages, **given)[0]


def ours(x: Inputs, two_passes: bool = False) -> torch.Tensor:
    return objective_from_hidden(
        mirrorpo.objective("grpo"),
        x.hidden[x.mask],
        Head(x.weight),
        x.tokens[x.mask],
        advantages=x.advantages,
        mask=x.mask,
        logp_old=x.logp_old,
        logp_ref=x.logp_ref,
        weight=(lambda logp, entropy: None) if two_passes else None,
    )[0].loss


LOSSES: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "eager": eager,
    "TRL": trl,
    "Liger": liger,
    "Liger, compiled": lambda x: liger(x, compiled=True),
    "mirrorpo": ours,
    "mirrorpo, two passes": lambda x: ours(x, two_passes=True),
}


def step(x: Inputs, loss: Callable[[Inputs], torch.Tensor]) -> None:
    x.hidden.grad = x.weight.grad = None
    loss(x).backward()


def limit(x: Inputs) -> Callable[[], None]:
    """The three products, into memory that is there already."""
    hidden = x.hidden.detach()[x.mask]
    logits = torch.empty(hidden.shape[0], x.weight.shape[0])
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(x.weight)

    @torch.no_grad()
    def products() -> None:
        torch.mm(hidden, x.weight.t(), out=logits)
        torch.mm(logits, x.weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return products


def check_equal(x: Inputs, names: list[str]) -> None:
    """All contenders give the gradients of ``eager``, to 1e-5."""
    found = {}
    for name in names:
        step(x, LOSSES[name])
        assert x.hidden.grad is not None
        assert x.weight.grad is not None
        found[name] = (x.hidden.grad, x.weight.grad)
    for name, grads in found.items():
        for got, expected in zip(grads, found["eager"], strict=True):
            error = ((got - expected).norm() / expected.norm()).item()
            if not error < 1e-5:
                raise SystemExit(f"{name}: a gradient is {error:.2g} away from eager's")


def measure(key: str, rounds: int, names: list[str]) -> dict[str, dict[str, float]]:
    x = Inputs.of(SHAPES[key])
    check_equal(x, names)
    calls: dict[str, Callable[[], None]] = {name: lambda name=name: step(x, LOSSES[name]) for name in names}
    medians = interleaved(calls | {LIMIT: limit(x)}, rounds, warmup=1)
    return {
        "seconds": medians,
        "time over mirrorpo": ratios(medians, "mirrorpo"),
        "peak MiB": {name: peak_of(calls[name], __file__, key, name) for name in names},
    }


def table(key: str, found: dict[str, dict[str, float]]) -> None:
    print(f"{SHAPES[key]}; float32, {'GPU' if on_gpu() else f'{torch.get_num_threads()} threads'}")
    for name, seconds in found["seconds"].items():
        peak = f"{found['peak MiB'][name]:8.0f} MiB" if name in found["peak MiB"] else ""
        print(f"  {name:<22}{seconds * 1e3:8.0f} ms {found['time over mirrorpo'][name]:7.2f} x mirrorpo {peak}")


def compiled(rounds: int, count: int = 256, width: int = 512, vocabulary: int = 32000) -> dict[str, float]:
    """What lies between a chunk's products by ``torch.compile``, and the whole head, over ours; needs g++."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, width), 0.05 * torch.randn(vocabulary, width)
    tokens, slope, eta = torch.randint(vocabulary, (count,)), torch.randn(count), torch.randn(count)
    products, head = hidden @ weight.t(), Head(weight)
    z = torch.empty_like(products)

    @torch.compile(dynamic=False)
    def statistics(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        largest = z.amax(-1, keepdim=True)
        e = (z - largest).exp()
        total = e.sum(-1, keepdim=True)
        log_sum = largest + total.log()
        logp = z.gather(-1, tokens.unsqueeze(-1)) - log_sum
        return logp.squeeze(-1), (total.log() - (e * (z - largest)).sum(-1, keepdim=True) / total).squeeze(-1), log_sum

    @torch.compile(dynamic=False)
    def gradient(z: torch.Tensor, log_sum: torch.Tensor, share: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
        p = (z - log_sum).exp()
        return p * share.unsqueeze(-1) - eta.unsqueeze(-1) * p * (z - log_sum)

    def by_compiler() -> torch.Tensor:
        z.copy_(products)
        _, entropy, log_sum = statistics(z)
        return gradient(z, log_sum, -slope - eta * entropy, eta).scatter_add_(
            -1, tokens.unsqueeze(-1), slope.unsqueeze(-1)
        )

    def ours() -> torch.Tensor:
        found = Found(hidden, head, (), None, torch.float32)
        chunk = Chunk(hidden, head, tokens, z.copy_(products), {}, (), slice(0, count))
        chunk.logs = True
        chunk._normalise(found)
        return chunk._logits_gradient(found, slope, (), eta, torch.float32)

    def whole() -> None:
        leaves = hidden.detach().requires_grad_(), Head(weight.detach().requires_grad_())
        single_pass(*leaves, tokens, lambda logp, part, _: logp * slope[part], entropy_weights=eta).loss.backward()

    torch.testing.assert_close(by_compiler(), ours(), rtol=1e-4, atol=1e-5)
    copy = "the copy that both need here"
    calls: dict[str, Callable[[], object]] = {
        copy: lambda: z.copy_(products),
        "ours": ours,
        "torch.compile": by_compiler,
        "the whole head": whole,
    }
    medians = interleaved(calls, rounds, warmup=2, clock=time.process_time)
    taken = {name: medians[name] - medians[copy] for name in ("ours", "torch.compile")}
    return ratios(taken | {"the whole head": medians["the whole head"]}, "ours")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--peak", nargs=2, metavar=("SHAPE", "NAME"), help=argparse.SUPPRESS)
    made.add_argument("--compiled", action="store_true", help="the sweep by torch.compile over ours")
    args = made.parse_args()
    use(args.device)
    if args.compiled:
        torch.set_num_threads(1)
        show("between the products, over ours", compiled(7 if args.quick else 15), "x", args.json)
        return
    warnings.simplefilter("ignore")
    if args.peak:
        key, name = args.peak
        # Imports and first calls allocate too: they are the process's, not the contender's.
        step(Inputs.of(Shape(2, 4, 8, 16)), LOSSES[name])
        x = Inputs.of(SHAPES[key])
        print(peak_mib(lambda: step(x, LOSSES[name])))
        return
    results = {}
    for key in QUICK if args.quick else SHAPES:
        compiles = key == "equal" and not args.quick and shutil.which("g++") is not None
        names = [name for name in present(LOSSES) if compiles or name != "Liger, compiled"]
        results[key] = measure(key, 7 if args.quick else 9, names)
        if not args.json:
            table(key, results[key])
    if args.json:
        shapes = {key: str(SHAPES[key]) for key in results}
        print(json.dumps({"title": "head and objective", "shapes": shapes, "values": results}))


if __name__ == "__main__":
    main()
