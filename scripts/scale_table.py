"""Write the tables of docs/scale.md: memory per GPU, tokens per second and traffic, by arithmetic that is shown.

Estimates, not measurements of a cluster. What can be measured on a CPU is: parameter counts are those of the
architectures, and the bytes that a layer and an `exact` penalty keep are counted on a small model of the same
proportions (--measure; a test compares them with the constants below).

Usage: python scripts/scale_table.py [--page docs/scale.md] [--check | --measure]
       python scripts/scale_table.py --model 8B --gpus 8 [--tokens 8192] [--bytes 8|16] [--estimator exact] [--shard]
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
GB = 1e9
# Of an H100 SXM, from its data sheet: dense bfloat16, memory bandwidth, memory.
PEAK_FLOPS, BANDWIDTH, CAPACITY = 989e12, 3.35e12, 80.0
# Assumed, not measured: what a training step and a decoding step reach of the two, and what the links carry.
TRAINING_SHARE, DECODING_SHARE = 0.40, 0.60
NVLINK, NETWORK = 300e9, 40e9  # bytes a second and GPU: within a machine, between machines (400 Gbit/s a GPU)
# Measured by --measure, in bytes per token and hidden unit of one layer, bfloat16, heads * head_dim = hidden = I / 3.
LAYER_BYTES, CHECKPOINT_BYTES = 52.6, 2.0
# Measured by --measure, in bytes per token and vocabulary entry at the peak of a step with an `exact` penalty.
EXACT_BYTES = 20.0
TOKENS = 8192  # of completions and prompts in memory at once, on each GPU


@dataclass(frozen=True)
class Model:
    """A decoder's shape.

    Attributes:
        layers: L.
        hidden: h.
        inner: width of the gated MLP.
        heads: of queries.
        kv_heads: of keys and values.
        vocabulary: V.
        tied: whether the head is the embedding.
        qk_norm: whether queries and keys are normalised (Qwen3).
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    qk_norm: bool = True
    head_dim: int = 128

    @property
    def parameters(self) -> int:
        """How many."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys) + (2 * self.head_dim if self.qk_norm else 0)
        layer = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        head = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + head + self.hidden

    @property
    def cache_bytes(self) -> int:
        """Of keys and values of one token, bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


MODELS = {
    "0.6B": Model(28, 1024, 3072, 16, 8, 151936, tied=True),
    "1.7B": Model(28, 2048, 6144, 16, 8, 151936, tied=True),
    "4B": Model(36, 2560, 9728, 32, 8, 151936, tied=True),
    "8B": Model(36, 4096, 12288, 32, 8, 151936),
    "14B": Model(40, 5120, 17408, 40, 8, 151936),
    "32B": Model(64, 5120, 25600, 64, 8, 151936),
    "70B": Model(80, 8192, 28672, 64, 8, 128256, qk_norm=False),
}
NAMES = {name: f"Qwen3-{name}" for name in MODELS} | {"70B": "Llama-3.3-70B"}


