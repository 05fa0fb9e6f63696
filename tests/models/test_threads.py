"""Threads by the size of the model: fewer for a tiny one, and never against what the user chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirrorpo.models import threads
from mirrorpo.models.threads import fit_threads, suggest_dtype, threads_for


@pytest.mark.parametrize(
    ("parameters", "available", "expected"),
    [(1, 64, 1), (330_000, 2, 1), (1_000_000, 64, 2), (3_200_000, 64, 6), (10**9, 64, 64), (10**9, 1, 1)],
)
def test_a_thread_for_each_half_million_parameters(parameters: int, available: int, expected: int) -> None:
    assert threads_for(parameters, available) == expected


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers that torch was set to, on a machine with 16 cores and no choice of the user's."""
    numbers: list[int] = []
    for name in threads._CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return numbers


def test_a_tiny_model_gets_one_thread_and_a_large_one_keeps_all(chosen: list[int]) -> None:
    with torch.device("meta"):
        assert fit_threads(torch.nn.Linear(100, 100)) == 1
        assert fit_threads(torch.nn.Linear(10_000, 10_000)) == 16
    assert chosen == [1]


@pytest.mark.parametrize("name", threads._CHOSEN_BY)
def test_what_the_user_chose_stays(name: str, chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "16")
    assert fit_threads(torch.nn.Linear(2, 2)) == 16
    assert chosen == []


def test_beside_a_gpu_the_threads_stay(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fit_threads(torch.nn.Linear(2, 2)) == 16
    assert chosen == []


def test_a_large_model_is_told_of_the_number_format_that_the_processor_computes_in(tmp_path: Path) -> None:
    texts = {
        "able": "processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n",
        "unable": "processor : 0\nmodel name : bf16\nflags\t\t: fpu avx2\n",
        "between": "processor : 0\nflags\t\t: fpu avx2 avx512f\n",  # converts within a product: not measured
        "arm": "processor : 0\nFeatures\t: fp asimd\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with torch.device("meta"):
        large, small = torch.nn.Linear(10_000, 10_000), torch.nn.Linear(100, 100)
        half, old = (torch.nn.Linear(10_000, 10_000, dtype=dtype) for dtype in (torch.bfloat16, torch.float16))

    def said(model: torch.nn.Module, name: str, autocast: str = "float32") -> str:
        line = suggest_dtype(model, autocast, tmp_path / name) or ""
        return "float32" if "model.dtype=float32" in line else "bfloat16" if "model.dtype=bfloat16" in line else line

    names = [*texts, "absent"]
    assert [said(large, name) for name in names] == ["bfloat16", "", "", "", ""]
    assert [said(half, name) for name in names] == ["", "float32", "", "", ""]
    assert [said(old, name) for name in names] == ["bfloat16", "float32", "float32", "", ""]
    assert [said(large, name, "bfloat16") for name in names] == ["", "float32", "", "", ""]
    assert [said(small, name) + said(small.bfloat16(), name) for name in names] == [""] * 5
