"""Teachers: another model, a server, or the policy itself behind a prefix, that scores what the policy drew.

A local teacher is scored as the reference is: from packed rows where that is possible, its hidden states read again
where a penalty needs the whole next-token distribution. A server (vLLM's OpenAI-compatible one) sends the K likeliest
tokens of every position and the sampled one; it is asked once for each rollout batch, and again with longer and longer
pauses when it fails. A prefix stands before the first message of the prompt, for the teacher alone: with no model and
no server the policy teaches itself what it would say if it had read the prefix.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from mirrorpo._checks import LOGP_TOLERANCE
from mirrorpo.config.train import TeacherSpec
from mirrorpo.errors import InputError, RunError
from mirrorpo.losses.objective import Objective
from mirrorpo.models import resolve_model
from mirrorpo.models import tokenizer as tokenizers
from mirrorpo.models.folder import check_model_folder, loading
from mirrorpo.models.generation import causal_part
from mirrorpo.training.scoring import gather_ids, read_by_teacher

# Sequences in a request, and requests at once.
_SEQUENCES, _REQUESTS = 16, 4
# What rounding in 16 bits may add to the mass of K entries.
_MASS = 0.05
# What vLLM writes for minus infinity, which JSON has no number for.
_NEVER = -9999.0
# Pauses between attempts, in seconds.
PAUSES = (1.0, 2.0, 4.0, 8.0)
_SAMPLE = "Question: 12 + 30 = 42?\nYes, na\u00efve fa\u00e7ade \u2014 \u4f60\u597d"


class _RefusedError(OSError):
    """An answer that is an error.

    Args:
        code: HTTP's.
        text: what the server said.
    """

    def __init__(self, code: int, text: str) -> None:
        hint = "; its key is read from VLLM_API_KEY" if code == 401 else ""
        super().__init__(f"status {code}: {text[:160]}{hint}")
        self.final = code < 500 and code != 429


class TeacherError(RunError):
    """A teacher's server does not answer any more; what was trained is kept."""


def behind(prefix: str, prompts: Sequence[Any]) -> list[Any]:
    """Prompts, texts or lists of messages, with a prefix before their first words.

    Example:
        >>> behind("Be brief.", ["Why?", [{"role": "user", "content": "Why?"}]])
        ['Be brief.\\n\\nWhy?', [{'role': 'user', 'content': 'Be brief.\\n\\nWhy?'}]]
    """

    def one(prompt: Any) -> Any:
        if isinstance(prompt, str):
            return f"{prefix}\n\n{prompt}"
        first, *others = prompt
        return [{**first, "content": f"{prefix}\n\n{first['content']}"}, *others]

    return [one(prompt) for prompt in prompts]


def check_vocabulary(teacher: Any, policy: Any, what: str) -> None:
    """Raises ``InputError`` for two tokenizers with other tokens; names the first difference."""
    theirs, ours = teacher.get_vocab(), policy.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            raise InputError(
                f"{what} has another vocabulary than the policy: token {token!r} is {number} for the policy and "
                f"{theirs.get(token, 'none')} for the teacher. Both must have the same tokenizer"
            )
    if len(theirs) != len(ours):
        raise InputError(f"{what} has {len(theirs)} tokens, the policy {len(ours)}: both must have the same tokenizer")


def check_teacher_model(spec: TeacherSpec, policy: str, tokenizer: Any, rows: int) -> str:
    """The path of a local teacher, its files and its vocabulary checked; nothing is loaded.

    Args:
        spec: with a path.
        policy: the path or hub name of the policy.
        tokenizer: the policy's.
        rows: of the policy's head: its tokens, and what pads them.

    Raises:
        InputError: no such model, another vocabulary, fewer rows, the teacher is the policy.
    """
    assert spec.path is not None
    what, path = f"teacher.path {spec.path!r}", resolve_model(spec.path)
    check_model_folder(path, "teacher.path")
    if spec.prefix is None and path == resolve_model(policy):
        raise InputError(f"{what} is the policy itself: its divergence would be 0. Give another model, or a prefix")
    try:
        check_vocabulary(tokenizers.load(path), tokenizer, what)
        theirs = AutoConfig.from_pretrained(path, **loading()).get_text_config().vocab_size
        if theirs < rows:
            raise InputError(
                f"{what} has {theirs} rows in its head and the policy {rows}: it has no probability for the others. "
                "Give a teacher with as many"
            )
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}") from error
    return path


