"""Shape checks on: beartype verifies the jaxtyping annotations of the core on every call, under pytest only.

And what keeps the suite short: the garbage collector leaves the libraries alone, and the longest files go first.
"""

import gc
import os
from collections.abc import Generator
from pathlib import Path

os.environ["MIRRORPO_CHECK_SHAPES"] = "1"
# Before torch is imported, here and in what tests start: tests fork from servers that have imported everything, and a
# process forked from one with OpenMP threads hangs in its first parallel region.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
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

# The longest files, the longest first: with --no-loadscope-reorder no worker is left alone with one of them at the end.
LONGEST = (
    "docs/test_site.py", "chaos/test_coordinated.py", "training/test_equals_trl.py", "training/test_trainer.py",
    "config/test_public_recipes.py", "rewards/test_forgeries.py", "search/test_kills.py", "studies/test_study_run.py",
    "training/test_two_processes.py", "chaos/test_resume.py", "training/test_packed.py", "rewards/test_processes.py",
    "losses/test_optimum.py", "kernels/test_triton.py", "divergences/test_numerics.py", "test_own_data.py",
    "hostile/test_recipes.py", "search/test_learn_run.py", "integrations/test_verl.py", "training/test_lengths.py",
    "training/test_plan.py", "hostile/test_models.py", "rewards/test_attacks.py", "training/test_nonfinite.py",
    "workers/test_pools.py", "search/test_member.py", "runs/test_taking_up.py", "training/test_watch.py",
    "workers/test_ray_cluster.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leaves the libraries and the tests, a million objects, out of every later collection of garbage.

    Each trainer asks for a full one, which takes 0.7 s if it looks at all of them.
    """
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected
