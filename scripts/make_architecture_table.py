"""Table of transformers' architectures: which are trained from packed rows, and beyond which length they are padded.

Every architecture that transformers registers for causal language modelling is built with two layers and random
weights. A short batch and a long one go through the trainer's packed path and through the model itself; their
log-probabilities must agree to 1e-5 in float32, or the batch must have been padded for a stated reason. Features that
begin at a length (``mirrorpo.models.thresholds``) are set to begin between the two.

``python scripts/make_architecture_table.py`` writes docs/models.md in about fifteen minutes on one core; ``--check``
compares it instead; names of architectures as arguments print their rows.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from mirrorpo.models.thresholds import thresholds
from mirrorpo.training.scoring import PackedPath

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
MAX_PARAMETERS = 40_000_000
VOCABULARY = 128
# Columns of the two batches, and a length between them at which features begin.
SHORT, BETWEEN, LONG = (8, 12), 24, (16, 80)
# Between log-probabilities in float32, relative to the largest where that is above 1.
TOLERANCE = 1e-5

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "index_topk"), BETWEEN),
    **dict.fromkeys(("keep_window_size", "window_size", "attention_window_size"), BETWEEN),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_chunk_size", "mamba_n_groups", "n_groups"), 8),
    "mamba_expand": 1,
    "index_topk_blocks": 3,  # of 8 tokens: those BETWEEN
    "index_block_size": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "zero_expert_num": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# What an architecture needs beyond that to have two layers.
EXTRA: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": _PLAIN, "sliding_attention": _PLAIN},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "longcat_flash": {"num_layers": 1, "head_dim": 8, "v_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "plbart": {"d_model": 96},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local"] * 2,
        "local_attn_chunk_length": 8,
        "attention_head_size": 16,
    },
    "whisper": {"d_model": 96},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2},
    **{name: {"num_key_value_heads": 4} for name in ("dots3_note", "dots3_note_text")},
    **{name: {"num_kv_shared_layers": 0} for name in ("gemma3n", "gemma3n_text")},
}
# Rotary embeddings that checkpoints of these architectures have, and their defaults do not.
_BASE = {"rope_theta": 10000.0, "original_max_position_embeddings": BETWEEN}
_LONGROPE = {**_BASE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_YARN = {**_BASE, "rope_type": "yarn", "factor": 4.0}
_LLAMA3 = {**_BASE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LAYERED = {"full_attention": _DYNAMIC, "sliding_attention": _PLAIN}
_EXTENDED = {"max_position_embeddings": 96, "original_max_position_embeddings": BETWEEN}
VARIANTS: dict[str, dict[str, Any]] = {
    "phi3 longrope": {"rope_parameters": _LONGROPE, "sliding_window": None, **_EXTENDED},
    "llama dynamic": {"rope_parameters": _DYNAMIC, "max_position_embeddings": BETWEEN},
    "gemma3_text dynamic": {"rope_parameters": _LAYERED, "max_position_embeddings": BETWEEN, "sliding_window": 500},
    "qwen2 yarn": {"rope_parameters": _YARN, "max_position_embeddings": 96},
    "llama llama3": {"rope_parameters": _LLAMA3, "max_position_embeddings": 96},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama beyond its context": {"max_position_embeddings": BETWEEN},
}
# Keys of configs whose name sounds like a length from which a model changes, and that are none: sizes of blocks in
# which a result is computed that does not depend on them, and parts of models that are never packed.
LIKE_A_LENGTH = re.compile(r"window|chunk|index_topk|block_size|local_attn|compress_rate")
NO_LENGTH = re.compile(
    r"pattern|layers|feed_forward|mamba_chunk|^chunk_size|kernel|block_ind|num_chunks|chunksize|lm_head|norm_topk"
    r"|attn_chunk_length|chunk_length|^block_size|window_type"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found for an architecture.

    Attributes:
        name: transformers' ``model_type``.
        state: ``packed``, ``padded`` or ``not run``.
        why: thresholds beyond which it is padded, the reason for padding, or why it was not run.
        error: the largest difference of log-probabilities of packed batches; None if none was packed.
    """

    name: str
    state: str
    why: str
    error: float | None = None


