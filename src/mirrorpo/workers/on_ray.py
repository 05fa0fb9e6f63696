"""Workers on a cluster: Ray actors, one job each at a time; an actor or node that dies is replaced."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mirrorpo.errors import InputError
from mirrorpo.interrupts import handlers_kept
from mirrorpo.workers.jobs import Done, Job, JobError, call

_ANSWER_SECONDS = 6.0


class RayPool:
    """Actors of a Ray cluster.

    Args:
        address: as in ``ray.init``: None starts Ray on this machine, ``auto`` finds a running cluster,
            ``ray://HOST:PORT`` is a client.
        num_workers: actors.
        num_threads: of each actor's numerical libraries, and the CPUs that Ray reserves for it.
        max_deaths: how many actors a job may cost before it counts as deadly.
        num_gpus: that Ray reserves for each actor; None: 1 where the cluster has any.

    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached.
        ValueError: a number below 1.
    """

    def __init__(
        self,
        address: str | None,
        num_workers: int,
        num_threads: int = 1,
        max_deaths: int = 3,
        num_gpus: float | None = None,
    ) -> None:
        for name, value in (("num_workers", num_workers), ("num_threads", num_threads), ("max_deaths", max_deaths)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._ours = connect(address, num_workers * num_threads)
        import ray

        self._ray: Any = ray
        gpus = num_gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
        options = {"num_cpus": num_threads, "num_gpus": gpus, "max_restarts": 0}
        self._actor: Any = ray.remote(**options)(_Actor)
        self.num_workers, self.num_threads, self.max_deaths = num_workers, num_threads, max_deaths
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Job]] = {}  # the answer's reference to actor and job

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """See ``mirrorpo.workers.jobs.Pool``."""
        waiting = deque(jobs)
        deaths: dict[str, int] = {}
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self.num_workers:
                    actor = self._idle.pop() if self._idle else self._actor.remote(self.num_threads)
                    job = waiting.popleft()
                    self._busy[actor.run.remote(job.function, job.payload)] = (actor, job)
                (answer,), _ = self._ray.wait(list(self._busy), num_returns=1)
                actor, job = self._busy.pop(answer)
                try:
                    result, error, seconds = self._ray.get(answer)
                except self._ray.exceptions.RayActorError as gone:
                    deaths[job.key] = deaths.get(job.key, 0) + 1
                    if deaths[job.key] >= self.max_deaths:
                        reason = " ".join(str(gone).split())[:300]
                        raise JobError(job.key, f"{deaths[job.key]} actors died over it ({reason})") from None
                    waiting.appendleft(job)
                    continue
                self._idle.append(actor)
                if error is not None:
                    raise JobError(job.key, error)
                yield Done(job=job, result=result, seconds=seconds, deaths=deaths.get(job.key, 0))
        finally:
            for actor, _ in self._busy.values():  # a failed or abandoned run
                self._ray.kill(actor)
            self._busy.clear()

    @property
    def process_ids(self) -> list[int]:
        """Of the idle actors, on whatever node."""
        return self._ray.get([actor.process_id.remote() for actor in self._idle])

    def close(self) -> None:
        """Ends the actors, and Ray if this pool started or joined it."""
        for actor in self._idle:
            self._ray.kill(actor)
        self._idle.clear()
        if self._ours:
            self._ray.shutdown()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: str | None, num_cpus: int) -> bool:
    """Connects this process with a cluster, unless it is with one already.

    Args:
        address: as in ``RayPool``.
        num_cpus: what a cluster started here has; of no effect on another one.

    Returns:
        Whether this call did it; ``ray.shutdown()`` undoes it.

    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError("--ray: needs the extra 'ray': pip install 'mirrorpo[ray]'") from error
    if ray.is_initialized():
        return False
    _check_answers(address)
    # Actors import the job's function as this process would: from a checkout, from the user's own folder. What belongs
    # to this Python stays out: a node has its own.
    own = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    found = [Path(path).resolve() for path in sys.path if path and Path(path).is_dir()]
    paths = [str(path) for path in found if own.isdisjoint((path, *path.parents))]
    settings: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": ":".join(paths)}}}
    if address is None:
        settings |= {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        with handlers_kept():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (ConnectionError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--ray {address}: no cluster there, or it refuses this process ({reason})") from error
    return True


def _check_answers(address: str | None) -> None:
    """Raises ``InputError`` for an address where nothing speaks Ray's protocol: ``ray.init`` waits minutes for it."""
    place = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if place in (None, "auto", "local") or os.environ.get("RAY_USE_TLS") == "1":
        return
    target = place.removeprefix("ray://").partition("?")[0]
    host, colon, port = target.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise InputError(f"--ray {address}: must be local, auto, HOST:PORT or ray://HOST:PORT")
    try:
        import grpc
    except ImportError as error:
        raise InputError("--ray: needs the extra 'ray': pip install 'mirrorpo[ray]' (missing: grpc)") from error
    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            raise InputError(
                f"--ray {address}: nothing that speaks Ray's protocol answered within {_ANSWER_SECONDS:g} seconds"
            ) from None
        if os.environ.get("RAY_AUTH_MODE") == "token":
            return
        method = "RayletDriver/ClusterInfo" if place.startswith("ray://") else "NodeInfoGcsService/CheckAlive"
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:  # others, of a version without the method, are ray.init's to tell
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:  # pyright: ignore[reportAttributeAccessIssue]
                raise InputError(
                    f"--ray {address}: the cluster asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
                    "(or RAY_AUTH_TOKEN)"
                ) from None


class _Actor:
    """What runs jobs, in a process of Ray's."""

    def __init__(self, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)

    def run(self, function: str, payload: Any) -> tuple[Any, str | None, float]:
        started = time.monotonic()
        result, error = call(function, payload)
        return result, error, time.monotonic() - started

    def process_id(self) -> int:
        return os.getpid()


__all__ = ["RayPool", "connect"]
