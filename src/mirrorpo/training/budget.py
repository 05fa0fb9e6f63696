"""Out of memory: which token budget would have fitted? The first of a half, a quarter, ... of the row that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from mirrorpo.training.fast import PackedPath


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a failed allocation; a CPU's allocator has no class of its own, only a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def budget_advice(path: PackedPath, model: nn.Module) -> Iterator[None]:
    """A failed allocation while a packed micro-batch is trained on becomes an error that says which budget fits.

    The micro-batch is read again, forward and backward, with budgets of half its longest row, a quarter, ... until one
    fits; the gradients of the failed step are dropped. Not with several processes: the others would wait for this one's
    gradients.

    Args:
        path: whose last micro-batch it was.
        model: the policy.
    """
    failed: RuntimeError | None = None
    try:
        yield
    except RuntimeError as error:
        if path.last is None or not is_out_of_memory(error) or "chunk=" in str(error):
            raise  # not ours, or advised on already
        failed = error.with_traceback(None)  # its frames hold the activations
    if failed is None:
        return
    model.zero_grad(set_to_none=True)
    tokens, shortest = path.last_tokens, path.last_shortest
    failure = f"out of memory with packed rows of {tokens} tokens"
    if path.accelerator.num_processes > 1:
        raise torch.OutOfMemoryError(f"{failure}; try a token_budget from {shortest} to {tokens // 2}") from failed
    budget = fitting_budget(path.read_last, tokens, shortest)
    model.zero_grad(set_to_none=True)
    advice = (
        f"token_budget={budget} fits"
        if budget is not None
        else "no token_budget fits: use a smaller per_device_train_batch_size, activation_checkpointing or LoRA"
    )
    raise torch.OutOfMemoryError(f"{failure}; {advice}") from failed


def fitting_budget(read: Callable[[int], None], tokens: int, shortest: int) -> int | None:
    """The first of tokens / 2, tokens / 4, ... that ``read`` survives; None if none of at least ``shortest`` does."""
    budget = tokens // 2
    while budget >= shortest:
        try:
            read(budget)
            return budget
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget //= 2
    return None


__all__ = ["budget_advice", "fitting_budget", "is_out_of_memory"]
