"""A pool that runs jobs in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mirrorpo.workers import Done, Job, JobError
from mirrorpo.workers.jobs import call


class SerialPool:
    """Counts what it runs."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        for job in jobs:
            self.ran.append(job.key)
            result, error = call(job.function, job.payload)
            if error is not None:
                raise JobError(job.key, error)
            yield Done(job=job, result=result, seconds=0.0)

    def close(self) -> None: ...
