"""`make gpu`: what the library does on an accelerator, measured in one go without a network, and its page of results.

``python scripts/gpu.py`` runs every part in a process of its own with a time limit, keeps the text of what fails, and
writes ``docs/results/gpu/results.json`` and ``README.md`` after each part, so that nothing is lost when time is up.
``--quick`` takes at most 280 seconds, else nine minutes. ``--device cpu`` is a dry run on small sizes: ``build/gpu/``.

A machine without a package index: ``python scripts/gpu.py --fetch FOLDER`` downloads there where there is one what a
machine with torch, numpy, scipy and pandas lacks (Linux on x86-64, Python 3.12, versions of ``constraints.txt``), and
``--wheels FOLDER`` installs it beside the machine's packages first. The standard library is enough to start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(os.environ.get("GPU_SITE", ROOT / "build" / "gpu_site"))
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014", "manylinux1")
# A version stands here where constraints.txt has none, or one without a wheel.
WHEELS = {
    **dict.fromkeys(("transformers", "trl", "accelerate", "datasets", "huggingface_hub", "tokenizers"), ""),
    **dict.fromkeys(("safetensors", "math-verify", "latex2sympy2_extended", "pydantic", "typer", "rich"), ""),
    **dict.fromkeys(("peft", "gguf", "liger-kernel", "beartype", "pytest"), ""),
    "antlr4-python3-runtime": "4.13.2",
    "pydantic_core": "2.50.4",
    "annotated-types": "0.8.0",
    "typing-inspection": "0.4.5",
    "typing_extensions": "4.16.0",
    "dill": "0.4.1",
    "multiprocess": "0.70.19",
    "fsspec": "2026.9.0",
    "hf-xet": "1.8.0",
    "httpx2": "2.16.2",
    "httpcore2": "2.16.2",
    "truststore": "0.10.5",
    "click": "8.5.1",
    "shellingham": "1.5.4",
    "annotated-doc": "0.0.7",
    "regex": "2026.11.19",
    "tqdm": "4.70.1",
    "xxhash": "4.1.0",
}
_BENCH = "benchmarks/{}.py --quick --json --device DEVICE"
# Name, arguments of python, seconds with and without --quick, which add up to the whole: what a part leaves is the
# next one's. The most valuable first.
PARTS: tuple[tuple[str, str, int, int], ...] = (
    ("paths", "benchmarks/gpu.py paths --device DEVICE QUICK", 42, 70),
    ("sweep", "benchmarks/gpu.py sweep --device DEVICE QUICK", 44, 75),
    ("triton", "benchmarks/gpu.py triton --device DEVICE QUICK", 32, 65),
    ("train", "benchmarks/ten_steps.py --device DEVICE QUICK", 70, 150),
    ("head", _BENCH.format("head"), 20, 40),
    ("policy_step", _BENCH.format("policy_step"), 20, 40),
    ("exact", _BENCH.format("exact"), 20, 40),
    ("mirror_map", _BENCH.format("mirror_map"), 15, 25),
    ("machine", "-m mirrorpo doctor --json", 12, 25),
)


def fetch(folder: Path) -> None:
    """Downloads the wheels, this project's own among them; none brings the packages that it needs."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    wanted = [f"{name}=={version or pinned[name]}" for name, version in WHEELS.items()]
    pip = [sys.executable, "-m", "pip"]
    platforms = [part for tag in GLIBC for part in ("--platform", f"{tag}_x86_64")]
    only = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([*pip, "download", "--quiet", *only, "--dest", str(folder), *wanted], check=True)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")


