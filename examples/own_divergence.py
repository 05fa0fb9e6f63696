"""A divergence of your own beside KL: the policy that each penalty aims at, and how fast its gradient leads there.

Expected: both end within 0.001 of the optimum that theory gives them, in a few seconds; the two optima differ.

    python examples/own_divergence.py
"""

from __future__ import annotations

import torch

import mirrorpo

COEFFICIENT, STEPS = 0.5, 400


def quartic(x: torch.Tensor) -> torch.Tensor:
    """The generator h of a Bregman divergence: any strictly convex function of a probability."""
    return x**2 + x**4


torch.set_num_threads(1)
reward = torch.tensor([1.0, 0.6, 0.3, 0.0])
reference = torch.tensor([0.1, 0.2, 0.3, 0.4])
divergences = {
    "kl": mirrorpo.divergence("kl"),
    "quartic": mirrorpo.divergence(quartic, family="bregman"),
}
for name, divergence in divergences.items():
    aim = mirrorpo.optimum(divergence, reference, reward, COEFFICIENT)
    logits = reference.log().clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(STEPS):
        penalty = divergence.exact(logits[None], reference.log()[None]).sum()
        loss = COEFFICIENT * penalty - (logits.softmax(-1) * reward).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = logits.softmax(-1).detach()
    theory, practice = ([round(p, 3) for p in probabilities.tolist()] for probabilities in (aim, found))
    print(f"{name:8} aims at {theory}, gradient descent found {practice}")
    assert (found - aim).abs().max() < 1e-3
