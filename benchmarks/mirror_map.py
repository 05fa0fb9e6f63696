"""What does a learned divergence cost? Its table against the 126 units, and against ``prob_l2`` (1 min).

Three measurements: 8,192 tokens forward + backward against a loop over the units as the textbook has it (a ratio: how
many times faster); ``exact`` over a vocabulary of 150,000 against that of ``prob_l2`` (a ratio); building the table
when the 380 parameters have changed (milliseconds).

The loop evaluates h, the sum of the units' antiderivatives, at both points and phi_inv at the reference, and autograd
differentiates it. In float32 that costs a little over half and is noise wherever p is close to q; the library
evaluates in float64, and so does the loop it is compared with first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mirrorpo
from mirrorpo.divergences.neural.map import GROUPS, SLICES, UNITS_PER_GROUP, MirrorMap
from timing import interleaved, parser, ratios, show, use

TOKENS = 8192
VOCABULARY = 150_000
ROWS = 4

# sigma(u) and its antiderivative, by group
UNITS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cube": (lambda u: u**3, lambda u: u**4 / 4),
    "square": (lambda u: u**2, lambda u: u**3 / 3),
    "sqrt": (lambda u: u**0.5, lambda u: 2 / 3 * u**1.5),
    "cbrt": (lambda u: u ** (1 / 3), lambda u: 3 / 4 * u ** (4 / 3)),
    "log": (
        lambda u: torch.log(torch.clamp(u, min=0) + 1e-3),
        lambda u: (torch.clamp(u, min=0) + 1e-3) * torch.log(torch.clamp(u, min=0) + 1e-3) - u,
    ),
    "exp": (torch.exp, torch.exp),
}


def textbook(parameters: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """d_h(p, q) = h(p) - h(q) - h'(q)(p - q), unit by unit."""
    v, w, b, a, c = (parameters[SLICES[name]] for name in ("v", "w", "b", "a", "c"))

    def h(x: Tensor) -> Tensor:
        total = a * x**2 / 2 + c * (x * torch.log(x) - x)
        for j in range(len(v)):
            antiderivative = UNITS[GROUPS[j // UNITS_PER_GROUP]][1]
            total = total + v[j] / w[j] * antiderivative(w[j] * x + b[j])
        return total

    def phi_inv(x: Tensor) -> Tensor:
        total = a * x + c * torch.log(x)
        for j in range(len(v)):
            sigma = UNITS[GROUPS[j // UNITS_PER_GROUP]][0]
            total = total + v[j] * sigma(w[j] * x + b[j])
        return total

    def term(logp: Tensor, logp_ref: Tensor) -> Tensor:
        p, q = torch.exp(logp), torch.exp(logp_ref)
        return h(p) - h(q) - phi_inv(q) * (p - q)

    return term


def against_the_loop(rounds: int) -> dict[str, float]:
    """How many times faster than the loop."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        mirror = MirrorMap.random(seed=0)
        d = mirror.divergence()
    logp = -5 * torch.rand(TOKENS)
    ref = (logp + 0.3 * torch.randn(TOKENS)).clamp(max=-1e-3)

    def step(term: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Callable[[], None]:
        leaf, anchor = logp.to(dtype).requires_grad_(), ref.to(dtype)

        def run() -> None:
            leaf.grad = None
            term(leaf, anchor).sum().backward()

        return run

    table = step(d.sampled, torch.float32)
    contenders = {
        "loop, float64": step(textbook(mirror.parameters.to(logp.device)), torch.float64),
        "loop, float32": step(textbook(mirror.parameters.to(logp.device).float()), torch.float32),
        # Several steps at a time: one alone would mostly measure the caches that the loop has just emptied.
        "table": lambda: [table() for _ in range(10)],
    }
    medians = interleaved(contenders, rounds)
    medians["table"] /= 10
    return {name: medians[name] / medians["table"] for name in contenders if name != "table"}


def exact(rounds: int) -> dict[str, float]:
    """``exact`` forward + backward over that of ``prob_l2``."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(ROWS, VOCABULARY)
    ref = logits + 0.3 * torch.randn(ROWS, VOCABULARY)
    leaf = logits.clone().requires_grad_()

    def run(d: mirrorpo.Divergence) -> None:
        leaf.grad = None
        d.exact(leaf, ref).sum().backward()

    with torch.device("cpu"):  # a map's table is made there
        divergences = {name: mirrorpo.divergence(name) for name in ("prob_l2", "kl", "neural")}
    return ratios(interleaved({name: lambda d=d: run(d) for name, d in divergences.items()}, rounds), "prob_l2")


def rebuild(rounds: int) -> dict[str, float]:
    """Milliseconds from 380 parameters to a divergence."""
    evolved = torch.rand(380, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
    contenders = {
        "random map": lambda: mirrorpo.divergence("neural", parameters=0.01 * evolved),
        "parameters up to 10": lambda: mirrorpo.divergence("neural", parameters=10 * evolved),
    }
    with torch.device("cpu"):
        return {name: 1e3 * seconds for name, seconds in interleaved(contenders, rounds).items()}


def main() -> None:
    args = parser(__doc__).parse_args()
    use(args.device)
    torch.set_num_threads(1)
    rounds = 7 if args.quick else 40
    show("8,192 tokens forward + backward: the table is faster than", against_the_loop(rounds), "x", args.json)
    show("exact over 150,000 tokens, over that of prob_l2", exact(rounds), "x", args.json)
    show("building the table", rebuild(5 * rounds), "ms", args.json)


if __name__ == "__main__":
    main()
