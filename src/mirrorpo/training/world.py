"""Which process of a run am I, and do all agree? One process, or those of ``accelerate launch`` and ``torchrun``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mirrorpo.errors import InputError
from mirrorpo.losses.objective import Objective

T = TypeVar("T")
# What every process must have alike, beyond the objective: otherwise one waits for the other for ever, or the average
# is over unlike things.
_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "max_completion_length",
    "temperature",
    "max_steps",
    "learning_rate",
    "seed",
    "save_steps",
    "gradient_share_every",
    "use_vllm",
    "bf16",
)


def world_size() -> int:
    """Processes of this run, as the launcher says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process, 0 for the main one."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def shards_parameters() -> bool:
    """Whether the launcher asks for FSDP or ZeRO-3: then no process holds the whole model."""
    environment = os.environ
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return True
    return uses_deepspeed() and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3") == "3"


def uses_deepspeed() -> bool:
    """Whether the launcher, or an ``Accelerator`` made with a plugin, asks for DeepSpeed: accelerate's own sign."""
    # accelerate takes "true", transformers these; either of them is enough to train with it.
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1", "yes", "y", "t", "on")


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks; on every process."""
    if world_size() == 1:
        return [value]
    from accelerate import PartialState
    from transformers import TrainingArguments

    # Joins the group, if nothing has yet; with transformers' time limit, which would otherwise come too late.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=TrainingArguments.ddp_timeout))
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def together(work: Callable[[], T], *, main_only: bool = False) -> T | None:
    """Runs something on every process, or on the main one; what fails on one ends all.

    Args:
        work: may raise ``InputError``.
        main_only: whether only the main process runs it; the others get None.

    Returns:
        What ``work`` returned here.

    Raises:
        InputError: the first one that was raised, on the main process; the others exit with status 2, silently.
    """
    result, message = None, None
    if is_main() or not main_only:
        try:
            result = work()
        except InputError as error:
            if world_size() == 1:
                raise
            message = str(error)
    failed = [text for text in gather(message) if text is not None]
    if not failed:
        return result
    if is_main():
        raise InputError(failed[0])
    sys.exit(2)


def check_equal(settings: Mapping[str, Any]) -> None:
    """Raises unless the processes of a run have the same settings.

    Args:
        settings: by name; plain values.

    Raises:
        ValueError: names the first one that differs, and the values by process.

    Example:
        >>> check_equal({"seed": 0})  # one process agrees with itself
    """
    everyone = gather(dict(settings))
    for name in settings:
        values = [other.get(name) for other in everyone]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"process {index}: {value!r}" for index, value in enumerate(values[:8]))
            raise ValueError(f"{name} must be the same on all {len(everyone)} processes, got {shown}")


def trainer_settings(args: Any, objective: Objective) -> dict[str, Any]:
    """What the processes of a training must have alike."""
    return {"objective": objective.describe(), **{name: getattr(args, name) for name in _SETTINGS}}