@dataclass(frozen=True)
class Plan:
    """One line of the tables.

    Attributes:
        model: name in ``MODELS``.
        gpus: how many.
        shard: FSDP2 or ZeRO-3 over all of them; else each GPU holds everything.
        lora: train adapters of 1 % of the parameters; the reference is the model without them.
        bytes: per trained parameter: 16 in float32 (weight 4, gradient 4, AdamW 8), 8 in bfloat16.
        reference: whether a penalty needs a second model.
        exact: whether a penalty is ``exact``, through logits.
        tokens: in memory at once.
    """

    model: str
    gpus: int
    shard: bool
    lora: bool = False
    bytes: int = 16
    reference: bool = True
    exact: bool = False
    tokens: int = TOKENS

    def memory(self) -> dict[str, float]:
        """GB on each GPU, by what holds them."""
        m = MODELS[self.model]
        over = self.gpus if self.shard else 1
        weight = 2 if self.lora else self.bytes // 4
        trained = 0.01 * 16 + 2 if self.lora else float(self.bytes)
        kept = CHECKPOINT_BYTES * m.layers + LAYER_BYTES * max(1.0, m.inner / m.hidden / 3)
        return {
            "parameters, gradients, optimiser": trained * m.parameters / over / GB,
            "reference": 0.0 if self.lora or not self.reference else weight * m.parameters / over / GB,
            "activations": self.tokens * m.hidden * kept / GB,
            "`exact`": self.tokens * m.vocabulary * EXACT_BYTES / GB if self.exact else 0.0,
        }

    def training_rate(self) -> float:
        """Tokens a second and GPU.

        6 P flops forward and backward (4 P where the weights have no gradient: LoRA), 2 P again for checkpointing, 2 P
        for each of the log-probabilities of rollout policy and reference; attention's quadratic part is left out.
        """
        passes = (6 if self.lora else 8) + 2 + (2 if self.reference else 0)
        return TRAINING_SHARE * PEAK_FLOPS / (passes * MODELS[self.model].parameters)

    def decoding_rate(self, sequences: int = 256, context: int = 1024) -> float:
        """Tokens a second and GPU while generating: each step reads the weights and all caches once.

        The model lies on as few GPUs (tensor parallelism) as hold its weights in half of their memory.
        """
        m = MODELS[self.model]
        wide = 1
        while 2 * m.parameters / wide / GB > CAPACITY / 2:
            wide *= 2
        read = (2 * m.parameters + sequences * context * m.cache_bytes) / wide
        return sequences * DECODING_SHARE * BANDWIDTH / read / wide

    def traffic(self) -> float:
        """Bytes that each GPU sends in an update of one micro-batch; no term depends on the divergence."""
        m = MODELS[self.model]
        share = (self.gpus - 1) / self.gpus
        if self.lora:
            return 2 * 0.04 * m.parameters * share
        if self.shard:  # parameters gathered twice in bfloat16, gradients scattered once in float32
            return (2 * 2 + 4) * m.parameters * share
        return 2 * (self.bytes // 4) * m.parameters * share  # a ring all-reduce of the gradients


PLANS = (
    Plan("0.6B", 1, False),
    Plan("1.7B", 1, False),
    Plan("4B", 1, False, bytes=8),
    Plan("8B", 1, False, lora=True),
    Plan("8B", 8, True),
    Plan("14B", 8, True),
    Plan("32B", 16, True),
    Plan("32B", 64, True),
    Plan("70B", 64, True),
)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([row(head), row(["---"] * len(head)), *map(row, rows)])


def how(plan: Plan) -> str:
    kind = "LoRA" if plan.lora else "FSDP2" if plan.shard else "whole model"
    return f"{plan.gpus} x {kind}, {'bfloat16' if plan.lora or plan.bytes == 8 else 'float32'}"


def memory_table() -> str:
    rows = []
    for plan in PLANS:
        parts = plan.memory()
        exact = Plan(**{**vars(plan), "exact": True}).memory()
        cells = [f"{parts[name]:.1f}" for name in ("parameters, gradients, optimiser", "reference", "activations")]
        totals = [sum(parts.values()), sum(exact.values())]
        shown = [f"{total:.0f}" + ("" if total < 0.9 * CAPACITY else " (too much)") for total in totals]
        rows.append([NAMES[plan.model], how(plan), *cells, shown[0], f"{exact['`exact`']:.1f}", shown[1]])
    head = ["model", "GPUs", "parameters, gradients, optimiser", "reference", "activations", "sum"]
    return table([*head, "`exact` adds", "sum with `exact`"], rows)


def speed_table() -> str:
    rows = []
    for plan in PLANS:
        sent = plan.traffic() / GB
        link = NVLINK if plan.gpus <= 8 else NETWORK
        seconds = plan.traffic() / link
        rows.append(
            [
                NAMES[plan.model],
                how(plan),
                f"{plan.training_rate():,.0f}",
                f"{plan.decoding_rate():,.0f}",
                "0" if plan.gpus == 1 else f"{sent:.1f} GB, {seconds:.2f} s",
                "0",
            ]
        )
    head = ["model", "GPUs", "training, tokens/s and GPU", "generation, tokens/s and GPU"]
    return table([*head, "sent by each GPU for a micro-batch", "of that for the divergence"], rows)


TABLES: dict[str, Callable[[], str]] = {"memory": memory_table, "speed": speed_table}


def replaced(text: str) -> str:
    """The page with its tables written anew."""
    for name, build in TABLES.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"the page has no marker <!-- {name} -->")
        text = pattern.sub(rf"\g<1>{build()}\n\g<2>", text)
    return text


