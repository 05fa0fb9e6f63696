"""A number that is none, at every place in the chain: named, or left out of numerator and denominator and counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mirrorpo.training import MirrorConfig, MirrorTrainer, NonFiniteError
from trl_pair import batch, fill, settings, trainer

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")


def build(folder: Path, aggregation: str = "sequence_mean", rows: int = 8, **more: Any) -> MirrorTrainer:
    objective = {"preset": "grpo", "coefficient": 0.5, "aggregation": aggregation}
    options = {"gradient_share_every": 0, **more}
    config = MirrorConfig(**settings(folder, per_device_train_batch_size=rows, **options), objective=objective)
    built = trainer(MirrorTrainer, config)
    built.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    return built


def filled(built: MirrorTrainer) -> dict[str, Any]:
    inputs = fill(batch(), built)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def gradient(built: MirrorTrainer, inputs: dict[str, Any], parts: int) -> torch.Tensor:
    """The gradient of an optimiser step on the rows, in so many micro-batches, as the trainer steps with it."""
    built.model.train()
    built.model.zero_grad()
    rows = 8 // parts
    for i in range(parts):
        part = {key: value[i * rows : (i + 1) * rows] if value.dim() else value for key, value in inputs.items()}
        built._compute_loss(built.model, part).backward()
    built._settle_nonfinite()
    grads = [p.grad.reshape(-1) for p in built.model.parameters() if p.grad is not None]
    return torch.cat(grads) if grads else torch.empty(0)


@pytest.mark.parametrize("where", ["old_per_token_logps", "ref_per_token_logps", "advantages"])
def test_raise_names_the_tensor_and_the_step(where: str, tmp_path: Path) -> None:
    built = build(tmp_path)
    inputs = filled(built)
    inputs[where] = inputs[where].clone()
    inputs[where].reshape(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^step 1: (logp_old|logp_ref|advantages) is not finite"):
        built._compute_loss(built.model, inputs)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("where", ["logp", "old_per_token_logps", "ref_per_token_logps", "advantages"])
def test_skip_is_the_same_as_if_the_tokens_had_never_been_there(
    where: str, aggregation: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"rows": 8 // parts, "gradient_accumulation_steps": parts}
    built = build(tmp_path, aggregation, on_nonfinite="skip", **more)
    inputs = filled(built)
    broken, clean = dict(inputs), dict(inputs)
    # TRL's mask of tokens that stay in the context and leave the loss.
    clean["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    if where == "advantages":  # the whole of sequence 3 (8 tokens)
        broken[where] = inputs[where].clone()
        broken[where][3] = torch.inf
        clean["tool_mask"][3] = 0
    else:  # tokens 2 and 4 of sequence 0 and the only token of sequence 2
        for row, column in ((0, 2), (0, 4), (2, 0)):
            clean["tool_mask"][row, column] = 0
            if where != "logp":
                broken[where] = broken[where].clone()
                broken[where][row, column] = torch.nan
    scorer = built.loss_computer.scorer
    score = scorer.padded
    if where == "logp":

        def scored(model: Any, given: dict[str, Any], **more: Any) -> Any:
            found = score(model, given, **more)
            bad = given["completion_mask"].bool() & ~given["usable"]
            return type(found)(
                logp=torch.where(bad, -torch.inf, found.logp), entropy=found.entropy, aux_loss=found.aux_loss
            )

        broken["usable"] = clean["tool_mask"].bool()
        monkeypatch.setattr(scorer, "padded", scored)
        # Packed rows whose hidden states are not finite are left to the padded path, which knows the tokens.
        hidden = built.packed.hidden
        monkeypatch.setattr(built.packed, "hidden", lambda *given: hidden(*given) * torch.nan)
    left_out = gradient(built, broken, parts)
    assert built._metrics["train"]["nonfinite/tokens/mean"] == [8.0 if where == "advantages" else 3.0]
    assert built.nonfinite.events == 1

    monkeypatch.setattr(scorer, "padded", score)
    clean["num_items_in_batch"] = (clean["completion_mask"] * clean["tool_mask"]).sum()
    wanted = gradient(built, clean, parts)
    # 8 sequences stand in the denominator of the other two; the one that lost all its tokens leaves it.
    scale = 1.0 if aggregation == "token_mean" else 8 / 7
    assert (left_out - scale * wanted).abs().max() < 2e-6 * wanted.abs().max()  # two sums in float32


def overflowing_loss(built: MirrorTrainer, inputs: dict[str, Any]) -> None:
    inputs["advantages"] = torch.full_like(inputs["advantages"], 3e38)  # finite; their sum is not


def infinite_gradient(built: MirrorTrainer, inputs: dict[str, Any]) -> None:
    first = next(iter(built.model.parameters()))
    first.register_hook(lambda g: torch.full_like(g, torch.inf))


@pytest.mark.parametrize("inject", [overflowing_loss, infinite_gradient])
def test_a_loss_or_gradient_that_is_not_finite_drops_the_step_and_moves_nothing(
    inject: Callable[[MirrorTrainer, dict[str, Any]], None], tmp_path: Path
) -> None:
    built = build(tmp_path, on_nonfinite="skip", max_grad_norm=1.0, weight_decay=0.1)
    built.create_optimizer()
    inputs = filled(built)
    inject(built, inputs)
    start = torch.cat([p.detach().reshape(-1).clone() for p in built.model.parameters()])
    gradient(built, inputs, 1)
    norm = built._get_grad_norm(built.model, built._clip_grad_norm(built.model))
    built.optimizer.step()
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in built.model.parameters()]), start)
    assert len(built.optimizer.state) == 0
    assert built._metrics["train"]["nonfinite/dropped/frac"] == [1.0]
    assert built.nonfinite.events == 1
    assert norm is None or not norm > 0 or not torch.isfinite(torch.as_tensor(norm))


@pytest.mark.parametrize("inject", [overflowing_loss, infinite_gradient])
def test_raise_stops_at_a_loss_or_gradient_that_is_not_finite(
    inject: Callable[[MirrorTrainer, dict[str, Any]], None], tmp_path: Path
) -> None:
    built = build(tmp_path)
    inputs = filled(built)
    inject(built, inputs)

    def step() -> None:
        gradient(built, inputs, 1)
        built._get_grad_norm(built.model, built._clip_grad_norm(built.model))

    with pytest.raises(
        NonFiniteError, match=r"^step 1: (loss is not finite|the gradient norm is inf|the gradient norm is nan)"
    ):
        step()


def reward_of(values: list[Any]) -> Any:
    def mine(completions: list[Any], **_: Any) -> list[Any]:
        return [values[i % len(values)] for i in range(len(completions))]

    return mine


def test_an_infinite_reward_of_a_model_is_left_out_like_none(tmp_path: Path) -> None:
    built = build(tmp_path, on_nonfinite="skip")
    rewards = torch.tensor([[1.0], [torch.inf], [torch.nan], [0.0]])
    found = built.nonfinite.leave_out_rewards(rewards, ["mine"], 1)
    assert found.isnan().squeeze(1).tolist() == [False, True, True, False]
    with pytest.raises(NonFiniteError, match="step 3: the reward of 'mine' is not finite"):
        build(tmp_path).nonfinite.leave_out_rewards(rewards, ["mine"], 3)


def test_more_than_the_limit_of_left_out_steps_ends_the_run(tmp_path: Path) -> None:
    built = build(tmp_path, on_nonfinite="skip", max_nonfinite=2)
    inputs = filled(built)
    inputs["old_per_token_logps"][0, 0] = torch.nan
    gradient(built, inputs, 1)
    gradient(built, inputs, 1)
    with pytest.raises(NonFiniteError, match=r"in 3 optimiser steps, at most 2 may be left out \(the last: logp_old\)"):
        gradient(built, inputs, 1)


def _rank(rank: int, port: int, folder: Path) -> None:
    """One of two processes: row 1 of rank 1 has a broken token; both must end with the same gradient."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    built = build(folder, "token_mean", rows=4, on_nonfinite="skip", ddp_backend="gloo")
    model = built.accelerator.prepare(built.model)
    inputs = filled(built)
    clean = {key: value.clone() for key, value in inputs.items()}
    inputs["old_per_token_logps"][5, 1:3] = torch.nan  # 2 tokens of a row of rank 1
    clean["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    clean["tool_mask"][5, 1:3] = 0
    clean["num_items_in_batch"] = clean["completion_mask"].sum() - 2
    grads = []
    for given in (inputs, clean):
        model.train()
        model.zero_grad()
        part = {key: value[4 * rank : 4 * rank + 4] if value.dim() else value for key, value in given.items()}
        built._compute_loss(model, part).backward()
        built._settle_nonfinite()
        grads.append(torch.cat([p.grad.reshape(-1) for p in built.model.parameters()]))
    worst = float((grads[0] - grads[1]).abs().max() / grads[1].abs().max())
    result = {"worst": worst, "tokens": built._metrics["train"]["nonfinite/tokens/mean"], "sum": float(grads[0].sum())}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_two_processes_leave_the_tokens_of_one_out_of_the_gradient_of_both(tmp_path: Path) -> None:
    import socket

    from chaos.harness import warm_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [warm_server().Process(target=_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    for process in processes:
        process.kill()  # one that waits for another that failed
    assert [process.exitcode for process in processes] == [0, 0]
    results = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [result["tokens"] for result in results] == [[2.0, 0.0], [2.0, 0.0]]
    assert max(result["worst"] for result in results) < 1e-6
    assert results[0]["sum"] == results[1]["sum"]
