"""The table of architectures holds: a part of it is computed again, the rest by the script's --check."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

Load = Callable[[str], ModuleType]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

# Packed at every length, packed up to one (a window, an index, rotary frequencies), and padded.
SOME = [
    "qwen3",
    "llama",
    "gpt2",
    "gpt_neox",
    "mistral",
    "gemma3_text",
    "glm_moe_dsa",
    "phi3 longrope",
    "llama dynamic",
    "gemma3_text dynamic",
    "qwen2 yarn",
    "llama beyond its context",
    "gemma2",
    "bloom",
    "opt",
    "mamba",
    "qwen3_next",
    "deepseek_v3",
]


def rows() -> dict[str, str]:
    """Architecture -> the rest of its line."""
    lines = [line.split("|", 2) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {name.strip(" `"): rest.strip(" |") for _, name, rest in lines}


def test_every_architecture_of_transformers_has_a_line(load: Load) -> None:
    script = load("scripts/make_architecture_table.py")
    assert set(rows()) == {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *script.VARIANTS}


@pytest.mark.parametrize("name", SOME)
def test_an_architecture_is_packed_as_the_page_says(name: str, load: Load) -> None:
    script = load("scripts/make_architecture_table.py")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, about sizes that nobody has
            row = script.row_of(name)
    finally:
        logging.set_verbosity(verbosity)
    assert row.state != "not run", row
    assert rows()[name] == script.shown(row)


def test_a_difference_fails(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("scripts/make_architecture_table.py")
    monkeypatch.setattr(script, "error_of", lambda *_: 2e-5)
    with pytest.raises(AssertionError, match="llama: packed and padded differ by"):
        script.row_of("llama")


def test_a_key_that_sounds_like_a_length_must_be_looked_at(load: Load) -> None:
    script = load("scripts/make_architecture_table.py")
    model = script.built(script.two_layers("llama"))
    assert script.unknown_lengths(model) == []
    model.config.new_attention_window = 50
    assert script.unknown_lengths(model) == ["new_attention_window 50"]
