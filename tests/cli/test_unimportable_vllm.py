"""A vLLM that does not fit stands beside the trainer: whatever it fails with is one line, and leaves no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs each command with a vLLM whose __init__ has this content, in one process: the imports are what takes time.
PROGRAM = """
import contextlib, importlib, io, json, os, shutil, sys
from pathlib import Path
from mirrorpo.cli import main

found = []
for content, version, command in json.loads(sys.argv[1]):
    Path(os.environ["SITE"], "vllm", "__init__.py").write_text(content)
    for name in [name for name in sys.modules if name.split(".")[0] in ("trl", "vllm")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    if not version:  # a checkout on the path
        shutil.rmtree(next(Path(os.environ["SITE"]).glob("*.dist-info")))
    sys.argv = ["mirrorpo", *command.split(), "--out", "x"]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as ended:
            found.append([ended.code, said.getvalue(), os.listdir()])
print(json.dumps(found))
"""
CASES = {
    "train arithmetic": ("", "No module named 'vllm."),
    "study studies/demo": (
        "raise ImportError(\"cannot import name 'ProcessorMixin' from 'transformers'\", name='transformers')",
        "ImportError: cannot import name 'ProcessorMixin' from 'transformers'",
    ),
    "train preferences": ("def f(x): return x.infer_schema\nf(1)", "AttributeError: 'int' object has no attribute"),
    "learn learn/embedded": ("import vllm_ascend", "No module named 'vllm_ascend'"),
    "eval builtin:tiny --task arithmetic --engine vllm": ("", "--engine vllm: vLLM 0.10.0 does not fit TRL 1.16"),
    "evolve evolve/embedded": ("", "InvalidVersion: Invalid version: 'N/A'"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    site = tmp_path_factory.mktemp("site")
    info = site / "vllm-0.10.0.dist-info"
    for folder in (site / "vllm", info):
        folder.mkdir()
    (site / "vllm" / "__init__.py").touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.10.0\n")
    (info / "RECORD").write_text(f"vllm/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    cases = [[content, "N/A" not in said, command] for command, (content, said) in CASES.items()]
    paths = [str(site), str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "SITE": str(site), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Written again within a second, the file's bytecode would be taken for its own.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)],
        cwd=tmp_path_factory.mktemp("work"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", CASES)
def test_a_vllm_that_cannot_be_imported_is_one_line_and_leaves_no_folder(
    command: str, ended: dict[str, tuple[int, str, list[str]]]
) -> None:
    status, said, there = ended[command]
    assert (status, said.count("\n"), there) == (2, 1, []), said
    assert CASES[command][1] in said
    assert said.startswith("error: ")
    assert "must be >=0.22,<0.31; pip install 'mirrorpo[vllm]'" in said
