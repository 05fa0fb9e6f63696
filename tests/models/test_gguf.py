"""GGUF files: what is converted equals what was written, once, and damaged files are refused in a line."""

import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mirrorpo.errors import InputError
from mirrorpo.models import builtin_path, resolve_model
from mirrorpo.models.folder import check_model_folder
from mirrorpo.models.gguf import cache_folder, check_gguf
from mirrorpo.training.setup import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# transformers reads no head dimension of Qwen3 from a GGUF file; Qwen2's is the hidden size shared among the heads.
CONFIG = Qwen2Config(
    vocab_size=262, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    tie_word_embeddings=True, eos_token_id=257, pad_token_id=256,
)  # fmt: skip
_WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    """`blk.0.attn_q.weight` of `model.layers.0.self_attn.q_proj.weight`."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, part = name.split(".", 3)
    part, kind = part.rsplit(".", 1)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def original(architecture: str = "qwen2") -> Qwen2ForCausalLM | LlamaForCausalLM:
    """A model with random weights."""
    torch.manual_seed(0)
    if architecture == "llama":
        sizes = {key: value for key, value in CONFIG.to_dict().items() if key not in ("model_type", "architectures")}
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return Qwen2ForCausalLM(CONFIG).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a Llama's queries or keys as GGUF has them: the two halves of a head, which rotate together, in turns."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape).contiguous()


def write_gguf(
    path: Path, *, quantised: bool = False, left_out: str = "", architecture: str = "qwen2"
) -> dict[str, torch.Tensor]:
    """A model with the built-in one's tokenizer as a GGUF file; returns the weights that are in it."""
    folder = builtin_path("tiny")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = [token["content"] for token in tokenizer["added_tokens"]]
    writer.add_tokenizer_model("gpt2")
    # A list of merges is never empty, so there is one more token, of the two rarest bytes.
    writer.add_token_list([*tokens, *special, tokens[-1] * 2])
    writer.add_token_types([1] * len(tokens) + [3] * len(special) + [1])
    writer.add_token_merges([f"{tokens[-1]} {tokens[-1]}"])
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(256)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    written = {}
    heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
    for name, tensor in original(architecture).state_dict().items():
        if name == "lm_head.weight" or name == left_out:
            continue
        values = tensor.numpy()
        if architecture == "llama" and (found := [count for part, count in heads.items() if part in name]):
            writer.add_tensor(gguf_name(name), interleaved(tensor, found[0]).numpy())
            written[name] = tensor
            continue
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = q8_values(tensor)
        else:
            writer.add_tensor(gguf_name(name), values)
        written[name] = torch.as_tensor(values)
    if architecture == "llama":  # newer files have the rotary factors too, which belong to no layer
        writer.add_tensor("rope_freqs.weight", np.ones(12, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def q8_values(tensor: torch.Tensor) -> np.ndarray:
    """What Q8_0 keeps: blocks of 32 integers in -127..127, and their scale, largest / 127, in float16."""
    blocks = tensor.numpy().reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    # A block of zeros, as in the padding token's row, has the scale 0.
    integers = np.trunc(np.abs(blocks) / np.where(scale == 0, 1, scale) + 0.5) * np.sign(blocks)
    return (integers * scale.astype(np.float16).astype(np.float32)).reshape(tensor.shape).astype(np.float32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("architecture", "quantised"), [("qwen2", False), ("qwen2", True), ("llama", False)])
def test_the_converted_folder_holds_the_weights_and_the_tokenizer_that_were_written(
    tmp_path: Path, architecture: str, quantised: bool
) -> None:
    written = write_gguf(tmp_path / "tiny.gguf", quantised=quantised, architecture=architecture)
    folder = resolve_model(str(tmp_path / "tiny.gguf"))
    check_model_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.state_dict()
    for name, tensor in written.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6 if quantised else 0, atol=0)
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(builtin_path("tiny"))
    chat = [{"role": "user", "content": "How many are 7 and 5?"}]
    ids, expected = (
        t.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for t in (tokenizer, ours)
    )
    assert ids == expected
    assert tokenizer.eos_token_id == ours.eos_token_id
    if not quantised:
        tokens = torch.tensor([ids])
        torch.testing.assert_close(model(tokens).logits, original(architecture)(tokens).logits, rtol=0, atol=1e-5)


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(str(file)).eos_token_id == CONFIG.eos_token_id  # by an absolute path, as a run does
        first = resolve_model(str(file))
        again = resolve_model(str(file))
        (tmp_path / "copy").mkdir()
        copy = tmp_path / "copy" / "tiny.gguf"
        copy.write_bytes(file.read_bytes())
        assert resolve_model(str(copy)) == first == again
        write_gguf(file, quantised=True)
        assert resolve_model(str(file)) != first
    assert [record.message.split(" into ")[0] for record in caplog.records if "dequantised" in record.message] == [
        "tiny.gguf is dequantised to float32, once,"
    ] * 2
    kept = [path for path in cache_folder().iterdir() if not path.name.endswith(".lock")]
    assert len(kept) == 2


def test_a_file_without_one_of_its_weights_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", left_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert str(caught.value).startswith(f"model.path {str(tmp_path / 'tiny.gguf')!r}: ")
    assert [path for path in cache_folder().iterdir() if not path.name.endswith(".lock")] == []


def header(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def key(name: str, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "first four bytes"),
        (b"PK\3\4 a zip archive", "first four bytes"),
        (b"GGUF", "damaged"),
        (header(version=1), "GGUF version 1; legal: 2, 3"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "little-endian"),
        (header(entries=2**62), "damaged"),
        (header(tensors=2**62), "damaged"),
        (header(entries=1) + key("k", 99), "a value of type 99"),
        (header(entries=1) + struct.pack("<Q", 2**63) + b"k", "damaged"),
        (header(entries=1) + key("k", 8) + struct.pack("<Q", 2**40), "damaged"),
        (header(entries=1) + key("k", 9) + struct.pack("<IQ", 4, 2**61), "damaged"),
        (header(entries=1) + key("k", 9) + struct.pack("<IQ", 8, 2**61), "damaged"),
        (header(entries=1) + key("k", 9) + 9 * struct.pack("<IQ", 9, 1), "a value of type 9"),
        (header(tensors=1) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 5), "5 dimensions"),
        (header(tensors=1) + struct.pack("<Q1sI2QIQ", 1, b"t", 2, 2**32, 2**31, 0, 0), "points beyond its end"),
        (header(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 2**50), "points beyond its end"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_read_from_it(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=line):
        check_gguf(tmp_path / "m.gguf")


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for share in (0.001, 0.01, 0.3, 0.9):
        (tmp_path / "torn.gguf").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match="GGUF file"):
            resolve_model(str(tmp_path / "torn.gguf"))


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "no.gguf", "someone/model-GGUF/model-Q4.gguf"):
        with pytest.raises(InputError, match="no such file"):
            load_tokenizer(str(path))
