"""Processes of a run: who this one is, agreement between them, and numbers and gradients over all of them.

There is one process, or those of ``accelerate launch`` and ``torchrun``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mirrorpo.errors import InputError
from mirrorpo.losses.metrics import ratio_quantiles

if TYPE_CHECKING:
    from mirrorpo.losses.objective import Objective

T = TypeVar("T")
# Here every process holds the whole model and optimiser; sharded ones are saved by their own libraries.
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
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


def unsharded_notice(kind: str) -> str | None:
    """What to say where FSDP or DeepSpeed was asked for and accelerate left it out, as it does on a CPU; else None.

    Args:
        kind: accelerate's type of distribution: "MULTI_CPU", "FSDP", ...
    """
    asked = {"FSDP": os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true", "DEEPSPEED": uses_deepspeed()}
    for name in (name for name, wanted in asked.items() if wanted and kind != name):
        return f"{name} was asked for, but accelerate left it out ({kind}, no accelerator): each process holds it all"
    return None


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


# Tokens of a rank that enter the quantiles over all ranks; of more, an even subsample.
MAX_GATHERED_TOKENS = 8192


def reduce_metrics(accelerator: Any, metrics: dict[str, Tensor], num_tokens: Tensor) -> dict[str, float]:
    """Python numbers, the same on every rank, with one transfer from the device.

    Args:
        accelerator: accelerate's ``Accelerator``.
        metrics: scalars; ``.../max`` and ``.../min`` are extremes, names that end in ``_loss/mean`` are averaged over
            ranks, all others are means over tokens.
        num_tokens: tokens that this rank's means are over.

    Returns:
        The reduced values by name. A mean over no token at all is 0.
    """
    names = list(metrics)
    local = torch.stack([num_tokens.detach().double(), *(metrics[name].detach().double() for name in names)])
    rows = accelerator.gather(local.unsqueeze(0)).cpu()
    counts, values = rows[:, 0], rows[:, 1:]
    total = counts.sum().clamp(min=1.0)
    reduced = {}
    for name, column in zip(names, values.T, strict=True):
        if name.endswith("/max"):
            number = column.max()
        elif name.endswith("/min"):
            number = column.min()
        elif name.endswith("_loss/mean"):
            number = column.mean()
        else:
            number = (column * counts).sum() / total
        reduced[name] = number.item()
    return reduced


@torch.no_grad()
def quantiles_over_ranks(accelerator: Any, log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
    """Quantiles of w over the tokens of all ranks: those of single ranks have no average that means anything.

    Args:
        accelerator: accelerate's ``Accelerator``.
        log_ratio: (B, T), log w of this rank's tokens; T may differ between ranks.
        mask: (B, T), 0 drops a token.

    Returns:
        ``ratio/q01/mean`` and its siblings, the same on every rank.
    """
    ratio = torch.where(mask.bool(), log_ratio.detach().float().exp(), torch.nan).reshape(-1)
    ratio = ratio[:: max(1, -(-ratio.numel() // MAX_GATHERED_TOKENS))]
    everyone = accelerator.gather(accelerator.pad_across_processes(ratio, dim=0, pad_index=torch.nan))
    return {name: value.item() for name, value in ratio_quantiles(everyone, ~everyone.isnan()).items()}


def why_padded(accelerator: Any) -> str | None:
    """Why a model in parts cannot read packed rows, in a few words; None if it is whole, or its parts may.

    ZeRO-1 and 2 keep parameters whole. ZeRO-3, and accelerate's FSDP2, gather a head's when the head is called, which
    packed rows never do; a model that was given to ``fully_shard`` as a whole is looked at when it is read.
    """
    kind = accelerator.distributed_type
    whole = kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage < 3
    return None if whole or kind in UNSHARDED else f"the model is sharded ({kind.value.lower()})"


def parts_elsewhere(model: nn.Module, head: nn.Module | None) -> str | None:
    """Why a sharded model's parts are not those that its forward pass gathers, in a few words; None if they are."""
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if meshes and (not isinstance(model, FSDPModule) or any(mesh.ndim > 1 for mesh in meshes)):
        return "the model is sharded (distributed tensors)"
    return "the model's head is sharded apart from it" if isinstance(head, FSDPModule) else None


def agreed(flag: bool, device: torch.device) -> bool:
    """Whether all processes of the run say so."""
    everyone = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MIN)
    return bool(everyone)


def through(wrapper: nn.Module, module: nn.Module, function: Callable[[], T], later: nn.Module) -> T:
    """The result of ``function``, called inside ``wrapper``'s forward pass if that gathers parameters or gradients.

    Args:
        wrapper: the model as the trainer holds it.
        module: the model in it.
        function: runs a part of the module; a tensor is differentiable.
        later: a module whose parameters the loss uses outside of this call; without it a wrapper that looks for unused
            parameters would take them for unused, and its backward pass would fail.
    """
    in_place = isinstance(module, FSDPModule)
    if wrapper is module and not in_place:
        return function()

    def forward(_: None) -> tuple[Any, ...]:
        if not isinstance(wrapper, DistributedDataParallel):
            return (function(),)
        # An empty view has the parameter in its graph, and is all that the wrapper looks at.
        return function(), *(p[:0] for p in later.parameters() if p.requires_grad)

    own = vars(module).get("forward")  # accelerate and TRL give modules a forward of their own
    vars(module)["forward"] = forward
    try:
        found = (module if in_place else wrapper)(None)[0]  # on a GPU a wrapper moves its inputs there, and wants one
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
    if in_place:
        module.unshard()  # the head is used next
    return found


__all__ = [
    "MAX_GATHERED_TOKENS",
    "UNSHARDED",
    "agreed",
    "check_equal",
    "gather",
    "is_main",
    "parts_elsewhere",
    "quantiles_over_ranks",
    "rank",
    "reduce_metrics",
    "shards_parameters",
    "through",
    "together",
    "trainer_settings",
    "unsharded_notice",
    "uses_deepspeed",
    "why_padded",
    "world_size",
]
