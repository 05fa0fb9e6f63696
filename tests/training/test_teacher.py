"""Teachers: a model, a server and the policy behind a prefix give the losses that their formulas say."""

from __future__ import annotations

import json
import math
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed

from mirrorpo.config.train import TeacherSpec, recipe_from
from mirrorpo.errors import InputError
from mirrorpo.training import MirrorConfig, MirrorTrainer
from mirrorpo.training.setup import prepare
from mirrorpo.training.teacher import PAUSES, Server, TeacherError, check_teacher_model
from small_models import SIZES, VOCABULARY, small_folder
from trl_pair import TINY, dataset, loss_and_gradient, settings, trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model that has nothing in common with the policy but its tokenizer."""
    return small_folder(tmp_path_factory.mktemp("teacher"), LlamaConfig(**SIZES, max_position_embeddings=256))


def build(folder: Path, penalty: dict[str, Any], teacher: dict[str, Any], fast: str = "auto", **more: Any) -> Any:
    objective = {"preset": "opd", "penalties": [{"coefficient": 1.0, "anchor": "teacher", **penalty}]}
    args = MirrorConfig(**settings(folder, **more), objective=objective, teacher=teacher, fast=fast)
    built = trainer(MirrorTrainer, args)
    built.current_gradient_accumulation_steps = 1
    return built


def rollout(built: Any) -> dict[str, Any]:
    """A rollout batch as the trainer makes it; the same for the same model."""
    set_seed(3)
    built.model.train()
    return built._generate_and_score_completions([dict(row) for row in dataset(2) for _ in range(4)])


def test_a_local_teacher_gives_trls_generalised_jsd(teacher: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the experimental part of TRL announces itself
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    model = AutoModelForCausalLM.from_pretrained(teacher)
    for beta, divergence in ((0.0, "forward_kl"), (0.5, "js"), (1.0, "reverse_kl")):
        losses, gradients = [], []
        for fast in ("off", "auto"):
            built = build(tmp_path / fast, {"divergence": divergence, "estimator": "exact"}, {"path": teacher}, fast)
            inputs = rollout(built)
            loss, gradient = loss_and_gradient(built, inputs)
            losses.append(loss)
            gradients.append(gradient)
        assert built.packed.reason is None
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        keep = inputs["completion_ids"].shape[1]
        built.model.zero_grad()
        student = built.model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
        with torch.no_grad():
            wise = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1]
        labels = torch.where(inputs["completion_mask"].bool(), inputs["completion_ids"], -100)
        expected = GKDTrainer.generalized_jsd_loss(student, wise, labels=labels, beta=beta)
        expected.backward()
        truth = torch.cat([p.grad.reshape(-1) for p in built.model.parameters() if p.grad is not None])
        for loss, gradient, tolerance in zip(losses, gradients, (1e-6, 1e-5), strict=True):
            assert abs(loss - expected) <= tolerance * expected
            assert (gradient - truth).abs().max() <= tolerance * max(1.0, truth.abs().max())


PENALTIES: list[dict[str, Any]] = [
    {"divergence": "reverse_kl", "estimator": "score"},
    {"divergence": "prob_l2", "estimator": "score", "baseline": "exact"},
    {"divergence": "js", "estimator": "top_k", "k": 5, "support": "union"},
    {"divergence": "forward_kl", "estimator": "exact"},
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: f"{p['divergence']} {p['estimator']}")
def test_packed_and_padded_agree_behind_a_prefix_and_in_several_rows(
    penalty: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    found = []
    for fast, budget in (("off", None), ("auto", None), ("auto", 60)):
        who = {"path": teacher, "prefix": "Think."}
        built = build(tmp_path / f"{fast}{budget}", penalty, who, fast, token_budget=budget, temperature=0.7)
        inputs = rollout(built)
        found.append(loss_and_gradient(built, inputs))
        assert (built.packed.reason is None) == (fast == "auto")
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) <= 1e-5 * max(1.0, found[0][0].abs())
        assert (gradient - found[0][1]).abs().max() <= 2e-5 * max(1.0, found[0][1].abs().max())


@pytest.mark.parametrize("served", [False, True], ids=["a model", "a server"])
@pytest.mark.parametrize("fast", ["off", "auto"])
def test_two_micro_batches_add_up_to_one(fast: str, served: bool, teacher: str, tmp_path: Path) -> None:
    penalty: dict[str, Any] = {"divergence": "js", "estimator": "top_k", "k": 5}
    with serving(teacher, {}) if served else nullcontext(teacher) as who:
        built = build(tmp_path, penalty, {"url": who, "top_k": 5} if served else {"path": who}, fast)
        inputs = rollout(built)
    loss, gradient = loss_and_gradient(built, inputs)
    built.current_gradient_accumulation_steps = 2
    built.loss_computer.settings = replace(built.loss_computer.settings, steps_per_generation=2)
    parts = []
    for rows in (slice(0, 5), slice(5, None)):
        part = {name: x[rows] if isinstance(x, torch.Tensor) and x.dim() else x for name, x in inputs.items()}
        parts.append(loss_and_gradient(built, part))
    assert sum(part[0] for part in parts) == pytest.approx(loss.item(), rel=1e-5)
    both = parts[0][1] + parts[1][1]
    assert (both - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max())


def test_the_policy_behind_a_prefix_is_scored_as_it_would_speak_there(tmp_path: Path) -> None:
    built = build(tmp_path, {"divergence": "reverse_kl", "estimator": "score"}, {"prefix": "The answer is 42."})
    inputs = rollout(built)
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), built.model.eval()
    question = dataset(1)[0]["prompt"][0]["content"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"The answer is 42.\n\n{question}"}], add_generation_prompt=True
    )["input_ids"]
    completion = inputs["completion_ids"][0][inputs["completion_mask"][0].bool()].tolist()
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    expected = [logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
    got = inputs["teacher_per_token_logps"][0][: len(completion)].tolist()
    assert got == pytest.approx(expected, abs=1e-4)
    assert inputs["prompt_ids"].shape[1] < inputs["teacher_prompt_ids"].shape[1]


def test_reward_teacher_and_reference_in_one_loss(teacher: str, tmp_path: Path) -> None:
    penalties = [
        {"divergence": "reverse_kl", "coefficient": 0.1},
        {"divergence": "js", "coefficient": 0.5, "anchor": "teacher", "estimator": "exact"},
        {"divergence": "reverse_kl", "coefficient": 0.2, "anchor": "teacher", "placement": "advantage"},
    ]
    objective = {"preset": "dapo", "penalties": penalties}
    more = {"max_steps": 2, "steps_per_generation": 2, "learning_rate": 1e-3}
    args = MirrorConfig(**settings(tmp_path, **more), objective=objective, teacher={"path": teacher})
    built = trainer(MirrorTrainer, args)
    built.train()
    log = built.state.log_history[0]
    assert {"divergence/reverse_kl/mean", "divergence/js_teacher/mean"} <= set(log)
    assert log["divergence/js_teacher/mean"] > 0.1
    assert built.packed.reason is None


@pytest.mark.parametrize("fast", ["off", "auto"])
def test_a_teacher_whose_head_is_padded_further_teaches_as_without_its_padding(fast: str, tmp_path: Path) -> None:
    # Qwen2.5 pads one vocabulary to 151,936 rows in its small models and to 152,064 in its large ones.
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    wide.mkdir()
    narrow.mkdir()
    small_folder(wide, LlamaConfig(**{**SIZES, "vocab_size": VOCABULARY + 59}, max_position_embeddings=256))
    small_folder(narrow, LlamaConfig(**SIZES, max_position_embeddings=256))
    cut = AutoModelForCausalLM.from_pretrained(wide)
    cut.resize_token_embeddings(VOCABULARY)
    cut.save_pretrained(narrow)
    losses = []
    for folder in (wide, narrow):
        built = build(tmp_path / "run", {"divergence": "js", "estimator": "exact"}, {"path": str(folder)}, fast)
        losses.append(loss_and_gradient(built, rollout(built))[0])
    assert losses[0] == losses[1]


def test_a_teacher_with_fewer_rows_than_the_policy_is_refused_before_it_is_loaded(teacher: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(InputError, match=f"has {VOCABULARY} rows in its head and the policy 300") as caught:
        check_teacher_model(TeacherSpec(path=teacher), TINY, tokenizer, 300)
    assert "\n" not in str(caught.value)


# A server


@contextmanager
def serving(folder: str, behaviour: dict[str, Any]) -> Iterator[str]:
    """A server that answers as vLLM's does, on a free port of this machine; ``behaviour`` may change meanwhile."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def scored(row: list[int], k: int) -> list[Any]:
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        positions: list[Any] = [behaviour.get("first")]
        for t, token in enumerate(row[1:]):
            top = logps[t].topk(min(behaviour.get("entries", k), VOCABULARY))
            said = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) | {token: logps[t, token].item()}
            said = {number: behaviour.get("says", value) for number, value in said.items()}
            if "certain" in behaviour:
                said = {number: behaviour["certain"] if number == token else -40.0 for number in said}
            said = {number + behaviour.get("renames", 0): value for number, value in said.items()}
            positions.append({str(number): {"logprob": value, "rank": 1} for number, value in said.items()})
        return positions

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Nothing."""

        def answer(self, body: Any, status: int = 200) -> None:
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text) + behaviour.get("owes", 0)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            if behaviour.get("key") not in (None, self.headers["Authorization"]):
                self.answer({"error": "Unauthorized"}, 401)
            else:
                self.answer({"data": [{"id": "wise", "max_model_len": behaviour.get("context")}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour["requests"] = behaviour.get("requests", 0) + 1
            time.sleep(behaviour.get("sleeps", 0.0))
            if behaviour["requests"] > behaviour.get("fails_after", 10**9):
                self.answer({"error": "out of memory"}, 500)
            elif self.path == "/tokenize":
                ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                self.answer({"tokens": [number + behaviour.get("shift", 0) for number in ids]})
            else:
                rows = [scored(row, body["prompt_logprobs"]) for row in body["prompt"]]
                choices = [{"index": i, "prompt_logprobs": row} for i, row in enumerate(rows)]
                if behaviour.get("as_they_end"):
                    choices.reverse()
                self.answer(behaviour.get("instead", {"choices": choices, "error": None}))

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("penalty", "k"),
    [
        ({"divergence": "reverse_kl", "estimator": "score"}, 3),
        # All entries: then the bound is the divergence itself.
        ({"divergence": "js", "estimator": "top_k", "k": VOCABULARY}, VOCABULARY),
    ],
)
def test_a_server_gives_the_loss_of_the_model_that_it_holds(
    penalty: dict[str, Any], k: int, teacher: str, tmp_path: Path
) -> None:
    local = build(tmp_path / "local", penalty, {"path": teacher, "prefix": "Think."})
    with serving(teacher, {}) as url:
        built = build(tmp_path / "remote", penalty, {"url": url, "top_k": k, "prefix": "Think."})
        inputs = rollout(built)
    loss, gradient = loss_and_gradient(built, inputs)
    expected, truth = loss_and_gradient(local, rollout(local))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (gradient - truth).abs().max() <= 2e-4 * max(1.0, truth.abs().max())
    covered = built._metrics["train"]["teacher/covered/mean"][-1]
    assert covered == pytest.approx(1.0, abs=1e-4) if k == VOCABULARY else 0.0 < covered < 1.0


def spec(url: str, **more: Any) -> TeacherSpec:
    return TeacherSpec(url=url, **more)


def test_a_server_that_cannot_teach_is_refused_at_the_start(teacher: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(InputError, match=r"teacher\.url 'http://127\.0\.0\.1:9': .*refused"):
        Server(spec("http://127.0.0.1:9"), VOCABULARY)
    with (
        serving(teacher, {"entries": 2}) as url,
        pytest.raises(InputError, match=r"sends \d entries .*top_k asks for 5"),
    ):
        Server(spec(url, top_k=5), VOCABULARY)
    with serving(teacher, {}) as url, pytest.raises(InputError, match="no model other, only wise"):
        Server(spec(url, model="other"), VOCABULARY)
    with serving(teacher, {}) as url, pytest.raises(InputError, match="tokens beyond the policy's vocabulary of 100"):
        Server(spec(url), 100)
    with serving(teacher, {"shift": 1}) as url, pytest.raises(InputError, match="another tokenizer than the policy"):
        Server(spec(url), VOCABULARY).check_tokenizer(tokenizer)
    with serving(teacher, {}) as url, pytest.raises(InputError, match=r"temperature must be 1 with teacher\.url"):
        build(tmp_path, {"divergence": "reverse_kl", "estimator": "score"}, {"url": url}, temperature=0.7)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"says": math.nan}, "it sends nan as a log-probability"),
        ({"says": 0.7}, "it sends 0.7 as a log-probability"),
        ({"says": None}, "it sends None as a log-probability"),  # what is no number in JSON
        ({"says": "NaN"}, "it sends NaN as a log-probability"),
        # as vLLM does with --logprobs-mode raw_logits
        ({"says": -0.1}, "it sends no log-probabilities: their probabilities add up to 1[89]"),
        ({"instead": b"<html>502 Bad Gateway</html>"}, "answer to /v1/completions is not a JSON object: '<html>502"),
        ({"instead": [1, 2]}, "is not a JSON object"),
        ({"instead": {"error": {"message": "engine is dead"}}}, "it says: .*engine is dead"),
        ({"instead": {"choices": [{"prompt_logprobs": None}]}}, "sends no prompt_logprobs"),
        ({"owes": 9}, r"its answer breaks off \(IncompleteRead\)"),
        ({"key": "Bearer secret"}, "status 401: .*Unauthorized.*; its key is read from VLLM_API_KEY"),
        ({"renames": 400}, r"it does not send the log-probability of token \d+"),
        ({"sleeps": 0.5}, "timed out|no answer in time"),
    ],
    ids=[
        *("NaN", "above 0", "null", "a text", "logits", "a proxy's page", "a list", "an error with status 200"),
        *("an engine without them", "half an answer", "a key", "other tokens", "slow"),
    ],
)
def test_an_answer_that_is_none_is_refused_in_one_line(behaviour: dict[str, Any], message: str, teacher: str) -> None:
    with serving(teacher, behaviour) as url, pytest.raises(InputError, match=message) as caught:
        Server(spec(url, seconds=0.2), VOCABULARY)
    assert "\n" not in str(caught.value)
    assert url.removesuffix("/v1") in str(caught.value)


def test_a_log_probability_that_rounding_put_above_zero_counts_as_zero(teacher: str) -> None:
    with serving(teacher, {"certain": 5e-4}) as url:
        said = Server(spec(url), VOCABULARY).score(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long), 2)
    assert said.logp.tolist() == [[0.0, 0.0]]


def test_answers_belong_to_their_sequences_in_whatever_order_and_the_first_token_may_have_any_entry(
    teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
    found = []
    for behaviour in ({}, {"as_they_end": True, "first": {"5": {"logprob": None}}, "key": "Bearer secret"}):
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        with serving(teacher, behaviour) as url:
            found.append(Server(spec(url), VOCABULARY).score(ids, torch.ones_like(ids), 2).logp)
    assert found[0].tolist() == found[1].tolist()
    assert found[0][0].tolist() != found[0][1].tolist()


def test_a_token_that_the_teacher_never_says_has_no_probability_as_with_a_local_one(teacher: str) -> None:
    with serving(teacher, {"certain": -9999.0}) as url:  # what vLLM writes for -inf, which JSON has no number for
        said = Server(spec(url), VOCABULARY).score(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long), 2)
    assert said.logp.tolist() == [[-math.inf, -math.inf]]
    assert (said.entries.exp() <= 1.0).all()


def test_a_recipe_whose_sequences_the_server_does_not_take_is_refused_before_anything_is_written(teacher: str) -> None:
    with serving(teacher, {"context": 64}) as url:
        recipe = recipe_from(
            {"task": {"name": "arithmetic"}, "objective": "opd", "teacher": {"url": url, "prefix": "Think."}}
        )
        with pytest.raises(InputError, match=r"takes 64 tokens, .* is \d+: start it with --max-model-len"):
            prepare(recipe)
        server = Server(spec(url), VOCABULARY)
        server.check_length(63)
        with pytest.raises(InputError, match="takes 64 tokens"):
            server.check_length(64)


def test_a_server_that_fails_for_a_while_is_waited_for(teacher: str) -> None:
    behaviour: dict[str, Any] = {}
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            behaviour.pop("fails_after")

    with serving(teacher, behaviour) as url:
        server = Server(spec(url), VOCABULARY, pause)
        behaviour["fails_after"] = 0
        ids = torch.tensor([[5, 6, 7]])
        said = server.score(ids, torch.ones_like(ids), 2)
    assert waited == list(PAUSES[:2])
    assert said.logp.shape == (1, 2)
    assert (said.logp < 0).all()


def test_a_server_that_fails_for_good_ends_the_run_with_a_checkpoint(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirrorpo.training.teacher.PAUSES", (0.0, 0.0))
    behaviour: dict[str, Any] = {}
    with serving(teacher, behaviour) as url:
        penalty = {"divergence": "reverse_kl", "estimator": "score"}
        built = build(tmp_path, penalty, {"url": url}, max_steps=9, steps_per_generation=1)
        behaviour["fails_after"] = behaviour["requests"] + 2  # one request a step
        with pytest.raises(TeacherError, match=r"failed 3 times: status 500: .*out of memory"):
            built.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


# Refusals


def test_a_teacher_that_is_the_policy_or_reads_other_tokens_is_refused(teacher: str, tmp_path: Path) -> None:
    penalty = {"divergence": "reverse_kl", "estimator": "score"}
    with pytest.raises(InputError, match="is the policy itself"):
        build(tmp_path, penalty, {"path": "builtin:tiny"})
    copied = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(TINY).save_pretrained(copied)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(copied)
    with pytest.raises(InputError, match="has the policy's weights"):
        build(tmp_path, penalty, {"path": str(copied)})
    other = AutoTokenizer.from_pretrained(teacher)
    other.add_tokens(["<think>"])
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"has 262 tokens, the policy 261"):
        build(tmp_path, penalty, {"path": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("objective", "teacher", "message"),
    [
        ("opd", None, "give teacher, a mapping with path, url or prefix"),
        ("opd", {}, "needs path, url, or a prefix"),
        ("opd", {"path": "x", "url": "http://x"}, "path and url are two teachers"),
        ("opd", {"path": "x", "top_k": 3}, "top_k has no effect without url"),
        ("opd", {"url": "localhost:8000"}, "teacher"),
        ({"preset": "opd", "estimator": "exact"}, {"url": "http://x"}, "a server sends top_k entries"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(objective: Any, teacher: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        recipe_from({"task": {"name": "arithmetic"}, "objective": objective, "teacher": teacher})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("teacher", [{"path": "x"}, {"prefix": "y"}, {"url": "http://x", "top_k": 5}])
def test_a_resolved_recipe_with_a_teacher_reads_back_as_the_same(teacher: dict[str, Any]) -> None:
    recipe = recipe_from({"task": {"name": "arithmetic"}, "objective": "opd", "teacher": teacher})
    assert recipe_from(recipe.model_dump(mode="json")) == recipe


def test_a_recipe_whose_teacher_is_not_there_is_refused_before_anything_is_written() -> None:
    for teacher, message in (({"url": "http://127.0.0.1:9"}, "refused"), ({"path": "builtin:tiny"}, "policy itself")):
        recipe = recipe_from({"task": {"name": "arithmetic"}, "objective": "opd", "teacher": teacher})
        with pytest.raises(InputError, match=message):
            prepare(recipe)


def test_a_teacher_that_the_objective_does_not_look_at_is_named_and_not_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = MirrorConfig(**settings(tmp_path), objective="dapo", teacher={"path": "nowhere"})
    with caplog.at_level("WARNING", logger="mirrorpo.training.trainer"):
        built = trainer(MirrorTrainer, args)
    assert built.teacher is None
    assert "teacher has no effect: objective 'dapo' has no penalty toward it" in caplog.text


def test_a_model_that_is_sharded_learns_from_a_server_only(teacher: str, tmp_path: Path) -> None:
    built = build(tmp_path, {"divergence": "reverse_kl", "estimator": "score"}, {"path": teacher})
    built.accelerator.state.distributed_type = DistributedType.FSDP
    try:
        for who in ({"path": teacher}, {"prefix": "Think."}):
            with pytest.raises(ValueError, match=r"need a model that is not sharded\. Legal: teacher\.url"):
                built._load_teacher(TeacherSpec(**who))
        with serving(teacher, {}) as url:
            assert built._load_teacher(spec(url)).server is not None
    finally:
        built.accelerator.state.distributed_type = DistributedType.NO
