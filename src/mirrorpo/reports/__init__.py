"""Reports: pages and pictures of runs and studies, from the files of their folders alone."""

# curve
from mirrorpo.reports.curve import write_curve

# run_page
from mirrorpo.reports.run_page import write_report

__all__ = [
    # curve
    "write_curve",
    # run_page
    "write_report",
]
