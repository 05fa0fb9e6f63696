"""Ratios that a noisy machine cannot spoil: contenders take turns in one process, medians are compared."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each contender; in every round each runs once, in turning order.

    Args:
        contenders: name to function.
        rounds: measured rounds.
        warmup: rounds before that.
        clock: seconds; ``time.process_time`` on a machine with other work to do (set one thread then).

    Returns:
        Name to median seconds.
    """
    return {name: statistics.median(spent) for name, spent in in_turns(contenders, rounds, warmup, clock).items()}


def in_turns(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of every round, by name; arguments as in ``interleaved``."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            wait()
            start = clock()
            contenders[name]()
            wait()
            spent = clock() - start
            if number >= warmup:
                times[name].append(spent)
    return times


def paired(times: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """The median over rounds of one contender's seconds over another's, and its 95 % bootstrap interval over rounds."""
    random = torch.Generator().manual_seed(0)
    found = torch.tensor(times[name]) / torch.tensor(times[base])
    drawn = torch.randint(len(found), (4_000, len(found)), generator=random)
    low, high = found[drawn].median(dim=1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return statistics.median(found.tolist()), low, high


def ratios(medians: Mapping[str, float], base: str) -> dict[str, float]:
    """Each median over the base's."""
    return {name: seconds / medians[base] for name, seconds in medians.items()}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """``--quick`` and ``--json`` for every benchmark."""
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("--quick", action="store_true", help="fewer rounds")
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors are (default cpu)")
    return made


def use(device: str) -> None:
    """New tensors are made on that device."""
    torch.set_default_device(device)


def on_gpu() -> bool:
    """Whether new tensors are made on a GPU."""
    return torch.get_default_device().type == "cuda"


def wait() -> None:
    """Until the GPU has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def show(title: str, rows: Mapping[str, float], unit: str, as_json: bool) -> None:
    """A table, or JSON."""
    if as_json:
        print(json.dumps({"title": title, "unit": unit, "values": dict(rows)}))
        return
    print(title)
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value:8.3f} {unit}")
