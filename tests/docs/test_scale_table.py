"""The tables of docs/scale.md are those of the script, and its constants are what a CPU measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def script(load: Load) -> ModuleType:
    return load("scripts/scale_table.py")


def test_the_page_holds_the_tables_that_the_script_writes(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--check"]) == 0
    page = tmp_path / "scale.md"
    page.write_text((ROOT / "docs" / "scale.md").read_text().replace("| Qwen3-8B |", "| Qwen3-9B |", 1))
    assert script.main(["--check", "--page", str(page)]) == 1


def test_the_shapes_have_the_parameters_of_the_models_of_transformers(script: ModuleType) -> None:
    for name, shape in script.MODELS.items():
        common = {
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocabulary,
            "tie_word_embeddings": shape.tied,
        }
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config((Qwen3Config if shape.qk_norm else LlamaConfig)(**common))
        assert sum(p.numel() for p in model.parameters()) == shape.parameters, name


def test_a_step_of_adamw_holds_the_bytes_per_parameter_of_the_table(script: ModuleType) -> None:
    for dtype, expected in ((torch.float32, 16), (torch.bfloat16, 8)):
        weight = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
        optimiser = torch.optim.AdamW([weight])
        weight.grad = torch.ones_like(weight)
        optimiser.step()
        held = [weight, weight.grad, *(v for v in optimiser.state[weight].values() if v.dim())]
        assert sum(t.untyped_storage().nbytes() for t in held) == expected * 1000


@pytest.mark.filterwarnings("ignore")  # of transformers, when checkpointing is switched on
def test_the_constants_are_what_a_cpu_measures(script: ModuleType) -> None:
    assert script.measure_layer(False) == pytest.approx(script.LAYER_BYTES, rel=0.02)
    assert script.measure_layer(True) == pytest.approx(script.CHECKPOINT_BYTES, rel=0.02)
    assert script.measure_exact() == pytest.approx(script.EXACT_BYTES, rel=0.02)


def test_memory_of_the_parts_adds_up(script: ModuleType) -> None:
    plan = script.Plan("8B", 8, True)
    whole = script.Plan("8B", 1, False)
    parts, all_of_it = plan.memory(), whole.memory()
    # 8.19 B parameters, 16 bytes each, on eight GPUs
    assert parts["parameters, gradients, optimiser"] == pytest.approx(8.19073536 * 16 / 8)
    assert all_of_it["reference"] == pytest.approx(8 * parts["reference"])
    assert script.Plan("8B", 8, True, lora=True).memory()["reference"] == 0.0
    assert script.Plan("8B", 1, False).traffic() == 0.0
