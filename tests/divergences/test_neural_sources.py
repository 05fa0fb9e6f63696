"""Where a neural mirror map comes from: a seed, numbers, a named divergence; and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import mirrorpo
from mirror_naive import random_like, single
from mirrorpo.divergences.neural.file import resolve_map
from mirrorpo.divergences.neural.generator import curvature, non_negative_least_squares
from mirrorpo.divergences.neural.map import SLICES, MirrorMap, project
from naive import logits

INF, NAN = math.inf, math.nan


def test_a_random_map_is_that_of_its_seed_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = (mirrorpo.divergence("neural", seed=s).map.parameters for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 0 <= one.min() < 1e-3
    assert 9e-3 < one.max() <= 0.01
    assert torch.equal(mirrorpo.divergence("neural").map.parameters, MirrorMap.random(0).parameters)


@pytest.mark.parametrize("form", ["tensor", "array", "list", "mapping", "float32", "map"])
def test_parameters_can_be_given_in_any_usual_form(form: str) -> None:
    parameters = random_like(5).float().double()
    given = {
        "tensor": parameters,
        "array": parameters.numpy(),
        "list": parameters.tolist(),
        "mapping": {name: parameters[at].tolist() for name, at in SLICES.items()},
        "float32": parameters.float().requires_grad_(),
        "map": MirrorMap(parameters),
    }[form]
    got = mirrorpo.divergence("neural", parameters=given).map.parameters
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert torch.equal(got, parameters)


def test_a_map_does_not_follow_the_tensor_it_was_made_from() -> None:
    parameters = random_like(5)
    made = MirrorMap(parameters)
    parameters.zero_()
    assert made.parameters.sum() > 0


@pytest.mark.parametrize("name", ["kl", "prob_l2"])
def test_a_map_like_a_representable_divergence_is_that_divergence(name: str) -> None:
    d = mirrorpo.divergence("neural", like=name)
    assert d.map.fit_error < 1e-14
    logp, logq = (logits(30, seed=s).log_softmax(-1) for s in (1, 2))
    torch.testing.assert_close(d.sampled(logp, logq), mirrorpo.divergence(name).sampled(logp, logq), rtol=1e-8, atol=0)


def test_the_error_of_a_map_that_is_only_alike_is_stated() -> None:
    made = MirrorMap.like("itakura_saito")
    x = torch.logspace(-4, 0, 400, dtype=torch.float64)
    error = (curvature(made.parameters, x) * x - 1.0).abs().max().item()  # x h'' = 1/x
    assert made.fit_error == pytest.approx(error, rel=1e-3)
    # No map has x h'' falling in x, so over [1e-4, 1] the worst case of the best one is (1e4 - 1) / (1e4 + 1).
    assert error >= (1e4 - 1) / (1e4 + 1) - 1e-3
    assert torch.equal(made.parameters, MirrorMap.like("itakura_saito").parameters)


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_without_negative_numbers_equals_scipys(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    matrix, target = logits(30, 12, seed=seed).abs(), logits(30, seed=seed + 50)
    expected, _ = optimize.nnls(matrix.numpy(), target.numpy())
    got = non_negative_least_squares(matrix, target)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)


def test_project_is_the_nearest_map() -> None:
    moved = torch.randn(3, 380, generator=torch.Generator().manual_seed(0))
    got = project(moved)
    assert torch.equal(got, torch.where(moved > 0, moved, 0.0))
    assert torch.equal(project(got), got)
    mirrorpo.divergence("neural", parameters=got[0])


@pytest.mark.parametrize(("preset", "base"), [("nm_grpo", "prob_l2_grpo"), ("nm_gspo", "prob_l2_gspo")])
def test_the_presets_are_those_of_prob_l2_with_a_random_map(preset: str, base: str) -> None:
    one, other = mirrorpo.objective(preset), mirrorpo.objective(base)
    (penalty,), (expected,) = one.penalties, other.penalties
    assert penalty.divergence.name == "neural"
    assert (penalty.coefficient, penalty.estimator) == (expected.coefficient, expected.estimator) == (1e-4, "sampled")
    for part in ("region", "surrogate", "level", "advantage", "aggregation"):
        assert getattr(one, part) == getattr(other, part)
    own = mirrorpo.objective(preset, divergence={"name": "neural", "seed": 4}).penalties[0].divergence
    assert torch.equal(own.map.parameters, MirrorMap.random(4).parameters)


@pytest.mark.parametrize(("preset", "base"), [("nm_grpo_es", "nm_grpo"), ("nm_gspo_es", "nm_gspo")])
def test_the_evolved_presets_are_the_others_with_the_shipped_map(preset: str, base: str) -> None:
    one, other = mirrorpo.objective(preset), mirrorpo.objective(base)
    (penalty,), (expected,) = one.penalties, other.penalties
    assert (penalty.coefficient, penalty.estimator) == (expected.coefficient, expected.estimator)
    for part in ("region", "surrogate", "level", "advantage", "aggregation"):
        assert getattr(one, part) == getattr(other, part)
    shipped = mirrorpo.divergence("neural", path="builtin:embedded").map
    assert torch.equal(penalty.divergence.map.parameters, shipped.parameters)
    assert not torch.equal(shipped.parameters, MirrorMap.random(0).parameters)


def test_the_shipped_map_says_how_it_was_evolved() -> None:
    about = json.loads(resolve_map("builtin:embedded").read_text())["about"]
    assert about["command"].startswith("mirrorpo evolve ")
    assert about["recipe"]["task"]["name"] == "arithmetic"
    assert all(0 <= fitness <= 1 for fitness in about["fitness"])
    assert {"seed", "member", "comparison", "start"} <= set(about)


def test_an_unknown_shipped_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown map 'builtin:embeded'; did you mean 'builtin:embedded'"):
        mirrorpo.divergence("neural", path="builtin:embeded")


def changed(at: int, value: float) -> torch.Tensor:
    parameters = random_like(0)
    parameters[at] = value
    return parameters


def mapping(**changes: Any) -> dict[str, Any]:
    full = {name: random_like(0)[at].tolist() for name, at in SLICES.items()}
    return {key: value for key, value in (full | changes).items() if value != "missing"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": changed(0, -1e-9)}, r"v\[0\] \(group 'cube'\) must be in \[0, inf\), got -1e-09"),
        ({"parameters": changed(126 + 125, NAN)}, r"w\[125\] \(group 'exp'\) must be in \[0, inf\), got nan"),
        ({"parameters": changed(252 + 42, INF)}, r"b\[42\] \(group 'sqrt'\) must be in \[0, inf\), got inf"),
        ({"parameters": changed(379, -INF)}, r"c must be in \[0, inf\), got -inf"),
        ({"parameters": torch.ones(379)}, r"parameters must be 380 numbers, got shape \(379,\)"),
        ({"parameters": torch.ones(2, 190)}, r"got shape \(2, 190\)"),
        ({"parameters": torch.ones(380, dtype=torch.bool)}, "got dtype torch.bool"),
        ({"parameters": torch.ones(380, dtype=torch.complex64)}, "got dtype torch.complex64"),
        ({"parameters": "map.json"}, "parameters must be 380 numbers, got str"),
        ({"parameters": mapping(c="missing")}, "'c' is missing"),
        ({"parameters": mapping(d=1.0)}, "unknown parameters key 'd'"),
        ({"parameters": mapping(w=[0.1] * 3)}, r"parameters\['w'\] must be 126 numbers, got shape \(3,\)"),
        ({"parameters": mapping(b=["x"] * 126)}, r"parameters\['b'\] must be 126 numbers, got list"),
        ({"parameters": torch.zeros(380)}, "constant phi_inv"),
        ({"parameters": single("sqrt", 0.0, 1.0)}, "constant phi_inv"),
        ({"parameters": single("cube", 1.0, 1.0, v=0.0)}, "constant phi_inv"),
        ({"parameters": single("exp", 800.0, 0.0)}, "a slope of inf at 1"),
        ({"parameters": torch.full((380,), 1e200, dtype=torch.float64)}, "a slope of inf at 1"),
        ({"like": "kll"}, "unknown like 'kll'; did you mean 'kl'"),
        ({"like": ["kl"]}, "unknown like"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^63\), got -1"),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"seed": 1, "like": "kl"}, "takes one of seed, path, parameters, like, got seed and like"),
        ({"beta": 1.0}, "does not take 'beta'. Legal: like, parameters, path, seed"),
        ({"path": "no/such/map.json"}, "path 'no/such/map.json' cannot be read"),
    ],
)
def test_bad_sources_are_refused_with_a_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mirrorpo.divergence("neural", **options)


@pytest.mark.parametrize("scale", [0.0, -1.0, 11.0, NAN, "1"])
def test_a_bad_scale_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a number in"):
        MirrorMap.random(0, scale)
