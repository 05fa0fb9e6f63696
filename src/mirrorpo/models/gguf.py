"""GGUF files as models: converted once into a cached folder of safetensors that every other part can load.

Weights are dequantised to float32, the numbers that an inference engine computes with; ``model.dtype`` rounds them when
they are loaded. The folder is named after a digest of the file, so a changed file is converted again.

Reference: the GGUF specification (ggml), version 3: header, metadata, tensor table, tensor data.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import secrets
import shutil
import struct
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, BinaryIO

from transformers.utils import logging

from mirrorpo.models.folder import check_config

logger = logging.get_logger(__name__)

_VERSIONS = (2, 3)
# Bytes of the metadata types 0 to 12: integers of 1, 2 and 4 bytes, float32, bool; 8 is text, 9 an array.
_SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_MAX_DEPTH, _MAX_DIMENSIONS = 4, 4


def cache_folder() -> Path:
    """The folder of converted files: ``$XDG_CACHE_HOME/mirrorpo/gguf``, or below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirrorpo" / "gguf"


def from_gguf(path: str) -> str:
    """The folder of a GGUF file's model, converted now unless it is in the cache.

    Args:
        path: of a file on this machine.

    Returns:
        A folder with config, tokenizer and weights in float32.

    Raises:
        ValueError: no such file, a damaged one, an architecture that transformers cannot convert, or the package
            ``gguf`` is missing; one line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError("no such file; download the GGUF file first, a name of the hub has no effect here")
    state = file.stat()
    return _converted(str(file.resolve()), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _converted(path: str, size: int, modified: int) -> str:
    """The folder; size and time of change are there so that a file is read once in a process, unless it changes."""
    file = Path(path)
    check_gguf(file)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    folder = cache_folder() / f"{file.stem}-{digest}"
    if folder.is_dir():
        return str(folder)
    try:
        import gguf as _gguf  # noqa: F401  (transformers imports it)
    except ImportError as error:
        raise ValueError("a GGUF file needs the extra 'gguf': pip install 'mirrorpo[gguf]'") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process converts, the others of a run wait for it.
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            logger.warning("%s is dequantised to float32, once, into %s", file.name, folder)
            convert(file, folder)
    return str(folder)


def convert(file: Path, folder: Path) -> None:
    """Writes the folder of a checked file's model, whole or not at all.

    Args:
        file: passed ``check_gguf``.
        folder: is not there yet; the folder above it is.

    Raises:
        ValueError: transformers cannot convert it; one line.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    writing = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.tmp"
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with redirect_stderr(io.StringIO()):  # bars that cannot be turned off
            config = AutoConfig.from_pretrained(file.parent, **options)
            check_config(config.to_dict())
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, config=config, output_loading_info=True, **options
            )
            model, found = loaded
            if absent := sorted(found["missing_keys"]):
                raise ValueError(f"it lacks weights: {absent[0]} ({len(absent)} in all)")
            # Its weights are not quantised any more: with the quantiser in its config no trainer would load it.
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(writing)
            tokenizer.save_pretrained(writing)
        writing.rename(folder)
    except Exception as error:  # whatever a stranger's file leads to, in gguf and in transformers
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the GGUF file cannot be converted ({reason})") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def check_gguf(file: Path) -> None:
    """Refuses a file whose header, metadata or tensor table is not that of a GGUF file or points beyond its end.

    The reader of the package ``gguf`` counts up to any number that it finds there.

    Raises:
        ValueError: one line.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError("its first four bytes are not those of a GGUF file")
        version, tensors, entries = struct.unpack("<IQQ", _take(opened, 20, size))
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version}; legal: {', '.join(map(str, _VERSIONS))}, little-endian")
        for _ in range(entries):
            _text(opened, size)
            (kind,) = struct.unpack("<I", _take(opened, 4, size))
            _skip(opened, kind, size, 0)
        for _ in range(tensors):
            _tensor(opened, size)


def _take(opened: BinaryIO, count: int, size: int) -> bytes:
    start = opened.tell()
    _pass(opened, count, size)
    opened.seek(start)
    return opened.read(count)


def _pass(opened: BinaryIO, count: int, size: int) -> None:
    if count > size - opened.tell():
        raise ValueError("the GGUF file is damaged: a length in its header points beyond its end")
    opened.seek(count, os.SEEK_CUR)


def _text(opened: BinaryIO, size: int) -> None:
    (length,) = struct.unpack("<Q", _take(opened, 8, size))
    _pass(opened, length, size)


def _skip(opened: BinaryIO, kind: int, size: int, depth: int) -> None:
    """Passes over one value of the metadata."""
    if kind == _TEXT:
        _text(opened, size)
    elif kind == _ARRAY and depth < _MAX_DEPTH:
        inner, length = struct.unpack("<IQ", _take(opened, 12, size))
        if inner in _SIZE:
            _pass(opened, _SIZE[inner] * length, size)
        else:
            for _ in range(length):
                _skip(opened, inner, size, depth + 1)
    elif kind in _SIZE:
        _pass(opened, _SIZE[kind], size)
    else:
        raise ValueError(f"the GGUF file is damaged: its metadata has a value of type {kind}")


def _tensor(opened: BinaryIO, size: int) -> None:
    _text(opened, size)
    (dimensions,) = struct.unpack("<I", _take(opened, 4, size))
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"the GGUF file is damaged: a tensor has {dimensions} dimensions")
    *shape, _, offset = struct.unpack(f"<{dimensions}QIQ", _take(opened, 8 * dimensions + 12, size))
    elements = 1
    for length in shape:
        elements *= length
    # The densest formats hold a weight in less than two bits, none in less than one.
    if elements > 8 * size or offset > size:
        raise ValueError("the GGUF file is damaged: a tensor points beyond its end")


__all__ = ["cache_folder", "check_gguf", "convert", "from_gguf"]
