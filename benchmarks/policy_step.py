"""What does a policy step cost? Forward, loss and backward against TRL's, over shapes of micro-batches (20 min).

TRL's ``_compute_loss`` and ours, padded and packed, take turns on the same weights and the same completions. Ratios are
tokens per second over TRL's: more is better. ``--quick``: the shape of the target only, few rounds (2 min).
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from policy_model import Shape, contenders, micro_batch, save_model, step_of
from timing import interleaved, parser

BASE = Shape()
SHAPES = [
    BASE,
    replace(BASE, prompt=16),
    replace(BASE, prompt=400),
    replace(BASE, group=4),
    replace(BASE, group=16),
    replace(BASE, shortest=1),
    replace(BASE, shortest=200),
    replace(BASE, shortest=16, longest=32, groups=4),
    # nothing to share and nothing padded: what packing costs
    replace(BASE, prompt=16, shortest=200, group=2, groups=4),
]
VOCABULARIES = (1_000, 32_000)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, default=256, help="hidden size of the model (default 256)")
    options.add_argument("--layers", type=int, default=6, help="layers of the model (default 6)")
    options.add_argument("--shape", type=int, help="only this one of the shapes, from 0")
    options.add_argument("--vocabulary", type=int, help="only this vocabulary")
    options.add_argument("--processor-time", action="store_true", help="of one thread: for a busy machine")
    args = options.parse_args()
    clock = time.perf_counter
    if args.processor_time:
        torch.set_num_threads(1)
        clock = time.process_time
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    shapes = SHAPES[:1] if args.quick else SHAPES
    if args.shape is not None:
        shapes = [SHAPES[args.shape]]
    vocabularies = VOCABULARIES if args.vocabulary is None else (args.vocabulary,)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in (replace(shape, vocabulary=v) for v in vocabularies for shape in shapes):
            model = save_model(folder, shape.vocabulary, args.hidden, args.layers)
            inputs = micro_batch(shape)
            trainers = contenders(model, folder, shape, args.device)
            steps = {kind: step_of(trainer, inputs) for kind, trainer in trainers.items()}
            check(steps)
            medians = interleaved(steps, rounds=3 if args.quick else 7, warmup=1, clock=clock)
            speed = {kind: medians["TRL"] / seconds for kind, seconds in medians.items()}
            tokens = int(inputs["completion_mask"].sum())
            results[str(shape)] = {
                "x TRL, packed": round(speed["mirrorpo"], 3),
                "x TRL, padded": round(speed["mirrorpo, padded"], 3),
                "tokens/s, TRL": round(tokens / medians["TRL"]),
                "tokens/s, packed": round(tokens / medians["mirrorpo"]),
            }
            if not args.json:
                line = "  ".join(f"{key} {value:,}" for key, value in results[str(shape)].items())
                print(f"{shape!s:<62}  {line}", flush=True)
    if args.json:
        print(json.dumps({"title": "policy step", "threads": torch.get_num_threads(), "values": results}))


def check(steps: dict[str, object]) -> None:
    """All contenders compute the same loss: else the comparison means nothing."""
    losses = {name: step().item() for name, step in steps.items()}  # pyright: ignore
    worst = max(abs(loss - losses["TRL"]) for loss in losses.values())
    if worst > 1e-4 * max(1.0, abs(losses["TRL"])):
        raise SystemExit(f"the losses differ: {losses}")


if __name__ == "__main__":
    main()
