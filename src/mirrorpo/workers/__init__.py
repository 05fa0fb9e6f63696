"""Who does many long jobs, survives deaths, and forgets no result? Processes or Ray actors, and a record."""

from mirrorpo.workers.jobs import Done, Job, JobError, run_recorded
from mirrorpo.workers.local import LocalPool
from mirrorpo.workers.record import Record

__all__ = ["Done", "Job", "JobError", "LocalPool", "Record", "run_recorded"]
