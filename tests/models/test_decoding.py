"""Completions drawn token by token: the loop equals transformers' ``generate``, and draws the distribution it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mirrorpo.models import decoding
from mirrorpo.models.decoding import complete, decoding_weights, pick, reason_for_generate

VOCABULARY, LENGTH = 40, 70  # beyond one block of 64 tokens
ENDS = [3, 4]
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))


MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS)), None),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4)), None),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(**SMALL, n_head=4)), None),
    "a sliding window": (lambda: MistralForCausalLM(MistralConfig(**SMALL, **HEADS, sliding_window=8)), "length"),
    "prepares its inputs": (
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **HEADS, head_dim=4)),
        "changes with the length",
    ),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SMALL)), "by itself"),
}


def draws(temperature: float = 0.3) -> decoding.Draw:
    numbers = torch.rand(LENGTH, 64, generator=torch.Generator().manual_seed(5))
    return lambda logits, rows, step: pick(logits, numbers[step, rows], temperature)


PROMPTS = [[5, 6, 7, 8]] * 3 + [[1, 2]] * 2 + [[9, 9, 9, 1, 2, 6, 7, 8, 9, 10]] * 3 + [[5, 6, 7, 8]]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_decoded_with_the_same_draws_whichever_way(name: str) -> None:
    torch.manual_seed(0)
    build, reason = MODELS[name]
    model = build().eval()
    found = reason_for_generate(model)
    assert found is None if reason is None else found is not None
    wanted = decoding._generated(model, PROMPTS, draws(), LENGTH, ENDS, 0).tolist()
    assert complete(model, PROMPTS, draws(), LENGTH, ENDS, 0) == [decoding._until(row, set(ENDS)) for row in wanted]


def test_completions_end_at_different_lengths_and_the_loop_goes_on_with_the_rest() -> None:
    model = llama()
    sizes: list[int] = []
    draw = draws()

    def watched(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        sizes.append(len(rows))
        return draw(logits, rows, step)

    found = complete(model, PROMPTS * 3, watched, LENGTH, ENDS, 0)
    lengths = sorted(map(len, found))
    assert lengths[0] < lengths[-1]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == len(PROMPTS) * 3 > sizes[-1]
    assert all((row[-1] in ENDS) == (len(row) < LENGTH or row[-1] in ENDS) for row in found)


def test_logits_of_the_loop_are_those_of_a_whole_forward_pass() -> None:
    model = llama().double()
    seen: dict[int, list[Tensor]] = {row: [] for row in range(len(PROMPTS))}
    draw = draws()

    def watched(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        for place, row in enumerate(rows.tolist()):
            seen[row].append(logits[place])
        return draw(logits, rows, step)

    found = complete(model, PROMPTS, watched, LENGTH, ENDS, 0)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, found, strict=True)):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(seen[row][: len(completion)]), whole, atol=1e-12, rtol=0)


def test_equal_prompts_are_read_once() -> None:
    model = llama()
    read: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    complete(model, PROMPTS, draws(), 4, ENDS, 0)
    handle.remove()
    assert read[0] == (3, 10)  # three prompts, the longest of ten tokens
    assert all(width == 1 for _, width in read[1:])


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_as_before_and_dropout_is_off(training: bool) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.5))
    model.train(training)
    first, second = (complete(model, PROMPTS, draws(), 20, ENDS, 0) for _ in range(2))
    assert first == second
    assert model.training is training


# Draws


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),  # 0.5 does not reach it, 0.8 does
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"min_p": 0.5}, {0, 1}),  # at least 0.25
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of 0.5, 0.3, 0.12 renormalised, the first two have 0.87
        ({"top_k": 9}, {0, 1, 2, 3}),
    ],
)
def test_a_fine_grid_of_uniform_numbers_gives_the_kept_distribution(options: dict[str, Any], kept: set[int]) -> None:
    probs = torch.tensor([0.5, 0.3, 0.12, 0.08], dtype=torch.float64)
    grid = (torch.arange(20_000) + 0.5) / 20_000
    chosen = pick(probs.log().expand(len(grid), 4), grid, 1.0, **options)
    wanted = torch.tensor([float(probs[i]) if i in kept else 0.0 for i in range(4)])
    share = torch.bincount(chosen, minlength=4) / len(grid)
    torch.testing.assert_close(share, wanted / wanted.sum(), atol=1e-4, rtol=0)


def test_temperature_divides_logits() -> None:
    grid = (torch.arange(10_000) + 0.5) / 10_000
    chosen = pick(torch.tensor([0.0, 1.0]).expand(10_000, 2), grid, 0.5)
    assert chosen.float().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-4)


def test_a_nucleus_wider_than_the_shortlist_equals_that_of_a_whole_sort() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 3_000) * torch.tensor([[0.1], [1.0], [2.0], [4.0], [8.0]])
    probs = logits.softmax(-1)
    for top_p in (0.3, 0.9, 0.999):
        ordered, index = probs.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        assert torch.equal(decoding._nucleus(probs, top_p), torch.zeros_like(probs).scatter_(-1, index, ordered))


# Weights


def lora(dropout: float = 0.0) -> nn.Module:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=dropout))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_merged_adapters_give_the_same_logits_and_leave_every_weight_as_it_was() -> None:
    model = lora().double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with decoding_weights(model, None):
            assert not torch.equal(
                model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight,
                before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
            )
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-12, rtol=0)
        assert torch.equal(model(input_ids=ids).logits, wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("autocast", [False, True])
def test_an_adapter_too_small_for_16_bits_still_moves_what_is_drawn(autocast: bool) -> None:
    """A weight of 1 in bfloat16 stays 1 with anything from -2^-9 to 2^-8 added: merged, the adapter would be gone."""
    model = lora().eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "base_layer" in name:
                parameter.copy_(parameter.sign())
            elif "lora_" in name:
                parameter.fill_(0.015)  # four products, scaled by 8 / 4: 0.0018 in every place, 2^-9 is 0.00195
    if not autocast:
        model = model.to(torch.bfloat16)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
        with decoding_weights(model, torch.bfloat16 if autocast else None):
            drawn = model(input_ids=ids).logits
    assert not torch.equal(trained, without)
    assert torch.equal(drawn, trained)


def test_weights_cast_once_give_what_autocast_gives_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True)).eval()
    ids = torch.tensor([[5, 6, 7]])
    embedding = model.get_input_embeddings().weight
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(input_ids=ids).logits
        with decoding_weights(model, torch.bfloat16):
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.get_input_embeddings().weight is embedding
            assert torch.equal(model(input_ids=ids).logits, wanted)
    assert model.lm_head.weight is embedding
    assert embedding.dtype == torch.float32


def test_weights_are_restored_when_generation_fails() -> None:
    model = lora()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stopped"), decoding_weights(model, torch.bfloat16):
        raise RuntimeError("stopped")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())
