"""Whatever a model folder holds: none of it is run, and weights that are not whole are refused before a run begins."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, xLSTMConfig

from mirrorpo.models import builtin_path
from refusal import TINY_RUN, refused
from small_models import SIZES, TOKENIZER, small_folder

HEADS = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 261, "eos_token_id": 257, "bos_token_id": 257}
GATE = "model.layers.0.mlp.gate_proj.weight"


def pickled_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(folder / "escaped"))))


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(folder / "escaped"))))


def remote_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (folder / "mine.py").write_text(f"open({str(folder / 'escaped')!r}, 'w')\nclass Config: pass\n")
    (folder / "model.safetensors").write_bytes(b"")


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (self.path, "w"))


def tiny(folder: Path) -> dict[str, torch.Tensor]:
    """A copy of the shipped model, to be damaged; its weights."""
    for source in builtin_path("tiny").iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    return load_file(folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def torn_at_the_end(folder: Path) -> None:
    tiny(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])


def torn_in_the_header(folder: Path) -> None:
    tiny(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])


def empty_weights(folder: Path) -> None:
    tiny(folder)
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder: Path) -> None:
    tiny(folder)
    (folder / "model.safetensors").unlink()


def pickled_under_another_name(folder: Path) -> None:
    tiny(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(str(folder / "escaped"))))


def a_tensor_less(folder: Path) -> None:
    weights = tiny(folder)
    del weights[GATE]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def a_tensor_of_another_shape(folder: Path) -> None:
    weights = tiny(folder)
    weights[GATE] = torch.zeros(3, 5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder: Path, index: object) -> None:
    tiny(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


def a_part_less(folder: Path) -> None:
    parts = dict.fromkeys(load_file(builtin_path("tiny") / "model.safetensors"), "model-00001-of-00002.safetensors")
    sharded(folder, {"metadata": {}, "weight_map": {**parts, GATE: "model-00002-of-00002.safetensors"}})


def torn_index(folder: Path) -> None:
    sharded(folder, '{"weight_map": {"model.norm.wei')


def index_without_a_map(folder: Path) -> None:
    sharded(folder, {"metadata": {}})


def another_config(folder: Path) -> None:
    edit_config(folder, intermediate_size=512)


def no_architecture(folder: Path) -> None:
    edit_config(folder, architectures=None)


def torn_config(folder: Path) -> None:
    tiny(folder)
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:-40])


def short_context(folder: Path) -> None:
    """A table of 40 positions."""
    small_folder(folder, GPT2Config(**HEADS, n_positions=40))


def no_tokenizer(folder: Path) -> None:
    small_folder(folder, GPT2Config(**HEADS))
    for name in TOKENIZER:
        (folder / name).unlink()


def empty_tokenizer(folder: Path) -> None:
    small_folder(folder, GPT2Config(**HEADS))
    for name in TOKENIZER:
        (folder / name).unlink()
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.json").write_text('{"<|endoftext|>": 0}')


def no_end_token(folder: Path) -> None:
    tiny(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))


def no_chat_template(folder: Path) -> None:
    tiny(folder)
    (folder / "chat_template.jinja").unlink()


def broken_chat_template(folder: Path) -> None:
    tiny(folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")


def template_of_parts(folder: Path) -> None:
    tiny(folder)
    parts = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(parts)


def template_without_content(folder: Path) -> None:
    tiny(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|{{ m['role'] }}|>{% endfor %}")


def quantised(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})


def gguf(folder: Path) -> None:
    (folder / "model-q4.gguf").write_bytes(b"GGUF")


def an_encoder(folder: Path) -> None:
    tiny(folder)
    (folder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')


def refusal(command: str, folder: Path, *more: str) -> str:
    arguments = {
        "train": ["train", "arithmetic", f"model.path={folder}", *TINY_RUN, *more, "--out", "run"],
        "plan": ["train", "arithmetic", f"model.path={folder}", *TINY_RUN, *more, "--plan"],
        "eval": ["eval", str(folder), "--task", "arithmetic", *more, "--out", "run"],
    }
    return refused(arguments[command], folder.parent)


commands = pytest.mark.parametrize("command", ["train", "plan", "eval"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@commands
@pytest.mark.parametrize("make", [pickled_model, pickled_adapter, remote_code, pickled_under_another_name])
def test_a_model_folder_is_never_run(make: Callable[[Path], None], command: str, folder: Path) -> None:
    make(folder)
    assert "model" in refusal(command, folder)
    assert not (folder / "escaped").exists()


@commands
@pytest.mark.parametrize(
    "make",
    [
        torn_at_the_end, torn_in_the_header, empty_weights, no_weights, a_tensor_less, a_tensor_of_another_shape,
        a_part_less, torn_index, index_without_a_map, another_config, no_architecture, torn_config,
    ],
)  # fmt: skip
def test_weights_that_are_not_whole_are_refused_before_a_folder_is_made(
    make: Callable[[Path], None], command: str, folder: Path
) -> None:
    make(folder)
    assert "model" in refusal(command, folder)
    assert not (folder.parent / "run").exists()


def test_the_damaged_tensor_is_named(folder: Path) -> None:
    a_tensor_less(folder)
    assert f"weights are missing that its config.json asks for: {GATE} (1 in all)" in refusal("train", folder)
    a_tensor_of_another_shape(folder)
    assert f"weights have another shape that its config.json asks for: {GATE} (1 in all)" in refusal("train", folder)


def test_a_context_that_is_too_short_is_refused_before_a_folder_is_made(folder: Path) -> None:
    short_context(folder)
    assert "the model's context is 40" in refusal("train", folder)
    assert "the model's context is 40" in refusal("eval", folder)
    assert not (folder.parent / "run").exists()


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (no_tokenizer, "the folder has no tokenizer files (tokenizer.json); copy those that belong to the model"),
        (empty_tokenizer, "the tokenizer is empty: it makes no token of a text"),
        (no_end_token, "set eos_token in its tokenizer_config.json to a token of its vocabulary, such as '<|end|>'"),
        (gguf, "the folder has no safetensors, but model-q4.gguf: give the path of that file"),
        (no_weights, "no file named model.safetensors"),
        (an_encoder, "model.path"),
        (broken_chat_template, "roles must alternate"),
        (template_of_parts, "it leaves out what the messages say"),
        (template_without_content, "it leaves out what the messages say"),
        (quantised, "its weights are quantised (fp8) and have no gradient"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line_with_what_to_do(
    make: Callable[[Path], None], line: str, plan: bool, folder: Path
) -> None:
    make(folder)
    more = ["--plan"] if plan else ["--out", "run"]
    assert line in refused(["train", "arithmetic", f"model.path={folder}", *TINY_RUN, *more], folder.parent)


def test_a_model_that_cannot_generate_is_refused_and_its_new_folder_taken_back(folder: Path) -> None:
    small_folder(folder, xLSTMConfig(**{**SIZES, "hidden_size": 64}, num_heads=2))
    assert "xLSTMForCausalLM cannot generate" in refusal("train", folder)


def test_options_of_a_chat_template_that_is_not_there_are_refused(folder: Path) -> None:
    no_chat_template(folder)
    line = refusal("train", folder, "model.chat_template={enable_thinking: false}")
    assert "no chat template, so that enable_thinking in model.chat_template would have no effect" in line


def test_a_token_budget_below_the_longest_sequence_is_refused_before_a_folder_is_made(folder: Path) -> None:
    tiny(folder)
    assert "train.token_budget: must hold the longest prompt" in refusal("train", folder, "train.token_budget=1")


def test_an_adapter_that_does_not_fit_is_refused_before_a_folder_is_made(folder: Path) -> None:
    tiny(folder)
    line = refusal("train", folder, "model.lora={r: 2, target_modules: [no_such_layer]}")
    assert "model.lora: " in line
    assert "no_such_layer" in line


@pytest.mark.parametrize("make", [torn_at_the_end, short_context])
def test_a_search_is_refused_as_a_run_is(make: Callable[[Path], None], folder: Path) -> None:
    make(folder)
    line = refused(["evolve", "evolve/embedded", f"model.path={folder}", "--out", "run"], folder.parent)
    assert "model" in line


@pytest.mark.parametrize("make", [torn_at_the_end, short_context])
def test_a_study_names_the_arm_whose_model_is_refused(make: Callable[[Path], None], folder: Path) -> None:
    make(folder)
    base = {"base": "arithmetic", "baseline": "a", "seeds": [0], "arms": {"a": {}, "b": {"model.path": str(folder)}}}
    (folder.parent / "study.yaml").write_text(json.dumps(base))
    assert "arms.b: " in refused(["study", "study.yaml", "--out", "run"], folder.parent)


def test_a_disk_that_fills_while_the_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mirrorpo.runs.folder.write_text_atomic", full)
    assert "No space left" in refused(["train", "arithmetic", *TINY_RUN, "--out", "a/b"], tmp_path)
    (tmp_path / "mine").mkdir()
    refused(["train", "arithmetic", *TINY_RUN, "--out", "mine"], tmp_path)
