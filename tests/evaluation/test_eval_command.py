"""``mirrorpo eval``: killed and resumed, greedy and sampled, with vLLM's interface, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_cli import refused, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirrorpo.evaluation.sampling import Sampler, TransformersEngine

ARGUMENTS = (
    "eval", "builtin:tiny", "--task", "arithmetic", "--samples", "2", "-k", "1,2",
    "eval.problems=10", "eval.batch_size=6", "train.max_completion_length=30",
)  # fmt: skip
TIMES = ("seconds", "generation_seconds", "tokens_per_second")


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in TIMES}


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody stopped."""
    out = tmp_path_factory.mktemp("eval") / "whole"
    run(*ARGUMENTS, "--out", str(out))
    return out


def test_a_folder_holds_settings_samples_and_summary(whole: Path) -> None:
    settings, summary = (json.loads((whole / name).read_text()) for name in ("evaluation.json", "summary.json"))
    assert (settings["samples"], settings["batch_size"], settings["engine"]) == (2, 6, "transformers")
    samples = samples_of(whole)
    assert [(s["problem"], s["sample"]) for s in samples] == [(i, j) for i in range(10) for j in range(2)]
    assert summary["tokens"] == sum(s["num_tokens"] for s in samples)
    assert summary["tokens_per_second"] > 0
    right = [sum(s["reward"] for s in samples[2 * i : 2 * i + 2]) for i in range(10)]
    assert summary["pass@1"] == pytest.approx(sum(right) / 20)
    assert summary["pass@2"] == sum(r > 0 for r in right) / 10


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(("batches", "torn"), [(0, 0), (1, 0), (2, 1), (2, 4), (3, 2)])
def test_a_killed_evaluation_goes_on_without_repeating_and_ends_the_same(
    batches: int, torn: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, complete, calls = tmp_path / "killed", TransformersEngine.complete, []

    def counted(self: Any, prompts: Any, *rest: Any) -> Any:
        if len(calls) == batches:
            raise KilledError
        calls.append(len(prompts))
        return complete(self, prompts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "complete", counted)
        run(*ARGUMENTS, "--out", str(out), status=1)
    path = out / "samples.jsonl"
    if torn:  # a kill in the middle of a write: some lines of the next batch, and half of one
        lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[: 6 * batches + torn - 1], lines[6 * batches + torn - 1][:30]]))
    assert not (out / "summary.json").exists()

    there = len(path.read_bytes().splitlines()) // 6 * 6 if path.exists() else 0
    calls.clear()
    batches = 99
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "complete", counted)
        done = run(*ARGUMENTS, "--out", str(out), "--resume", "--json")
    assert samples_of(out) == samples_of(whole)
    assert without_times(json.loads(done.stdout)) == without_times(json.loads((whole / "summary.json").read_text()))
    assert sum(calls) == 20 - there, "no whole batch is generated twice"


