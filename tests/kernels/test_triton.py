"""The Triton sweep: its choice and refusal; equality with the torch sweep in a process of its own."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mirrorpo
from kernels_batch import batch, converted
from mirrorpo.divergences.neural.map import NeuralDivergence
from mirrorpo.kernels import Head, token_logps
from mirrorpo.kernels.backend import form_of, uses_triton
from naive import CASES, Case

AGAINST_TORCH = Path(__file__).with_name("triton_against_torch.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the extra 'kernels'")


@needs_triton
def test_the_triton_sweep_is_the_torch_sweep() -> None:
    # A process of its own: whether kernels are interpreted is settled when Triton is imported.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(AGAINST_TORCH)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=AGAINST_TORCH.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
def test_every_kernel_compiles_for_an_h100_through_tritons_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter takes much that the compiler refuses. No GPU is needed to compile, only to launch.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import JITFunction  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.runtime import driver  # pyright: ignore[reportMissingImports]

    from mirrorpo.kernels import triton_kernels as kernels

    target = GPUTarget("cuda", 90, 32)
    machine = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    monkeypatch.setattr(driver, "_active", machine)
    compiled, run = [], JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **given: Any) -> None:
        compiled.append(run(self, *args, warmup=True, **given))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    named = (case for case in CASES if not case.options.keys() or set(case.options.values()) <= {0.0, 0.5, 1.0, 2.0})
    divergences = [mirrorpo.divergence(case.name, **case.options) for case in named]
    groups = [[], *(divergences[start::5] for start in range(5))]
    heads = (Head(torch.zeros(1000, 1)), Head(torch.zeros(1000, 1), torch.zeros(1000), 30.0, 1.0, 0.7))
    for number, group in enumerate(groups):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        z, q, tokens = torch.zeros(2, 1000, dtype=dtype), torch.zeros(2, 1000, dtype=dtype), torch.zeros(2).long()
        others = [
            kernels.Other(
                form=form_of(d),  # pyright: ignore[reportArgumentType]
                logits=q if place else None,
                table=d.table.rows(z.device) if isinstance(d, NeuralDivergence) else None,
            )
            for place, d in enumerate(group)
        ]
        found = kernels.measure(z, tokens, heads[number % 2], others)
        weights = [torch.zeros(2)] * len(group)
        kernels.gradient_(z, tokens, heads[number % 2], found, torch.zeros(2), others, weights, torch.zeros(2))
    assert len(compiled) == 2 * len(groups)
    # A row begins beyond 2^31 entries: its place is a product of 64-bit integers.
    assert all(re.search(r"muli .* : i64", kernel.asm["ttir"]) and kernel.asm["cubin"] for kernel in compiled)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_divergence_of_the_table_has_a_form_but_beta_below_zero(case: Case) -> None:
    found = form_of(mirrorpo.divergence(case.name, **case.options))
    assert (found is None) == (case.name == "beta" and case.options["beta"] < 0.0)


def test_a_divergence_of_your_own_has_no_form() -> None:
    assert form_of(mirrorpo.divergence(lambda x: x**3)) is None
    assert form_of(mirrorpo.divergence(lambda t: (t - 1) ** 2, family="f")) is None


def test_triton_on_a_cpu_is_refused_in_one_line_and_auto_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    b = converted(batch(), torch.float32)
    with pytest.raises(ValueError, match=r"kernels must be 'torch' or 'auto' here, got 'triton': (Triton|the package)"):
        token_logps(b.hidden, Head(b.head.weight, kernels="triton"), b.tokens)
    expected = token_logps(b.hidden, Head(b.head.weight), b.tokens)
    torch.testing.assert_close(token_logps(b.hidden, Head(b.head.weight, kernels="auto"), b.tokens), expected)


@pytest.mark.parametrize("present", [True, False])
def test_what_is_missing_is_named(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if present else None)
    message = "Triton needs a GPU, the device is 'cpu'" if present else r"pip install 'mirrorpo\[kernels\]'"
    with pytest.raises(ValueError, match=message):
        uses_triton("triton", torch.device("cpu"), torch.float32, ())
    assert not uses_triton("auto", torch.device("cpu"), torch.float32, ())
    assert uses_triton("auto", torch.device("cuda"), torch.float32, ()) == present


def test_unknown_kernels_are_refused_with_the_legal_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown kernels 'tritn'.*'triton'"):
        Head(torch.zeros(2, 2), kernels="tritn")


def test_importing_the_package_does_not_import_triton() -> None:
    importers = set()
    for file in Path(mirrorpo.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # the top level: what an import runs
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if any(part.startswith("triton") for name in names for part in name.split(".")):
                importers.add(file.name)
    assert importers == {"triton_kernels.py", "triton_rows.py"}
