"""Whatever a recipe, a data file or a run folder holds: status 2, one line, nothing written."""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirrorpo.config.train import Recipe, recipe_from
from mirrorpo.config.yaml import parse_yaml
from mirrorpo.errors import InputError
from refusal import TINY_RUN, refused

BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
GOOD = "task: {name: arithmetic}\n"

TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "only a comment": "# nothing\n",
    "null": "null\n",
    "a list": "- task\n",
    "a scalar": "arithmetic\n",
    "a number": "1e9\n",
    "billion laughs": BILLION_LAUGHS,
    "one alias": "x: &x {name: arithmetic}\ntask: *x\n",
    "alias of itself": "task: &t\n  name: *t\n",
    "merge key": "task: {<<: {name: arithmetic}, name: arithmetic}\nbase: 1\n",
    "python object": "task: !!python/object/apply:os.system ['touch escaped']\n",
    "python name": "task: !!python/name:os.system\n",
    "python module": "task: !!python/module:os\n",
    "python tuple": "task: !!python/tuple [1, 2]\n",
    "private tag": "task: !mine {name: arithmetic}\n",
    "global tag": "task: !<tag:example.org,2000:x> {name: arithmetic}\n",
    "binary": "task: {name: !!binary aGVsbG8=}\n",
    "set": "task: !!set {name, arithmetic}\n",
    "omap": "task: !!omap [name: arithmetic]\n",
    "timestamp": "task: {name: arithmetic, seed: 2001-12-14}\n",
    "sexagesimal": "task: {name: arithmetic, seed: '1:30'}\n",
    "key twice": GOOD + GOOD,
    "key twice inside": "task: {name: arithmetic, seed: 1, seed: 2}\n",
    "key twice in quotes": "task: {name: arithmetic, seed: 1, 'seed': 2}\n",
    "list as key": "? [a, b]\n: c\n",
    "mapping as key": "? {a: b}\n: c\n",
    "number as key": GOOD + "7: 8\n",
    "bool as key": GOOD + "true: 8\n",
    "null as key": GOOD + "~: 8\n",
    "two documents": GOOD + "---\n" + GOOD,
    "tab": "task:\n\tname: arithmetic\n",
    "unclosed": "task: {name: arithmetic\n",
    "unclosed quote": "task: {name: 'arithmetic}\n",
    "NUL": b"task: {name: \x00arithmetic}\n",
    "escaped NUL": 'task: {name: "arith\\0metic"}\n',
    "bell": b"task: {name: \x07}\n",
    "terminal escape": 'task: {name: "\\e[31mred\\e[0m"}\n',
    "terminal title": 'task: {name: "\\e]0;owned\\a"}\n',
    "right to left": "task: {name: \u202earithmetic}\n",
    "zero width": "task: {name: arith\u200bmetic}\n",
    "emoji": "task: {name: \U0001f600}\n",
    "homoglyph": "t\u0430sk: {name: arithmetic}\n",
    "lone surrogate": 'task: {name: "\\ud800"}\n',
    "latin-1": "task: {name: café}\n".encode("latin-1"),
    "utf-16": GOOD.encode("utf-16"),
    "bad utf-8": b"task: {name: \xff\xfe}\n",
    "binary file": bytes(range(256)) * 8,
    "gzip": gzip.compress(GOOD.encode()),
    "pickle": pickle.dumps({"task": {"name": "arithmetic"}}),
    "elf": b"\x7fELF" + bytes(100),
    "json list": json.dumps([1, 2, 3]),
    "deep list": "task: " + "[" * 5_000 + "]" * 5_000 + "\n",
    "deep mapping": "task: " + "{a: " * 3_000 + "1" + "}" * 3_000 + "\n",
    "long key": "k" * 100_000 + ": 1\n",
    "long value": "task: {name: " + "v" * 100_000 + "}\n",
    "long number": "task: {name: arithmetic, seed: " + "9" * 10_000 + "}\n",
    "too many bytes": GOOD + "#" * 1_000_001,
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "no task": "train: {steps: 1}\n",
    "task null": "task: ~\n",
    "task list": "task: [arithmetic]\n",
    "task text": "task: arithmetic\n",
    "task without name": "task: {seed: 0}\n",
    "task name list": "task: {name: [arithmetic]}\n",
    "task name number": "task: {name: 7}\n",
    "task unknown": "task: {name: arithmetics}\n",
    "task of dunder": "task: {name: __class__}\n",
    "group is a list": GOOD + "train: [1]\n",
    "group is a text": GOOD + "train: steps\n",
    "group is a number": GOOD + "eval: 3\n",
    "unknown group": GOOD + "trian: {steps: 1}\n",
    "dunder group": GOOD + "__init__: 1\n",
    "objective text": GOOD + "objective: no_such_preset\n",
    "objective unknown": GOOD + "objective: {preset: grop}\n",
    "objective unknown key": GOOD + "objective: {preset: grpo, coeficient: 1}\n",
    "objective import": GOOD + "objective: {preset: grpo, divergence: 'os:system'}\n",
    "objective import of nothing": GOOD + "objective: {preset: grpo, divergence: 'no_such_module:f'}\n",
    "objective region list": GOOD + "objective: {preset: grpo, region: [1]}\n",
    "objective nan": GOOD + "objective: {preset: grpo, coefficient: .nan}\n",
    "objective inf": GOOD + "objective: {preset: grpo, coefficient: .inf}\n",
    "objective huge": GOOD + "objective: {preset: grpo, coefficient: 1e400}\n",
    "objective preset list": GOOD + "objective: {preset: [grpo]}\n",
    "objective control text": GOOD + "objective: {preset: grpo, control: adaptive}\n",
    "reference without penalty": GOOD + "objective: {preset: dr_grpo}\nreference: {kind: averaged}\n",
    "model empty": GOOD + "model: {path: ''}\n",
    "model absent": GOOD + "model: {path: ./absent}\n",
    "model NUL": GOOD + 'model: {path: "a\\0b"}\n',
    "model builtin unknown": GOOD + "model: {path: 'builtin:large'}\n",
    "model url": GOOD + "model: {path: 'https://example.org/model'}\n",
    "model traversal": GOOD + "model: {path: '../../../../etc'}\n",
    "model device": GOOD + "model: {path: /dev/null}\n",
    "model dtype": GOOD + "model: {dtype: float8}\n",
    "model list": GOOD + "model: {path: [a]}\n",
    "model newline": GOOD + 'model: {path: "a\\nb"}\n',
    "lora rank": GOOD + "model: {lora: {r: 0}}\n",
    "lora huge rank": GOOD + "model: {lora: {r: 1000000000}}\n",
    "lora text": GOOD + "model: {lora: yes please}\n",
    "jsonl without path": "task: {name: jsonl}\n",
    "jsonl absent": "task: {name: jsonl, path: absent.jsonl}\n",
    "jsonl folder": "task: {name: jsonl, path: .}\n",
    "jsonl device": "task: {name: jsonl, path: /dev/zero}\n",
    "jsonl NUL": 'task: {name: jsonl, path: "a\\0b"}\n',
    "jsonl long path": "task: {name: jsonl, path: " + "p" * 5_000 + "}\n",
    "jsonl reward unknown": "task: {name: jsonl, path: x, reward: exakt}\n",
    "jsonl reward absent": "task: {name: jsonl, path: x, reward: 'no_module_here:f'}\n",
    "jsonl reward no function": "task: {name: jsonl, path: x, reward: 'os:sep'}\n",
    "jsonl reward dotted": "task: {name: jsonl, path: x, reward: '..:f'}\n",
    "jsonl reward empty": "task: {name: jsonl, path: x, reward: ':'}\n",
    "gsm8k absent": "task: {name: gsm8k, path: absent.jsonl}\n",
    "gsm8k without hub": "task: {name: gsm8k}\n",
    "mbpp absent": "task: {name: mbpp, path: absent.jsonl}\n",
    "more prompts than rows": GOOD + "train: {prompts_per_step: 9000}\n",
    "indivisible": GOOD + "train: {updates_per_batch: 7}\n",
}

