"""Where does an evaluation keep its samples, so that a killed one goes on where it was? One folder, one evaluation.

``evaluation.json`` (what is evaluated, and how), ``samples.jsonl`` (a line a sample, appended batch by batch, in the
order of the problems) and ``summary.json``. The samples on disk are always a beginning of all samples; on resume what
lies beyond the last whole batch is dropped, so every batch has the same shape as in a run that was never stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mirrorpo.errors import InputError
from mirrorpo.evaluation.summary import Sample
from mirrorpo.files import write_text_atomic

SETTINGS_FILE = "evaluation.json"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"


class EvaluationFolder:
    """The folder of one evaluation, locked while the object lives (the lock dies with the process).

    Args:
        path: the folder; created if needed.
        settings: plain data that decides the samples; written, or compared with what is there.
        resume: continue the evaluation that the folder holds.

    Raises:
        InputError: the folder holds an evaluation (without ``resume``), holds none (with it) or another one, holds
            other files, is no folder, cannot be written, or is in use.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path}: is a file, not a folder")
        holds = (path / SETTINGS_FILE).exists()
        if holds and not resume:
            raise InputError(f"--out {path}: already holds an evaluation; give another folder, or --resume")
        if resume and not holds:
            raise InputError(f"--resume: {path} holds no evaluation")
        if not holds and path.exists() and any(entry.name != LOCK_FILE for entry in path.iterdir()):
            raise InputError(f"--out {path}: is not empty and holds no evaluation; give another folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK_FILE).open("w")
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise InputError(f"--out {path}: another process is evaluating into this folder") from None
        try:
            if holds:
                self._check_same(settings)
            else:
                write_text_atomic(path / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        except BaseException:
            self.close()
            raise

    def _check_same(self, settings: dict[str, Any]) -> None:
        try:  # the file may have been edited
            kept = json.loads((self.path / SETTINGS_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{self.path / SETTINGS_FILE}: not JSON ({error})") from None
        if not isinstance(kept, dict):
            raise InputError(f"{self.path / SETTINGS_FILE}: must be a JSON object")
        for key, value in settings.items():
            if kept.get(key) != value:
                raise InputError(
                    f"--resume: {key} is {value!r}, the evaluation in {self.path} has {kept.get(key)!r}; "
                    "a resumed evaluation keeps its settings"
                )

    def take_up(self, batch_size: int, total: int) -> list[Sample]:
        """The samples of whole batches that are there; what lies beyond them is cut off the file.

        Args:
            batch_size: samples in a batch.
            total: samples of the whole evaluation; the last batch may be smaller.

        Raises:
            InputError: a line within them is no sample; names file and line.
        """
        path = self.path / SAMPLES_FILE
        if not path.exists():
            return []
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # torn by a kill
        keep = len(lines) if len(lines) == total else len(lines) // batch_size * batch_size
        if len(lines) > total:
            raise InputError(f"{path}: {len(lines)} samples, the evaluation has {total}")
        samples = [_sample(line, f"{path}: line {number}") for number, line in enumerate(lines[:keep], 1)]
        os.truncate(path, sum(len(line) for line in lines[:keep]))
        return samples

    def append(self, samples: list[Sample]) -> None:
        """Adds a batch; it is on the disk when this returns."""
        text = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)
        with (self.path / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json`` whole or not at all."""
        write_text_atomic(self.path / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()


def _sample(line: bytes, where: str) -> Sample:
    try:  # the file may have been edited
        value = json.loads(line)
        if {*value} != {f.name for f in fields(Sample)}:
            raise ValueError(f"its keys must be {', '.join(f.name for f in fields(Sample))}")
        return Sample(**value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: is no sample ({error})") from None
