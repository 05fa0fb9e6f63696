"""How does a run stop when it is asked to? Behind the step that it is in, with a checkpoint and a line how to go on.

Between the steps (evaluation, the final files) there is nothing to lose: there the signal ends the run at once, and so
does a second one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from mirrorpo.errors import Interrupted
from mirrorpo.interrupts import SIGNALS


class GracefulStop(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint at the next step's end; a context manager around the run.

    Args:
        say: prints one line for the user.
        how_to_resume: the command that goes on.

    Attributes:
        number: the signal that arrived, if one did.
    """

    def __init__(self, say: Callable[[str], None], how_to_resume: str) -> None:
        self.say, self.how_to_resume = say, how_to_resume
        self.number: int | None = None
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._received) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self._in_step or self.number is not None:
            raise Interrupted(number, f"stopped by {signal.Signals(number).name}; continue with: {self.how_to_resume}")
        self.number = number
        self.say(f"{signal.Signals(number).name}: a checkpoint is written after this step; once more to stop at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_step = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_step = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._anybody(args):
            control.should_save = True
            control.should_training_stop = True

    def _anybody(self, args: Any) -> bool:
        """Whether a process of the run was signalled: all must stop behind the same step."""
        if args.world_size == 1:
            return self.number is not None
        flag = torch.tensor(self.number or 0, device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        self.number = int(flag) or None
        return self.number is not None

    def raise_if_stopped(self, step: int, steps: int) -> None:
        """To be called behind the training: ends the run if a signal ended the training."""
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Interrupted(
                self.number, f"stopped by {name} behind step {step} of {steps}; continue with: {self.how_to_resume}"
            )
