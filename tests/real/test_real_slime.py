"""The adapter inside slime's real loss code: `SLIME=CHECKOUT pytest tests/real/test_real_slime.py`.

What runs is slime's `loss_function` with its scoring of packed logits, its averages and its top-p mask, in one process;
megatron, which asks for GPUs, has a stand-in that says "one rank", and the HTTP client an empty one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mirrorpo
import slime_call
from framework_batch import LENGTHS, PROMPTS, assert_same
from mirrorpo.integrations import slime
from mirrorpo.integrations.shared import pad_rows

CHECKOUT = os.environ.get("SLIME", "")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of slime, named by SLIME"),
    pytest.mark.filterwarnings("ignore"),
]
VOCABULARY, HORIZON = 11, 12
LOSS = "slime.backends.megatron_utils.loss"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, CHECKOUT)
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    mpu = ModuleType("megatron.core.mpu")
    for name in ("context_parallel", "tensor_model_parallel", "data_parallel"):
        vars(mpu)[f"get_{name}_world_size"] = lambda **_: 1
        vars(mpu)[f"get_{name}_rank"] = lambda **_: 0
        vars(mpu)[f"get_{name}_group"] = lambda **_: dist.group.WORLD
    core, package = ModuleType("megatron.core"), ModuleType("slime.backends.megatron_utils")
    vars(core).update(mpu=mpu)
    vars(package).update(__path__=[str(Path(CHECKOUT) / "slime/backends/megatron_utils")])  # its init patches megatron
    for module in (ModuleType("megatron"), core, mpu, package):
        sys.modules[module.__name__] = module
    client = ModuleType("httpx")
    vars(client).update(AsyncClient=object)
    sys.modules.setdefault("httpx", client)
    yield import_module(LOSS)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("megatron", "slime", "httpx"):
            del sys.modules[name]
    sys.path[:] = path
    dist.destroy_process_group()


class Packed:
    """Samples side by side in float32, with ratios on both sides of the regions."""

    def __init__(self, real: Any, kept: bool = False) -> None:
        g = torch.Generator().manual_seed(0)
        totals = [p + r for p, r in zip(PROMPTS, LENGTHS, strict=True)]
        self.logits = torch.randn(1, sum(totals), VOCABULARY, generator=g).requires_grad_()
        self.tokens = [torch.randint(VOCABULARY, (total,), generator=g) for total in totals]
        self.batch: dict[str, Any] = {
            "unconcat_tokens": self.tokens,
            "total_lengths": totals,
            "response_lengths": list(LENGTHS),
        }
        if kept:  # of each position the sampled token, and one more
            ids = [
                [[int(t), (int(t) + 1) % VOCABULARY] for t in x[-n:]] for x, n in zip(self.tokens, LENGTHS, strict=True)
            ]
            self.batch["rollout_top_p_token_ids"] = [[i for pair in row for i in pair] for row in ids]
            self.batch["rollout_top_p_token_offsets"] = [list(range(0, 2 * n + 1, 2)) for n in LENGTHS]
        args = arguments(kept)
        _, found = real.get_log_probs_and_entropy(
            self.logits,
            args=args,
            unconcat_tokens=self.tokens,
            total_lengths=totals,
            response_lengths=list(LENGTHS),
            **real.get_rollout_top_p_logprob_kwargs(args, self.batch),
        )
        self.logp = found["log_probs"]

        def moved() -> list[torch.Tensor]:
            return [(row.detach() + 0.4 * torch.randn(len(row), generator=g)).clamp(max=-1e-3) for row in self.logp]

        masks = [torch.ones(n) for n in LENGTHS]
        masks[0][2] = 0.0
        self.batch |= {
            "log_probs": moved(),
            "ref_log_probs": moved(),
            "rollout_log_probs": moved(),
            "advantages": [torch.randn(1, generator=g).expand(n) for n in LENGTHS],
            "loss_masks": masks,
            "rollout_mask_sums": [mask.sum() for mask in masks],
        }


def arguments(kept: bool = False, **more: Any) -> Any:
    """Those that the stand-in has, and what the real code reads besides."""
    own = {"log_probs_chunk_size": -1, "allgather_cp": False, "recompute_loss_function": False, "qkv_format": "thd"}
    return slime_call.arguments(**own, rollout_top_p=0.9 if kept else 1.0, rollout_max_response_len=HORIZON, **more)


SPECS: tuple[dict[str, Any], ...] = (
    {"preset": "dapo"},
    {"preset": "grpo", "coefficient": 0.3},
    {"preset": "prob_l2_gspo", "coefficient": 0.5},
    {"preset": "dr_grpo", "divergence": "js", "coefficient": 0.4, "estimator": "score"},
    {"preset": "atr_grpo", "behaviour": "sampler"},
    {"preset": "icepop"},
)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["preset"])
def test_the_real_loss_code_gives_our_loss_and_gradient(
    real: Any, spec: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(slime.VARIABLE, str(spec).replace("'", '"'))
    objective, p = mirrorpo.objective_from(spec), Packed(real, kept)
    per_token = objective.aggregation == "token_mean"
    args = arguments(
        kept,
        calculate_per_token_loss=per_token,
        grpo_std_normalization=objective.advantage == "grpo",
        use_kl_loss=objective.needs_reference,
    )
    loss, tokens, logged = real.loss_function(args, p.batch, 1, len(LENGTHS), p.logits)
    theirs = loss / tokens
    ours = objective(
        logp=pad_rows(p.logp),
        **{
            f"logp_{ours}": pad_rows(p.batch[theirs])
            for ours, theirs in (("old", "log_probs"), ("ref", "ref_log_probs"), ("sampler", "rollout_log_probs"))
        },
        advantages=pad_rows(p.batch["advantages"]),
        mask=pad_rows(p.batch["loss_masks"]),
        max_completion_length=HORIZON,
    ).loss
    slopes = [torch.autograd.grad(x, p.logits, retain_graph=True)[0] for x in (theirs, ours)]
    assert_same((theirs.detach(), slopes[0]), (ours.detach(), slopes[1]))
    assert "mirrorpo/ratio/mean" in logged["keys"]