def load_teacher(
    spec: TeacherSpec, policy: nn.Module, tokenizer: Any, temperature: float = 1.0, **options: Any
) -> nn.Module | None:
    """The teacher's model, frozen; None if there is no local one.

    Args:
        spec: what it is.
        policy: the model that is trained, before the first step.
        tokenizer: the policy's.
        temperature: its logits are divided by it, as the reference's are.
        **options: for ``from_pretrained``, such as ``dtype``.

    Raises:
        InputError: as in ``check_teacher_model``; its weights cannot be loaded, or are the policy's.
    """
    if spec.path is None:
        return None
    own: Any = causal_part(policy)
    rows = len(own.get_output_embeddings().weight)
    path = check_teacher_model(spec, str(own.config.name_or_path or "."), tokenizer, rows)
    what = f"teacher.path {spec.path!r}"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **{**loading(), **options})
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}") from error
    if spec.prefix is None and _equal(model, policy):
        raise InputError(f"{what} has the policy's weights: its divergence would be 0. Give another model, or a prefix")
    if model.config.get_text_config().vocab_size > rows:
        model.resize_token_embeddings(rows)  # models of one family pad one vocabulary to different multiples
    add_fused_lm_head(model, temperature=temperature)  # TRL's way to score padded rows
    return model.eval().requires_grad_(False)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = dict(other.named_parameters())
    return all(
        name in theirs
        and p.shape == theirs[name].shape
        and torch.equal(p.detach(), theirs[name].detach().to(p.device, p.dtype))
        for name, p in one.named_parameters()
    )


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What a server said of completions.

    Attributes:
        logp: (B, T), of the sampled tokens; 0 behind the end of a completion.
        indices: (B, T, K), the likeliest tokens.
        entries: (B, T, K), their log-probabilities; -inf is padding.
    """

    logp: Tensor
    indices: Tensor
    entries: Tensor


class Server:
    """A vLLM server that scores token ids.

    Args:
        spec: its address, the name of its model (None: the first that it lists), entries per position, time limit.
        vocabulary: the policy's, of which its tokens must be.
        pause: sleeps; for tests.

    Raises:
        InputError: it does not answer, has no model, sends no log-probabilities of prompts, or too few of them.
    """

    def __init__(self, spec: TeacherSpec, vocabulary: int, pause: Callable[[float], None] = time.sleep) -> None:
        assert spec.url is not None
        self.url = spec.url.rstrip("/").removesuffix("/v1")
        self.top_k, self.seconds, self.vocabulary, self._pause = spec.top_k, spec.seconds, vocabulary, pause
        try:
            listed = {str(model["id"]): model for model in self._ask("/v1/models")["data"]}
            if not listed or (spec.model is not None and spec.model not in listed):
                raise ValueError(f"it has no model {spec.model or ''}, only {', '.join(listed) or 'none'}")
            self.model = spec.model or next(iter(listed))
            self._context = listed[self.model].get("max_model_len")
            self._score([[0, 1, 2]])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"teacher.url {spec.url!r}: {_reason(error)}") from None

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises ``InputError`` if it reads a text as other tokens; a server that cannot say is believed."""
        body = {"model": self.model, "prompt": _SAMPLE, "add_special_tokens": False}
        try:
            theirs = self._ask("/tokenize", body)["tokens"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        ours = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        if list(theirs) != list(ours):
            at = next(
                (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
            )
            raise InputError(
                f"teacher.url {self.url!r} has another tokenizer than the policy: token {at} of a sample text is "
                f"{theirs[at : at + 1]} there and {ours[at : at + 1]} here"
            )

    def check_length(self, longest: int) -> None:
        """Raises ``InputError`` where a prompt and its completion have more tokens than the server takes."""
        if self._context is not None and longest >= self._context:  # it draws one token more
            raise InputError(
                f"teacher.url {self.url!r} takes {self._context} tokens, the longest prompt with its completion and "
                f"one more token is {longest + 1}: start it with --max-model-len {longest + 1}"
            )

    def score(self, ids: Tensor, attention: Tensor, keep: int) -> Reported:
        """What it says of the last ``keep`` tokens of each row.

        Args:
            ids: (B, P + T), padded on both sides.
            attention: (B, P + T).
            keep: T.

        Raises:
            TeacherError: it has not answered, in several attempts.
        """
        rows = [row[mask.bool()].tolist() for row, mask in zip(ids, attention, strict=True)]
        lengths = attention[:, -keep:].sum(1).tolist()
        parts = [rows[i : i + _SEQUENCES] for i in range(0, len(rows), _SEQUENCES)]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            found = [positions for part in pool.map(self._patiently, parts) for positions in part]
        logp = torch.zeros(len(rows), keep)
        indices = torch.zeros(len(rows), keep, self.top_k, dtype=torch.long)
        entries = torch.full((len(rows), keep, self.top_k), -torch.inf)
        for b, (row, positions, length) in enumerate(zip(rows, found, lengths, strict=True)):
            for t in range(length):
                at = len(row) - length + t
                known = sorted(positions[at].items(), key=lambda item: -item[1])[: self.top_k]
                logp[b, t] = positions[at][row[at]]
                indices[b, t, : len(known)] = torch.tensor([token for token, _ in known])
                entries[b, t, : len(known)] = torch.tensor([value for _, value in known])
        device = ids.device
        return Reported(logp=logp.to(device), indices=indices.to(device), entries=entries.to(device))

    def _patiently(self, rows: list[list[int]]) -> list[list[dict[int, float]]]:
        attempts, failure = 0, Exception()
        for pause in (*PAUSES, None):
            attempts += 1
            try:
                return self._score(rows)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                failure = error
            if isinstance(failure, _RefusedError) and failure.final:
                break  # it will not change its mind
            if pause is not None:
                self._pause(pause)
        raise TeacherError(f"teacher.url {self.url!r} failed {attempts} times: {_reason(failure)}")

    def _score(self, rows: list[list[int]]) -> list[list[dict[int, float]]]:
        """For each row, for each of its tokens, log-probabilities by token; nothing for the first one."""
        body = {"model": self.model, "prompt": rows, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": self.top_k}
        choices = self._ask("/v1/completions", body)["choices"]
        if len(choices) != len(rows):
            raise ValueError(f"it sent {len(choices)} answers to {len(rows)} sequences")
        choices = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [self._positions(choice, row) for choice, row in zip(choices, rows, strict=True)]

    def _positions(self, choice: Any, row: list[int]) -> list[dict[int, float]]:
        positions = choice.get("prompt_logprobs")
        if not isinstance(positions, list) or len(positions) != len(row):
            raise ValueError("it sends no prompt_logprobs, one entry for each token of the prompt")
        read: list[dict[int, float]] = [{}]  # whatever stands at the first token, which nothing comes before
        for each in positions[1:]:
            read.append({int(token): _log_probability(said) for token, said in (each or {}).items()})
        wanted = min(self.top_k, self.vocabulary)
        for token, known in list(zip(row, read, strict=True))[1:]:
            if len(known) < wanted:
                raise ValueError(f"it sends {len(known)} entries for a token, teacher.top_k asks for {self.top_k}")
            if token not in known:
                raise ValueError(f"it does not send the log-probability of token {token}")
            if not all(0 <= number < self.vocabulary for number in known):
                raise ValueError(f"it has tokens beyond the policy's vocabulary of {self.vocabulary}")
            if (mass := math.fsum(map(math.exp, known.values()))) > 1.0 + _MASS:
                raise ValueError(f"it sends no log-probabilities: their probabilities add up to {mass:.4g}")
        return read

    def _ask(self, route: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + route, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _RefusedError(error.code, " ".join(error.read().decode(errors="replace").split())) from None
        except http.client.HTTPException as error:  # it went away in the middle of its answer
            raise OSError(f"its answer breaks off ({type(error).__name__})") from None
        try:
            found = json.loads(said)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"its answer to {route} is not a JSON object: {said[:60].decode(errors='replace')!r}")
        if found.get("error"):
            raise ValueError(f"it says: {str(found['error'])[:160]}")
        return found


def _log_probability(said: Any) -> float:
    value = said["logprob"]
    if not isinstance(value, (int, float)) or not value <= LOGP_TOLERANCE:
        raise ValueError(f"it sends {value} as a log-probability")
    return -math.inf if value <= _NEVER else min(value, 0.0)


def server_of(spec: TeacherSpec, policy: Any, tokenizer: Any) -> Server:
    """A teacher's server that answers, and reads text as the policy does.

    Raises:
        InputError: as in ``Server``; another tokenizer.
    """
    server = Server(spec, policy.get_output_embeddings().weight.shape[0])
    server.check_tokenizer(tokenizer)
    return server


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time (teacher.seconds)"
    text = str(getattr(error, "reason", None) or error)
    return " ".join(text.split())[:200] if not isinstance(error, KeyError) else f"its answer has no {text}"


def needs_logps(objective: Objective) -> bool:
    """Whether the teacher's log-probabilities of the sampled tokens are needed, and not only whole distributions."""
    penalties = [p.summed for p in objective.penalties if p.anchor == "teacher"]
    return not all([*penalties, *(rule.region.needs_logits for rule in objective.rules if rule.anchor == "teacher")])


class Teacher:
    """The teacher of a run.

    Args:
        spec: what it is.
        policy: the model that is trained, before the first step.
        tokenizer: the policy's.
        temperature: of the rollouts; the logits of a local teacher are divided by it, as the reference's are.
        **options: for ``from_pretrained`` of a local one.

    Attributes:
        model: a local teacher's; None otherwise.
        server: or None.

    Raises:
        InputError: as in ``load_teacher`` and ``Server``; a server with a temperature that it does not know.
    """

    def __init__(
        self, spec: TeacherSpec, policy: nn.Module, tokenizer: Any, temperature: float, **options: Any
    ) -> None:
        self.spec, self.server = spec, None
        self.model = load_teacher(spec, policy, tokenizer, temperature, **options)
        if spec.url is not None:
            if temperature != 1.0:
                raise InputError(
                    f"temperature must be 1 with teacher.url, whose log-probabilities are those of temperature 1, got "
                    f"{temperature:g}"
                )
            self.server = server_of(spec, causal_part(policy), tokenizer)

    def describe(self) -> str:
        """A few words."""
        who = self.spec.path or self.spec.url or "the policy"
        return who if self.spec.prefix is None else f"{who} behind a prefix of {len(self.spec.prefix)} characters"

    def read(
        self,
        batch: dict[str, Any],
        prompts: Sequence[Sequence[int]] | None,
        score: Callable[[nn.Module | None, Tensor, Tensor, int], Tensor] | None,
    ) -> dict[str, Tensor]:
        """What a rollout batch gains: log-probabilities (B, T), a server's entries, prompts behind the prefix.

        Args:
            batch: of token ids and masks, as TRL lays it out.
            prompts: token ids of its prompts behind the prefix; None without one.
            score: gives log-probabilities under a model (None: the policy) of ids, attention mask and T; None: they are
                not needed of a local teacher, whose whole distributions the loss reads.

        Raises:
            TeacherError: the server has failed for good.
        """
        found: dict[str, Tensor] = {}
        if prompts is not None:
            rows = [torch.tensor(ids) for ids in prompts]
            like = {"batch_first": True, "padding_side": "left"}
            ids = nn.utils.rnn.pad_sequence(rows, **like)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **like)
            device = batch["prompt_ids"].device
            found = {"teacher_prompt_ids": ids.to(device), "teacher_prompt_mask": mask.to(device)}
        ids, attention, keep = gather_ids(read_by_teacher({**batch, **found}))
        if self.server is None and score is None:
            return found
        if self.server is None:
            assert score is not None
            return {**found, "teacher_per_token_logps": score(self.model, ids, attention, keep)}
        said = self.server.score(ids, attention, keep)
        return {
            "teacher_per_token_logps": said.logp,
            "teacher_indices": said.indices,
            "teacher_entries": said.entries,
        }


__all__ = [
    "PAUSES",
    "Teacher",
    "Reported",
    "Server",
    "TeacherError",
    "behind",
    "check_vocabulary",
    "load_teacher",
    "needs_logps",
]
