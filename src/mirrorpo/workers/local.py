"""Workers on this machine, and the choice between them and a Ray cluster.

The workers are long-lived processes, started fresh (spawn) and replaced when they die.

Each worker has a pipe of its own, so a worker killed in the middle of a message harms no other one (a shared queue
would keep a dead worker's lock). A worker whose coordinator dies ends itself: nothing is left running.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from mirrorpo.errors import Interrupted
from mirrorpo.interrupts import signals_held
from mirrorpo.workers.jobs import Done, Job, JobError, call

# What decides a numerical library's number of threads before it is imported.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Not a fork of the coordinator, whose threads (torch's, Ray's) may hold locks. The chaos tests fork from a server that
# has everything imported and no threads, which differs in nothing but the seconds.
START_METHOD = "spawn"


def threads_each(num_workers: int) -> int:
    """The cores of this process divided among the workers, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


class LocalPool:
    """Worker processes on this machine.

    Args:
        num_workers: how many; each is started when it is first needed.
        num_threads: of each worker's numerical libraries; None: the cores divided by the workers.
        max_deaths: how many workers a job may cost before it counts as deadly.

    Raises:
        ValueError: a number below its legal range.

    Example:
        >>> from mirrorpo.workers import Job
        >>> with LocalPool(1) as pool:  # doctest: +SKIP
        ...     [done.result for done in pool.run([Job(key="a", function="math:sqrt", payload=4.0)])]
        [2.0]
    """

    def __init__(self, num_workers: int, num_threads: int | None = None, max_deaths: int = 3) -> None:
        for name, value in (("num_workers", num_workers), ("max_deaths", max_deaths)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        self.num_workers, self.max_deaths = num_workers, max_deaths
        self.num_threads = threads_each(num_workers) if num_threads is None else num_threads
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, Job] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """See ``mirrorpo.workers.jobs.Pool``."""
        waiting = deque(jobs)
        deaths: dict[str, int] = {}
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self.num_workers:
                    job = waiting.popleft()
                    with signals_held():  # one between the two would leave a worker that nobody knows
                        worker = self._idle.pop() if self._idle else _Worker(self.num_threads)
                        self._busy[worker] = job
                    worker.begin(job)
                ready = wait([worker.pipe for worker in self._busy])
                for worker in [w for w in self._busy if w.pipe in ready]:
                    job, answer = self._busy[worker], worker.answer()
                    if answer is None:
                        del self._busy[worker]
                        deaths[job.key] = deaths.get(job.key, 0) + 1
                        self._check_deaths(job, deaths[job.key], worker.exit_code())
                        waiting.appendleft(job)
                        continue
                    self._idle.append(worker)  # before it leaves the busy ones: it is always known
                    del self._busy[worker]
                    result, error, seconds = answer
                    if error is not None:
                        raise JobError(job.key, error)
                    yield Done(job=job, result=result, seconds=seconds, deaths=deaths.get(job.key, 0))
        finally:
            with signals_held():
                for worker in self._busy:  # a failed or abandoned run: what they compute is of no use any more
                    worker.kill()
                self._busy.clear()

    def _check_deaths(self, job: Job, count: int, exit_code: int | None) -> None:
        if count >= self.max_deaths:
            how = f"status {exit_code}"
            if exit_code is not None and exit_code < 0:
                how = signal.Signals(-exit_code).name
            hint = " (often the system's answer to exhausted memory: use fewer workers)" if how == "SIGKILL" else ""
            raise JobError(job.key, f"{count} workers died over it, the last by {how}{hint}")

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that are alive now."""
        return [worker.process.pid for worker in (*self._idle, *self._busy) if worker.process.pid is not None]

    def close(self) -> None:
        """Ends every worker."""
        with signals_held():
            for worker in (*self._idle, *self._busy):
                worker.kill()
            self._idle.clear()
            self._busy.clear()

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The coordinator's end of a worker."""

    def __init__(self, num_threads: int) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self.pipe, theirs = context.Pipe()
        kept = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(num_threads)))
        # Inherited: a terminal sends Ctrl-C to all processes, also to one that is still importing.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = context.Process(target=_serve, args=(theirs, num_threads), daemon=True)
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for name, value in kept.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()  # so that the worker's death closes the pipe

    def begin(self, job: Job) -> None:
        # One that died while idle: its pipe reads as closed, and the run sees a death like any other.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((job.function, job.payload))

    def answer(self) -> tuple[Any, str | None, float] | None:
        """What the worker says, None if it died instead."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None

    def exit_code(self) -> int | None:
        self.process.join(timeout=10.0)
        self.pipe.close()
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.exit_code()


def _serve(pipe: Connection, num_threads: int) -> None:
    """The life of a worker."""
    # Ctrl-C is the coordinator's business. Blocked, not ignored: a training has a handler of its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(num_threads)
    while True:
        try:
            function, payload = pipe.recv()
        except EOFError:
            return
        started = time.monotonic()
        try:
            result, error = call(function, payload)
        except Interrupted as stopped:  # SIGTERM to this worker: one that dies like any other, without a traceback
            sys.exit(stopped.status)
        pipe.send((result, error, time.monotonic() - started))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


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


__all__ = ["default_workers", "open_pool", "LocalPool", "threads_each"]
