"""How much of the gradient is the penalty's? Its share of the norm, from two extra backward passes now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mirrorpo.losses.objective import Output
from mirrorpo.training.distributed import UNSHARDED

if TYPE_CHECKING:
    from mirrorpo.training.trainer import MirrorTrainer

# Measured once more, early, when the policy has left its reference.
_EARLY_LOOK = 5


def share_is_due(trainer: MirrorTrainer) -> bool:
    """Whether this micro-batch is one to measure the penalty's share of the gradient on."""
    objective, every = trainer.policy_objective, trainer.args.gradient_share_every
    if not objective.placed("loss"):
        return False
    if trainer.accelerator.distributed_type not in UNSHARDED:
        return False  # sharded gradients have no norm of their own
    step = trainer.state.global_step
    return every > 0 and trainer.model.training and (step % every == 0 or step == _EARLY_LOOK)


def penalty_share(model: nn.Module, output: Output, accelerator: Any) -> float:
    r"""The penalty's share of the gradient that an optimiser step would take,
    :math:`\lVert g_{penalty} \rVert / (\lVert g_{policy} \rVert + \lVert g_{penalty} \rVert)`.

    Args:
        model: the policy.
        output: of the objective; ``penalty_loss`` is not None, and both parts have a graph.
        accelerator: accelerate's; gradients are averaged over its processes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for part in (output.policy_loss, output.penalty_loss):
        assert part is not None
        grads = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        present = (accelerator.reduce(g.detach().float(), "mean") for g in grads if g is not None)
        norms.append(torch.stack([g.norm() for g in present]).norm())
    return (norms[1] / (norms[0] + norms[1]).clamp(min=torch.finfo(torch.float32).tiny)).item()


__all__ = ["penalty_share", "share_is_due"]
