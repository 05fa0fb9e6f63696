"""From one objective to verl's settings: the overrides for `python -m verl.trainer.main_ppo`.

Needs no verl; with verl 0.9.1 installed it also asks verl's own registry for the loss. Expected: a few seconds.

    python examples/verl_config.py
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import mirrorpo
from mirrorpo.integrations.verl_settings import overrides

SPEC = {
    "preset": "dapo",
    "region": {"name": "binary_kl", "radius": 0.05},
    "divergence": "js",
    "estimator": "score",
    "coefficient": 0.01,
}
objective = mirrorpo.objective_from(SPEC)
print(f"# {objective.describe()}")
settings = overrides(json.dumps(SPEC), objective)
print("\n".join(settings))

if find_spec("verl") is None:
    print("# verl is not installed here: these settings are all that it needs")
else:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    import mirrorpo.integrations.verl

    name = settings[0].partition("=")[2].strip("'")
    print(f"# verl's registry knows it: {callable(get_policy_loss_fn(name))}")