def install(folder: Path) -> None:
    """Puts the wheels into a folder of their own, before the machine's packages on the path."""
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(SITE)]
    wheels = sorted(map(str, folder.glob("*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)


def environment() -> dict[str, str]:
    """Of the parts: this source first, then the wheels if there are any, no hub."""
    path = [str(ROOT / "src"), str(SITE), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def run_part(arguments: str, seconds: float) -> dict[str, Any]:
    """The JSON documents that a part prints, or how it failed."""
    started = time.monotonic()
    found: dict[str, Any] = {"command": f"python {arguments}"}
    process = subprocess.Popen(
        [sys.executable, *arguments.split()],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        found["error"] = f"stopped after {seconds:.0f} s"
    found["seconds"] = round(time.monotonic() - started, 1)
    documents, lines = [], []
    for line in out.splitlines():
        try:
            documents.append(json.loads(line))
        except ValueError:
            lines.append(line)
    if not documents:  # one document over several lines
        try:
            documents = [json.loads(out)]
        except ValueError:
            found["output"] = lines[-20:]
    merged = {key: value for document in documents if isinstance(document, dict) for key, value in document.items()}
    apart = sum(len(document) if isinstance(document, dict) else 1 for document in documents)
    found["result"] = merged if len(merged) == apart else documents
    if "error" in found and lines and not documents:
        found["output"] = lines[-20:]
    if process.returncode and "error" not in found:
        found["error"] = f"exit status {process.returncode}"
    if "error" in found and not (documents and found["error"].startswith("stopped")):
        found["stderr"] = err.splitlines()[-25:]
    return found


def versions() -> dict[str, Any]:
    """Card, driver, packages and commit, from a process of its own."""
    code = (
        "import json,platform,torch;from importlib.metadata import version as v;"
        "c=torch.cuda.is_available();n='torch triton transformers trl accelerate numpy mirrorpo'.split();f={}\n"
        "for k in n:\n try: f[k]=v(k)\n except Exception: f[k]=None\n"
        "f['python']=platform.python_version();f['cuda']=torch.version.cuda;"
        "f['card']=torch.cuda.get_device_name() if c else None;"
        "f['memory GiB']=round(torch.cuda.get_device_properties(0).total_memory/2**30,1) if c else None;"
        "f['TF32 in products']=torch.backends.cuda.matmul.allow_tf32;print(json.dumps(f))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.splitlines()[-5:]}
    return json.loads(done.stdout.splitlines()[-1])


def page(results: dict[str, Any]) -> str:
    """The results as a page of a few tables; results.json has every number."""
    machine, parts = results["versions"], results["parts"]
    card = machine.get("card") or "no GPU: a dry run on a CPU, whose figures say nothing about one"
    lines = [
        "# On a GPU",
        "",
        f"Written by `make gpu{' QUICK=1' if results['quick'] else ''}`, {results['date']}: {card}; "
        + ", ".join(f"{key} {value}" for key, value in machine.items() if key != "card" and value is not None)
        + ". Every number is in [results.json](results.json). Times are medians, taken when the device has finished; "
        "errors are against float64 on the same rounded weights. What it shows: [performance](../../performance.md).",
        "",
        *_rows(("part", "command", "seconds", ""), [_outcome(name, parts.get(name)) for name, *_ in PARTS]),
    ]
    for name, tables in TABLES.items():
        if parts.get(name, {}).get("result"):
            lines += tables(parts[name]["result"])
    return "\n".join(lines).rstrip() + "\n"


def _outcome(name: str, part: dict[str, Any] | None) -> tuple[Any, ...]:
    if part is None:
        return name, "", "", "not run"
    remarks = (part.get("error", ""), part.get("remark", ""))
    return name, f"`{part['command']}`", part["seconds"], "; ".join(filter(None, remarks))


def _rows(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return ["|" + "|".join(f" {_shown(cell)} " for cell in row) + "|" for row in lines] + [""]


def _shown(value: Any) -> str:
    shown = "" if value is None else f"{value:.3g}" if isinstance(value, float) and value < 100 else str(value)
    if isinstance(value, float) and value >= 100:
        shown = f"{value:.0f}"
    return shown.replace("|", "\\|").replace("\n", " ")


def _get(value: Any, *keys: str) -> Any:
    """What lies there, or None: a part may have stopped, or a kernel been refused."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _paths(result: dict[str, Any]) -> list[str]:
    keys = ("loss error", "log-probability error, rms", "gradient error, relative", "ms", "peak MiB")
    steps = [
        (dtype, way, *(_get(result, dtype, way, key) for key in keys))
        for dtype in ("float32", "bfloat16", "float16")
        for way in ("padded", "packed")
    ]
    kernels = [
        (key.removeprefix("attention, "), way, *(_get(found, errors, of) for of in ("value", "query", "key")),
         _get(found, way, "ms"), _get(found, way, "peak MiB"))
        for key, found in result.items() if key.startswith("attention")
        for way, errors in (("ours", "errors"), ("one masked attention", "errors of the mask"))
    ]  # fmt: skip
    head = ("dtype", "rows", "loss error", "log-probabilities, rms", "gradient, relative", "ms", "peak MiB")
    return [
        "## Packed against padded rows",
        "",
        f"A policy step of a random model: {_get(result, 'shape')}.",
        "",
        *_rows(head, steps),
        "The attention of one packed row alone, relative errors of the value and of two gradients:",
        "",
        *_rows(("dtype", "form", "value", "query", "key", "ms", "peak MiB"), kernels),
    ]


def _sweeps(result: dict[str, Any]) -> list[str]:
    rows = [
        (place, *(_get(f, e, of) for e in ("errors", "errors of full logits") for of in ("hidden", "weight")),
         *(_get(f, way, of) for of in ("ms", "peak MiB") for way in ("ours", "full logits")))
        for place, f in result.items()
    ]  # fmt: skip
    head = ("from hidden states to gradients", "error, hidden", "weight", "full logits' error, hidden", "weight",
            "ms", "ms, full logits", "peak MiB", "MiB, full logits")  # fmt: skip
    return ["## The sweep over logits, by torch", "", *_rows(head, rows)]


def _triton(result: dict[str, Any]) -> list[str]:
    alone = [
        (place.removeprefix("sweep alone, "), _get(found, "ms"), _get(found, "GB/s"))
        for place, found in result.items() if place.startswith("sweep alone")
    ]  # fmt: skip
    whole = [
        (place, *(_get(f, errors, "weight") for errors in ("errors", "errors, triton")),
         *(_get(f, way, of) for of in ("ms", "peak MiB") for way in ("ours", "triton")), _get(f, "ours over triton"))
        for place, f in result.items() if not place.startswith("sweep alone")
    ]  # fmt: skip
    head = ("whole, with the products", "torch, weight's error", "triton's", "ms", "ms, triton", "peak MiB",
            "MiB, triton", "time over triton's")  # fmt: skip
    return [
        "## The sweep over logits, by Triton",
        "",
        *_rows(head, whole),
        "The two kernels alone. GB/s counts two reads and one write of an entry: a cache may serve the second read.",
        "",
        *_rows(("logits", "ms", "GB/s"), alone),
    ]


def _train(result: dict[str, Any]) -> list[str]:
    phases = list(_get(next(iter(result.values())), "seconds a step") or {})
    more = ("tokens per second", "peak MiB")
    rows = [
        (name, *(_get(found, "seconds a step", phase) for phase in phases), *(_get(found, key) for key in more))
        for name, found in result.items()
    ]
    return ["## Ten training steps", "", "Seconds a step.", "",
            *_rows(("trainer", *phases, "tokens/s", "peak MiB"), rows)]  # fmt: skip


def _head(result: dict[str, Any]) -> list[str]:
    rows = [
        (shape, contender, 1e3 * seconds, *(_get(found, of, contender) for of in ("time over mirrorpo", "peak MiB")))
        for key, shape in result["shapes"].items()
        for found in (result["values"][key],)
        for contender, seconds in found["seconds"].items()
    ]
    head = ("from hidden states to gradients, float32", "contender", "ms", "time over mirrorpo", "peak MiB")
    return ["## Head and objective beside others", "", *_rows(head, rows)]


def _policy_steps(result: dict[str, Any]) -> list[str]:
    keys = ("x TRL, packed", "x TRL, padded", "tokens/s, TRL", "tokens/s, packed")
    rows = [(shape, *(found[key] for key in keys)) for shape, found in result["values"].items()]
    return ["## Policy steps of a small model beside TRL", "", *_rows(("shape", *keys), rows)]


TABLES = {
    "paths": _paths,
    "sweep": _sweeps,
    "triton": _triton,
    "train": _train,
    "head": _head,
    "policy_step": _policy_steps,
}


def kept(out: Path, versions: dict[str, Any]) -> dict[str, Any]:
    """The parts that an earlier run on the same card with the same versions has left there."""
    try:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found["parts"] if found.get("versions") == versions else {}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--quick", action="store_true", help="at most 280 seconds")
    made.add_argument("--seconds", type=float, help="in all; default 530, with --quick 275")
    made.add_argument(
        "--only",
        nargs="+",
        choices=[name for name, *_ in PARTS],
        help="these parts; others that are there from the same card and versions stay",
    )
    made.add_argument("--out", type=Path, help="default docs/results/gpu, with --device cpu build/gpu")
    made.add_argument("--fetch", type=Path, metavar="FOLDER", help="download the wheels, and no more")
    made.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these first")
    args = made.parse_args()
    if args.fetch:
        fetch(args.fetch)
        return
    ends = time.monotonic() + (args.seconds or (275 if args.quick else 530))
    if args.wheels:
        install(args.wheels)
    args.out = args.out or ROOT / ("docs/results/gpu" if args.device == "cuda" else "build/gpu")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": args.device,
        "quick": args.quick,
        "versions": versions(),
        "parts": {},
    }
    if args.only:
        results["parts"] = kept(args.out, results["versions"])
    # `make bench` measures the other pages' benchmarks on a CPU, in minutes: here they run only if they are asked for
    chosen = [
        (name, arguments, quick if args.quick else whole)
        for name, arguments, quick, whole in PARTS
        if (name in args.only if args.only else args.device == "cuda" or "--json --device" not in arguments)
    ]
    for i, (name, arguments, limit) in enumerate(chosen):
        left = ends - time.monotonic()
        if left < 5:
            continue
        typed = arguments.replace("DEVICE", args.device).replace("QUICK", "--quick" if args.quick else "").strip()
        later = sum(seconds for *_, seconds in chosen[i + 1 :])
        results["parts"][name] = part = run_part(typed, min(left, max(limit, left - later)))
        print(f"{name}: {part['seconds']} s{', ' + part['error'] if 'error' in part else ''}", flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (args.out / "README.md").write_text(page(results), encoding="utf-8")
    failed = [name for name, part in results["parts"].items() if "error" in part and name != "machine"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the other parts are in {args.out}")


if __name__ == "__main__":
    main()
