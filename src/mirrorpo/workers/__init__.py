"""Workers for many long jobs: processes or Ray actors that may die, and a record that forgets no result."""

from mirrorpo.workers.jobs import Done, Job, JobError, Record, run_recorded
from mirrorpo.workers.local import LocalPool

__all__ = ["Done", "Job", "JobError", "LocalPool", "Record", "run_recorded"]
