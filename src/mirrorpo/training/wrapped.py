"""How is a part of a model run so that DistributedDataParallel sees it? Inside a call of the wrapper.

The wrapper's forward pass is where it learns that a backward pass will follow, and which parameters take part. Packed
rows go through the backbone alone, so for the time of one call the wrapped module's forward pass is another function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def through(wrapper: nn.Module, function: Callable[[], Tensor], later: nn.Module) -> Tensor:
    """The result of ``function``, called inside ``wrapper``'s forward pass if that synchronises gradients.

    Args:
        wrapper: the model as the trainer holds it; anything but ``DistributedDataParallel`` is not called.
        function: runs a part of the wrapped module.
        later: a module whose parameters the loss uses outside of this call; without it a wrapper that looks for unused
            parameters would take them for unused, and its backward pass would fail.
    """
    if not isinstance(wrapper, DistributedDataParallel):
        return function()

    def forward(_: None) -> tuple[Any, ...]:
        # An empty view has the parameter in its graph, and is all that the wrapper looks at.
        return function(), *(p[:0] for p in later.parameters() if p.requires_grad)

    module = wrapper.module
    own = vars(module).get("forward")  # accelerate and TRL give modules a forward of their own
    vars(module)["forward"] = forward
    try:
        return wrapper(None)[0]  # on a GPU the wrapper moves its inputs there, and wants one
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


__all__ = ["through"]
