"""How do libraries keep silent? Their bars and notices off: this program draws its own, and raises on what matters."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet() -> None:
    """Turns off the bars and notices of transformers and datasets in this process."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def silent_if_it_fails() -> Iterator[None]:
    """Holds back what native code writes to stderr in here; it appears at the end, unless the block raises.

    A panic in Rust arrives as an exception, and prints a trace of tens of lines by itself.
    """
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError):  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        held.seek(0)
        os.write(2, held.read())
