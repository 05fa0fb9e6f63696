"""Measures of trained policies: exact distances by enumeration, common problems, registered plans."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mirrorpo.config.measure import MeasureSpec
from mirrorpo.config.study import Study, load_study
from mirrorpo.config.train import Recipe, recipe_from
from mirrorpo.errors import InputError
from mirrorpo.evaluation.summary import Evaluation, Sample
from mirrorpo.models import builtin_path
from mirrorpo.reports.conclusions import conclude_study
from mirrorpo.reports.study_page import write_study_report
from mirrorpo.reports.tables import runs_csv
from mirrorpo.studies import job
from mirrorpo.studies.collection import read_run
from mirrorpo.studies.compare import compare
from mirrorpo.studies.gather import study_collection
from mirrorpo.studies.job import Response, check_measured, distances, measure_job, measure_run, measure_study, run_job
from mirrorpo.studies.runner import grown_from, open_study
from mirrorpo.workers import Done, Job
from test_study_run import BASE, SILENT, Here, go, plan

END, VOCABULARY, LONGEST = 0, 4, 3


class Chain(torch.nn.Module):
    """A language model whose next token depends on the last two alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=random))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        before = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, :-1]], 1)
        return SimpleNamespace(logits=self.table[before, input_ids])

    def probability(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        whole, logp = (0, *prompt, *tokens), self.table.detach().double().log_softmax(-1)
        places = range(len(prompt) + 1, len(whole))
        return math.exp(sum(float(logp[whole[n - 2], whole[n - 1], whole[n]]) for n in places))


def responses() -> list[tuple[int, ...]]:
    """All that end, or are as long as allowed."""
    ended = [(*t, END) for n in range(LONGEST) for t in itertools.product(range(1, VOCABULARY), repeat=n)]
    return ended + list(itertools.product(range(1, VOCABULARY), repeat=LONGEST))


def test_the_distance_of_responses_is_the_divergence_of_their_distributions_by_enumeration() -> None:
    policy, start, prompt, spec = Chain(1), Chain(2), (3, 1), MeasureSpec()
    p = {r: policy.probability(prompt, r) for r in responses()}
    q = {r: start.probability(prompt, r) for r in responses()}
    assert sum(p.values()) == pytest.approx(1.0) == pytest.approx(sum(q.values()))
    measured = {r: distances(policy, start, [Response(prompt=prompt, tokens=r)], spec) for r in responses()}
    reverse = sum(p[r] * measured[r]["reverse_kl_sum"] for r in p)
    forward = sum(q[r] * measured[r]["forward_kl_sum"] for r in q)
    assert reverse == pytest.approx(sum(p[r] * math.log(p[r] / q[r]) for r in p), rel=1e-5)
    assert forward == pytest.approx(sum(q[r] * math.log(q[r] / p[r]) for r in p), rel=1e-5)


def test_padding_and_batches_change_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, start, spec = Chain(1), Chain(2), MeasureSpec(distances=["reverse_kl", {"name": "alpha", "alpha": 0.5}])
    asked = [Response(prompt=(1, 2, 3)[: 1 + n % 3], tokens=tokens) for n, tokens in enumerate(responses())]
    one = [distances(policy, start, [response], spec) for response in asked]
    at_once = distances(policy, start, asked, spec)
    monkeypatch.setattr("mirrorpo.studies.job._LOGITS_AT_ONCE", 100)
    by_parts = distances(policy, start, asked, spec)
    tokens = sum(len(response.tokens) for response in asked)
    for name in ("reverse_kl", "alpha_0.5"):
        total = sum(found[f"{name}_sum"] for found in one)
        for found in (at_once, by_parts):
            assert found[f"{name}_sum"] == pytest.approx(total / len(asked), rel=1e-6)
            assert found[name] == pytest.approx(total / tokens, rel=1e-6)


def test_different_right_texts_are_counted_once_and_wrong_ones_never() -> None:
    def sample(problem: int, text: str, reward: float | None) -> Sample:
        return Sample(
            problem=problem, prompt="", completion=text, answer="", num_tokens=1, reward=reward, reason="match"
        )

    drawn = [("a", 1.0), ("a ", 1.0), ("b", 1.0), ("c", 0.0)], [("a", 0.0)] * 4, [("a", 1.0)] * 3 + [("b", None)]
    samples = tuple(sample(n, *one) for n, group in enumerate(drawn) for one in group)
    assert Evaluation(samples=samples, samples_per_problem=4).distinct_right() == (2 + 0) / 2  # the last is not scored


EASY = {"name": "arithmetic", "difficulty": "easy"}


def folder_of(path: Path, noise: float) -> tuple[Recipe, Path]:
    """A run folder with the embedded model, moved a little."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny"))
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += noise * weights.std() * torch.randn_like(weights) if weights.dim() > 1 else 0.0
    model.save_pretrained(path / "model")
    return recipe_from(BASE), path


def test_a_policy_that_did_not_move_has_the_numbers_of_its_start_and_no_distance(tmp_path: Path) -> None:
    spec = MeasureSpec.model_validate(
        {
            "problems": 8,
            "pass_at": [1, 2, 4],
            "responses": 12,
            "distances": ["reverse_kl", "chi2"],
            "tasks": {"easy": EASY},
        }
    )
    found = measure_run(*folder_of(tmp_path, 0.0), spec)
    assert json.loads((tmp_path / "measures.json").read_text())["measures"] == found
    for task in ("trained", "easy"):
        for name in ("accuracy", "pass@2", "pass@4", "distinct_right", "length"):
            assert found[f"{task}.policy.{name}"] == found[f"{task}.start.{name}"]
        assert found[f"{task}.policy.accuracy"] <= found[f"{task}.policy.pass@2"] <= found[f"{task}.policy.pass@4"]
        assert [found[f"{task}.{source}.reverse_kl"] for source in ("policy", "start")] == [0.0, 0.0]


def test_the_start_draws_once_for_all_runs_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = folder_of(tmp_path, 0.01)
    lengths: list[int] = []

    def counting(recipe: Recipe, model: Any, *args: Any) -> Any:
        lengths.append(recipe.train.max_completion_length)
        return draw(recipe, model, *args)

    draw = job._draw
    monkeypatch.setattr(job, "_draw", counting)
    monkeypatch.setattr(job, "_DRAWN", {})
    spec = MeasureSpec(problems=2, responses=2)
    for preset, seed, length in (("grpo", 1, 24), ("cispo", 2, 24), ("cispo", 2, 25)):
        train = {**BASE["train"], "seed": seed, "max_completion_length": length}
        measure_run(recipe_from(BASE | {"objective": {"preset": preset}, "train": train}), folder, spec)
    assert lengths == [24, 24, 24, 25, 25]  # start and policy, policy alone, and another length


def test_a_response_that_begins_as_told_is_graded_with_its_beginning(tmp_path: Path) -> None:
    spec = {"problems": 48, "responses": 8, "tasks": {"easy": EASY, "free": EASY}}
    recipe, folder = folder_of(tmp_path, 0.02)
    found = measure_run(recipe, folder, MeasureSpec.model_validate(spec | {"begin": {"easy": "{prompt[0]}"}}))
    # The embedded model answers half of the problems without working them out, wrongly; a worked answer begins with the
    # problem itself.
    assert found["easy.start.accuracy"] > 0.9 > 0.7 > found["free.start.accuracy"]
    assert (
        0
        < found["easy.policy.reverse_kl"]
        == pytest.approx(found["easy.policy.reverse_kl_sum"] / found["easy.policy.length"], rel=0.2)
    )
    with pytest.raises(InputError, match=r"measure\.begin: '\{question\}' does not fit a row of the task 'arithmetic'"):
        check_measured(recipe, MeasureSpec.model_validate(spec | {"begin": {"easy": "{question}"}}))
    with pytest.raises(InputError, match=r"measure\.problems: task 'easy' has 512 test problems, got 700"):
        check_measured(
            recipe_from(BASE | {"task": {"name": "arithmetic", "test_size": 1000}}),
            MeasureSpec.model_validate(spec | {"problems": 700}),
        )


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        ({"pass_at": [8], "samples": 4}, "pass_at must be at most samples = 4, got 8"),
        ({"problems": 4, "responses": 9}, "responses must be at most problems"),
        ({"distances": ["reverse_kl", "reverse_kl"]}, "duplicate divergence 'reverse_kl'"),
        ({"distances": ["revers_kl"]}, "reverse_kl"),
        ({"distances": [{"name": "alpha"}]}, "alpha"),
        ({"tasks": {"trained": EASY}}, "not 'trained'"),
        ({"tasks": {"A/../b": EASY}}, "lower-case"),
        ({"begin": {"esy": "x"}}, "esy"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_a_measure_that_cannot_be_taken_is_refused_in_one_line(measure: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match="measure") as refused:
        plan(measure=measure)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_samples_default_to_the_largest_k() -> None:
    assert MeasureSpec.model_validate({"pass_at": [1, 16]}).samples == 16


def study_with(tmp_path: Path, **more: Any) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, "arms": ["dr_grpo"], "seeds": [0], **more}))
    return load_study(path)


class Measuring(Here):
    """A pool that measures in this process."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        for one in jobs:
            self.keys.append(one.key)
            yield Done(job=one, result=measure_job(one.payload), seconds=1.0)


FEW = {"problems": 4, "responses": 4}


def test_a_run_is_measured_before_its_model_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(recipe: Recipe, folder: Path, **_: Any) -> dict[str, Any]:
        folder_of(folder, 0.01)
        return {"seconds": 1.0, "accuracy_after": 0.5}

    monkeypatch.setattr("mirrorpo.training.run.train", trained)
    payload = {
        "recipe": plan().jobs()[0].recipe.model_dump(mode="json"), "folder": str(tmp_path / "a"), "threads": 1,
        "keep_models": False, "measure_divergence": False, "measure": FEW, "command": "",
    }  # fmt: skip
    assert run_job(payload)["status"] == "finished"
    assert json.loads((tmp_path / "a/measures.json").read_text())["measures"]["trained.policy.reverse_kl"] > 0
    assert not (tmp_path / "a/model").exists()


def test_runs_that_are_there_are_measured_on_resume_once_and_only_with_their_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(out, Here(), study=study_with(tmp_path))
    folder_of(out / "runs/dr_grpo/seed0", 0.01)

    def measured(pool: Here, measure: Any) -> list[str]:
        study = grown_from(study_with(tmp_path, measure=measure), out, True)
        with open_study(study, out, True, "") as record:
            return measure_study(study, out, record, pool, SILENT)

    first, second = Measuring(), Measuring()
    assert (measured(first, FEW), measured(second, FEW)) == ([], [])
    assert (first.keys, second.keys) == (["dr_grpo/seed0"], [])
    run = study_collection(out).runs[0]
    (row,) = csv.DictReader(runs_csv(study_collection(out)).splitlines())
    assert {name: float(row[name]) for name in run.measures} == dict(run.measures)
    shutil.rmtree(run.folder / "model")
    assert measured(Measuring(), {"problems": 3, "responses": 3}) == [
        "dr_grpo/seed0: not measured, its model was not kept (keep_models)"
    ]


def test_measures_that_no_study_wrote_are_refused(tmp_path: Path) -> None:
    go(tmp_path, Here(), study=study_with(tmp_path / ".."))
    folder = tmp_path / "runs/dr_grpo/seed0"
    for measures in ([], {"trained.policy.x": "high"}, {"=cmd()": 1.0}):
        (folder / "measures.json").write_text(json.dumps({"measures": measures}))
        with pytest.raises(InputError, match=r"measures\.json"):
            read_run(folder)


def test_a_registered_plan_stands_in_the_report_with_its_hash_and_its_changes(tmp_path: Path) -> None:
    page = tmp_path / "plan.md"
    with pytest.raises(InputError, match=r"plan: no file 'plan.md', from the working folder or beside the study file "):
        study_with(tmp_path, plan="plan.md")
    page.write_text("a hypothesis")
    out = tmp_path / "out"
    go(out, Here(), study=study_with(tmp_path, plan="plan.md"))
    digest = hashlib.sha256(b"a hypothesis").hexdigest()
    notes = " ".join(study_collection(out).notes)
    assert f"The plan is plan.md, sha256 {digest[:16]}, in no commit when the first run began." in notes
    assert "changed" not in notes
    page.write_text("what we found, of course")
    for _ in range(2):
        go(out, Here(), resume=True, study=study_with(tmp_path, plan="plan.md", seeds=[0, 1]))
    later = hashlib.sha256(b"what we found, of course").hexdigest()
    assert f"The plan was changed after the first run: sha256 {later[:16]}." in " ".join(study_collection(out).notes)


def test_a_plan_that_is_named_after_the_first_run_is_none(tmp_path: Path) -> None:
    (tmp_path / "plan.md").write_text("what came out")
    out = tmp_path / "study"
    go(out, Here(), study=study_with(tmp_path))
    with pytest.raises(InputError, match=r"^plan: the study in the folder began without one"):
        go(out, Here(), resume=True, study=study_with(tmp_path, plan="plan.md"))
    assert not [note for note in study_collection(out).notes if "plan" in note]


def test_the_commit_of_a_plan_is_known_only_while_it_is_as_committed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "plan.md").write_text("a")
    assert study_with(tmp_path, plan="plan.md").plan.commit is None  # pyright: ignore[reportOptionalMemberAccess]
    git("add", "plan.md")
    git("commit", "-qm", "plan")
    assert study_with(tmp_path, plan="plan.md").plan.commit == git("rev-parse", "HEAD")  # pyright: ignore[reportOptionalMemberAccess]
    (tmp_path / "plan.md").write_text("b")
    assert study_with(tmp_path, plan="plan.md").plan.commit is None  # pyright: ignore[reportOptionalMemberAccess]


