"""How does a packed policy step grow? Its time at 1, 2, 4 and 8 times the tokens, V and G, and the exponent (5 min).

Tokens: more groups in the micro-batch. V: a larger vocabulary. G: more completions of a prompt. The exponent is the
slope of log time over log factor, by least squares over the four sizes: 1 is linear, less is better.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from mirrorpo.training import MirrorTrainer
from policy_model import Shape, build, micro_batch, save_model, step_of
from timing import interleaved, parser

FACTORS = (1, 2, 4, 8)
BASE = Shape(prompt=100, shortest=40, longest=200, group=4, groups=1, vocabulary=4_000)
AXES = {
    "tokens": [replace(BASE, groups=factor) for factor in FACTORS],
    "V": [replace(BASE, vocabulary=4_000 * factor) for factor in FACTORS],
    "G": [replace(BASE, group=4 * factor) for factor in FACTORS],
}


def exponent(times: list[float]) -> float:
    """Slope of log time over log factor."""
    x = [math.log(factor) for factor in FACTORS]
    y = [math.log(seconds) for seconds in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, default=128, help="hidden size of the model (default 128)")
    options.add_argument("--layers", type=int, default=4, help="layers of the model (default 4)")
    args = options.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for axis, shapes in AXES.items():
            steps = {}
            for factor, shape in zip(FACTORS, shapes, strict=True):
                model = save_model(folder, shape.vocabulary, args.hidden, args.layers)
                steps[f"{factor}x"] = step_of(build(MirrorTrainer, model, folder, shape), micro_batch(shape))
            medians = interleaved(steps, rounds=3 if args.quick else 9, warmup=1)
            results[axis] = {"exponent": round(exponent(list(medians.values())), 3)} | {
                f"seconds at {factor}": round(seconds, 4) for factor, seconds in medians.items()
            }
            if not args.json:
                print(f"{axis:<8}" + "  ".join(f"{key} {value}" for key, value in results[axis].items()), flush=True)
    if args.json:
        print(json.dumps({"title": "scaling", "threads": torch.get_num_threads(), "values": results}))


if __name__ == "__main__":
    main()
