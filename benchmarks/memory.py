"""How much memory does a call need at its peak? Resident memory over what was there before it, in a process of its own.

Tensors are invisible to Python's own tracing; the kernel counts them. Linux only: the high-water mark of this process
is reset before the call.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from timing import on_gpu

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(call: Callable[[], Any], script: str, *arguments: str) -> float:
    """MiB at the peak of ``call()``: counted by the allocator on a GPU, in a fresh process of ``script`` on a CPU."""
    if not on_gpu():
        return peak_in_process(script, *arguments)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB at the peak of ``call()``, over those before it."""
    before = _mib("VmRSS")
    _CLEAR.write_text("5")  # resets the high-water mark
    call()
    return _mib("VmHWM") - before


def peak_in_process(script: str, *arguments: str) -> float:
    """What ``script --peak ...`` prints, a number of MiB, from a fresh process."""
    done = subprocess.run(
        [sys.executable, script, "--peak", *arguments], check=True, capture_output=True, text=True, timeout=600
    )
    return float(done.stdout.split()[-1])


def present(contenders: Iterable[str]) -> list[str]:
    """Those that are installed; Liger is not needed by anything else (``pip install 'mirrorpo[bench]'``)."""
    without = find_spec("liger_kernel") is None
    if without:
        print("Liger is left out: liger_kernel is not installed", file=sys.stderr)
    return [name for name in contenders if not (without and name.startswith("Liger"))]


def _mib(key: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024