def curves_study(tmp_path: Path, **matched: Any) -> Path:
    """Two curves of three arms and a shared one, six seeds; `high` lies 0.1 above `low` at the same distance.

    The distances of `high` are twice those of `low`, so that its arms have more than that difference between them.
    """
    settings = {"reference": "low", "curves": {"low": "low_*", "high": "high_*"}, "shared": ["none"], **matched}
    arms = {"none": {}} | {f"{name}_{n}": {"train.steps": 3 + n} for name in ("low", "high") for n in (1, 2, 4)}
    data = {"base": BASE, "arms": arms, "seeds": list(range(6)), "baseline": "none", "matched": settings}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data))
    out = tmp_path / "out"
    go(out, Here(), study=load_study(tmp_path / "study.yaml"))
    for folder in out.glob("runs/*/seed*"):
        curve, _, step = folder.parent.name.partition("_")
        x = math.log(0.1 * int(step)) if step else math.log(0.8)
        x += math.log(2.0) if curve == "high" else 0.0
        height = 0.5 + 0.1 * x + (0.1 if curve == "high" else 0.0) + 0.001 * int(folder.name[4:])
        measures = {"trained.policy.reverse_kl_sum": math.exp(x), "easy.policy.pass@4": height}
        (folder / "measures.json").write_text(json.dumps({"measures": measures}))
    return out


