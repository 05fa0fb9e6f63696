"""Configurations, chat templates, tokenizers and generation settings of a hostile model folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mirrorpo.config.train import recipe_from
from mirrorpo.errors import InputError
from mirrorpo.evaluation.eval_run import evaluate_recipe
from mirrorpo.models import builtin_path, chat_template
from mirrorpo.models.chat_template import check_chat_template
from mirrorpo.models.folder import check_config, check_model_folder
from mirrorpo.training.setup import load_tokenizer
from test_models import edit_config, refusal, tiny

commands = pytest.mark.parametrize("command", ["train", "plan", "eval"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


# ---- config.json

ABSURD = {
    "num_hidden_layers": 10**9,
    "hidden_size": 10**12,
    "intermediate_size": 2**63,
    "vocab_size": 10**18,
    "num_attention_heads": 0,
    "num_key_value_heads": -8,
    "head_dim": "64",
    "max_position_embeddings": 10**30,
    "attn_implementation": "stranger/attention-kernel",
    "_attn_implementation": "stranger/kernel@main:forward",
    "_attn_implementation_internal": "stranger/kernel",
}


@commands
@pytest.mark.parametrize("key", ABSURD)
def test_sizes_and_kernels_that_no_model_has_are_refused_by_name(key: str, command: str, folder: Path) -> None:
    edit_config(folder, **{key: ABSURD[key]})
    line = refusal(command, folder)
    assert f"config.json: {key} " in line


@pytest.mark.parametrize(
    ("config", "piece"),
    [
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers must be an integer in [1, 2000]"),
        ({"text_config": {"attn_implementation": "a/b"}}, "is code that would be downloaded. Legal: eager, sdpa"),
        ({"num_hidden_layers": 1_000, "num_experts": 9_000}, "1000 layers of 9000 experts; legal: 400,000 in all"),
        ({"num_hidden_layers": True}, "got True"),
        ({"hidden_size": 1.5}, "got 1.5"),
        ({"num_key_value_heads": [8, 10**6]}, "got 1000000"),
        ({"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"}, "code of its author (auto_map)"),
        ({"auto_map": {"AutoConfig": "a/b--mine.C"}, "trust_remote_code": True}, "code of its author (auto_map)"),
    ],
)
def test_a_config_is_checked_wherever_a_size_stands(config: dict[str, object], piece: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json") as refused:
        check_config(config)
    assert piece in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 126, "hidden_size": 16_384, "vocab_size": 256_000, "max_position_embeddings": 10**7},
        {"num_hidden_layers": 61, "n_routed_experts": 384, "num_experts": 0, "sliding_window": None},
        {"num_key_value_heads": None, "head_dim": None, "num_hidden_layers": 32},
        {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "qwen3"},
        {"attn_implementation": "sdpa", "text_config": {"_attn_implementation": "eager"}},
    ],
)
def test_configs_of_real_models_pass(config: dict[str, object]) -> None:
    check_config(config)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff\xfe", b"[1, 2]", b"null", b"", b'{"a": NaN', b" " * 10_000_001], ids=range(7)
)
def test_a_settings_file_that_is_none_is_refused_by_name(name: str, content: bytes, folder: Path) -> None:
    tiny(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as refused:
        check_model_folder(str(folder))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_folder_in_place_of_a_settings_file_is_refused(folder: Path) -> None:
    (folder / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config.json is not a file"):
        check_model_folder(str(folder))


def test_an_adapter_brings_its_base_into_the_check(folder: Path) -> None:
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    edit_config(base, num_hidden_layers=10**9)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="num_hidden_layers"):
        check_model_folder(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    (adapter / "other.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_model.bin is a pickle"):
        check_model_folder(str(adapter))


def test_code_of_the_author_is_accepted_by_a_key_of_the_recipe_alone(folder: Path) -> None:
    tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model\.trust_remote_code=true accepts it"):
        load_tokenizer(str(folder))
    check_model_folder(str(folder), trust_remote_code=True)
    recipe = recipe_from({"task": {"name": "arithmetic"}, "model": {"trust_remote_code": True}})
    assert "trust_remote_code: true" in recipe.to_yaml(), "on record"
    assert recipe_from({"task": {"name": "arithmetic"}}).model.trust_remote_code is False


# ---- tokenizer


@commands
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0", "model": {"type": "BPE"}}', b"\xff" * 99])
def test_a_broken_tokenizer_is_one_line(content: bytes, command: str, folder: Path) -> None:
    tiny(folder)
    (folder / "tokenizer.json").write_bytes(content)
    assert "its tokenizer cannot be loaded" in refusal(command, folder)


def test_a_tokenizer_that_makes_its_library_panic_is_one_line(folder: Path) -> None:
    """A merge longer than any entry of the vocabulary: an exception that is no ``Exception``, and a native trace."""
    tiny(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["ab", "ab"]]}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    command = [sys.executable, "-m", "mirrorpo", "eval", str(folder), "--task", "arithmetic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "its tokenizer cannot be loaded (range end index" in done.stderr


@commands
@pytest.mark.parametrize("name", ["./absent", "/absent/model", "runs/absent/model"])
def test_a_missing_folder_is_called_a_missing_folder(name: str, command: str, tmp_path: Path) -> None:
    from refusal import TINY_RUN, refused

    arguments = {
        "train": ["train", "arithmetic", f"model.path={name}", *TINY_RUN, "--out", "run"],
        "plan": ["train", "arithmetic", f"model.path={name}", *TINY_RUN, "--plan"],
        "eval": ["eval", name, "--task", "arithmetic"],
    }
    assert f"model.path {name!r}: no such folder" in refused(arguments[command], tmp_path)


# ---- chat templates

BROKEN = {
    "no syntax": ("{% for %}", "TemplateSyntaxError"),
    "unknown filter": ("{{ messages|nothing }}", "nothing"),
    "undefined": ("{{ a.b.c }}", "UndefinedError"),
    "raises": ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "private": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "import": ("{% import 'os' as os %}{{ os }}", "TypeError|no loader|cannot be used"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "memory": ("{{ ('a' * 10**6)|list|length }}{{ 'a' * 10**11 }}", "memory"),
    "long": ("{{ 'a' * 20000000 }}", "a prompt of more than 10,000,000 characters"),
    "loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "it takes more than 1 s",
    ),
    "one long call": ("{{ 10 ** (10 ** 9) }}", "it takes more than 1 s|memory"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_chat_template_that_fails_or_takes_too_much_is_one_line(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, piece = BROKEN[name]
    if "1 s" in piece:
        monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    tiny(folder)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=piece) as refused:
        check_chat_template(load_tokenizer(str(folder)), [[{"role": "user", "content": "1 + 1"}]])
    assert "its chat template cannot be used" in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_template_among_the_options_is_held_to_the_same_limits() -> None:
    tokenizer, chats = load_tokenizer("builtin:tiny"), [[{"role": "user", "content": "1 + 1"}]]
    for options in ({"chat_template": "{{ raise_exception('mine') }}"}, {"tokenize": True}):
        with pytest.raises(InputError, match="its chat template cannot be used"):
            check_chat_template(tokenizer, chats, options)


@commands
def test_every_command_refuses_such_a_template(command: str, folder: Path) -> None:
    tiny(folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "its chat template cannot be used (TemplateError: no)" in refusal(command, folder)
    assert not (folder.parent / "run").exists()


def test_a_template_of_megabytes_is_not_even_compiled(folder: Path) -> None:
    tiny(folder)
    (folder / "chat_template.jinja").write_text("{{ 1 }}" * 200_000)
    with pytest.raises(InputError, match=r"has 1,400,000 characters\. Legal: at most 1,000,000"):
        check_chat_template(load_tokenizer(str(folder)), [[{"role": "user", "content": "1 + 1"}]])


def test_a_good_template_a_plain_text_and_no_template_pass() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    check_chat_template(tokenizer, [[{"role": "user", "content": "1 + 1"}]] * 100)
    check_chat_template(tokenizer, ["1 + 1"])
    tokenizer.chat_template = None
    check_chat_template(tokenizer, [[{"role": "user", "content": "1 + 1"}]])


# ---- generation settings

GENERATION = {
    "temperature": 0.01, "top_k": 1, "top_p": 0.1, "do_sample": True, "repetition_penalty": 9.0, "num_beams": 4,
    "num_return_sequences": 3, "max_length": 3, "min_new_tokens": 20, "forced_eos_token_id": 5, "use_cache": False,
    "prompt_lookup_num_tokens": 4, "suppress_tokens": [1, 2, 3], "no_repeat_ngram_size": 1,
}  # fmt: skip


def evaluated(path: Path) -> dict[str, object]:
    data = {"task": {"name": "arithmetic"}, "model": {"path": str(path)}, "eval": {"problems": 4}}
    summary = evaluate_recipe(recipe_from(data, ["train.max_completion_length=12"]), [1], Console(file=io.StringIO()))
    return {key: summary[key] for key in ("pass@1", "mean_length", "verdicts", "reasons")}


def test_generation_settings_of_the_folder_do_not_change_what_is_drawn(folder: Path) -> None:
    tiny(folder)
    path = folder / "generation_config.json"
    ids = {key: value for key, value in json.loads(path.read_text()).items() if key.endswith("_token_id")}
    path.write_text(json.dumps({**ids, **GENERATION}))
    assert evaluated(folder) == evaluated(builtin_path("tiny"))


@commands
@pytest.mark.parametrize("value", ["5", -1, True, 10**12, [1, "x"], {}, 1.5], ids=repr)
def test_a_token_id_that_is_none_is_refused(value: object, command: str, folder: Path) -> None:
    tiny(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "generation_config.json: eos_token_id must be a token id" in refusal(command, folder)
