"""Micro-batches of whole groups, without another set of completions in any optimiser step.

TRL shuffles the completions of a generation batch before it cuts it into micro-batches, so that a group is spread over
all of them and its prompt is read as often. An optimiser step adds up the gradients of ``gradient_accumulation_steps``
micro-batches in a row: within that window their order changes no sum. So the completions of the window are sorted by
prompt, in the order in which TRL's shuffle brought the prompts up, and cut again.

With one update per generation batch the window is the whole batch, and every group is whole. With more, TRL's shuffle
decides which completions of a group an update sees, and that stays: a group is whole as far as the window has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def regroup(batches: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Micro-batches with completions of one prompt side by side, within each ``window`` of them.

    Args:
        batches: micro-batches of equal size as TRL makes them; tensors with the completions first, scalars, None.
        window: micro-batches of an optimiser step; it divides their number.

    Returns:
        As many, with the same completions in each window.

    Raises:
        ValueError: ``window`` does not divide the number of micro-batches.
    """
    if window < 1 or len(batches) % window:
        raise ValueError(f"window must divide the number of micro-batches, {len(batches)}, got {window}")
    made: list[dict[str, Any]] = []
    for first in range(0, len(batches), window):
        parts = batches[first : first + window]
        order = _by_prompt(torch.cat([p["prompt_ids"].masked_fill(p["prompt_mask"] == 0, -1) for p in parts]))
        size = len(order) // window
        for number in range(window):
            rows = order[number * size : (number + 1) * size]
            made.append({key: _taken(parts, key, rows) for key in parts[0]})
    return made


def _by_prompt(prompts: Tensor) -> Tensor:
    """Indices that put equal rows side by side, in the order of their first appearance."""
    group = prompts.unique(dim=0, return_inverse=True)[1]
    place = torch.arange(len(group), device=group.device)
    first = torch.full_like(place, len(group)).scatter_reduce(0, group, place, "amin")
    return first[group].argsort(stable=True)


def _taken(parts: list[dict[str, Any]], key: str, rows: Tensor) -> Any:
    values = [part[key] for part in parts]
    if values[0] is None or (isinstance(values[0], Tensor) and values[0].dim() == 0):
        return values[0]
    if isinstance(values[0], Tensor):
        return torch.cat(values)[rows.to(values[0].device)]
    flat = [item for value in values for item in value]
    return [flat[row] for row in rows.tolist()]


__all__ = ["regroup"]
