"""A batch with hidden states of three policies, and everything that the plain path needs of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import mirrorpo
from mirrorpo.kernels import Anchor, Head
from naive import logits

B, T, H, H_REF, V, LENGTH = 4, 6, 5, 7, 11, 9
# One empty completion, one of a single token.
LENGTHS = (6, 3, 0, 1)


def head(width: int = H, *, seed: int = 0, bias: bool = False, vocabulary: int = V, **settings: Any) -> Head:
    """A random float64 head whose parameters require gradients."""
    weight = logits(vocabulary, width, seed=seed).requires_grad_()
    return Head(weight, logits(vocabulary, seed=seed + 50).requires_grad_() if bias else None, **settings)


@dataclass(frozen=True)
class Batch:
    """Hidden states of the kept tokens under policy, reference and rollout policy."""

    hidden: torch.Tensor
    head: Head
    reference: Anchor
    rollout: Anchor
    tokens: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None and x.requires_grad]

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) to (B, T, ...)."""
        mask = self.mask.view(*self.mask.shape, *(1 for _ in x.shape[1:]))
        return x.new_zeros(*self.mask.shape, *x.shape[1:]).masked_scatter(mask, x)

    def logp(self, logits: torch.Tensor) -> torch.Tensor:
        return self.padded(logits.log_softmax(-1).gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1))

    @property
    def teacher(self) -> Anchor:
        """The reference with another head."""
        weight = self.reference.head.weight.flip(0)
        return Anchor(hidden=self.reference.hidden, head=replace(self.reference.head, weight=weight))

    def sampler(self) -> torch.Tensor:
        """What an engine with noise would report of the rollout policy."""
        old = self.logp(self.rollout.head.logits(self.rollout.hidden)).detach()
        return torch.where(self.mask, (old + 0.1 * logits(*old.shape, seed=8).to(old)).clamp(max=-1e-3), 0.0)

    def shared(self) -> dict[str, Any]:
        """What plain and fused path take alike."""
        return {
            "advantages": self.advantages,
            "mask": self.mask,
            "logp_old": self.logp(self.rollout.head.logits(self.rollout.hidden)).detach(),
            "logp_ref": self.logp(self.reference.head.logits(self.reference.hidden)).detach(),
            "logp_sampler": self.sampler(),
            "logp_teacher": self.logp(self.teacher.head.logits(self.teacher.hidden)).detach(),
            "max_completion_length": LENGTH,
        }

    def plain(self, objective: mirrorpo.Objective, **changes: Any) -> mirrorpo.Output:
        """The objective from full logits, by autograd."""
        all_logits = self.head.logits(self.hidden)
        of_all = all_logits.log_softmax(-1)
        given = self.shared() | {"entropy": self.padded(-(of_all.exp() * of_all).sum(-1)).detach()}
        if objective.needs_logits:
            given |= {
                "logits": self.padded(all_logits),
                "logits_ref": self.padded(self.reference.head.logits(self.reference.hidden)),
                "logits_old": self.padded(self.rollout.head.logits(self.rollout.hidden)),
                "logits_teacher": self.padded(self.teacher.head.logits(self.teacher.hidden)),
                "tokens": self.padded(self.tokens),
            }
        given["vocabulary"] = self.head.vocabulary
        return objective(logp=self.logp(all_logits), **(given | changes))


def batch(
    lengths: tuple[int, ...] = LENGTHS,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    spread: float = 0.15,
    vocabulary: int = V,
    **settings: Any,
) -> Batch:
    """A batch whose rollout policy is a small step away; the reference has another width."""
    count, longest = sum(lengths), max((*lengths, 1))
    policy = head(bias=bias, vocabulary=vocabulary, **settings)
    hidden = logits(count, H, seed=1)
    old_weight = policy.weight.detach() + spread * logits(vocabulary, H, seed=2)
    old_bias = None if policy.bias is None else policy.bias.detach()
    rollout = Anchor(hidden=hidden + spread * logits(count, H, seed=3), head=Head(old_weight, old_bias, **settings))
    reference = Anchor(
        hidden=logits(count, H_REF, seed=4),
        head=head(H_REF, seed=5, bias=bias, vocabulary=vocabulary, **settings).detached(),
    )
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(vocabulary, (count,), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
    made = Batch(hidden.requires_grad_(), policy, reference, rollout, tokens, mask, logits(len(lengths), seed=7))
    return made if dtype == torch.float64 else converted(made, dtype)


def converted(b: Batch, dtype: torch.dtype) -> Batch:
    """The same batch in another dtype, with leaves of its own."""

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    def of(given: Head) -> Head:
        bias = None if given.bias is None else leaf(given.bias)
        return Head(leaf(given.weight), bias, given.softcap, given.scale, given.temperature)

    reference, rollout = (Anchor(hidden=a.hidden.detach().to(dtype), head=of(a.head)) for a in (b.reference, b.rollout))
    advantages = b.advantages.to(torch.promote_types(dtype, torch.float32))
    return Batch(leaf(b.hidden), of(b.head), reference, rollout, b.tokens, b.mask, advantages)


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, leaves, retain_graph=False)]


def distance(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error of a gradient, each in its norm."""
    return max(((g - e).norm() / e.norm().clamp(min=1e-12)).item() for g, e in zip(got, expected, strict=True))