def two_layers(name: str, **more: Any) -> Any:
    """The config of an architecture with two small layers."""
    config_class = CONFIG_MAPPING[name.split()[0]]
    text = config_class().get_text_config(decoder=True)
    if type(text) is config_class:  # a decoder's own names, where transformers has renamed them
        text = config_class()
    keys = {*text.to_dict(), *text.attribute_map}
    settings = {key: value for key, value in SMALL.items() if key in keys}
    if "qk_rope_head_dim" in keys:  # latent attention: a head is made of parts
        settings.pop("head_dim", None)
    return type(text)(**{**settings, **more, **EXTRA.get(name, {}), **VARIANTS.get(name, {})})


def whole(name: str) -> Any:
    """The config of a model of several parts, each with small layers."""

    def small(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if key not in ("layer_types", "block_out_channels")}
        sizes = {key: SMALL[key] for key, value in kept.items() if key in SMALL and type(value) is int}
        return {**kept, **sizes, **{key: small(value) for key, value in kept.items() if isinstance(value, dict)}}

    return CONFIG_MAPPING[name].from_dict(small(CONFIG_MAPPING[name]().to_dict()))


def built(config: Any) -> PreTrainedModel:
    """A model with random weights, which reads both batches.

    Raises:
        Exception: it cannot be built or run so.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters with two layers")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # large enough that attention is not an average of everything
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
        for sizes in (SHORT, LONG):
            ids, mask = batch(*sizes)
            model.eval()(input_ids=ids, attention_mask=mask, use_cache=False)
    return model


def batch(num_prompt: int, num_completion: int) -> tuple[Tensor, Tensor]:
    """Two prompts with three completions each, ragged on both sides."""
    g = torch.Generator().manual_seed(num_prompt)
    ids = torch.randint(3, VOCABULARY, (6, num_prompt + num_completion), generator=g)
    ids[:3, :num_prompt], ids[3:, :num_prompt] = ids[0, :num_prompt], ids[3, :num_prompt]
    mask = torch.ones_like(ids)
    mask[3:, :2] = 0
    for row, size in enumerate((1.0, 0.5, 0.9, 0.7, 1.0, 0.2)):
        mask[row, num_prompt + max(1, int(size * num_completion)) :] = 0
    return ids, mask


class Path_(PackedPath):
    """The packed path, and what it said."""

    def __init__(self) -> None:
        accelerator = SimpleNamespace(
            distributed_type=next(iter(transformers.training_args.DistributedType)),
            is_main_process=False,
            unwrap_model=lambda model: model,
            autocast=nullcontext,
        )
        args = SimpleNamespace(
            fast="auto", kernels="torch", token_budget=None, torch_compile=False, n_gpu=1, entropy_coef=0.0
        )
        super().__init__(args, accelerator, 1.0, aux_loss=False)
        self.reasons: list[str] = []

    def say(self, reason: str) -> None:
        self.reasons.append(reason)


def error_of(path: Path_, model: PreTrainedModel, sizes: tuple[int, int]) -> float | None:
    """The largest difference between packed log-probabilities and the model's own; None if it was padded."""
    ids, mask = batch(*sizes)
    keep = sizes[1]
    with torch.no_grad():
        found = path.score(model, ids, mask, keep, len(ids), with_entropy=False)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -keep - 1 : -1]
    if found is None:
        return None
    wanted = logits.log_softmax(-1).gather(-1, ids[:, -keep:].unsqueeze(-1)).squeeze(-1) * mask[:, -keep:]
    return ((found[0] - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)).item()


def unknown_lengths(model: PreTrainedModel) -> list[str]:
    """Keys of its config that sound like a length from which it changes, and that nobody has looked at."""
    values = model.config.get_text_config(decoder=True).to_dict()
    known = " ".join(t.feature for t in thresholds(model.config))
    return [
        f"{key} {value}"
        for key, value in values.items()
        if LIKE_A_LENGTH.search(key) and not NO_LENGTH.search(key) and type(value) is int and value > sum(SHORT)
        if key not in known and key not in SMALL
    ]


