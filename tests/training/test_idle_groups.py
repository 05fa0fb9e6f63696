"""Groups whose rewards are all equal: read once, without activations, and never read backward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mirrorpo
from mirrorpo.kernels import idle
from mirrorpo.kernels.idle import without_activations
from mirrorpo.kernels.packing import pack
from mirrorpo.losses.facts import SURROGATE_FACTS
from mirrorpo.losses.parts import Parts
from mirrorpo.losses.presets import PRESETS
from mirrorpo.training import model_adapter
from test_packed import SIZES, assert_same, both_ways, build, lora, micro_batch
from trl_pair import fill, loss_and_gradient


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    """(tokens of a row, whether activations are kept) of every pass through a model."""
    seen: list[tuple[int, bool]] = []
    inner = model_adapter._read

    def read(model: Any, row: Any, packed: Any) -> Tensor:
        seen.append((row.segments.length, torch.is_grad_enabled()))
        return inner(model, row, packed)

    monkeypatch.setattr(model_adapter, "_read", read)
    return seen


@pytest.fixture(autouse=True)
def small_passes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "WORTH", {"cpu": 1})


def moved(built: Any) -> None:
    """The policy has left its reference and its old self."""
    with torch.no_grad():
        for p in built.model.parameters():
            p.mul_(1.01)


# What is skipped


def test_a_group_without_an_advantage_is_read_once_without_activations(tmp_path: Path, passes: list[Any]) -> None:
    built = build(tmp_path, "dr_grpo")
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    inputs["advantages"][4:] = 0.0
    prompt, completions = inputs["prompt_mask"], inputs["completion_mask"]
    loss_and_gradient(built, inputs)  # compares packed and padded, the first time
    passes.clear()
    loss_and_gradient(built, inputs)
    # A prompt once, and of every completion all but the last token.
    sizes = [int(prompt[i].sum() + (completions[i : i + 4].sum(1) - 1).clamp(min=0).sum()) for i in (0, 4)]
    assert passes == [(sizes[0], True), (sizes[1], False)]


@pytest.mark.parametrize(
    "more", [{}, {"lora": True}, {"activation_checkpointing": True}, {"token_budget": 30}], ids=str
)
@pytest.mark.parametrize("resting", [[4, 5, 6, 7], [1, 2], list(range(8))], ids=["a group", "a part of one", "all"])
def test_loss_metrics_and_gradient_are_those_of_the_padded_path(
    more: dict[str, Any], resting: list[int], tmp_path: Path
) -> None:
    settings = dict(more)
    if settings.pop("lora", False):
        settings["peft_config"] = lora()
    built = build(tmp_path, "dr_grpo", **settings)
    moved(built)
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    inputs["advantages"][resting] = 0.0
    found = both_ways(built, inputs)
    if len(resting) < 8:
        assert_same(found)
        return
    # Nothing moves, and an optimiser sees zeros, not parameters that took no part.
    for loss, gradients, _ in found.values():
        assert loss == 0.0
        assert gradients.keys() == {name for name, p in built.model.named_parameters() if p.requires_grad}
        assert all(not g.any() for g in gradients.values())


def test_few_tokens_of_a_small_model_are_not_worth_a_pass(
    tmp_path: Path, passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(tmp_path, "dr_grpo")
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    inputs["advantages"][4:] = 0.0
    tokens = int(inputs["prompt_mask"][4:].sum() + inputs["completion_mask"][4:].sum())
    work = tokens * sum(p.numel() for p in built.model.parameters())
    rows = []
    for least in (work, work + 1):
        monkeypatch.setattr(idle, "WORTH", {"cpu": least})
        loss_and_gradient(built, inputs)
        passes.clear()
        loss_and_gradient(built, inputs)
        rows.append(len(passes))
    assert rows == [2, 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_says_rightly_whether_a_completion_without_an_advantage_has_a_gradient(preset: str) -> None:
    objective = mirrorpo.objective(preset)
    torch.manual_seed(0)
    logits, noise, other = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(3))
    old = logits + 1e-5 * noise  # inside every region
    logits.requires_grad_()
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])

    def at(x: Tensor) -> Tensor:
        return x.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    given: dict[str, Any] = {f"logp_{name}": at(other) for name in ("ref", "teacher")}
    given |= {f"logits_{name}": other for name in ("ref", "old", "teacher")} if objective.needs_logits else {}
    out = objective(
        logp=at(logits),
        mask=torch.ones(2, 3),
        advantages=torch.tensor([0.0, 1.3], dtype=torch.float64),
        logp_old=at(old),
        logp_sampler=at(old),
        logits=logits if objective.needs_logits else None,
        tokens=tokens,
        vocabulary=5,
        max_completion_length=3,
        num_tokens=6,
        **given,
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert bool(grad[1].any()) or not objective.surrogate.has_policy_term
    if objective.follows_advantages:
        assert not grad[0].any()
    elif objective.surrogate.name == "regression":
        assert grad[0].any()


def test_all_surrogates_but_one_are_in_proportion_to_the_advantage() -> None:
    assert {name for name, facts in SURROGATE_FACTS.items() if not facts.scales_advantage} == {"regression"}


@pytest.mark.parametrize(
    ("objective", "more"),
    [("grpo", {}), ({"preset": "a_star_po", "tau": 0.5}, {}), ("dr_grpo", {"entropy_coef": 0.1})],
    ids=["a penalty", "a regression", "an entropy bonus"],
)
def test_where_something_else_moves_a_completion_none_is_left_out(
    objective: Any, more: dict[str, Any], tmp_path: Path, passes: list[Any]
) -> None:
    built = build(tmp_path, objective, **more)
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    inputs["advantages"][4:] = 0.0
    loss_and_gradient(built, inputs)
    passes.clear()
    loss_and_gradient(built, inputs)
    assert [kept for _, kept in passes if kept] == [True]


def test_a_gradient_that_nobody_expected_is_computed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(tmp_path, "grpo")
    moved(built)
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    inputs["advantages"][4:] = 0.0
    monkeypatch.setattr(Parts, "follows_advantages", True)
    assert_same(both_ways(built, inputs))


# Rows and passes


def test_groups_of_idle_completions_get_rows_of_their_own() -> None:
    ids = torch.arange(1, 25).view(4, 6)
    ids[1, :3], ids[3, :3] = ids[0, :3], ids[2, :3]
    plain = pack(ids, torch.ones(4, 6), 3)
    assert [row.idle for row in plain.rows] == [False]
    packing = pack(ids, torch.ones(4, 6), 3, idle=torch.tensor([True, True, False, True]))
    assert [row.idle for row in packing.rows] == [False, True]
    assert [row.ids.tolist() for row in packing.rows] == [
        [13, 14, 15, 16, 17, 22, 23],  # one that is not idle keeps its group
        [1, 2, 3, 4, 5, 10, 11],
    ]
    ids_of_rows = torch.cat([row.ids for row in packing.rows])
    before = ids_of_rows[packing.predictors].tolist()  # the token that each one follows
    assert before == [3, 4, 5, 3, 10, 11, 15, 16, 17, 15, 22, 23]
    assert packing.tokens.tolist() == plain.tokens.tolist()
    whole = pack(ids, torch.ones(4, 6), 3, idle=torch.ones(4, dtype=torch.bool))
    assert [row.idle for row in whole.rows] == [True]


def noisy(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), torch.randn(5, 3)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_a_second_pass_has_the_random_numbers_and_the_precision_of_the_first(mixed: bool) -> None:
    found = []
    for late in (False, True):
        model, x = noisy(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            y = without_activations(lambda: model(x), list(model.parameters())) if late else model(x)  # noqa: B023
        torch.rand(7)  # other numbers are drawn before the backward pass
        state = torch.get_rng_state()
        y.float().square().sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    assert found[0][0].dtype == (torch.bfloat16 if mixed else torch.float32)
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_zeros_stop_there_and_gradients_that_are_there_stay() -> None:
    calls = []
    a, b, fixed = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(2)
    a.grad = torch.tensor([5.0, 6.0])

    def read() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return a * b * fixed

    (without_activations(read, [a, b, fixed]) * 0.0).sum().backward()
    assert calls == [False]
    assert b.grad is not None
    assert (a.grad.tolist(), b.grad.tolist(), fixed.grad) == ([5.0, 6.0], [0.0, 0.0], None)


def test_parameters_that_take_no_part_stay_without_a_gradient() -> None:
    # AdamW decays what has a gradient of zeros, and leaves alone what has none.
    model, x = nn.ModuleDict({"read": nn.Linear(3, 2), "spare": nn.Linear(3, 2)}), torch.randn(5, 3)

    def read() -> Tensor:
        assert model["spare"].weight.shape == (2, 3)  # looked at, not used
        return torch.cat([model["read"](x), model["read"].bias.unsqueeze(0)])

    (without_activations(read, list(model.parameters())) * 0.0).sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"read.weight", "read.bias"}


def test_without_gradients_it_is_a_plain_call() -> None:
    weight = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not without_activations(lambda: weight * 2, [weight]).requires_grad
    assert not without_activations(lambda: torch.ones(2), [torch.ones(2)]).requires_grad


@pytest.mark.parametrize("more", [{"bf16": True}, {"bf16": True, "activation_checkpointing": True}], ids=str)
def test_in_mixed_precision_a_row_without_a_graph_takes_none_from_the_others(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(tmp_path, "dr_grpo", **more)
    inputs = fill(micro_batch(SIZES["ragged"]), built)
    inputs["advantages"][:4] = 0.0
    found = []
    for least in (1, 2**60):
        monkeypatch.setattr(idle, "WORTH", {"cpu": least})
        loss_and_gradient(built, inputs)
        found.append({name: p.grad.clone() for name, p in built.model.named_parameters() if p.grad is not None})
    apart, whole = found
    assert apart.keys() == whole.keys()
    assert all(bool(g.any()) for g in apart.values())
    norm = torch.stack([g.norm() for g in whole.values()]).norm()
    assert torch.stack([(apart[name] - g).norm() for name, g in whole.items()]).norm() < 0.05 * norm
