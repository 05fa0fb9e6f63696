"""Your own generator: it reproduces the built-in ones, and what is no divergence is refused with the place shown."""

import math
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import BregmanDivergence, RatioDivergence
from naive import Case, logits
from precision import QUANTITIES, grid, reference

Generator = Callable[[torch.Tensor], torch.Tensor]

BREGMAN: dict[str, tuple[Case, Generator]] = {
    "kl": (Case("kl"), lambda x: x * x.log() - x),
    "prob_l2": (Case("prob_l2"), lambda x: x**2),
    "itakura_saito": (Case("itakura_saito"), lambda x: -x.log()),
    "beta": (Case("beta", {"beta": 1.5}), lambda x: x**1.5 / 0.75),
}
F: dict[str, tuple[Case, Generator]] = {
    "reverse_kl": (Case("reverse_kl"), lambda t: t * t.log()),
    "forward_kl": (Case("forward_kl"), lambda t: -t.log()),
    "js": (Case("js"), lambda t: (t * t.log() - (1 + t) * ((1 + t) / 2).log()) / 2),
    "tv": (Case("tv"), lambda t: (t - 1).abs() / 2),
    "chi2": (Case("chi2"), lambda t: (t - 1) ** 2),
    "hellinger": (Case("hellinger"), lambda t: 1 - t.sqrt()),
    "jeffreys": (Case("jeffreys"), lambda t: (t - 1) * t.log()),
    "alpha": (Case("alpha", {"alpha": 2.5}), lambda t: (t**2.5 - 2.5 * t + 1.5) / 3.75),
}
OWN = [
    *(pytest.param("bregman", case, fn, id=f"bregman {name}") for name, (case, fn) in BREGMAN.items()),
    *(pytest.param("f", case, fn, id=f"f {name}") for name, (case, fn) in F.items()),
]
# named by import path in the tests below: this module is found by that name
THIS = "divergences_custom_for_tests"


def square(x: torch.Tensor) -> torch.Tensor:
    return x**2


def pearson(t: torch.Tensor) -> torch.Tensor:
    return (t - 1) ** 2


def gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize(("family", "case", "fn"), OWN)
def test_your_own_function_reproduces_the_built_in_divergence(family: str, case: Case, fn: Generator) -> None:
    own, built_in = mirrorpo.divergence(fn, family=family), mirrorpo.divergence(case.name, **case.options)
    theta, ref, old = (logits(3, 7, seed=s) for s in (1, 2, 3))
    theta.requires_grad_()
    logq, logb = ref.log_softmax(-1), old.log_softmax(-1)
    for estimator in ("sampled", "weighted", "score"):
        one, other = (d.estimate(estimator, theta.log_softmax(-1), logq, logb) for d in (own, built_in))
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(gradient(one, theta), gradient(other, theta), rtol=1e-8, atol=1e-12)
    one, other = own.exact(theta, ref), built_in.exact(theta, ref)
    torch.testing.assert_close(one, case.divergence(theta.softmax(-1), ref.softmax(-1)), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradient(one, theta), gradient(other, theta), rtol=1e-8, atol=1e-12)
    tokens = torch.zeros(3, dtype=torch.long)
    one, other = (d.top_k(theta, ref, tokens, 2) for d in (own, built_in))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("family", "case", "fn"), OWN)
def test_your_own_function_is_right_to_five_digits_near_and_far(family: str, case: Case, fn: Generator) -> None:
    logp, logp_ref = grid(per_decade=1)
    near = (logp_ref > -25) & (logp > -30)
    logp, logp_ref = logp[near], logp_ref[near]
    d = mirrorpo.divergence(fn, family=family)
    x = logp.clone().requires_grad_()
    value = d.sampled(x, logp_ref)
    got = {"value": value.detach(), "gradient": gradient(value, x), "score": d.score(logp, logp_ref)}
    for i, (a, b) in enumerate(zip(logp.tolist(), logp_ref.tolist(), strict=True)):
        expected = reference(case, a, b)
        for quantity in QUANTITIES:
            assert got[quantity][i].item() == pytest.approx(float(expected[quantity]), rel=1e-5, abs=1e-37), (a, b)


