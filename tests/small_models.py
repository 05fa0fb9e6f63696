"""Small models of any architecture, with random weights and the tokenizer of the shipped one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from mirrorpo.models import builtin_path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VOCABULARY = 261  # bytes and a few marks
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
}


def small_model(config: Any, spread: float = 0.2) -> PreTrainedModel:
    """A model with weights large enough that its attention is no average of everything."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, spread)
    return model


def small_folder(folder: Path, config: Any) -> str:
    """A folder with such a model and a tokenizer."""
    small_model(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(builtin_path("tiny") / name, folder / name)
    return str(folder)
