"""The three roles of an isolated process: it runs a program, or it judges one; never both.

``values``: run the program, make the calls that the tests make, return plain data. ``server``: run the program, then
answer a judge. ``judge``: run the text of the tests against a server. The program's process holds neither the tests nor
the expected values nor the channel on which a verdict travels.

Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from typing import Any, NoReturn

from mirrorpo.rewards.sandbox import limits as limits_
from mirrorpo.rewards.sandbox import running, seccomp
from mirrorpo.rewards.sandbox.frames import ChannelClosed, read_frame, write_frame
from mirrorpo.rewards.sandbox.plain import Decoder, Encoder, NotPlain, from_bytes, to_bytes
from mirrorpo.rewards.sandbox.remote import Link
from mirrorpo.rewards.sandbox.server import Server

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


def _load(job: Job, names: dict[str, Any]) -> None:
    """Runs the imports that the tests bring, then the program."""
    for part in ("imports", "code"):
        exec(_compiled(job[part], part), names)


def _module() -> dict[str, Any]:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    return module.__dict__


def _compiled(text: str, name: str) -> types.CodeType:
    try:
        return compile(text, f"<{name}>", "exec", dont_inherit=True)
    except ValueError:  # a NUL byte, a lone surrogate: no Python either
        raise SyntaxError(name) from None


def _values(job: Job) -> dict[str, Any]:
    limit = job["limits"]["result_bytes"]
    names = _module()
    try:
        _load(job, names)
        encode, decode = Encoder().encode, Decoder().decode
        trees = []
        for name, arguments, named in job["calls"]:
            given = [decode(tree) for tree in arguments]
            trees.append(encode(names[name](*given, **{key: decode(tree) for key, tree in named.items()})))
        if len(to_bytes(trees)) > limit:
            return {"status": "too large"}
        return {"status": "values", "values": trees}
    except NotPlain:
        return {"status": "too large"}
    except BaseException as error:  # noqa: BLE001  (whatever the program raises, SystemExit included)
        return {"status": "raised", "kind": type(error).__name__[:80]}


def _server(job: Job) -> None:
    names = _module()
    Server(RPC, job["limits"]["result_bytes"], job["stubs"], names).run(lambda: _load(job, names))


def _judge(job: Job) -> dict[str, Any]:
    """The word of the judge, preceded by one on when the program has its first say."""
    told = to_bytes({"status": "used"})
    return running.verdict(job, Link(RPC, job["limits"]["result_bytes"], job, lambda: write_frame(CHANNEL, told)))
