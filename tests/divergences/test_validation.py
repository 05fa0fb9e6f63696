"""Bad input raises ``ValueError`` whose text names the argument, the value received and what is legal."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import mirrorpo

NAN = float("nan")


def assert_refused(words: tuple[str, ...], call: Any) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("revers_kl", {}, ("unknown divergence 'revers_kl'", "did you mean 'reverse_kl'", "Legal: ", "itakura_saito")),
        ("KL", {}, ("unknown divergence 'KL'", "Legal: ", "kl")),
        ("beta", {}, ("'beta'", "needs the option 'beta'")),
        ("alpha", {}, ("'alpha'", "needs the option 'alpha'")),
        ("beta", {"beta": 5.0}, ("beta", "5.0", "[-2, 4]")),
        ("beta", {"beta": -2.5}, ("beta", "-2.5", "[-2, 4]")),
        ("beta", {"beta": NAN}, ("beta", "nan", "[-2, 4]")),
        ("beta", {"beta": "0.5"}, ("beta", "'0.5'", "number")),
        ("beta", {"beta": True}, ("beta", "True", "number")),
        ("alpha", {"alpha": 4.5}, ("alpha", "4.5", "[-4, 4]")),
        ("alpha", {"beta": 1.0}, ("needs the option 'alpha'",)),
        ("beta", {"beta": 1.0, "alpha": 1.0}, ("'beta'", "does not take 'alpha'", "Legal: beta")),
        ("kl", {"beta": 1.0}, ("'kl'", "does not take 'beta'", "no options")),
    ],
)
def test_names_and_options_of_divergences(name: str, options: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused(words, lambda: mirrorpo.divergence(name, **options))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("kl33", {"radius": 0.1}, ("unknown region 'kl33'", "did you mean 'kl3'", "binary_tv")),
        ("kl3", {}, ("'kl3'", "needs a radius in (0, 1e+06]")),
        ("reverse_kl", {}, ("'reverse_kl'", "needs a radius in (0, 1e+06]")),
        ("exact", {}, ("'exact'", "needs a radius")),
        ("k1", {"radius": 0.1}, ("'k1'", "reverse_kl")),
        ("none", {"radius": 0.1}, ("'none'", "does not take 'radius'", "no options")),
        ("ratio", {"radius": 0.1}, ("'ratio'", "does not take 'radius'", "epsilon_high, epsilon_low")),
        ("ratio", {"epsilon_low": -0.1}, ("epsilon_low", "-0.1", "[0, inf]")),
        ("ratio", {"epsilon_high": NAN}, ("epsilon_high", "nan")),
        ("exact", {"radius": 0.1, "k": 3}, ("'exact'", "does not take 'k'", "divergence, radius")),
        ("top_k", {"radius": 0.1, "k": 0}, ("k", ">= 1", "0")),
        ("top_k", {"radius": 0.1, "k": 2.5}, ("k", ">= 1", "2.5")),
        ("exact", {"radius": 0.1, "divergence": "tvv"}, ("unknown divergence 'tvv'", "did you mean 'tv'")),
        ("beta", {"radius": 0.1}, ("'beta'", "needs the option 'beta'")),
        ("kl", {"radius": 0.1, "beta": 1.0}, ("'kl'", "does not take 'beta'")),
    ],
)
def test_names_and_options_of_regions(name: str, options: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused(words, lambda: mirrorpo.trust_region(name, **options))


@pytest.mark.parametrize("radius", [0, 0.0, -0.1, NAN, float("inf"), 1e7, "0.1", None, True])
@pytest.mark.parametrize("name", ["kl3", "kl2", "binary_tv", "binary_kl", "exact", "top_k", "kl", "reverse_kl"])
def test_a_radius_must_be_a_positive_number(name: str, radius: Any) -> None:
    assert_refused(("radius", "(0, 1e+06]", repr(radius)), lambda: mirrorpo.trust_region(name, radius=radius))


@pytest.mark.parametrize("radius", [1, 1e-8, 1e6])
def test_the_ends_of_the_legal_range_and_integers_are_accepted(radius: float) -> None:
    low, high = mirrorpo.trust_region("kl3", radius=radius).ratio_bounds(torch.zeros(1))
    assert low < 1 < high


GOOD = torch.tensor([-1.0, -2.0])


@pytest.mark.parametrize("bad", [NAN, 0.5, float("inf")])
@pytest.mark.parametrize("argument", ["logp", "logp_ref", "logp_old"])
def test_log_probabilities_that_are_none_are_named(argument: str, bad: float) -> None:
    given = {"logp": GOOD, "logp_ref": GOOD, "logp_old": GOOD, argument: torch.tensor([-1.0, bad])}
    words = (argument + " must hold", "-inf to 0", str(bad))
    d = mirrorpo.divergence("kl")
    assert_refused(words, lambda: d.weighted(**given))
    assert_refused(words, lambda: d.surrogate(**given))
    if argument != "logp_old":
        del given["logp_old"]
        assert_refused(words, lambda: d.sampled(**given))
        assert_refused(words, lambda: d.score(**given))


def test_rounding_above_zero_is_accepted() -> None:
    value = mirrorpo.divergence("reverse_kl").sampled(torch.tensor([5e-4]), torch.tensor([0.0]))
    assert value.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, 0.5])
@pytest.mark.parametrize("argument", ["logp", "logp_ref", "logp_old"])
def test_the_objective_names_bad_log_probabilities_where_the_mask_keeps_them(argument: str, bad: float) -> None:
    given = {"logp": GOOD.view(1, 2), "logp_ref": GOOD.view(1, 2), "logp_old": GOOD.view(1, 2)}
    given[argument] = torch.tensor([[-1.0, bad]])
    objective = mirrorpo.objective("grpo")
    rest = {"advantages": torch.ones(1)}
    assert_refused((argument + " must hold", str(bad)), lambda: objective(**given, **rest, mask=torch.ones(1, 2)))
    assert objective(**given, **rest, mask=torch.tensor([[1, 0]])).loss.isfinite()


@pytest.mark.parametrize("estimator", ["samplde", "exact", "top_k"])
def test_estimate_names_what_it_cannot_do(estimator: str) -> None:
    words = {"samplde": ("unknown estimator", "did you mean 'sampled'")}.get(estimator, (estimator, "needs logits"))
    assert_refused(words, lambda: mirrorpo.divergence("kl").estimate(estimator, GOOD, GOOD, GOOD))


@pytest.mark.parametrize("k", [0, -1, True])
def test_k_must_be_a_positive_integer(k: int) -> None:
    theta = torch.zeros(3, 4)
    tokens = torch.zeros(3, dtype=torch.long)
    words = ("k must be an integer >= 1", repr(k))
    assert_refused(words, lambda: mirrorpo.divergence("kl").top_k(theta, theta, tokens, k))


# Shapes are checked by the library itself too: the annotations that catch them here are off for its users.
WITHOUT_ANNOTATIONS = """
import torch, mirrorpo
from mirrorpo.losses.aggregation import aggregate
x, y, row = torch.full((2, 3), -1.0), torch.full((2, 4), -1.0), torch.full((1, 3), -1.0)
d, grpo, mask, a = mirrorpo.divergence("kl"), mirrorpo.objective("grpo"), torch.ones(2, 3), torch.ones(2)
CALLS = {
    "logp_ref has shape (2, 4) but logp has shape (2, 3)": lambda: d.sampled(x, y),
    "logp_old has shape (1, 3) but logp has shape (2, 3)": lambda: d.weighted(x, x, row),
    "logp must be a floating tensor": lambda: d.sampled(x.long(), x),
    "logits_ref has a vocabulary of 4, logits of 3": lambda: d.exact(x, y),
    "logits_ref has shape (1, 3), logits (2, 3)": lambda: d.exact(x, row),
    "tokens has shape (3,), legal: (2,)": lambda: d.top_k(x, x, torch.zeros(3).long()),
    "k must be an integer >= 1, got 1.5": lambda: d.top_k(x, x, torch.zeros(2).long(), 1.5),
    "mask has shape (2, 4), legal: (2, 3)": lambda: aggregate(x, y, "token_mean"),
    "logp and mask must have the same shape": lambda: grpo(logp=x, logp_ref=x, advantages=a, mask=torch.ones(2, 4)),
    "logp_old must have the shape of logp, (2, 3), got (1, 3)":
        lambda: grpo(logp=x, logp_ref=x, logp_old=row, advantages=a, mask=mask),
    "logp_ref must have the shape of logp, (2, 3), got (1, 3)":
        lambda: grpo(logp=x, logp_ref=row, advantages=a, mask=mask),
    "weight must have shape (B, 1) or (B, T), got (2,)":
        lambda: grpo(logp=x, logp_ref=x, advantages=a, mask=mask, weight=a),
    "advantages must have shape (B,), (B, 1) or (B, T), got (3,)":
        lambda: grpo(logp=x, logp_ref=x, advantages=torch.ones(3), mask=mask),
    "rewards must have shape (B,)": lambda: mirrorpo.advantages(x, 2),
    "group_size must be an integer >= 2": lambda: mirrorpo.advantages(a, 2.0),
    "divergence 'int' must be a function or a Divergence, got int": lambda: mirrorpo.divergence(3),
}
for text, call in CALLS.items():
    try:
        call()
    except ValueError as error:
        assert text in str(error), (text, str(error))
    else:
        raise AssertionError("accepted: " + text)
"""


def test_shapes_are_checked_without_the_annotations_too() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MIRRORPO_CHECK_SHAPES"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ANNOTATIONS], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
