"""Combinations of parts that mean nothing: each is refused by name, in one line."""

from typing import Any, get_args

import pytest

import mirrorpo
from mirrorpo.divergences import ESTIMATORS
from mirrorpo.losses.anchors import ANCHORS
from mirrorpo.losses.keys import _NAMES_OF_PENALTIES, _NAMES_OF_REGIONS
from mirrorpo.losses.penalties import BASELINES, PLACEMENTS
from mirrorpo.losses.rules import ACTS, LEVELS, MASK_LEVELS, SIDES

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


def test_the_names_that_the_command_line_knows_without_torch_are_those_of_the_tables() -> None:
    tables = {
        "act": ACTS,
        "anchor": ANCHORS,
        "baseline": BASELINES,
        "estimator": ESTIMATORS,
        "level": (*LEVELS, *MASK_LEVELS),
        "placement": PLACEMENTS,
        "side": SIDES,
    }
    assert {key: set(get_args(names)) for key, names in (_NAMES_OF_PENALTIES | _NAMES_OF_REGIONS).items()} == {
        key: set(names) for key, names in tables.items()
    }


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_what_means_nothing_is_refused_by_name_in_one_line(overrides: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        mirrorpo.objective("dapo", **overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
