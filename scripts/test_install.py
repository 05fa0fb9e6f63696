"""Installation tests: the wheel in fresh virtual environments, as users of each kind install it.

``core``   ``pip install mirrorpo``: objectives, regions, kernels, the adapters' command; no transformers, no TRL.
``verl``   ``pip install mirrorpo verl==0.9.1`` with every requirement of verl resolved by pip: verl's policy loss runs
           ours, and its own Ray workers and FSDP2 engine take two steps with it (tests/real/verl_engine.py). Nothing is
           left out: all of them install on a CPU.
``train``  ``pip install 'mirrorpo[train]'`` in an empty folder, where ``core`` was tried before if it is wanted too, as
           its error says: list, train a shipped recipe by name, eval, report, doctor. Then with DeepSpeed beside it:
           accelerate's FSDP2 plug-in and ZeRO train, save and resume (tests/real/sharded.py; SHARDED names the ways, by
           default all).

``python scripts/test_install.py [core] [verl] [train]``; all of them by default. Downloads are cached by pip. Each
prints one line; the exit status is 1 if one fails. They run side by side: most of their time is spent on downloads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
SMALL = ("train.steps=2", "train.prompts_per_step=4", "train.group_size=4", "eval.problems=8")

CORE = """
import importlib.util, torch, mirrorpo, mirrorpo.kernels
for name in ("transformers", "trl", "pydantic", "typer", "scipy", "accelerate"):
    assert importlib.util.find_spec(name) is None, name
logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
for preset in ("grpo", "dapo", "atr_grpo", "prob_l2_grpo"):
    out = mirrorpo.objective(preset)(
        logp=logp, logp_old=logp.detach() - 0.5, logp_ref=logp.detach() - 0.1, advantages=torch.tensor([1.0]),
        mask=torch.ones(1, 2), max_completion_length=2,
    )
    out.loss.backward()
assert logp.grad.isfinite().all()
low, high = mirrorpo.trust_region("kl3", radius=0.03).ratio_bounds(logp.detach())
assert (low < 1).all() and (high > 1).all()
hidden, head = torch.randn(3, 4), torch.randn(5, 4)
found, _ = mirrorpo.kernels.token_logps(hidden, mirrorpo.kernels.Head(head), torch.tensor([0, 1, 4]))
wanted = (hidden @ head.T).log_softmax(-1)[range(3), [0, 1, 4]]
assert torch.allclose(found, wanted, atol=1e-5)
try:
    from mirrorpo.training import MirrorTrainer
except ImportError as error:
    assert "pip install 'mirrorpo[train]'" in str(error), error
else:
    raise AssertionError("trained without the extra")
"""

VERL = """
import torch, mirrorpo, verl
import verl.trainer.ppo.core_algos as core
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

name = "mirrorpo:{preset: grpo, coefficient: 0, region: {name: kl3, radius: 0.03}}"
config = FSDPActorConfig(
    strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=2, loss_agg_mode="seq-mean-token-mean",
    policy_loss=PolicyLossConfig(loss_mode=name),
)
old, mask = torch.full((2, 3), -1.5), torch.ones(2, 3)
advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)

def gradient(loss_of):
    logp = (old + torch.tensor([0.4, -0.4, 0.01])).requires_grad_()
    loss = loss_of(logp)
    loss.backward()
    return loss.item(), logp.grad

theirs = gradient(lambda logp: core.get_policy_loss_fn(name)(
    old_log_prob=old, log_prob=logp, advantages=advantages, response_mask=mask,
    loss_agg_mode="seq-mean-token-mean", config=config,
)[0])
objective = mirrorpo.objective("grpo", coefficient=0, region={"name": "kl3", "radius": 0.03})
ours = gradient(lambda logp: objective(logp=logp, logp_old=old, advantages=advantages[:, 0], mask=mask).loss)
assert abs(theirs[0] - ours[0]) < 1e-6, (theirs, ours)
assert torch.allclose(theirs[1], ours[1], atol=1e-6) and ours[1].abs().max() > 0
import transformers
print("verl", verl.__version__, "transformers", transformers.__version__)
"""


class Failure(Exception):
    """A step failed; the message holds the end of what it printed."""


class Environment:
    """A fresh virtual environment and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir()
        call([sys.executable, "-m", "venv", str(folder / "venv")], self.work)

    def pip(self, *arguments: str) -> None:
        self.call(
            "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *arguments
        )

    def call(self, program: str, *arguments: str, status: int = 0) -> str:
        return call([str(self.bin / program), *arguments], self.work, status)

    def run(self, code: str) -> str:
        return self.call("python", "-c", code)


