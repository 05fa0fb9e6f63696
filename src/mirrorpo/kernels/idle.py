"""A pass through a model for outputs that are not expected to have a gradient.

A group of completions whose rewards are all equal moves nothing: its advantages are 0. What it costs is a forward
pass, for the metrics; no activations are kept of it, and a gradient of exact zeros goes no further. Should the gradient
not be 0 after all, the pass is done again with the same random numbers: the result is right either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Multiplications of a forward pass from which on a backward pass saved is worth another call of the model: about 30 ms
# on a CPU. A GPU computes so much faster than it is called that it takes a thousand times as many.
WORTH = {"cpu": 2**30}
_WORTH_ELSEWHERE = 2**40


def pays(tokens: int, parameters: Iterable[Tensor], device: torch.device) -> bool:
    """Whether it saves more than it costs to leave so many tokens out of the backward pass through these parameters.

    Example:
        >>> import torch
        >>> pays(1000, [torch.zeros(1000, 1000)], torch.device("cpu"))
        False
    """
    return tokens * sum(p.numel() for p in parameters) >= WORTH.get(device.type, _WORTH_ELSEWHERE)


def without_activations(read: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """``read()``, differentiable in ``parameters`` once, with nothing in memory but its result.

    Args:
        read: computes a tensor from ``parameters``; called again in the backward pass if its gradient is not all 0,
            under the same autocast and from the same random states.
        parameters: what to differentiate in; those that need no gradient are left out.

    Returns:
        The result. Without a gradient the parameters that ``read`` used get zeros where they have no ``grad`` yet, so
        that an optimiser sees what a whole backward pass would have left: weight decay and momentum act on these, and
        on no others.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, requires_grad=True)
        >>> y = without_activations(lambda: weight * weight, [weight])
        >>> (y * torch.tensor([0.0, 3.0])).sum().backward()
        >>> weight.grad
        tensor([0., 6.])
    """
    needed = [p for p in parameters if p.requires_grad]
    if not (needed and torch.is_grad_enabled()):
        return read()
    return _Idle.apply(read, needed[0].device, *needed)


class _Uses(TorchFunctionMode):
    """Notes which tensors are arguments of torch's functions; reading an attribute, a shape say, is no use."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            self.ids.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return func(*args, **kwargs)


class _Idle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, read: Callable[[], Tensor], device: torch.device, *parameters: Tensor) -> Tensor:
        kind = device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.devices = [] if kind == "cpu" else [torch.get_device_module(kind).current_device()]
        ctx.states = torch.get_rng_state(), [torch.get_device_module(kind).get_rng_state(d) for d in ctx.devices]
        ctx.read, ctx.parameters = read, parameters
        with _Uses() as uses:
            result = read()
        ctx.used = [id(p) in uses.ids for p in parameters]
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        if not bool(grad.any()):
            used = zip(ctx.parameters, ctx.used, strict=True)
            return (None, None, *(torch.zeros_like(p) if u and p.grad is None else None for p, u in used))
        kind, dtype, enabled = ctx.autocast
        host, others = ctx.states
        with torch.random.fork_rng(ctx.devices, device_type="cuda" if kind == "cpu" else kind), torch.enable_grad():
            torch.set_rng_state(host)
            for device, state in zip(ctx.devices, others, strict=True):
                torch.get_device_module(kind).set_rng_state(state, device)
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                again = ctx.read()
            grads = torch.autograd.grad(again, ctx.parameters, grad, allow_unused=True)
        return (None, None, *grads)


__all__ = ["pays", "without_activations"]