def row_of(name: str) -> Row:
    """What is found for an architecture.

    Raises:
        AssertionError: packed and padded differ, or a key of its config may be a threshold.
    """
    reasons = []
    for config in (two_layers, lambda name: two_layers(name, num_key_value_heads=4), whole):
        try:
            model = built(config(name))
            break
        # Untrusted: two layers of any architecture, many of which want more.
        except Exception as error:  # noqa: BLE001
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:110]}")
    else:
        return Row(name=name, state="not run", why=reasons[0])
    path = Path_()
    errors = [error for sizes in (SHORT, LONG) if (error := error_of(path, model, sizes)) is not None]
    beyond = [t.feature.rsplit(" ", 1)[0] for t in thresholds(model.config)]
    assert all(error <= TOLERANCE for error in errors), f"{name}: packed and padded differ by {errors}"
    if not errors:
        return Row(name=name, state="padded", why=path.reasons[0])
    assert len(errors) == (1 if beyond else 2), f"{name}: {path.reasons}"
    assert not unknown_lengths(model), f"{name}: thresholds? {unknown_lengths(model)}"
    return Row(name=name, state="packed", why=", ".join(sorted(set(beyond))), error=max(errors))


def shown(row: Row) -> str:
    """The second cell of its line; without figures that depend on the machine."""
    text = re.sub(r" by \d\.\de[-+]\d+", "", row.why).replace("|", "\\|").strip()
    return text or "no length"


def document(rows: list[Row]) -> str:
    """The page."""
    parts = {state: [row for row in rows if row.state == state] for state in ("packed", "padded", "not run")}
    lines = [
        "# Models",
        "",
        "<!-- Written by scripts/make_architecture_table.py -->",
        "",
        f"transformers {transformers.__version__} registers {len(rows) - len(VARIANTS)} architectures for causal "
        "language modelling. Each was built with two layers, random weights and no dropout of attention. Two batches, "
        f"one of {sum(SHORT)} and one of {sum(LONG)} columns, were scored from packed rows and by the model itself; "
        f"features that begin at a length were set to begin at {BETWEEN}. {len(parts['packed'])} are packed and agree "
        f"to {TOLERANCE:g} in float32, {sum(bool(row.why) for row in parts['packed'])} of them up to a length; "
        f"{len(parts['padded'])} are padded for the reason below; {len(parts['not run'])} did not run with such a "
        "config. Names with a rotary type are variants.",
        "",
        "A batch is compared, too, while a run goes on: the first, and each that is twice as long as any before. Where "
        "packed and padded log-probabilities differ by more than rounding, the run says so in one line and pads from "
        "there. On a GPU two random models, a Qwen3 and a Llama, were run packed ([figures](results/gpu/README.md)); "
        "for the others this comparison is what shows there that packing is right.",
        "",
        "## Packed",
        "",
        "| architecture | padded beyond |",
        "|---|---|",
        *(f"| `{row.name}` | {shown(row)} |" for row in parts["packed"]),
        "",
        "## Padded",
        "",
        "| architecture | reason |",
        "|---|---|",
        *(f"| `{row.name}` | {shown(row)} |" for row in parts["padded"]),
        "",
        "## Not run",
        "",
        "| architecture | reason |",
        "|---|---|",
        *(f"| `{row.name}` | {shown(row)} |" for row in parts["not run"]),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Writes or checks the page, or prints rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures to print; default: all, into the page")
    parser.add_argument("--check", action="store_true", help="compare the page instead of writing it")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    rows, failures = [], []
    for name in arguments.names or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS}):
        try:
            rows.append(row_of(name))
            print(rows[-1], flush=True)
        except AssertionError as error:
            failures.append(str(error))
            print("FAILED", error, flush=True)
        gc.collect()
    if failures or arguments.names:
        return bool(failures)
    text = document(rows)
    if arguments.check:
        return DOCUMENT.read_text(encoding="utf-8") != text
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
