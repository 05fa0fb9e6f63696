"""The head read from a config gives the model's own logits, for every family that does something to them."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig, GraniteConfig, Qwen3Config

from mirrorpo.training.model_adapter import check_head, head_of

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
GPTJ = {"vocab_size": 37, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
CONFIGS = {
    "plain, tied": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "plain, untied": Qwen3Config(**SMALL, tie_word_embeddings=False),
    "soft cap": Gemma2Config(**SMALL, final_logit_softcapping=0.05),
    "scale": CohereConfig(**SMALL, logit_scale=0.25),
    "inverse scale": GraniteConfig(**SMALL, logits_scaling=8.0),
    "bias": GPTJConfig(**GPTJ, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_of_a_config_gives_the_models_own_logits(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    if name == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    head = head_of(model, temperature=0.7)
    assert check_head(model, head) is None
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model.eval()
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), model(input_ids=ids).logits / 0.7, rtol=1e-5, atol=1e-6)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.softcap is not None) == (name == "soft cap")
    assert (head.scale != 1.0) == ("scale" in name)


def test_a_head_that_is_not_the_models_is_noticed() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["scale"]).train()
    found = head_of(model)
    wrong = type(found)(found.weight, scale=1.0)
    assert "not those of its head" in str(check_head(model, wrong))
    assert model.training
