"""What does an isolated process do with its job? It runs the candidate, or it judges; never both.

Three roles. ``values``: run the candidate, evaluate the tests' calls, return plain data. ``server``: run the candidate,
then answer a judge. ``judge``: run the text of the tests, on data that came back (``rests``) or against a server. The
candidate's process holds neither the expected values nor the channel on which a verdict travels.

Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import os
import signal
import sys
import types
from typing import Any, NoReturn

from mirrorpo.rewards.sandbox import limits as limits_
from mirrorpo.rewards.sandbox import seccomp
from mirrorpo.rewards.sandbox.frames import ChannelClosed, TooLarge, read_frame, write_frame
from mirrorpo.rewards.sandbox.plain import Decoder, Encoder, NotPlain, from_bytes, to_bytes
from mirrorpo.rewards.sandbox.remote import Link, LiveCompared, Remote, Server

CHANNEL, RPC = 3, 4
_MAX_REQUEST = 200_000_000

Job = dict[str, Any]
# Bound here, before a program can replace them in their modules.
_exit = os._exit


def run(use_filter: bool) -> NoReturn:
    """Takes the job from the channel, locks the process, does the job, ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGPIPE else signal.SIG_IGN)
    status = 1
    try:
        job = from_bytes(read_frame(CHANNEL, _MAX_REQUEST))
        limits_.apply(limits_.Limits(**job["limits"]))
        if use_filter:
            seccomp.install()
        answer = {"values": _values, "server": _server, "judge": _judge}[job["role"]](job)
        if answer is not None:
            write_frame(CHANNEL, to_bytes(answer))
        status = 0
    except ChannelClosed:
        pass
    except BaseException:  # noqa: BLE001  (nothing above this frame could report it; the status does)
        status = 3
    finally:
        _exit(status)


def _load(job: Job) -> dict[str, Any]:
    """The candidate's module: imports of the setup, the program, the whole setup."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    for name in ("imports", "code", "setup"):
        exec(_compiled(job[name], name), module.__dict__)
    return module.__dict__


def _compiled(text: str, name: str) -> types.CodeType:
    try:
        return compile(text, f"<{name}>", "exec")
    except ValueError:  # a NUL byte, a lone surrogate: no Python either
        raise SyntaxError(name) from None


def _failure(error: BaseException) -> dict[str, Any]:
    return {"status": "raised", "kind": type(error).__name__[:80]}


def _values(job: Job) -> dict[str, Any]:
    limit = job["limits"]["result_bytes"]
    try:
        # Compiled first: a program cannot reach what it has not been told of yet.
        calls = [compile(text, "<call>", "eval") for text in job["calls"]]
        names = _load(job)
        encode = Encoder().encode
        trees = [encode(eval(call, names)) for call in calls]
        if len(to_bytes(trees)) > limit:
            return {"status": "too large"}
        return {"status": "values", "values": trees}
    except NotPlain:
        return {"status": "too large"}
    except BaseException as error:  # noqa: BLE001  (whatever the program raises, SystemExit included)
        return _failure(error)


def _server(job: Job) -> None:
    try:
        names = _load(job)
    except BaseException as error:  # noqa: BLE001  (whatever the program raises, SystemExit included)
        write_frame(RPC, to_bytes(type(error).__name__[:80]))
        return
    Server(RPC, names, job["limits"]["result_bytes"]).serve()


def _judge(job: Job) -> dict[str, Any]:
    if "rests" in job:
        return _judge_values(job)
    link = Link(RPC, job["limits"]["result_bytes"])
    try:
        failed = link.ready()
        if failed is not None:
            return {"status": "raised", "kind": failed}
        return _judge_live(job, link)
    except ChannelClosed:
        return {"status": "gone"}
    except (TooLarge, NotPlain):
        return {"status": "too large"}
    except LiveCompared:
        return {"status": "opaque"}
    except AssertionError:
        return {"status": "failed"}
    except BaseException as error:  # noqa: BLE001  (a test that raises has not passed)
        if error is link.raised:
            return _failure(error)
        # Once the program has had a say, what it returned may be the cause: no excuse to be left out of the count.
        return {"status": "failed" if link.used else "broken test", "kind": type(error).__name__}


def _judge_live(job: Job, link: Link) -> dict[str, Any]:
    """Runs setup and tests; classes of the setup live with the candidate, so that both sides share them."""
    texts = [_without_classes(job["setup"]), *job["tests"]]
    trees = [ast.parse(text) for text in texts]
    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(job["imports"], "<imports>", "exec"), names)
    for name in unbound_names(trees) - names.keys():
        names[name] = link.request("name", name)
    if not any(type(value) is Remote for value in names.values()):
        return {"status": "broken test", "kind": "uses nothing of the program"}
    for tree in trees:
        exec(compile(tree, "<tests>", "exec"), names)
    return {"status": "passed"}


def _without_classes(setup: str) -> str:
    tree = ast.parse(setup)
    tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    return ast.unparse(tree)


def unbound_names(trees: list[ast.Module]) -> set[str]:
    """Names that are used but bound nowhere in these texts, and are no built-ins."""
    used: set[str] = set()
    bound = set(vars(builtins))
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound


def _judge_values(job: Job) -> dict[str, Any]:
    """Evaluates what is left of each test on the data that came back."""
    decoder = Decoder()
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(job["imports"], "<imports>", "exec"), names)
    except Exception as error:  # noqa: BLE001  (an import that fails is the test's fault, not the program's)
        return {"status": "broken test", "kind": type(error).__name__}
    try:
        values = [decoder.decode(tree) for tree in job["values"]]
    except (NotPlain, MemoryError):
        return {"status": "opaque"}
    if decoder.opaque:
        return {"status": "opaque"}
    names.update({f"_value_{index}": value for index, value in enumerate(values)})
    for rest in job["rests"]:
        try:
            if not eval(compile(rest, "<test>", "eval"), names):
                return {"status": "failed"}
        except BaseException as error:  # noqa: BLE001  (a comparison of the wrong types is no match)
            return {"status": "failed", "kind": type(error).__name__}
    return {"status": "passed"}
