"""What a CPU has for a model: the number of torch's threads that it can use, and bfloat16.

A tiny model gains nothing from many threads, and loses much by waiting.

A layer of a tiny model takes microseconds, less than it takes threads to meet at its end; on a busy machine the slowest
of them is waited for thousands of times a step.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Parameters for each thread: below it, a thread's share of a matrix product is less than the cost of meeting.
PARAMETERS_A_THREAD = 500_000
# Below so many parameters a step is not spent in matrix products, and a shorter format saves little.
_WORTH_BFLOAT16 = 50_000_000
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86-64's, and Arm's
_CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def threads_for(parameters: int, available: int) -> int:
    """Between 1 and what is available, one for each half million parameters.

    Example:
        >>> threads_for(330_000, 64), threads_for(5_000_000, 64), threads_for(600_000_000, 64)
        (1, 10, 64)
    """
    return max(1, min(available, parameters // PARAMETERS_A_THREAD))


def fit_threads(model: torch.nn.Module) -> int:
    """Lowers torch's number of threads to what the model can use, unless the user chose one or there is a GPU.

    Returns:
        The number of threads from here on.
    """
    available = torch.get_num_threads()
    if any(os.environ.get(name) for name in _CHOSEN_BY) or torch.cuda.is_available():
        return available
    wanted = threads_for(sum(p.numel() for p in model.parameters()), available)
    if wanted < available:
        torch.set_num_threads(wanted)
        line = f"{wanted} of {available} threads: a model of this size gains nothing from more (else: OMP_NUM_THREADS)"
        logger.warning_once(line)  # pyright: ignore[reportAttributeAccessIssue]
    return wanted


def multiplies_bfloat16(cpuinfo: str) -> bool:
    """Whether a processor has instructions for products of bfloat16.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``.

    Example:
        >>> multiplies_bfloat16("flags : fpu avx512f avx512_bf16"), multiplies_bfloat16("flags : fpu avx2")
        (True, False)
    """
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return any(
        name.strip() in ("flags", "Features") and _BFLOAT16_FLAGS & set(words.split()) for name, _, words in lines
    )


def suggest_bfloat16(model: torch.nn.Module, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """One line where a float32 model on a CPU would be much faster in bfloat16, which is also logged; else None."""
    large = sum(p.numel() for p in model.parameters()) >= _WORTH_BFLOAT16
    if not large or torch.cuda.is_available() or any(p.dtype != torch.float32 for p in model.parameters()):
        return None
    if not (cpuinfo.is_file() and multiplies_bfloat16(cpuinfo.read_text())):
        return None
    line = (
        "this processor multiplies bfloat16: model.dtype=bfloat16 is about twice as fast for a model of this size, "
        "with the rounding that `mirrorpo docs performance` measures"
    )
    logger.warning_once(line)  # pyright: ignore[reportAttributeAccessIssue]
    return line


__all__ = ["fit_threads", "multiplies_bfloat16", "suggest_bfloat16", "threads_for"]
