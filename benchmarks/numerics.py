"""How exact is the float32 path? Prints the worst relative error of every divergence against 60 digits, and where.

Expected: every number below 1e-5 (in fact near 1e-7, the spacing of float32). Takes about 10 s on one CPU core.

    python benchmarks/numerics.py [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the naive formulas live with the tests

import precision
from naive import CASES


def measure(per_decade: int) -> dict[str, dict[str, dict[str, float]]]:
    """Worst errors by divergence and quantity."""
    logp, logp_ref = precision.grid(per_decade)
    return {
        str(case): {key: asdict(error) for key, error in precision.worst(case, logp, logp_ref).items()}
        for case in CASES
    }


def main() -> int:
    """Prints the table; 1 if any error exceeds 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--per-decade", type=int, default=4, help="gaps |logp - logp_ref| per decade (default 4)")
    parser.add_argument("--quick", action="store_true", help="one gap per decade")
    arguments = parser.parse_args()
    results = measure(1 if arguments.quick else arguments.per_decade)
    if arguments.json:
        print(json.dumps(results))
    else:
        print(f"{'divergence':24}" + "".join(f"{key:>12} at (logp, logp_ref)     " for key in precision.QUANTITIES))
        for name, row in results.items():
            cells = (f"{e['relative']:12.2e} ({e['logp']:10.4g}, {e['logp_ref']:10.4g})" for e in row.values())
            print(f"{name:24}" + "  ".join(cells))
    return int(any(error["relative"] > 1e-5 for row in results.values() for error in row.values()))


if __name__ == "__main__":
    sys.exit(main())