@pytest.mark.parametrize(("family", "case", "fn"), OWN)
def test_your_own_function_stays_finite_at_the_extremes(family: str, case: Case, fn: Generator) -> None:
    d = mirrorpo.divergence(fn, family=family)
    extremes = torch.tensor([0.0, -1e-9, -1.0, -80.0, -1e4, -math.inf])
    logp, logp_ref = torch.cartesian_prod(extremes, extremes).unbind(-1)
    x = logp.clone().requires_grad_()
    for value in (d.sampled(x, logp_ref), d.weighted(x, logp_ref, logp)):
        assert value.isfinite().all()
        assert gradient(value, x).isfinite().all()
    assert d.score(logp, logp_ref).isfinite().all()


def test_the_kink_of_total_variation_is_kept() -> None:
    d = mirrorpo.divergence(F["tv"][1], family="f")
    logp = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    value = d.weighted(logp, torch.tensor([-1.001, -1.0, -0.999], dtype=torch.float64), logp.detach())
    t = torch.tensor([math.exp(0.001), 1.0, math.exp(-0.001)], dtype=torch.float64)
    torch.testing.assert_close(value.detach(), (t - 1).abs() / (2 * t), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(gradient(value, logp), torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which this module can be imported."""
    module = type(torch)(THIS)
    module.square, module.pearson, module.number = square, pearson, 3  # type: ignore[attr-defined]
    module.ready = mirrorpo.divergence("js")  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, THIS, module)
    return THIS


def test_an_import_path_names_a_function_or_a_divergence(importable: str) -> None:
    logp, logp_ref = logits(5, seed=1).log_softmax(-1), logits(5, seed=2).log_softmax(-1)
    for path, options, name in (
        (f"{importable}:square", {}, "prob_l2"),
        (f"{importable}:square", {"family": "bregman"}, "prob_l2"),
        (f"{importable}:pearson", {"family": "f"}, "chi2"),
        (f"{importable}:ready", {}, "js"),
    ):
        got = mirrorpo.divergence(path, **options).sampled(logp, logp_ref)
        torch.testing.assert_close(got, mirrorpo.divergence(name).sampled(logp, logp_ref), rtol=1e-9, atol=1e-14)
    penalty = mirrorpo.objective("grpo", divergence=f"{importable}:square", coefficient=0.1).penalties[0]
    assert penalty.divergence.name == f"{importable}:square"


def test_bad_import_paths_say_what_is_missing(importable: str) -> None:
    for path, words in (
        ("no_such_module_here:f", ("no_such_module_here", "cannot import")),
        (f"{importable}:missing", ("no attribute 'missing'", importable)),
        (f"{importable}:", ("module:attribute",)),
        (f"{importable}:number", ("function or a Divergence", "int")),
    ):
        with pytest.raises(ValueError, match=r"divergence") as caught:
            mirrorpo.divergence(path)
        for word in words:
            assert word in str(caught.value)


REFUSED: list[tuple[str, str, Generator, tuple[str, ...]]] = [
    ("bregman", "concave", lambda x: -(x**2), ("not convex", "slope falls from")),
    ("bregman", "a wave", lambda x: torch.sin(20 * x), ("not convex", "slope falls from", " at 0.")),
    ("bregman", "linear", lambda x: 3 * x, ("linear", "slope is 3", "zero")),
    ("bregman", "constant", lambda x: torch.ones_like(x), ("linear", "slope is 0")),
    ("bregman", "infinite", lambda x: 1 / (x - 1), ("value at 1 is", "finite on (0, 1]")),
    ("bregman", "nan", lambda x: torch.log(x - 0.5), ("value at 1e-08 is nan", "finite on (0, 1]")),
    ("bregman", "steep", lambda x: (x - 1e-8).sqrt(), ("slope at 1e-08 is inf",)),
    ("bregman", "shape", lambda x: (x**2).sum(), ("tensor of the same shape",)),
    ("f", "f(1)", lambda t: t**2, ("f(1) must be 0", "got 1")),
    ("f", "f(1) nan", lambda t: (t - 2).log(), ("f(1) must be 0", "nan")),
    ("f", "concave f", lambda t: t.log(), ("not convex", "slope falls from")),
    ("f", "linear f", lambda t: t - 1, ("linear", "slope is 1")),
    ("f", "overflow", lambda t: t.exp() - math.e, ("inf", "finite on (0, inf)")),
    ("f", "no tensor", lambda t: 0.0, ("tensor of the same shape", "float")),  # type: ignore[return-value, arg-type]
]


@pytest.mark.parametrize(("family", "why", "fn", "words"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_is_no_divergence_is_refused_with_the_place(
    family: str, why: str, fn: Generator, words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"generator '<lambda>'") as caught:
        mirrorpo.divergence(fn, family=family)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_small_wave_on_a_steep_generator_is_still_found() -> None:
    # -log x has slopes up to 1e8 near 0; the wave makes h'' = 1/x^2 - 5 sin(10 x + 2) negative near x = 0.58
    with pytest.raises(ValueError, match=r"not convex: its slope falls from .* at 0\.[56]"):
        mirrorpo.divergence(lambda x: -x.log() + 0.05 * torch.sin(10 * x + 2.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "bergman"}, ("family", "'bergman'", "did you mean 'bregman'")),
        ({"beta": 2.0}, ("does not take 'beta'", "family")),
    ],
)
def test_options_of_your_own_function_are_checked(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"family") as caught:
        mirrorpo.divergence(square, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entry points as an installed package would declare them."""
    found = {"scaled_kl": lambda scale=1.0: mirrorpo.divergence(lambda x: scale * (x * x.log() - x)), "broken": list}

    class Loaded(EntryPoint):
        def load(self) -> Any:
            return found[self.name]

    points = [Loaded(name, "somewhere:something", "mirrorpo.divergences") for name in found]
    monkeypatch.setattr("mirrorpo.divergences.entry_points", lambda *, group: points if "mirrorpo" in group else [])


@pytest.mark.usefixtures("installed")
def test_an_entry_point_adds_a_name_with_its_own_options() -> None:
    logp, logp_ref = logits(5, seed=1).log_softmax(-1), logits(5, seed=2).log_softmax(-1)
    expected = 3 * mirrorpo.divergence("kl").sampled(logp, logp_ref)
    got = mirrorpo.divergence("scaled_kl", scale=3.0).sampled(logp, logp_ref)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)
    with pytest.raises(ValueError, match=r"'broken' of mirrorpo.divergences gave a list"):
        mirrorpo.divergence("broken")
    with pytest.raises(ValueError, match=r"did you mean 'scaled_kl'"):
        mirrorpo.divergence("scaled_k1l")


def test_a_value_beyond_float32_is_held_and_not_infinite() -> None:
    d = mirrorpo.divergence(lambda t: t**4 - 4 * t + 3, family="f")
    x = torch.tensor([-1.0], requires_grad=True)
    value = d.sampled(x, torch.tensor([-32.0]))  # F(t)/t ~ t^3 = e^93
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["js", "chi2", "hellinger", "kl", "prob_l2", "itakura_saito"])
def test_a_definition_that_leaves_its_numerics_out_is_slower_and_right(name: str) -> None:
    full = mirrorpo.divergence(name)
    if isinstance(full, BregmanDivergence):
        lean: mirrorpo.Divergence = BregmanDivergence("mine", coordinate=full.coordinate)
    else:
        assert isinstance(full, RatioDivergence)
        lean = RatioDivergence("mine", form=full.form)
    assert lean.ordinary == 0.0  # every batch is guarded
    assert full.ordinary < 0.0
    theta, theta_ref = logits(40, 9, seed=1).float(), logits(40, 9, seed=2).float()
    logp, logq, logb = (x.log_softmax(-1) for x in (theta, theta_ref, logits(40, 9, seed=3).float()))
    for estimator in ("sampled", "weighted", "score"):
        one, other = (d.estimate(estimator, logp, logq, logb) for d in (full, lean))
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-9)
    for one, other in zip(full.over_vocabulary(logp, logq), lean.over_vocabulary(logp, logq), strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    low, high = (mirrorpo.trust_region(d, radius=0.03).ratio_bounds(logb) for d in (full, lean))
    torch.testing.assert_close(low, high)
