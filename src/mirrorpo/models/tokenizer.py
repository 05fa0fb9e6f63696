"""Checks on a model's tokenizer: its files, its end token, its layout of a chat.

transformers makes an empty tokenizer of a folder that has none, without a word; and a policy whose tokenizer has no end
token never learns to stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Any of these holds a vocabulary.
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece*.model",
    "vocab.*",
    "vocab",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
)
_SAMPLE = "How many are 7 and 5?"


def load(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or a hub name, padding on the left.

    Raises:
        ValueError: no tokenizer files, or files that make no tokenizer; one line.

    Example:
        >>> from mirrorpo.models import resolve_model
        >>> load(resolve_model("builtin:tiny")).eos_token
        '<|end|>'
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    adapter = (folder / "adapter_config.json").is_file()  # of a hub model, whose tokenizer may be meant
    if folder.is_dir() and not adapter and not any(any(folder.glob(pattern)) for pattern in _FILES):
        raise ValueError("the folder has no tokenizer files (tokenizer.json); copy those that belong to the model")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code)
        sample = tokenizer(_SAMPLE)["input_ids"]
    except (KeyboardInterrupt, SystemExit):
        raise
    # Untrusted: the author's files. Each kind of tokenizer fails in its own way, and a panic in Rust is no Exception.
    except BaseException as error:
        raise ValueError(f"its tokenizer cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if not sample:
        raise ValueError(f"the tokenizer is empty: it makes no token of a text ({len(tokenizer)} in its vocabulary)")
    return tokenizer


def check_end_token(tokenizer: Any, config: Any = None) -> None:
    """Raises ``ValueError`` if the tokenizer has no end token; says what the model's config takes for one.

    Args:
        tokenizer: of transformers.
        config: the model's, if it is known.
    """
    if tokenizer.eos_token_id is not None:
        return
    named = None if config is None else config.get_text_config().eos_token_id
    first = named[0] if isinstance(named, list) and named else named
    known = isinstance(first, int) and 0 <= first < len(tokenizer)
    hint = f", such as {tokenizer.convert_ids_to_tokens(first)!r} (eos_token_id in config.json)" if known else ""
    raise ValueError(
        "the tokenizer has no end token, so that no completion would ever end; set eos_token in its "
        f"tokenizer_config.json to a token of its vocabulary{hint}"
    )


def check_chat(tokenizer: Any, options: Mapping[str, Any], prompts_are_chats: bool) -> str | None:
    """What a tokenizer without a chat template means for prompts, in one line; None if it has one.

    Args:
        tokenizer: of transformers.
        options: of the chat template, from the recipe.
        prompts_are_chats: whether the task gives prompts as lists of messages.

    Raises:
        ValueError: options or chats without a template.
    """
    if tokenizer.chat_template is not None:
        return None
    if prompts_are_chats:
        raise ValueError(
            "the task's prompts are chats, and the tokenizer has no chat template: set chat_template in it"
        )
    if options:
        raise ValueError(
            f"the tokenizer has no chat template, so that {', '.join(sorted(options))} in model.chat_template would "
            "have no effect: remove it, or use the model's chat version"
        )
    return "the tokenizer has no chat template: prompts are given to the model as plain text"


__all__ = ["check_chat", "check_end_token", "load"]
