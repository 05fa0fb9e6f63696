"""The trainer's tests with the newest TRL and transformers (or with versions that are named), in a fresh environment.

``python scripts/test_newest.py [trl==1.15.0 ...]``: without arguments the newest releases. Prints the versions and
pytest's summary; exit status 1 if a test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What stands on TRL's private methods, and one whole run.
TESTS = ("tests/training/test_trl_seam.py", "tests/training/test_equals_trl.py", "tests/training/test_trainer.py")
TOOLS = ("pytest>=8", "beartype>=0.20", "jaxtyping>=0.3", "hypothesis>=6.100", "peft>=0.20")


def main(wanted: list[str]) -> int:
    """Installs, tests, and returns pytest's exit status."""
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    with tempfile.TemporaryDirectory(prefix="mirrorpo-newest-") as folder:
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*pip, torch, *TOOLS, f"{ROOT}[train]"], check=True)
        # Against our own upper bound: pip warns, and that is what is tried here.
        subprocess.run([*pip, "--upgrade", *(wanted or ["trl", "transformers"])], check=True)
        show = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('trl', 'transformers')))"
        subprocess.run([python, "-c", show], check=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
        tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", *TESTS]
        return subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
