"""Shape checks on: beartype verifies the jaxtyping annotations of the core on every call, under pytest only."""

import os

os.environ["MIRRORPO_CHECK_SHAPES"] = "1"
# Before torch is imported, here and in what tests start: tests fork from servers that have imported everything, and a
# process forked from one with OpenMP threads hangs in its first parallel region.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

CORE = (
    "divergences",
    # all but triton_kernels, whose functions Triton reads itself
    *(f"kernels.{name}" for name in ("attention", "backend", "fused", "head", "objective_head", "packing", "sweep")),
    "kernels.vocabulary",
    "losses.advantages",
    "losses.aggregation",
    "losses.future_kl",
    "losses.objective",
    "losses.optimum",
    "losses.penalties",
    "losses.preference",
    "losses.regions",
    "losses.rules",
    "losses.solver",
    "losses.surrogates",
)
install_import_hook([f"mirrorpo.{module}" for module in CORE], "beartype.beartype")

import torch  # noqa: E402  (the hook must be in place before the package is imported)

torch.set_num_threads(1)  # tensors here are tiny: a second thread costs more than it gives
