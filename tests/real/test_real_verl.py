"""verl's own workers with our loss: `VERL_PYTHON=.../bin/python pytest tests/real/test_real_verl.py`.

verl's engine wants an older transformers than TRL, so it runs in an environment of its own, whose Python is named by
VERL_PYTHON; `scripts/test_install.py verl` makes one and runs the same script there.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("VERL_PYTHON", "")


@pytest.mark.skipif(not PYTHON, reason="needs an environment with verl and its requirements, its Python in VERL_PYTHON")
def test_two_steps_of_verls_fsdp2_engine_on_ray_workers_equal_one_process_without_verl() -> None:
    script = Path(__file__).with_name("verl_engine.py")
    done = subprocess.run([PYTHON, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 steps" in done.stdout
