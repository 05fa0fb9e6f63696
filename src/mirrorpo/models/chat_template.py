"""Limits for chat templates: a template is a program of the model's author, and it is run on every prompt.

transformers runs it in Jinja's sandbox, which keeps it from files and from Python's internals, but not from taking all
the time or memory there is. So the prompts are rendered once in a child process with limits before anything else uses
the template; what it does there within the limits, it does again afterwards.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mirrorpo.errors import InputError

MAX_TEMPLATE = 1_000_000  # characters of the template
MAX_PROMPT = 10_000_000  # characters of a prompt that it makes
MAX_SECONDS = 20.0  # for the first prompt; each other one may add _SECONDS_A_PROMPT
_SECONDS_A_PROMPT = 0.01
_MAX_BYTES = 2_000_000_000  # of memory, beyond what the process has
_FINE = b"fine"


def check_chat_template(
    tokenizer: Any, prompts: Sequence[Any], options: Mapping[str, Any] | None = None, key: str = "model.path"
) -> None:
    """Renders the prompts within the limits; plain texts, and a tokenizer without a template, pass.

    Args:
        tokenizer: of transformers.
        prompts: texts, or lists of messages.
        options: of the template.
        key: of the recipe, for the message.

    Raises:
        InputError: the template is too long, raises, takes too long, too much memory, makes too long a prompt,
            or leaves the messages out of it.
    """
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not chats or tokenizer.chat_template is None:
        return
    template = tokenizer.chat_template
    longest = max(map(len, template.values())) if isinstance(template, dict) else len(template)
    if longest > MAX_TEMPLATE:
        raise InputError(f"{key}: its chat template has {longest:,} characters. Legal: at most {MAX_TEMPLATE:,}")
    reason = _in_child(tokenizer, chats, dict(options or {}), MAX_SECONDS + _SECONDS_A_PROMPT * len(chats))
    if reason is not None:
        raise InputError(f"{key}: its chat template cannot be used ({' '.join(reason.split())[:300]})")


def _in_child(tokenizer: Any, chats: Sequence[Any], options: dict[str, Any], seconds: float) -> str | None:
    """None if all is fine, else what is wrong."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: the child runs Python alone
        child = os.fork()
    if child == 0:
        _child(writing, tokenizer, chats, options, seconds)
    os.close(writing)
    said, deadline = b"", time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
            part = os.read(reading, 65536)
            if not part:
                break
            said += part
        else:
            return f"it takes more than {seconds:.0f} s on {len(chats)} prompts"
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if said == _FINE:
        return None
    return said.decode("utf-8", "replace") or f"it takes more than {_MAX_BYTES / 1e9:g} GB of memory, or crashes"


def _child(writing: int, tokenizer: Any, chats: Sequence[Any], options: dict[str, Any], seconds: float) -> NoReturn:
    said = b""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = size + _MAX_BYTES if hard == resource.RLIM_INFINITY else min(hard, size + _MAX_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        said = _render(tokenizer, chats, options)
    except MemoryError:
        said = b""
    except BaseException as error:  # noqa: BLE001  (a template may raise anything)
        said = f"{type(error).__name__}: {str(error)[:1000]}".encode("utf-8", "replace")
    finally:
        with contextlib.suppress(OSError):
            os.write(writing, said)
        os._exit(0)


def _render(tokenizer: Any, chats: Sequence[Any], options: dict[str, Any]) -> bytes:
    made: set[str] = set()
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **options)
        if not isinstance(text, str) or len(text) > MAX_PROMPT:
            return f"it makes a prompt of more than {MAX_PROMPT:,} characters".encode()
        made.add(text)
    if "" in made or (len(made) == 1 and any(chat != chats[0] for chat in chats)):
        return b"it leaves out what the messages say: their content is text, it may expect a list of parts"
    return _FINE


__all__ = ["MAX_PROMPT", "MAX_SECONDS", "MAX_TEMPLATE", "check_chat_template"]
