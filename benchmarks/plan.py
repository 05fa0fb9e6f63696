"""What a plan says of memory on a CPU, against the peak of a process that does two such steps.

``python benchmarks/plan.py --model FOLDER``. Completions are made up, each of the full length, as the plan takes them;
two steps, because the optimiser's averages are there from the second one on.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

VARIANTS = {"full": (), "LoRA": ("model.lora.r=16",), "bfloat16": ("model.dtype=bfloat16",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--recipe", default="smollm2/words_dr_grpo")
    parser.add_argument("--variant", choices=[*VARIANTS])
    parser.add_argument("--quick", action="store_true")  # has nothing to leave out
    given = parser.parse_args()
    if given.variant:
        _two_steps(given.recipe, [f"model.path={given.model}", *VARIANTS[given.variant]])
        return
    print("| weights | planned, GB | measured, GB | planned over measured |\n|---|---|---|---|")
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--model", given.model, "--recipe", given.recipe, "--variant", variant]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        planned, measured = json.loads(done.stdout.splitlines()[-1])
        print(f"| {variant} | {planned / 1e9:.2f} | {measured / 1e9:.2f} | {planned / measured:.2f} |", flush=True)


def _two_steps(recipe: str, overrides: list[str]) -> None:
    import torch

    from mirrorpo.cli.output import recipe_file
    from mirrorpo.config.train import load_recipe
    from mirrorpo.training.plan import plan
    from mirrorpo.training.setup import build_trainer, prepare

    loaded = load_recipe(recipe_file(recipe), ["train.steps=2", "eval.problems=0", *overrides])
    planned = plan(loaded)["memory"]["total"]
    length = loaded.train.max_completion_length
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(prepare(loaded), Path(folder), [])
        trainer.rollouts.complete = lambda model, prompts: torch.randint(100, 200, (len(prompts), length)).tolist()
        trainer.reward_funcs = [lambda completions, **_: [float(i % 2) for i in range(len(completions))]]
        trainer.args.save_strategy = "no"
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
    print(json.dumps([planned, peak]))


if __name__ == "__main__":
    main()
