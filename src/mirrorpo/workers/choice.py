"""Choice of the workers: processes of this machine, or actors of a Ray cluster."""

from __future__ import annotations

import os
from typing import Any

from mirrorpo.workers.local import LocalPool, threads_each


def default_workers() -> int:
    """How many jobs run side by side unless the user says so: one a GPU, without a GPU one a core."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def open_pool(num_workers: int, num_threads: int | None, max_deaths: int, ray: str | None = None) -> Any:
    """Workers, a context manager.

    Args:
        num_workers: side by side.
        num_threads: of torch in each; None: the cores divided.
        max_deaths: workers that one job may cost.
        ray: None for processes of this machine; ``local`` starts Ray here, ``auto`` or an address joins a cluster,
            whose nodes must see the output folder under the same path.
    """
    threads = threads_each(num_workers) if num_threads is None else num_threads
    if ray is None:
        return LocalPool(num_workers, threads, max_deaths)
    from mirrorpo.workers.on_ray import RayPool

    return RayPool(None if ray == "local" else ray, num_workers, threads, max_deaths)


__all__ = ["default_workers", "open_pool"]
