"""The Triton sweep: its choice and refusal; equality with the torch sweep in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mirrorpo
from kernels_batch import batch, converted
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
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


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
    message = "Triton needs a GPU, the tensors are on 'cpu'" if present else r"pip install 'mirrorpo\[kernels\]'"
    with pytest.raises(ValueError, match=message):
        uses_triton("triton", torch.device("cpu"), torch.float32, ())
    assert not uses_triton("auto", torch.device("cpu"), torch.float32, ())
    assert uses_triton("auto", torch.device("cuda"), torch.float32, ()) == present


def test_unknown_kernels_are_refused_with_the_legal_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown kernels 'tritn'.*'triton'"):
        Head(torch.zeros(2, 2), kernels="tritn")


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, mirrorpo, mirrorpo.kernels; sys.exit('mirrorpo.kernels.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
