"""The number of torch's threads for a model on a CPU: a tiny one gains nothing from many, and loses much by waiting.

A layer of a tiny model takes microseconds, less than it takes threads to meet at its end; on a busy machine the slowest
of them is waited for thousands of times a step.
"""

from __future__ import annotations

import os

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Parameters for each thread: below it, a thread's share of a matrix product is less than the cost of meeting.
PARAMETERS_A_THREAD = 500_000
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


__all__ = ["fit_threads", "threads_for"]
