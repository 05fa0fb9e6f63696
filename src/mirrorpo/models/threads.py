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
_FLOAT16_FLAG = "avx512_fp16"
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


def _flags(cpuinfo: str) -> frozenset[str]:
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return frozenset(
        word for name, _, words in lines if name.strip() in ("flags", "Features") for word in words.split()
    )


def suggested_dtype(cpuinfo: str, now: str) -> str | None:
    """The number format in which a processor computes much faster than in the present one; None if there is none.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``.
        now: float32, bfloat16 or float16: of the weights, or of the passes.

    Example:
        >>> suggested_dtype("flags : fpu avx512f avx512_bf16", "float32"), suggested_dtype("flags : avx2", "bfloat16")
        ('bfloat16', 'float32')
    """
    flags = _flags(cpuinfo)
    able = bool(_BFLOAT16_FLAGS & flags)
    if now == "float32":
        return "bfloat16" if able else None
    if "avx2" not in flags or _FLOAT16_FLAG in flags:  # of other processors nothing was measured
        return None
    if now == "float16":  # products in it are a loop, with AVX-512 too
        return "bfloat16" if able else "float32"
    return "float32" if not able and "avx512f" not in flags else None


def suggest_dtype(
    model: torch.nn.Module, autocast: str = "float32", cpuinfo: Path = Path("/proc/cpuinfo")
) -> str | None:
    """One line where a model on a CPU would be much faster in another number format, which is also logged; else None.

    Args:
        model: its weights tell the format.
        autocast: what passes are computed in, if the weights are in float32.
        cpuinfo: where the processor is described.
    """
    large = sum(p.numel() for p in model.parameters()) >= _WORTH_BFLOAT16
    if not large or torch.cuda.is_available() or not cpuinfo.is_file():
        return None
    floats = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    now = autocast if floats == {"float32"} else next((one for one in ("float16", "bfloat16") if one in floats), None)
    dtype = None if now is None else suggested_dtype(cpuinfo.read_text(), now)
    if dtype is None:
        return None
    rounding = "with the rounding that `mirrorpo docs performance` measures"
    line = f"this processor multiplies bfloat16: model.dtype=bfloat16 is about twice as fast for this model, {rounding}"
    if now != "float32":
        line = (
            f"this processor has no arithmetic for {now}: model.dtype={dtype} (and train.precision={dtype}) is several "
            "times as fast"
        )
    logger.warning_once(line)  # pyright: ignore[reportAttributeAccessIssue]
    return line


__all__ = ["fit_threads", "suggest_dtype", "suggested_dtype", "threads_for"]
