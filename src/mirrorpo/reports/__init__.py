"""What did a run do? A picture and a page, from the files of its folder alone."""

# curve
from mirrorpo.reports.curve import write_curve

# page
from mirrorpo.reports.page import write_report

__all__ = [
    # curve
    "write_curve",
    # page
    "write_report",
]
