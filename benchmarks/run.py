"""Every benchmark of this folder, one after the other; ``--quick`` for fewer rounds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = ("run.py", "gpu.py", "ten_steps.py", "timing.py", "memory.py", "policy_model.py")


def main() -> None:
    failed = []
    for path in sorted(HERE.glob("*.py")):
        if path.name in HELPERS:
            continue
        print(f"\n== {path.name} {' '.join(sys.argv[1:])}", flush=True)
        if subprocess.run([sys.executable, str(path), *sys.argv[1:]], check=False).returncode:
            failed.append(path.name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
