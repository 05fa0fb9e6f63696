"""Workers for many long jobs: processes or Ray actors that may die, and a record that forgets no result."""

from mirrorpo.workers.jobs import Done, Job, JobError, run_recorded
from mirrorpo.workers.local import LocalPool
from mirrorpo.workers.record import Record

__all__ = ["Done", "Job", "JobError", "LocalPool", "Record", "run_recorded"]
