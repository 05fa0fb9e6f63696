"""Where do the rows of a public data set come from, and which of them does training never see?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Part = Literal["train", "validation", "test"]


def load_from_hub(name: str, config: str, split: str) -> list[dict[str, Any]]:
    """The rows of a data set's split.

    Raises:
        ValueError: the hub cannot be reached, or has no such data set; says what to set.
    """
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(name, config, split=split)]  # pyright: ignore[reportArgumentType]
    except Exception as error:  # datasets raises a dozen kinds, down to those of its HTTP client
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} cannot be loaded from the hub ({type(error).__name__}: {reason}). "
            "Set task.path to the original JSONL file, or allow the hub (unset HF_HUB_OFFLINE)"
        ) from error


def split_off(
    rows: Sequence[dict[str, Any]], key: str, size: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to keep and ``size`` distinct rows to hold out, both in an order that the seed decides.

    The order is that of a digest of seed and text: rows with the same text fall on the same side, and it depends on no
    random state.

    Args:
        rows: any rows.
        key: of the text.
        size: how many distinct texts to hold out.
        seed: any integer.

    Raises:
        ValueError: size is not in [0, number of distinct texts).
    """
    texts = {str(row[key]).strip(): row for row in reversed(rows)}
    if isinstance(size, bool) or not 0 <= size < len(texts):
        raise ValueError(f"validation_size must be in [0, {len(texts) - 1}] ({len(texts)} rows), got {size}")

    def place(text: str) -> bytes:
        return hashlib.sha256(f"{seed}/{text}".encode("utf-8", "surrogatepass")).digest()

    ordered = sorted(texts, key=place)
    held_out, kept = ordered[:size], ordered[size:]
    assert not set(held_out) & set(kept)
    return [texts[text] for text in kept], [texts[text] for text in held_out]


def check_test_part(wanted: str, parts: Mapping[Part, Sequence[Any]], missing: str) -> Part:
    """Which part serves for testing.

    Args:
        wanted: "test", "validation" or "auto".
        parts: what the source has.
        missing: what to do if the test part is wanted and not there.

    Raises:
        ValueError: an unknown name, or that part has no rows.
    """
    if wanted not in ("auto", "test", "validation"):
        raise ValueError(f"test_part must be 'auto', 'test' or 'validation', got {wanted!r}")
    if wanted == "test" and not parts["test"]:
        raise ValueError(f"the source has no test split: {missing}, or task.test_part to validation")
    chosen: Part = "test" if wanted == "test" or (wanted == "auto" and parts["test"]) else "validation"
    if not parts[chosen]:
        raise ValueError(f"no rows for testing: {missing}, or task.validation_size above 0")
    return chosen
