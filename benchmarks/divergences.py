"""What does a penalty cost? ``sampled`` forward + backward on 8,192 tokens, over plain k3 written by hand (20 s)."""

from __future__ import annotations

import torch

import mirrorpo
from mirrorpo.divergences import DIVERGENCES
from timing import interleaved, parser, ratios, show

TOKENS = 8192
OPTIONS = {"beta": {"beta": 0.5}, "alpha": {"alpha": 0.5}, "neural": {"seed": 0}}


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.manual_seed(0)
    logp = -5 * torch.rand(TOKENS)
    ref = (logp + 0.3 * torch.randn(TOKENS)).clamp(max=-1e-3)
    leaf = logp.clone().requires_grad_()

    def by_hand() -> None:
        leaf.grad = None
        (torch.exp(ref - leaf) - (ref - leaf) - 1).sum().backward()

    def ours(d: mirrorpo.Divergence) -> None:
        leaf.grad = None
        d.sampled(leaf, ref).sum().backward()

    values = {}
    for name in DIVERGENCES:
        d = mirrorpo.divergence(name, **OPTIONS.get(name, {}))
        # In pairs: with all of them in turn, each would pay for what its neighbour left in the caches.
        pair = {"by hand": by_hand, name: lambda d=d: ours(d)}
        values[name] = ratios(interleaved(pair, rounds=100 if args.quick else 500, warmup=20), "by hand")[name]
    show(
        "sampled, forward + backward, 8,192 tokens, over plain k3 by hand",
        values,
        "x",
        args.json,
    )


if __name__ == "__main__":
    main()
