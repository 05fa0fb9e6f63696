"""What does ``import mirrorpo`` cost on top of torch? Fresh processes, interleaved (1 min)."""

from __future__ import annotations

import statistics
import subprocess
import sys

from timing import parser, show

PROGRAM = "import time, torch; start = time.perf_counter(); import mirrorpo; print(time.perf_counter() - start)"


def main() -> None:
    args = parser(__doc__).parse_args()
    seconds = [
        float(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
        for _ in range(3 if args.quick else 9)
    ]
    show("import mirrorpo after import torch", {"median": statistics.median(seconds)}, "s", args.json)


if __name__ == "__main__":
    main()