def test_curves_are_compared_where_they_went_equally_far(tmp_path: Path) -> None:
    out = curves_study(tmp_path, value="easy.policy.pass@4")
    found = compare(study_collection(out)).matched
    assert found is not None
    # Both are straight, with the shared arm on the line of `low`. `high` stays 0.1 above until its last arm, as
    # far as `none`: the two are one point at mean height, 0.05 above. Common range: 0.2 to 0.8 nats, in logarithms
    # half of it at 0.1, and half falling from 0.1 to 0.05.
    expected = 0.5 * 0.1 + 0.5 * (0.1 + 0.05) / 2
    assert found.heights["high"].mean.estimate == pytest.approx(expected)
    assert found.heights["high"].p_holm == pytest.approx(2 / 2**6)
    assert found.left_out == {}
    page, text = (path.read_text() for path in write_study_report(study_collection(out), out)[:2])
    assert "Curves at matched distance" in page
    assert "high above low" in text
    assert "easy pass@4" in text


def test_curves_without_a_common_range_are_left_out_and_counted(tmp_path: Path) -> None:
    out = curves_study(tmp_path, curves={"low": ["low_1", "low_2"], "high": ["high_4"]}, shared=["none"])
    for folder in out.glob("runs/none/seed*"):
        (folder / "measures.json").write_text(json.dumps({"measures": {"trained.policy.reverse_kl_sum": 0.8}}))
    found = compare(study_collection(out)).matched
    assert found is not None
    assert (found.heights, found.left_out) == ({}, {"high": 6})
    conclusion = conclude_study(study_collection(out), compare(study_collection(out)))
    assert "At matched distance" not in dict(conclusion.paragraphs)


@pytest.mark.parametrize(
    ("matched", "said"),
    [
        ({"reference": "lo"}, "reference: unknown curve 'lo'"),
        ({"curves": {"low": "low_*", "high": ["high_3"]}}, "curves.high: unknown arm 'high_3'"),
        ({"curves": {"low": "low_*", "high": "hi-*"}, "shared": []}, "curves.high: must have at least 2 arms"),
        ({"shared": ["nothing"]}, "shared: unknown arm 'nothing'"),
        ({"curves": {"low": "low_*"}}, "curves"),
    ],
)
def test_curves_that_no_arm_has_are_refused(tmp_path: Path, matched: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match="matched") as refused:
        curves_study(tmp_path, **matched)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
