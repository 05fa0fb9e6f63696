"""How do libraries keep silent? Their bars and notices off: this program draws its own, and raises on what matters."""

from __future__ import annotations

import warnings


def quiet() -> None:
    """Turns off the bars and notices of transformers and datasets in this process."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