def test_a_resumed_evaluation_keeps_the_batches_that_it_began_with(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "begun"
    out.mkdir()
    shutil.copy(whole / "evaluation.json", out)
    lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(b"".join(lines[:8]))
    run(*(text for text in ARGUMENTS if not text.startswith("eval.batch_size")), "--out", str(out), "--resume")
    assert samples_of(out) == samples_of(whole)
    assert (out / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


def test_a_finished_evaluation_is_read_not_repeated_and_other_k_may_be_asked(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(TransformersEngine, "complete")
    done = run(*ARGUMENTS[:6], "-k", "2", *ARGUMENTS[8:], "--out", str(whole), "--resume", "--json")
    assert json.loads(done.stdout)["tokens"] == sum(s["num_tokens"] for s in samples_of(whole))


def test_greedy_takes_the_most_likely_token(tmp_path: Path) -> None:
    arguments = ("eval", "builtin:tiny", "--task", "arithmetic", "eval.problems=4", "train.max_completion_length=30")
    first = json.loads(run(*arguments, "--greedy", "--json").stdout)
    assert first["temperature"] == 0.0
    text = run(*arguments, "eval.temperature=0").stdout
    assert "greedy" in text
    assert f"pass@1   {first['pass@1']:.4f}" in text
    assert "truncated 0.0 %" in text
    assert "samples must be 1 with temperature 0" in refused(*arguments, "--greedy", "--samples", "2")


def test_both_public_tasks_are_evaluated_on_real_rows() -> None:
    from rewards.data import GSM8K, MBPP, rows_of

    for path, name in ((GSM8K, "gsm8k"), (MBPP, "mbpp")):
        rows_of(path)
        done = run(
            "eval", "builtin:tiny", f"task.path={path}", "eval.problems=3", "train.max_completion_length=12",
            "--task", name, "--samples", "2", "-k", "1,2", "--json",
        )  # fmt: skip
        result = json.loads(done.stdout)
        assert result["problems"] == 3
        assert sum(result["verdicts"].values()) == sum(result["reasons"].values()) == 6
        assert result["accuracy"] == 0.0


def test_the_adapter_of_a_run_is_evaluated_on_top_of_its_model(tmp_path: Path) -> None:
    out, few = tmp_path / "run", ("eval.problems=4", "train.max_completion_length=8")
    run(
        "train", "arithmetic", "model.lora={r: 2}", "train.steps=1", "train.prompts_per_step=2", "train.group_size=2",
        *few, "--out", str(out),
    )  # fmt: skip
    arguments = ("eval", str(out / "model"), *few, "--task", "arithmetic")
    assert json.loads(run(*arguments, "--json").stdout)["problems"] == 4
    assert "holds an adapter; merge it" in refused(*arguments, "--engine", "vllm")


class SamplingParams(SimpleNamespace):
    """The keywords of vLLM's class that are in its documentation; any other is an error."""

    def __init__(
        self, *, n: int = 1, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0,
        seed: int | None = None, stop: Any = None, stop_token_ids: Any = None, max_tokens: int | None = 16,
        detokenize: bool = True, skip_special_tokens: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
        assert n == 1


class LLM:
    """vLLM's offline class as its documentation has it, around a model of transformers."""

    made: list[LLM] = []  # noqa: RUF012  (a record for the test)

    def __init__(
        self, model: str, *, dtype: str = "auto", seed: int = 0, max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9, tensor_parallel_size: int = 1,
    ) -> None:  # fmt: skip
        self.max_model_len, self.seeds = max_model_len, []
        weights = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.engine = TransformersEngine(weights, AutoTokenizer.from_pretrained(model))
        LLM.made.append(self)

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[Any]:
        assert len(prompts) == len(sampling_params)
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert set(prompt) == {"prompt_token_ids"}
            assert self.max_model_len is not None
            assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.max_model_len
            self.seeds.append(params.seed)
            sampler = Sampler(
                temperature=params.temperature, top_p=params.top_p, max_completion_length=params.max_tokens
            )
            (done,) = self.engine.complete([prompt["prompt_token_ids"]], [params.seed], sampler)
            reason = "length" if done.truncated else "stop"
            completion = SimpleNamespace(index=0, text="", token_ids=tuple(done.tokens), finish_reason=reason)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[completion]))
        return outputs


def test_vllm_gets_token_ids_and_a_seed_for_every_sample(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "vllm", module)
    out = tmp_path / "vllm"
    result = json.loads(run(*ARGUMENTS, "--engine", "vllm", "--out", str(out), "--json").stdout)
    assert result["engine"] == "vllm"
    # The stand-in draws as transformers does, so the whole way there and back must give the same samples.
    assert samples_of(out) == samples_of(whole)
    assert len(set(LLM.made[-1].seeds)) == 20
    assert "engine is 'transformers'" in refused(*ARGUMENTS, "--out", str(out), "--resume")


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--engine", "vlm"], "--engine vlm: must be transformers or vllm"),
        (["--engine", "vllm", "--out", "x"], "needs the extra 'vllm': pip install 'mirrorpo[vllm]'"),
        (["--resume"], "--resume: needs --out"),
        (["--resume", "--out", "x"], "x holds no evaluation"),
        (["eval.problems=0", "--out", "x"], "eval.problems: must be at least 1"),
        (["model.path=./absent", "--out", "x"], "model.path './absent'"),
        (["-k", "3"], "k must be at most the number of samples, 2"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_leaves_nothing(
    arguments: list[str], piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert piece in refused(*ARGUMENTS, *arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(whole: Path, tmp_path: Path) -> None:
    assert "already holds an evaluation" in refused(*ARGUMENTS, "--out", str(whole))
    assert "--resume: seed is 5, the evaluation in" in refused(
        *ARGUMENTS, "eval.seed=5", "--out", str(whole), "--resume"
    )
    (tmp_path / "notes.txt").write_text("precious")
    assert "is not empty and holds no evaluation" in refused(*ARGUMENTS, "--out", str(tmp_path))
    assert "is a file" in refused(*ARGUMENTS, "--out", str(tmp_path / "notes.txt"))


def test_an_edited_sample_is_named_by_its_line(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "samples.jsonl").read_text().splitlines()
    (tmp_path / "evaluation.json").write_text((whole / "evaluation.json").read_text())
    (tmp_path / "samples.jsonl").write_text("\n".join([lines[0], '{"problem": 1}', *lines[2:]]) + "\n")
    assert "samples.jsonl: line 2: is not a sample" in refused(*ARGUMENTS, "--out", str(tmp_path), "--resume")