# What a CPU can measure


def kept_by(run: Callable[[], Any], parameters: Sequence[Any]) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the parameters."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(seen.values())


def measure_layer(checkpointed: bool) -> float:
    """Bytes per token and hidden unit of one layer of transformers' Qwen3, bfloat16, in the 8B's proportions."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    hidden, tokens, kept = 512, (2, 128), []
    for layers in (2, 4):
        shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
        heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": 1, "head_dim": 128}
        model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=64, **shape, **heads), dtype=torch.bfloat16)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(tokens, dtype=torch.long)
        kept.append(kept_by(lambda m=model, ids=ids: m.model(input_ids=ids, use_cache=False)[0], [*model.parameters()]))
    return (kept[1] - kept[0]) / 2 / (tokens[0] * tokens[1]) / hidden


def measure_exact() -> float:
    """Peak bytes per token and vocabulary entry of scoring from logits and an `exact` penalty, both models."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from mirrorpo.divergences import divergence
    from mirrorpo.training.scoring import score_from_logits

    class Head(torch.nn.Module):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(1, vocabulary, dtype=torch.bfloat16))

        def forward(self, input_ids: Any, logits_to_keep: int, **_: Any) -> Any:
            rows = torch.ones(*input_ids.shape, 1, dtype=torch.bfloat16)[:, -logits_to_keep:]
            return type("Output", (), {"logits": rows @ self.table})()

    vocabulary = 1 << 13

    def peak(width: int) -> int:
        gc.collect()  # what is freed only now would count as freed by the step
        ids = torch.zeros(1, width + 1, dtype=torch.long)
        policy, reference = Head(vocabulary), Head(vocabulary)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            scored = score_from_logits(policy, ids, torch.ones_like(ids), width, 1.0)
            with torch.no_grad():
                other = score_from_logits(reference, ids, torch.ones_like(ids), width, 1.0).logits
            assert scored.logits is not None
            assert other is not None
            loss = divergence("js").exact(scored.logits, other).mean() - scored.logp.mean()
            loss.backward()
        # Allocations, and with a negative size their ends.
        found = seen.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
        return max(accumulate(size for _, size in events))

    # The difference of two sizes: what a step needs whatever its size (float64 in chunks) is not counted.
    return (peak(1536) - peak(768)) / (768 * vocabulary)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page has other tables")
    parser.add_argument("--measure", action="store_true", help="measure the constants on this CPU")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--bytes", type=int, choices=(8, 16), default=16)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--estimator", choices=("none", "sampled", "weighted", "score", "exact"), default="sampled")
    given = parser.parse_args(arguments)
    if given.measure:
        print(f"a layer keeps {measure_layer(False):.1f} bytes per token and hidden unit (table: {LAYER_BYTES})")
        print(f"checkpointed: {measure_layer(True):.1f} (table: {CHECKPOINT_BYTES})")
        print(f"`exact`: {measure_exact():.1f} bytes per token and vocabulary entry (table: {EXACT_BYTES})")
        return 0
    if given.model:
        settings = {"shard": given.shard, "lora": given.lora, "bytes": given.bytes, "tokens": given.tokens}
        wanted = {"reference": given.estimator != "none", "exact": given.estimator == "exact"}
        plan = Plan(given.model, given.gpus, **settings, **wanted)
        for name, value in plan.memory().items():
            print(f"{name}: {value:.1f} GB")
        print(f"sum: {sum(plan.memory().values()):.1f} GB of {CAPACITY:.0f} on each GPU")
        print(f"training: {plan.training_rate():,.0f} tokens/s and GPU; sent: {plan.traffic() / GB:.1f} GB")
        return 0
    text = given.page.read_text(encoding="utf-8")
    new = replaced(text)
    if given.check:
        if new != text:
            print(f"{given.page}: the tables are not those of {Path(__file__).name}", file=sys.stderr)
            return 1
        return 0
    given.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
