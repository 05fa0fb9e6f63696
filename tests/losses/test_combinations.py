"""Combinations of parts that mean nothing: each is refused by name, in one line."""

import random
from typing import Any

import pytest

import mirrorpo
from mirrorpo.divergences import DIVERGENCES, ESTIMATORS, LOGITS_ESTIMATORS, SUPPORTS
from mirrorpo.divergences.neural.generator import TARGETS
from mirrorpo.divergences.neural.map import SOURCES
from mirrorpo.losses import facts, keys
from mirrorpo.losses.presets import PRESETS, described
from mirrorpo.losses.regions import DIVERGENCE_REGIONS, REGIONS
from mirrorpo.losses.rules import ACTS, LEVELS, MASK_LEVELS, SIDES, SUBJECTS
from mirrorpo.losses.surrogates import SURROGATES

RATIO = {"name": "ratio", "epsilon_low": 0.2}
JS = {"divergence": "js", "coefficient": 0.1}
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"regions": [RATIO, {"name": "kl3", "radius": 0.1}]}, ("one entry with act 'clip' or 'soft'", "'ratio'", "'kl3'")),
    ({"regions": [RATIO, {"name": "chi2", "radius": 0.1, "act": "soft"}]}, ("one entry", "(clip)", "(soft)")),
    ({"regions": [{**RATIO, "act": "soft"}]}, ("act 'soft' needs a divergence", "'ratio'")),
    ({"regions": [{"name": "exact", "radius": 0.1, "act": "soft"}]}, ("act 'soft' needs a divergence", "'exact'")),
    ({"regions": [{"name": "chi2", "radius": 0.1, "act": "soft", "level": "sequence"}]}, ("act 'soft'", "'sequence'")),
    ({"regions": [{**RATIO, "act": "hard"}]}, ("unknown act 'hard'", "clip, mask, soft, truncate")),
    ({"regions": [{**RATIO, "act": "truncate"}] * 2}, ("one entry with act 'truncate'", "'ratio' and 'ratio'")),
    ({"regions": [{**RATIO, "act": "truncate"}], "behaviour": "sampler"}, ("needs behaviour 'old'", "'sampler'")),
    ({"regions": [{**RATIO, "act": "truncate", "side": "negative"}]}, ("'truncate'", "side 'both'")),
    ({"regions": [{**RATIO, "act": "truncate", "of": "policy"}]}, ("of must be 'old'", "'policy'")),
    ({"regions": [{**RATIO, "act": "truncate", "anchor": "old"}]}, ("another anchor than 'old'",)),
    ({"regions": [{"name": "none", "act": "truncate"}]}, ("'truncate' needs a region with bounds", "'none'")),
    ({"regions": [{**RATIO, "act": "truncate", "level": "mean_divergence"}]}, ("unknown level", "product")),
    ({"regions": [{**RATIO, "act": "mask", "level": "mean_divergence"}]}, ("a region with a radius", "'ratio'", "kl3")),
    ({"regions": [{"name": "kl3", "radius": 1, "level": "sum_divergence"}]}, ("unknown level 'sum_divergence'",)),
    (
        {"regions": [{"name": "exact", "radius": 1, "act": "mask", "level": "max_divergence"}]},
        ("a region at the sampled token", "'exact'"),
    ),
    ({"regions": [{**RATIO, "anchor": "uniform"}]}, ("anchor 'uniform' is for penalties",)),
    ({"regions": [{**RATIO, "anchor": "samplr"}]}, ("unknown anchor 'samplr'", "did you mean 'sampler'")),
    ({"regions": [{**RATIO, "side": "left"}]}, ("unknown side 'left'",)),
    (
        {"regions": [{"name": "exact", "radius": 0.1, "anchor": "sampler"}]},
        ("'exact'", "next-token logits", "'sampler'"),
    ),
    ({"regions": [{"name": "kl", "radius": 0.1, "act": "mask", "level": "product"}]}, ("level 'product'", "'kl'")),
    ({"regions": [{**RATIO, "of": "old"}]}, ("of 'old' is for masks",)),
    ({"regions": [{**RATIO, "of": "old", "act": "mask"}]}, ("of 'old' is for masks", "around 'old'")),
    ({"regions": [{"epsilon_low": 0.2}]}, ("needs the key 'name'",)),
    ({"regions": "ratio"}, ("regions must be a list",)),
    ({"regions": [RATIO], "radius": 0.1}, ("radius is given beside regions",)),
    ({"regions": [RATIO], "region": "kl3"}, ("region is given beside regions",)),
    ({"regions": [{**RATIO, "level": "sequence"}], "level": "token"}, ("level 'token' differs from level 'sequence'",)),
    ({"region": {**RATIO, "level": "sequence"}}, ("at level 'sequence'", "level 'token'")),
    ({"surrogate": "sigmoid", "regions": [RATIO]}, ("no effect", "'sigmoid'")),
    ({"surrogate": "geometric", "regions": [{"name": "chi2", "radius": 1, "act": "soft"}]}, ("'geometric'", "clip")),
    ({"surrogate": "none"}, ("'none' has no policy term", "give divergence")),
    ({"surrogate": "none", "penalties": [JS], "regions": [RATIO]}, ("no effect", "'none'")),
    ({"surrogate": "none", "penalties": [JS], "future_kl": True}, ("future_kl has no effect",)),
    (
        {"surrogate": "none", "penalties": [JS, {**JS, "placement": "advantage"}]},
        ("placement 'advantage' has no effect",),
    ),
    ({"surrogate": "none", "penalties": [JS], "level": "sequence"}, ("level 'sequence'", "'none'")),
    ({"behaviour": "teacher"}, ("unknown behaviour 'teacher'", "old, sampler")),
    ({"penalties": [{**JS, "anchor": "sampler", "estimator": "exact"}]}, ("'exact'", "sampler reports sampled tokens")),
    ({"penalties": [{**JS, "anchor": "uniform", "estimator": "top_k"}]}, ("'top_k'", "'uniform'")),
    ({"penalties": [{**JS, "placement": "advantage", "estimator": "sampled"}]}, ("'advantage'", "'score'")),
    # the same for every token of the vocabulary: its gradient has expectation 0
    ({"penalties": [{**JS, "placement": "advantage", "estimator": "top_k"}]}, ("'advantage'", "'score'", "'top_k'")),
    ({"penalties": [{**JS, "placement": "reward", "anchor": "old"}]}, ("'reward'", "'old'", "no effect")),
    ({"penalties": [{**JS, "placement": "rewards"}]}, ("unknown placement 'rewards'", "did you mean 'reward'")),
    ({"penalties": [{**JS, "support": "union"}]}, ("support 'union' has no effect",)),
    ({"penalties": [{**JS, "k": 3}]}, ("k has no effect",)),
    ({"penalties": [{**JS, "baseline": "mean"}]}, ("unknown baseline 'mean'", "exact, none")),
    ({"penalties": [{**JS, "baseline": "exact"}]}, ("baseline 'exact' has no effect", "'sampled'", "score")),
    (
        {"penalties": [{**JS, "baseline": "exact", "estimator": "score", "anchor": "sampler"}]},
        ("baseline 'exact' needs the anchor's next-token logits", "sampler reports sampled tokens"),
    ),
    ({"penalties": [{**JS, "coeficient": 3}]}, ("unknown penalty key 'coeficient'", "did you mean 'coefficient'")),
    ({"penalties": [{"divergence": "js"}]}, ("a penalty needs coefficient",)),
    ({"penalties": ["js"]}, ("a penalty must be a mapping", "'js'")),
    ({"penalties": JS}, ("penalties must be a list",)),
    ({"penalties": [JS], "estimator": "score"}, ("estimator is given beside penalties",)),
    ({"penalties": [{**JS, "placement": "reward"}], "advantage": "maxrl"}, ("'maxrl'", "rewards >= 0")),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_what_means_nothing_is_refused_by_name_in_one_line(overrides: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        mirrorpo.objective("dapo", **overrides)
    message = str(caught.value)
    with pytest.raises(ValueError, match=r"\w") as quick:  # the same words before torch is loaded
        described({"preset": "dapo", **overrides})
    assert str(quick.value) == message
    assert "\n" not in message
    for word in words:
        assert word in message, message


def _drawn(draw: random.Random) -> dict[str, Any]:
    """A preset with a few keys of random values, most of which do not go together."""
    names = [*facts.DIVERGENCE_FACTS, *facts.REGION_FACTS]

    def divergence() -> Any:
        option = draw.choice(
            [
                {},
                {"alpha": 0.5},
                {"beta": 9},
                {"seed": 1, "like": "kl"},
                {"seed": -1},
                {"like": "klx"},
                {"path": "no.json"},
            ]
        )
        name = draw.choice([*facts.DIVERGENCE_FACTS, *["neural"] * 3, "jss", "no_such_module:f"])
        return draw.choice([name, {"name": name, **option}])

    def region() -> dict[str, Any]:
        made = {"name": draw.choice(names)}
        for key, values in (
            ("radius", [0.1, 0, None]),
            ("epsilon_low", [0.2, -1, None]),
            ("epsilon_high", [0.3, 25]),
            ("act", [*ACTS, "clap"]),
            ("level", [*LEVELS, *MASK_LEVELS]),
            ("side", SIDES),
            ("of", SUBJECTS),
            ("anchor", facts.ANCHORS),
            ("divergence", ["js", "jss"]),
            ("k", [3, 0]),
        ):
            if draw.random() < (0.7 if key == "radius" else 0.2):
                made[key] = draw.choice([*values])
        return made

    def penalty() -> dict[str, Any]:
        made = {"divergence": divergence(), "coefficient": draw.choice([0.1, 0, -1])}
        for key, values in (
            ("estimator", keys.ESTIMATORS),
            ("anchor", facts.ANCHORS),
            ("placement", keys.PLACEMENTS),
            ("support", keys.SUPPORTS),
            ("baseline", keys.BASELINES),
            ("k", [3, 0]),
        ):
            if draw.random() < 0.3:
                made[key] = draw.choice([*values])
        return made

    values: dict[str, Any] = {
        "surrogate": [*facts.SURROGATE_FACTS],
        "regions": [[region() for _ in range(draw.randint(0, 2))]],
        "region": [draw.choice(names), region(), "none", False],
        "penalties": [[penalty() for _ in range(draw.randint(0, 2))]],
        "divergence": [divergence(), [divergence(), divergence()], "none"],
        "coefficient": [0.1, [0.1, 0.2], 0, -1],
        "radius": [0.1, 0],
        "epsilon_low": [0.1],
        "estimator": [*keys.ESTIMATORS, ["score", "exact"]],
        "placement": keys.PLACEMENTS,
        "behaviour": keys.BEHAVIOURS,
        "level": LEVELS,
        "advantage": [*keys.ADVANTAGE_NAMES, "rlo"],
        "aggregation": keys.AGGREGATION_NAMES,
        "anchor": [*facts.ANCHORS],
        "future_kl": [True, False, {"half_life": 0}],
        "control": [{"kind": "linear"}, {"kind": "adaptive"}],
        "dual_clip": [3.0, 0.5],
        "tau": [0.1],
        "k": [2],
    }
    chosen = draw.sample(sorted(values), draw.randint(1, 4))
    return {"preset": draw.choice([*PRESETS]), **{key: draw.choice([*values[key]]) for key in chosen}}


def test_the_check_without_torch_says_of_any_objective_what_building_it_says() -> None:
    draw, refused = random.Random(0), 0
    for _ in range(1500):
        spec = _drawn(draw)
        said = []
        for check in (described, mirrorpo.objective_from):
            try:
                made = check(spec)
            except ValueError as error:
                said.append(str(error))
            else:
                assert made is not None
                said.append(f"needs {sorted(made.needs)}, logits of {sorted(made.needs_logits_of)}, {made.placement}")
        assert said[0] == said[1], spec
        refused += not said[0].startswith("needs")
    assert 500 < refused < 1400


def test_the_facts_are_those_of_the_tables_and_of_what_is_built() -> None:
    assert set(facts.DIVERGENCE_FACTS) == set(DIVERGENCES)
    assert set(facts.REGION_FACTS) == set(REGIONS)
    assert {name: vars(known) for name, known in facts.SURROGATE_FACTS.items()} == {
        name: {key: value for key, value in vars(built).items() if key != "fn"} for name, built in SURROGATES.items()
    }
    assert (keys.ESTIMATORS, keys.LOGITS_ESTIMATORS, keys.SUPPORTS) == (ESTIMATORS, LOGITS_ESTIMATORS, SUPPORTS)
    assert (set(facts.MAP_SOURCES), set(facts.MAP_TARGETS)) == (set(SOURCES), set(TARGETS))
    for name, known in facts.DIVERGENCE_FACTS.items():
        entry = DIVERGENCES[name]
        assert (tuple(known.options), known.one_of) == (entry.options, entry.optional), name
        built = mirrorpo.divergence(name, **dict.fromkeys(known.options, 0.5))
        assert known.depends_on_token == built.depends_on_token, name
    for name, known in facts.REGION_FACTS.items():
        region = mirrorpo.trust_region(name, **dict.fromkeys(known.options, 0.1))
        for key in ("per_token", "needs_logits", "has_constraint", "is_ball"):
            assert getattr(known, key) == getattr(region, key), (name, key)
    for name in DIVERGENCE_REGIONS:
        options = {"radius": 0.1, **dict.fromkeys(facts.DIVERGENCE_FACTS[name].options, 0.5)}
        known, built = facts.region_facts(name, **options), mirrorpo.trust_region(name, **options)
        assert (known.per_token, known.is_ball) == (built.per_token, built.is_ball), name
