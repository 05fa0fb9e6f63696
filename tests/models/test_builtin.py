"""The model that comes with the package: small, loadable without a network, its tokenizer lossless."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrorpo.models import BUILTIN_MODELS, builtin_path, for_vllm, resolve_model

FOLDER = builtin_path("tiny")
MAX_WEIGHTS_BYTES = 2_500_000
MAX_FOLDER_BYTES = 3_000_000
QUESTION = [{"role": "user", "content": "12+7*3=?"}]
# Any text but lone surrogates, which no UTF-8 text can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def render(messages: list[dict[str, str]], **options: bool) -> str:
    return tokenizer().apply_chat_template(messages, tokenize=False, **options)


def test_builtin_path_is_a_folder_inside_the_package() -> None:
    assert FOLDER.is_dir()
    assert FOLDER.parent.name == "models"
    assert BUILTIN_MODELS["tiny"] == FOLDER


@pytest.mark.parametrize("name", ["huge", "", "../tiny", "tiny/"])
def test_an_unknown_name_is_an_error_that_lists_the_legal_ones(name: str) -> None:
    message = f"is {re.escape(repr(name))}; legal values: 'tiny'"
    with pytest.raises(ValueError, match=message):
        builtin_path(name)
    with pytest.raises(ValueError, match=message):
        resolve_model(f"builtin:{name}")


def test_resolve_model_maps_the_builtin_prefix_and_nothing_else() -> None:
    assert resolve_model("builtin:tiny") == str(FOLDER)
    for path in ("Qwen/Qwen3-0.6B", "runs/builtin:tiny", "tiny", "", "Builtin:tiny", str(FOLDER)):
        assert resolve_model(path) == path


def test_files_are_few_small_and_free_of_code() -> None:
    sizes = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert set(sizes) == {
        "build.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sizes["model.safetensors"] <= MAX_WEIGHTS_BYTES
    assert sum(sizes.values()) <= MAX_FOLDER_BYTES
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert "auto_map" not in config
    assert "_name_or_path" not in config  # where it was built is nobody's business


def test_the_weights_are_float32_finite_and_fewer_than_a_million() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in stored.values())
    number = sum(tensor.numel() for tensor in stored.values())
    assert number < 1_000_000
    assert all(parameter.dtype == torch.float32 for parameter in model().parameters())
    assert sum(parameter.numel() for parameter in model().parameters()) == number
    assert json.loads((FOLDER / "build.json").read_text())["num_parameters"] == number


def test_the_record_of_the_build_says_the_base_is_often_wrong_and_short() -> None:
    base = json.loads((FOLDER / "build.json").read_text())["base"]
    assert 0.3 <= base["medium"]["accuracy"] <= 0.5
    assert base["hard"]["accuracy"] < base["medium"]["accuracy"] < base["easy"]["accuracy"]
    assert base["medium"]["mean_tokens"] < 14


@settings(deadline=None)  # the first example may load the tokenizer
@given(TEXT)
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    tokens = tokenizer().encode(text)
    assert tokenizer().decode(tokens) == text


@settings(deadline=None)  # the first example may load the tokenizer
@given(TEXT.filter(lambda text: "<|" not in text))
def test_tokens_are_the_bytes_of_the_text(text: str) -> None:
    assert tokenizer().encode(text) == list(text.encode())
    assert tokenizer().decode(list(text.encode()), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a  b \r\n\t",
        "\x00",
        "a\x00\x01\x7fb",
        "\U0001f600\U0001f468\u200d\U0001f469",
        "e\u0301 \u00e9 \ufb01",
    ],
)
def test_blanks_nuls_emoji_and_unnormalised_letters_come_back(text: str) -> None:
    assert tokenizer().encode(text) == list(text.encode())
    assert tokenizer().decode(list(text.encode())) == text


def test_bytes_that_are_no_text_decode_without_an_error() -> None:
    assert tokenizer().decode([0xF0, 0x9F, ord("A")]).endswith("A")


def test_padding_is_on_the_left_and_is_not_the_end() -> None:
    assert tokenizer().padding_side == "left"
    assert tokenizer().pad_token_id != tokenizer().eos_token_id
    config = model().config
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer().pad_token_id, tokenizer().eos_token_id)
    assert config.vocab_size == len(tokenizer())
    batch = tokenizer()(["1+1", "1"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


def test_special_text_in_a_message_is_read_as_the_special_token() -> None:
    # Whoever needs it otherwise can encode with split_special_tokens=True.
    assert tokenizer().encode("<|end|>") == [tokenizer().eos_token_id]
    assert tokenizer().encode("<|end|>", split_special_tokens=True) == list(b"<|end|>")


def test_the_generation_prompt_is_a_prefix_of_the_conversation_with_the_answer() -> None:
    system = {"role": "system", "content": "Be right."}
    for prompt in (QUESTION, [system, *QUESTION]):
        answered = [*prompt, {"role": "assistant", "content": "#### 33"}]
        longer = [*answered, {"role": "user", "content": "1+1=?"}]
        head = render(prompt, add_generation_prompt=True)
        assert render(answered) == head + "#### 33<|end|>"
        assert head.startswith(render(prompt))
        assert render(longer).startswith(render(answered))
        ids = tokenizer().apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        full = tokenizer().apply_chat_template(answered, return_dict=False)
        assert full[: len(ids)] == ids
    assert render([system, *QUESTION], add_generation_prompt=True) == (
        "<|system|>Be right.<|end|><|user|>12+7*3=?<|end|><|assistant|>"
    )


@settings(deadline=None)  # the first example may load the tokenizer
@given(TEXT)
def test_the_template_renders_content_as_it_is(text: str) -> None:
    assert render([{"role": "user", "content": text}]) == f"<|user|>{text}<|end|>"


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(Exception, match="roles are 'system', 'user' and 'assistant', not 'tool'"):
        render([{"role": "tool", "content": "x"}])


def test_the_model_generates_and_left_padding_changes_nothing() -> None:
    chats = [render([{"role": "user", "content": text}], add_generation_prompt=True) for text in ("3*4+50=?", "9-2=?")]
    batch = tokenizer()(chats, padding=True, return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "temperature": None, "top_k": None}
    together = model().generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        alone = tokenizer()(chat, return_tensors="pt")
        answer = model().generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        text = tokenizer().decode(answer, skip_special_tokens=True)
        assert re.fullmatch(r"[-0-9+*=;]*#### [0-9]+", text)
        assert tokenizer().decode(together[row], skip_special_tokens=True) == text


def test_calculating_step_by_step_is_mostly_right() -> None:
    head = render([{"role": "user", "content": "12+7*3=?"}], add_generation_prompt=True)
    ids = torch.tensor([tokenizer().encode(head + "7*3=21;12+21=33#### 33<|end|>")])
    logp = model()(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    start = len(tokenizer().encode(head))
    # After the first token, which decides whether to calculate at all, every byte is nearly certain.
    assert logp[start:].sum().exp() > 0.9


def test_no_file_names_a_folder_of_the_machine_it_was_built_on() -> None:
    for file in FOLDER.iterdir():
        content = file.read_bytes()
        for folder in (Path.home(), Path.cwd()):
            assert len(folder.parts) < 2 or str(folder).encode() not in content


# A copy with wider heads, for vLLM


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Path(for_vllm(str(FOLDER)))


def test_the_copy_with_wider_heads_is_the_same_function(wide: Path) -> None:
    ids = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(0))
    copy = AutoModelForCausalLM.from_pretrained(wide)
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids).logits.log_softmax(-1) for one in (model(), copy))
    assert copy.config.head_dim == 32
    # Frequencies are rounded to float32 in another order: angles differ by some 1e-7 of a position.
    assert (ours.exp() - theirs.exp()).abs().max() < 2e-6
    assert (ours - theirs).abs().max() < 5e-5


def test_training_leaves_the_padding_of_the_wider_heads_at_zero(wide: Path) -> None:
    copy = AutoModelForCausalLM.from_pretrained(wide)
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    copy(input_ids=ids, labels=ids).loss.backward()
    parts = set()
    for name, p in copy.named_parameters():
        part = name.split(".")[-2]
        if p.shape != model().get_parameter(name).shape:
            assert p.grad is not None
            zero = (p == 0).flatten()
            assert zero.sum() >= p.numel() // 4  # 8 of 32 in every head
            assert (p.grad.flatten()[zero] == 0).all()
            parts.add(part)
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}


def test_other_models_and_a_copy_that_is_there_are_left_as_they_are(wide: Path) -> None:
    made = (wide / "model.safetensors").stat().st_mtime_ns
    assert for_vllm(str(FOLDER)) == str(wide)
    assert (wide / "model.safetensors").stat().st_mtime_ns == made
    assert [one.name for one in wide.parent.iterdir()] == [wide.name]
    for path in ("Qwen/Qwen3-0.6B", str(wide), "nowhere"):
        assert for_vllm(path) == path
    for config in ("{", "[]", '{"model_type": "qwen3", "head_dim": 24, "rope_parameters": null}'):
        (wide / "config.json").write_text(config)
        assert for_vllm(str(wide)) == str(wide)
