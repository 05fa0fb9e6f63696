"""Threads by the size of the model: fewer for a tiny one, and never against what the user chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mirrorpo.models import threads
from mirrorpo.models.threads import fit_threads, suggest_bfloat16, threads_for


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


def test_bfloat16_is_suggested_for_a_large_float32_model_where_the_processor_multiplies_it(tmp_path: Path) -> None:
    able, unable = tmp_path / "able", tmp_path / "unable"
    able.write_text("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n")
    unable.write_text("processor : 0\nmodel name : bf16\nflags\t\t: fpu avx512f\n")
    with torch.device("meta"):
        large, small = torch.nn.Linear(10_000, 10_000), torch.nn.Linear(100, 100)
    said = suggest_bfloat16(large, able)
    assert said is not None
    assert "model.dtype=bfloat16" in said
    assert suggest_bfloat16(large, unable) is None
    assert suggest_bfloat16(large, tmp_path / "absent") is None
    assert suggest_bfloat16(small, able) is None
    assert suggest_bfloat16(large.bfloat16(), able) is None
