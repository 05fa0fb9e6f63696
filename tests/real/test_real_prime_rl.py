"""The adapter inside prime-rl's real loss code: `PRIME_RL=CHECKOUT pytest tests/real/test_real_prime_rl.py`.

Only `src/prime_rl/trainer/rl/loss.py` is run, which needs only torch; the settings that it imports have stand-ins.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import mirrorpo

CHECKOUT = os.environ.get("PRIME_RL", "")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of prime-rl, named by PRIME_RL")
LENGTHS = (5, 8, 3)
SPEC = {"preset": "dr_grpo", "advantage": "dr_grpo", "aggregation": "token_mean"}


class CustomLossConfig:
    """The two fields of prime-rl's settings that its loss code reads."""

    def __init__(self, import_path: str, kwargs: dict[str, Any]) -> None:
        self.import_path, self.kwargs = import_path, kwargs


def imported(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(import_module(module), name)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    modules = {name: ModuleType(name) for name in ("prime_rl", "prime_rl.configs", "prime_rl.utils")}
    modules["prime_rl.configs.trainer"] = config = ModuleType("prime_rl.configs.trainer")
    vars(config).update(dict.fromkeys(("DefaultLossConfig", "IPOLossConfig", "LossConfig"), type("Other", (), {})))
    vars(config)["CustomLossConfig"] = CustomLossConfig
    modules["prime_rl.utils.utils"] = utils = ModuleType("prime_rl.utils.utils")
    vars(utils)["import_object"] = imported
    modules["prime_rl_loss"] = loss = ModuleType("prime_rl_loss")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
    file = Path(CHECKOUT) / "src/prime_rl/trainer/rl/loss.py"
    exec(compile(file.read_text(), str(file), "exec"), vars(loss))
    return loss


class Rows:
    """Sequences as prime-rl splits them: the first token of each is the prompt's."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.logp = [(-0.05 - torch.rand(n, generator=g)).requires_grad_() for n in LENGTHS]
        self.old = [(x.detach() + 0.3 * torch.randn(len(x), generator=g)).clamp(max=-0.01) for x in self.logp]
        self.ref = [(x.detach() + 0.3 * torch.randn(len(x), generator=g)).clamp(max=-0.01) for x in self.logp]
        self.advantages = [torch.full((n,), a) for n, a in zip(LENGTHS, (1.0, -0.5, 0.3), strict=True)]
        self.masks = [torch.arange(n) > 0 for n in LENGTHS]
        self.weights = [0.5 + torch.rand(n, generator=g) for n in LENGTHS]
        self.weights[1][3] = 0.0

    def through(self, real: Any, spec: Any, ref: list[Tensor] | None, weights: list[Tensor] | None) -> Tensor:
        settings = CustomLossConfig("mirrorpo.integrations.prime_rl.loss", {"objective": json.dumps(spec)})
        function = real.setup_rl_loss_fn(settings)
        counted = [m if weights is None else m & (weights[i] != 0) for i, m in enumerate(self.masks)]
        scale = int(sum(int(m.sum()) for m in counted))
        loss, _ = real.compute_loss(
            self.logp, self.old, ref, self.advantages, self.masks, weights, None, None, function, scale, 1, 1
        )
        return loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", [{}, {"divergence": "js", "coefficient": 0.2}])
@pytest.mark.parametrize("region", ["ratio", {"name": "kl3", "radius": 0.03}, {"name": "binary_tv", "radius": 0.15}])
def test_the_real_loss_code_gives_our_loss_and_gradient(real: Any, region: Any, penalty: Any, weighted: bool) -> None:
    spec = {**SPEC, **penalty, "region": {"name": "ratio"} if region == "ratio" else region}
    rows = Rows()
    weights = rows.weights if weighted else None
    theirs = rows.through(real, spec, rows.ref if penalty else None, weights)
    mask = pad_sequence(rows.masks, batch_first=True)
    terms = mirrorpo.objective_from(spec).terms(
        logp=pad_sequence(rows.logp, batch_first=True),
        logp_old=pad_sequence(rows.old, batch_first=True),
        logp_ref=pad_sequence(rows.ref, batch_first=True),
        advantages=pad_sequence(rows.advantages, batch_first=True),
        mask=mask,
    )
    w = pad_sequence(rows.weights, batch_first=True) if weighted else torch.ones(mask.shape)
    ours = (terms.loss * w * mask).sum() / (mask & (w != 0)).sum()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(theirs, rows.logp), torch.autograd.grad(ours, rows.logp), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_row_that_was_packed_beside_rows_with_a_reference_is_refused(real: Any) -> None:
    rows = Rows()
    ref = [rows.ref[0], torch.zeros(LENGTHS[1]), rows.ref[2]]
    with pytest.raises(ValueError, match="a row whose ref_logprobs are all 0"):
        rows.through(real, {**SPEC, "divergence": "js", "coefficient": 0.2}, ref, None)
