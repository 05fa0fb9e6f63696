"""Job functions for the tests of workers: they run in processes of their own, found by import path."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch


def square(x: float) -> float:
    return x * x


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def process(_: Any) -> int:
    return os.getpid()


def threads(_: Any) -> int:
    return torch.get_num_threads()


def no_json(_: Any) -> float:
    return float("nan")


def die(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_first(marker: str) -> str:
    """Dies the first time, lives the second."""
    if not Path(marker).exists():
        Path(marker).touch()
        die(None)
    return "alive"


def raises(text: str) -> None:
    raise ValueError(text)


def fitness(payload: dict[str, Any]) -> dict[str, Any]:
    """Fit maps have a = 0.02 and little else; a little luck of the seed, the same for all members that share it."""
    folder = os.environ.get("CHEAP_JOBS_FOLDER")
    if folder:
        (Path(folder) / str(os.getpid())).touch()
    time.sleep(0.004)
    parameters = torch.tensor(payload["parameters"], dtype=torch.float64)
    wanted = torch.zeros(380, dtype=torch.float64)
    wanted[378] = 0.02
    value = 0.5 - (parameters - wanted).square().sum().item() + 0.001 * (payload["seed"] % 7)
    return {"fitness": value, "failed": None, "right": 5, "problems": 10, "samples": 1, "mean_length": 3.0}


def wait_for_go(folder: str) -> str:
    """Says that it has begun, and ends when it is told to."""
    (Path(folder) / f"begun {os.getpid()}").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.02)
    return "went"