# Every number of a recipe, with values that no number of that kind takes.
NUMBERS = [
    "task.train_size", "task.test_size", "task.seed", "train.steps", "train.prompts_per_step", "train.group_size",
    "train.updates_per_batch", "train.passes_per_batch", "train.learning_rate", "train.save_every", "train.keep",
    "train.seed", "train.max_completion_length", "train.temperature", "train.top_p", "train.max_nonfinite",
    "eval.problems", "eval.batch_size", "eval.seed", "reference.every", "reference.rate",
]  # fmt: skip
VALUES = ["-1000000000", "nothing", "[]", "{}", "~", ".nan", "''"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_broken_recipe_is_refused(text: str | bytes, tmp_path: Path) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (tmp_path / "r.yaml").write_bytes(data)
    refused(["train", "r.yaml", "--out", "run"], tmp_path)


OPTIONAL_EMPTY = [("eval.batch_size", "~")]  # empty: chosen by the program


@pytest.mark.parametrize(("key", "value"), [(k, v) for k in NUMBERS for v in VALUES if (k, v) not in OPTIONAL_EMPTY])
def test_a_number_out_of_its_range_is_refused_with_its_key(key: str, value: str, tmp_path: Path) -> None:
    line = refused(["train", "arithmetic", f"{key}={value}", "--out", "run"], tmp_path)
    assert key.split(".")[1] in line


@pytest.mark.parametrize(
    "key",
    [
        key for key in NUMBERS
        if key not in ("task.seed", "train.updates_per_batch", "train.seed", "eval.problems", "eval.seed")
    ],
)  # fmt: skip
def test_a_billion_as_a_size_is_refused(key: str, tmp_path: Path) -> None:
    assert key.split(".")[1] in refused(["train", "arithmetic", f"{key}=1000000000", "--out", "run"], tmp_path)


@pytest.mark.parametrize("override", ["", "=", "train", "train.=1", ".steps=1", "train.steps", "train.steps.x=1"])
def test_a_broken_override_is_refused(override: str, tmp_path: Path) -> None:
    refused(["train", "arithmetic", override, "--out", "run"], tmp_path)


ROW = json.dumps({"prompt": "2+2=", "answer": "4"}) + "\n"
DATA: dict[str, bytes] = {
    "empty": b"",
    "blank lines": b"\n\n \n",
    "not json": b"hello\n",
    "a list": b"[1, 2]\n",
    "a text": b'"prompt"\n',
    "null": b"null\n",
    "no prompt": b'{"question": "2+2="}\n',
    "no answer": b'{"prompt": "2+2="}\n',
    "prompt null": b'{"prompt": null, "answer": "4"}\n',
    "prompt list": b'{"prompt": ["a"], "answer": "4"}\n',
    "prompt blank": b'{"prompt": "  ", "answer": "4"}\n',
    "answer mapping": b'{"prompt": "a", "answer": {}}\n',
    "answer bool": b'{"prompt": "a", "answer": true}\n',
    "torn": (ROW * 30)[:-9].encode(),
    "gzip": gzip.compress(ROW.encode() * 30),
    "gzip of the wrong kind": b"\x1f\x8b" + ROW.encode() * 30,
    "pickle": pickle.dumps([{"prompt": "a", "answer": "b"}]),
    "bad utf-8": ROW.encode() * 30 + b'{"prompt": "\xff", "answer": "4"}\n',
    "utf-16": (ROW * 30).encode("utf-16"),
    "NUL": ROW.encode() * 30 + b"\x00\n",
    "deep": ROW.encode() * 30 + b"[" * 100_000 + b"\n",
    "long integer": ROW.encode() * 30 + b'{"prompt": "a", "answer": ' + b"9" * 10_000 + b"}\n",
    "lone surrogate": ROW.encode() * 30 + b'{"prompt": "\\ud800", "answer": "4"}\n',
    "lone surrogate in an answer": ROW.encode() * 30 + b'{"prompt": "a", "answer": "\\udfff"}\n',
    "lone surrogate elsewhere": ROW.encode() * 30 + b'{"prompt": "a", "answer": "4", "x": "\\udfff"}\n',
    "a key twice": ROW.encode() * 30 + b'{"prompt": "a", "prompt": "b", "answer": "4"}\n',
    "NaN": ROW.encode() * 30 + b'{"prompt": "a", "answer": NaN}\n',
    "one row": ROW.encode(),
    "huge line": ROW.encode() * 30 + b'{"prompt": "' + b"a" * 17_000_000 + b'", "answer": "4"}\n',
    "a BOM": b"\xef\xbb\xbf" + b'{"prompt": 4}\n',
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_a_broken_data_file_is_refused_with_its_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(data)
    task = "task={name: jsonl, path: data.jsonl}"
    assert "data.jsonl" in refused(["train", "arithmetic", task, *TINY_RUN, "--out", "run"], tmp_path)


def out_is_a_file(folder: Path) -> str:
    (folder / "run").write_text("precious")
    return "run"


def out_below_a_file(folder: Path) -> str:
    (folder / "file").write_text("precious")
    return "file/run"


def out_is_a_dangling_link(folder: Path) -> str:
    (folder / "run").symlink_to(folder / "nowhere")
    return "run"


def out_holds_a_link(folder: Path) -> str:
    (folder / "precious").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").symlink_to(folder / "precious")
    return "run"


def out_has_a_link_as_lock(folder: Path) -> str:
    (folder / "precious").write_text("precious")
    (folder / "run").mkdir()
    (folder / "run" / ".lock").symlink_to(folder / "precious")
    return "run"


def out_is_in_proc(folder: Path) -> str:
    return "/proc/run"  # read-only, for root too


def out_is_a_device(folder: Path) -> str:
    return "/dev/null"


def out_is_long(folder: Path) -> str:
    return "r" * 300


def out_is_full_of_others(folder: Path) -> str:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("precious")
    return "run"


@pytest.mark.parametrize(
    "make",
    [
        out_is_a_file, out_below_a_file, out_is_a_dangling_link, out_holds_a_link, out_has_a_link_as_lock,
        out_is_in_proc, out_is_a_device, out_is_long, out_is_full_of_others,
    ],
)  # fmt: skip
def test_a_run_folder_that_is_none_is_refused(make: Callable[[Path], str], tmp_path: Path) -> None:
    assert "--out" in refused(["train", "arithmetic", *TINY_RUN, "--out", make(tmp_path)], tmp_path)


def test_a_link_in_a_run_folder_is_refused_on_resume(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_from({"task": {"name": "arithmetic"}}).to_yaml())
    (run / "metrics.jsonl").symlink_to(tmp_path / "precious")
    line = refused(["train", "arithmetic", "--out", "run", "--resume"], tmp_path)
    assert "metrics.jsonl is a symbolic link" in line


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    [f"{group}.{name}" for group in ("train", "eval", "model", "reference") for name in
     Recipe.model_fields[group].annotation.model_fields] + ["task.seed", "objective.preset", "objective.region"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(key=keys, value=json_like)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key: str, value: object) -> None:
    group, name = key.split(".")
    data: dict[str, object] = {"task": {"name": "arithmetic"}}
    data[group] = {**(data[group] if group == "task" else {}), name: value}  # pyright: ignore[reportGeneralTypeIssues]
    try:
        recipe = recipe_from(data)
    except InputError:
        return
    assert recipe_from(parse_yaml(recipe.to_yaml(), "again")) == recipe


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=200) | st.text(alphabet="{}[]:,-&*!?|>'\"%@` \nabn~01", max_size=60))
def test_any_text_is_a_recipe_or_is_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        recipe_from(parse_yaml(text, "r.yaml"))
