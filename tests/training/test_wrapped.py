"""A part of a model inside DistributedDataParallel's forward pass: its hooks see it, and nothing stays changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mirrorpo.training.distributed import through


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_a_model_that_nobody_wraps_is_not_called() -> None:
    model = Model()
    x = torch.randn(2, 3)
    assert torch.equal(through(model, model, lambda: model.backbone(x), model.head), model.backbone(x))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("unused", [False, True])
def test_every_gradient_is_reduced_once_the_head_s_too(unused: bool) -> None:
    model, x = Model(), torch.randn(2, 3)
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wrapper = DistributedDataParallel(model, find_unused_parameters=unused)
    # As on a GPU: there the wrapper moves its inputs to the device.
    wrapper.device_ids = [0]
    reduced: list[str] = []

    def count(_, bucket):  # torch refuses annotations that are strings, as they are in this file
        reduced.extend(str(tuple(p.shape)) for p in bucket.parameters())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapper.register_comm_hook(None, count)
    for _ in range(2):  # the second forward pass checks that the first was finished
        model.zero_grad()
        reduced.clear()
        hidden = through(wrapper, model, lambda: model.backbone(x), model.head)
        model.head(hidden).square().sum().backward()
        assert sorted(reduced) == sorted(str(tuple(p.shape)) for p in model.parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, wanted[name]), name


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("own", [False, True])
def test_the_forward_pass_is_put_back_also_after_an_error(own: bool) -> None:
    model, x = Model(), torch.randn(2, 3)
    if own:  # as accelerate and TRL leave it
        model.forward = lambda x: model.backbone(x)
    before = vars(model).get("forward")
    wrapper = DistributedDataParallel(model)

    def fail() -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        through(wrapper, model, fail, model.head)
    assert vars(model).get("forward") is before
    assert through(wrapper, model, lambda: model.backbone(x), model.head).shape == (2, 4)
    assert vars(model).get("forward") is before