def call(command: list[str], folder: Path, status: int = 0) -> str:
    """What a command prints; raises ``Failure`` unless it ends with this status."""
    # Nothing of the environment that runs this script, or of the checkout, reaches the new one.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**outside, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != status:
        shown = " ".join(command)[:200]
        raise Failure(f"{shown}: status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


def core(there: Environment, wheel: Path) -> str:
    there.pip("--constraint", str(CONSTRAINTS), str(wheel))
    there.run(CORE)
    settings = there.call("python", "-m", "mirrorpo.integrations", "verl", "dapo")
    assert "mirrorpo" in settings, settings
    said = there.call("mirrorpo", "--help", status=1)
    assert said.count("\n") == 1, said
    assert said.endswith("pip install 'mirrorpo[train]'\n"), said
    return f"{len(there.call('python', '-m', 'pip', 'list', '--format', 'freeze').splitlines())} packages"


def verl(there: Environment, wheel: Path) -> str:
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    there.pip(str(wheel), "verl==0.9.1", torch)
    there.call("python", "-m", "pip", "check")
    said = there.run(VERL).strip().splitlines()[-1]
    there.pip("uvicorn", "fastapi")  # verl's workers import them; its inference engines bring them
    steps = there.call("python", str(ROOT / "tests" / "real" / "verl_engine.py")).strip().splitlines()
    return f"{said}; {next(line for line in steps if line.startswith('verl'))}"


def train(there: Environment, wheel: Path) -> str:
    there.pip("--constraint", str(CONSTRAINTS), f"{wheel}[train]")
    assert "arithmetic" in there.call("mirrorpo", "list", "recipes")
    there.call("mirrorpo", "train", "arithmetic", *SMALL, "--out", "run")
    there.call("mirrorpo", "eval", "run/model", "eval.problems=8", "--task", "arithmetic")
    there.call("mirrorpo", "report", "run")
    there.call("mirrorpo", "doctor")
    page = there.call("mirrorpo", "explorer", "--no-open").strip()
    assert Path(page.removeprefix("file://")).is_file(), page
    assert there.call("mirrorpo", "docs", "choosing").startswith("# ")
    assert [entry.name for entry in there.work.iterdir()] == ["run"]
    there.pip("deepspeed>=0.18")
    ways = os.environ.get("SHARDED", "").split()
    sharded = there.call("python", str(ROOT / "tests" / "real" / "sharded.py"), *ways)
    return "list, train, eval, report, doctor, docs, explorer; " + "; ".join(re.findall(r"^\w+: .*", sharded, re.M))


KINDS: dict[str, Callable[[Environment, Path], str]] = {"core": core, "train": train, "verl": verl}
# Kinds that share an environment, one after the other.
SHARED = (("core", "train"), ("verl",))


def tried(kinds: Sequence[str], wheel: Path) -> bool:
    """Whether all of these kinds pass, in one fresh environment; prints a line for each."""
    passed = True
    with tempfile.TemporaryDirectory(prefix=f"mirrorpo-{'-'.join(kinds)}-") as folder:
        there: Environment | None = None
        for kind in kinds:
            begun = time.monotonic()
            try:
                there = there or Environment(Path(folder))
                said = KINDS[kind](there, wheel)
            except (Failure, AssertionError) as error:
                passed, said = False, f"FAILED: {error}"
            print(f"{kind:<6} {time.monotonic() - begun:4.0f} s  {said}", flush=True)
    return passed


def main(wanted: list[str]) -> int:
    """Runs the tests of these kinds; returns the exit status."""
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown:
        print(f"unknown kind {unknown[0]!r}. Legal: {', '.join(KINDS)}")
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mirrorpo-install-") as scratch:
        call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", scratch, str(ROOT)], ROOT)
        (wheel,) = Path(scratch).glob("mirrorpo-*.whl")
        shipped = {name.removeprefix("mirrorpo/") for name in zipfile.ZipFile(wheel).namelist()}
        absent = {str(p.relative_to(ROOT / "src/mirrorpo")) for p in (ROOT / "src/mirrorpo").rglob("*.py")} - shipped
        if absent:
            print(f"the wheel lacks {', '.join(sorted(absent))}")
            return 1
        chosen = [kind for kind in wanted or KINDS if kind != "verl" or sys.version_info < (3, 13)]
        if len(chosen) < len(wanted or KINDS):
            print("verl   skipped: its requirements are for Python below 3.13")
        groups = [kinds for shared in SHARED if (kinds := [kind for kind in shared if kind in chosen])]
        with ThreadPoolExecutor(len(SHARED)) as side_by_side:
            for passed in side_by_side.map(lambda kinds: tried(kinds, wheel), groups):
                failed = failed or int(not passed)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
