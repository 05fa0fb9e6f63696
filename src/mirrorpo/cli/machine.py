"""The checks of ``mirrorpo doctor``: packages, accelerator, threads, memory, disk, sandbox, hub; each with advice."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirrorpo.errors import VLLM, InputError, check_vllm, vllm_version
from mirrorpo.wording import printable

# Package: (first tested, first not tested).
TESTED = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.23", "6"),
    "trl": ("1.16", "1.17"),
    "accelerate": ("1.10", "2"),
    "datasets": ("4", "6"),
    "pydantic": ("2.10", "3"),
}
EXTRAS = ("peft", "ray", "verl")
MIN_FREE_GB, MIN_MEMORY_GB = 2.0, 1.0
_CGROUP = "/sys/fs/cgroup"
_HUB_SECONDS = 3.0

Finding = dict[str, str]


def _finding(what: str, state: str, found: str, advice: str = "") -> Finding:
    return {"what": what, "state": state, "found": found, "advice": advice}


def _packages() -> list[Finding]:
    from packaging.version import Version

    findings = []
    for name, (low, high) in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(_finding(name, "bad", "not installed", f"pip install '{name}>={low},<{high}'"))
            continue
        # The release alone: a preview of the first untested one is not tested either, "+cpu" says nothing.
        fits = Version(low) <= Version(Version(found).base_version) < Version(high)
        advice = "" if fits else f"tested: >={low},<{high}"
        findings.append(_finding(name, "ok" if fits else "warn", found, advice))
    for name in EXTRAS:
        try:
            findings.append(_finding(f"{name} (extra)", "ok", version(name)))
        except PackageNotFoundError:
            findings.append(_finding(f"{name} (extra)", "ok", "not installed"))
    findings.append(_vllm())
    return findings


def _vllm() -> Finding:
    found = vllm_version()
    if found is None:
        return _finding("vllm (extra)", "ok", "not installed", f"fits: >={VLLM[0]},<{VLLM[1]}")
    try:
        check_vllm("vllm")
    except InputError as error:
        return _finding("vllm (extra)", "warn", found, str(error).removeprefix(f"vllm: vLLM {found} "))
    return _finding("vllm (extra)", "ok", found)


def _accelerator() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a build for another system, or a library that is missing
        reason = " ".join(str(error).split())
        return [_finding("torch build", "bad", f"cannot be imported ({reason})", "pip install --force-reinstall torch")]
    return [_finding("torch build", "ok", torch.__version__), *_devices(torch)]


def _devices(torch: Any) -> list[Finding]:
    build = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return [_finding("accelerator", "ok", f"{names} (CUDA {build})")]
    if build:
        return [_finding("accelerator", "warn", f"none visible, torch is built for {build}", "check the driver")]
    advice = "for a GPU: pip install --force-reinstall torch --index-url URL, PyTorch's index of its CUDA version"
    return [_finding("accelerator", "ok", "none (CPU build of torch)", advice)]


def _threads() -> int:
    try:
        import torch
    except (ImportError, OSError):  # reported by _accelerator
        return 1
    return torch.get_num_threads()


def _free_memory() -> float:
    """Bytes: those of the machine, or what a container's limit leaves of them."""
    import psutil

    free, limit, used = psutil.virtual_memory().available, Path(_CGROUP, "memory.max"), Path(_CGROUP, "memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return float(free)


def _machine() -> list[Finding]:
    cores, threads = len(os.sched_getaffinity(0)), _threads()  # of a container, those it may use
    memory = _free_memory() / 1e9
    free = shutil.disk_usage(".").free / 1e9
    few = "" if free >= MIN_FREE_GB else "a checkpoint may not fit: free some, or set train.keep=1"
    return [
        _finding("python", "ok" if sys.version_info >= (3, 11) else "bad", platform.python_version(), "needs >= 3.11"),
        _finding(
            "threads",
            "ok" if threads <= cores else "warn",
            f"{threads} of {cores} cores",
            "" if threads <= cores else "set OMP_NUM_THREADS to the number of cores",
        ),
        _finding(
            "memory",
            "ok" if memory >= MIN_MEMORY_GB else "warn",
            f"{memory:.1f} GB available",
            "" if memory >= MIN_MEMORY_GB else "a run may be killed: smaller train.micro_batch_size, or more memory",
        ),
        _finding("disk", "ok" if free >= MIN_FREE_GB else "warn", f"{free:.1f} GB free here", few),
    ]


def _hub() -> list[Finding]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if offline:
        return [_finding("model hub", "ok", "offline (HF_HUB_OFFLINE is set)", "use model folders and builtin:tiny")]
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urlsplit(address).hostname or address
    try:
        urlopen(Request(address, method="HEAD"), timeout=_HUB_SECONDS).close()  # through a proxy, if one is set
    except HTTPError:
        pass  # it answers
    except (OSError, ValueError, HTTPException) as error:  # no network, no address, no web server
        return [
            _finding(
                "model hub",
                "warn",
                f"{host} cannot be reached ({error})",
                "use model folders, task.path and builtin:tiny; HF_HUB_OFFLINE=1 saves the waiting",
            )
        ]
    return [_finding("model hub", "ok", f"{host} answers", "HF_HUB_OFFLINE=1 forbids it")]


def _sandbox() -> list[Finding]:
    from mirrorpo.cli.pages import page
    from mirrorpo.rewards.sandbox import SandboxError, Template

    try:
        template = Template()
    except SandboxError as error:
        return [_finding("code sandbox", "bad", "does not start", str(error))]
    reached = template.reached
    template.close()
    missing = "; ".join(f"{layer}: {error}" for layer, error in reached.errors.items())
    fits = reached.level in ("confined", "isolated")
    advice = "" if fits else f"code tasks need level confined, see {page('rewards.md')} ({missing})"
    found = f"level {reached.level} ({', '.join(reached.layers) or 'resource limits only'})"
    return [_finding("code sandbox", "ok" if fits else "warn", found, advice)]


def examine() -> list[Finding]:
    """What was found: ``what``, ``state`` (ok, warn, bad), ``found``, ``advice``."""
    return [*_packages(), *_accelerator(), *_machine(), *_sandbox(), *_hub()]


def render(findings: list[Finding]) -> None:
    """Draws the findings on stdout."""
    colours = {"ok": "green", "warn": "yellow", "bad": "red"}
    table = Table(pad_edge=False)
    for column in ("what", "state", "found", "advice"):
        table.add_column(column, overflow="fold")
    for f in findings:
        advice = f["advice"] if f["state"] != "ok" or f["what"] in ("accelerator", "model hub", "vllm (extra)") else ""
        table.add_row(
            Text(f["what"]),
            Text(f["state"], style=colours[f["state"]]),
            Text(printable(f["found"])),
            Text(printable(advice)),
        )
    Console().print(table)
