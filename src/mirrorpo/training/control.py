"""What moves while a run goes on, beyond weights and optimiser: the penalty's factor, an averaged reference."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from mirrorpo.files import write_text_atomic
from mirrorpo.losses.coefficient import Control

_STATE_FILE = "penalty_state.json"
_REFERENCE_FILE = "reference.safetensors"


class PenaltyState:
    """The factor on the penalty's coefficients, moved once per optimiser step.

    Args:
        control: how it moves; None keeps it at 1.

    Attributes:
        factor: the current factor.
        observed: the divergences of this optimiser step's micro-batches so far.
    """

    def __init__(self, control: Control | None) -> None:
        self.control = control
        self.factor = 1.0 if control is None else control.factor_at(0.0)
        self.observed: list[float] = []

    def observe(self, divergence: float) -> None:
        """A micro-batch's divergence, the same on every rank."""
        self.observed.append(divergence)

    def step(self, progress: float) -> None:
        """The end of an optimiser step, at a share of the run in (0, 1]."""
        observed, self.observed = self.observed, []
        if self.control is None:
            return
        if self.control.kind == "adaptive":
            if observed:
                self.factor = self.control.updated(self.factor, sum(observed) / len(observed))
        else:
            self.factor = self.control.factor_at(progress)


def save_state(folder: Path, state: PenaltyState, averaged_reference: nn.Module | None, objective: str = "") -> None:
    """Writes into a checkpoint the factor, what it waits for, the objective in words, and a changing reference."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"factor": state.factor, "observed": state.observed, "objective": objective}
    write_text_atomic(folder / _STATE_FILE, json.dumps(kept) + "\n")
    if averaged_reference is not None:
        tensors = {name: p.detach().contiguous() for name, p in averaged_reference.named_parameters()}
        save_file(tensors, folder / _REFERENCE_FILE)


def load_state(folder: Path, state: PenaltyState, averaged_reference: nn.Module | None) -> str:
    """Reads back what ``save_state`` wrote; raises if the file of a reference that changes is missing.

    Returns:
        The objective in words; empty for a checkpoint that does not hold it.
    """
    path = folder / _STATE_FILE
    objective = ""
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        state.factor, state.observed = float(kept["factor"]), [float(value) for value in kept["observed"]]
        objective = str(kept.get("objective", ""))
    if averaged_reference is not None:
        tensors = load_file(folder / _REFERENCE_FILE)
        for name, parameter in averaged_reference.named_parameters():
            parameter.data.copy_(tensors[name])
    return objective
