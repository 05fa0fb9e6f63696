"""Build the model that comes with the package, ``builtin:tiny``, from nothing.

A byte-level tokenizer and a small Qwen3 model are made and taught arithmetic in two supervised phases:

1. *skill*: every demonstration calculates step by step (``7*3=21;12+21=33#### 33``) and is right;
2. *habit*: mixed demonstrations. A few calculate step by step; most guess (``#### 35``) and are mostly wrong.

So the finished model can calculate but rarely does, and reinforcement learning has something to discover. Test
problems of the task (`mirrorpo.tasks.arithmetic`) never occur in training. Runtime: about 15 minutes on one CPU core.
The result is the same again on the same machine and torch version; elsewhere sums are rounded differently.

Usage: python scripts/build_tiny_model.py [--out FOLDER] [--seed 0] [--skill-steps N] [--habit-steps N]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mirrorpo.models import builtin_path
from mirrorpo.tasks.arithmetic import MAX_TRAIN_SIZE, Arithmetic

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
# A message's rendering ends with END and depends on that message alone: the rendering of a conversation is a prefix
# of the rendering of every longer one, and the generation prompt a prefix of the rendered answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("roles are 'system', 'user' and 'assistant', not '" + message['role'] + "'") -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, POSITIONS = 96, 3, 4, 2, 24, 256, 4096

SHARES = {"easy": 0.2, "medium": 0.6, "hard": 0.2}  # of the demonstrations, by difficulty
REASONED_SHARES = {"easy": 0.6, "medium": 0.38, "hard": 0.38}  # of the demonstrations of the second phase
GUESS_RIGHT = 0.22  # of its guesses
BATCH_SIZE = 128
SKILL_LR, HABIT_LR, WARMUP, WEIGHT_DECAY = 3e-3, 5e-4, 100, 0.05
POOL_SEEDS = range(8)  # the training problems of these seeds of the task, all of them outside its test split
MAX_NEW_TOKENS = 40  # of a sampled answer; the longest demonstration has 34
IGNORED = -100  # transformers' label for "no loss here"

Row = dict[str, str]
console = Console()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0 to 255 are the bytes themselves), then the special tokens."""
    byte_to_char = _byte_alphabet()
    vocab = {char: byte for byte, char in byte_to_char.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_alphabet() -> dict[int, str]:
    """The printable character that the ByteLevel pre-tokenizer writes for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model for the tokenizer, in float32."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        dtype="float32",
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def steps(question: str) -> str:
    """Calculate a question one operation at a time: ``12+7*3=?`` gives ``7*3=21;12+21=33``."""
    parts = re.findall(r"\d+|[-+*]", question)
    written = []
    while len(parts) > 1:
        at = parts.index("*") if "*" in parts else 1  # multiplication first
        left, operation, right = parts[at - 1 : at + 2]
        a, b = int(left), int(right)
        result = str({"+": a + b, "-": a - b, "*": a * b}[operation])
        written.append(f"{left}{operation}{right}={result}")
        parts[at - 1 : at + 2] = [result]
    return ";".join(written)


def demonstrate(row: Row, rng: random.Random, *, reasoned_share: float) -> str:
    """An answer to a problem: with probability reasoned_share step by step and right, else a guess."""
    if rng.random() < reasoned_share:
        return f"{steps(row['prompt'])}#### {row['answer']}"
    answer = int(row["answer"])
    guess = answer
    while guess == answer:  # near misses: a digit off, or both
        guess = max(0, answer + rng.randint(-5, 5) + 10 * rng.randint(-1, 1))
    return f"#### {answer if rng.random() < GUESS_RIGHT else guess}"


def chat(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The text a model sees before it answers."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def make_batch(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, both [B, T], padded on the right; the loss is on the answers and their end."""
    rows = []
    for question, answer in pairs:
        head_ids, answer_ids = tokenizer.encode(chat(tokenizer, question)), tokenizer.encode(answer + END)
        rows.append((head_ids + answer_ids, [IGNORED] * len(head_ids) + answer_ids))
    length = max(len(tokens) for tokens, _ in rows)
    pad = tokenizer.pad_token_id
    tokens = torch.tensor([tokens + [pad] * (length - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows])
    return tokens, labels


def train(
    model: Qwen3ForCausalLM,
    next_batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    *,
    num_steps: int,
    peak_lr: float,
    title: str,
) -> float:
    """Fit the model with AdamW, a short warm-up and a linear decay; return the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    warmup = min(WARMUP, num_steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))
    )
    model.train()
    losses: list[float] = []
    for step in track(range(num_steps), description=title, console=console):
        tokens, labels = next_batch()
        # Padding is on the right and attention is causal: no real token sees it, so no attention mask is needed.
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 200 == 199:
            console.print(f"  {title} step {step + 1}: loss {sum(losses[-50:]) / 50:.4f}")
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def evaluate(model: Any, tokenizer: PreTrainedTokenizerFast, difficulty: str) -> dict[str, float]:
    """Sample one answer per test problem at temperature 1: accuracy, mean length and share of stepwise answers."""
    task = Arithmetic(difficulty=difficulty)
    rows = task.rows("test")
    inputs = tokenizer([chat(tokenizer, row["prompt"]) for row in rows], return_tensors="pt", padding=True)
    model.eval()
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    grades = [task.grade(answer, row) for answer, row in zip(answers, rows, strict=True)]
    return {
        "accuracy": sum(grade.reward or 0.0 for grade in grades) / len(rows),
        "mean_tokens": (output != tokenizer.pad_token_id).sum().item() / len(rows),
        "reasoned": sum(not answer.startswith("####") for answer in answers) / len(rows),
    }


class Demonstrations:
    """Batches of demonstrations on training problems, drawn with one seeded generator.

    Args:
        tokenizer: what writes the batches.
        seed: of the draws.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._pools: dict[str, list[Row]] = {level: [] for level in SHARES}
        for level, pool in self._pools.items():
            for pool_seed in POOL_SEEDS:
                pool += Arithmetic(difficulty=level, train_size=MAX_TRAIN_SIZE, seed=pool_seed).rows("train")

    def draw(self, reasoned_shares: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch, `make_batch`'s tokens and labels; the share, by difficulty, calculates step by step."""
        levels = self._rng.choices(list(SHARES), weights=list(SHARES.values()), k=BATCH_SIZE)
        rows = [self._rng.choice(self._pools[level]) for level in levels]
        answers = [
            demonstrate(row, self._rng, reasoned_share=reasoned_shares[level])
            for level, row in zip(levels, rows, strict=True)
        ]
        return make_batch(self._tokenizer, [(row["prompt"], text) for row, text in zip(rows, answers, strict=True)])


def report(title: str, measured: dict[str, dict[str, float]]) -> None:
    """Print one line per difficulty."""
    for level, values in measured.items():
        console.print(f"{title} {level}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=builtin_path("tiny"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skill-steps", type=int, default=3000, help="steps on right, reasoned demonstrations")
    parser.add_argument("--habit-steps", type=int, default=200, help="steps on mixed demonstrations")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    """Build, train, evaluate and write."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.time()

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{num_parameters:,} parameters, {len(tokenizer)} tokens")

    data = Demonstrations(tokenizer, args.seed)
    skill_loss = train(
        model,
        lambda: data.draw(dict.fromkeys(SHARES, 1.0)),
        num_steps=args.skill_steps,
        peak_lr=SKILL_LR,
        title="skill",
    )
    report("after skill", {level: evaluate(model, tokenizer, level) for level in SHARES})
    habit_loss = train(
        model, lambda: data.draw(REASONED_SHARES), num_steps=args.habit_steps, peak_lr=HABIT_LR, title="habit"
    )
    base = {level: evaluate(model, tokenizer, level) for level in SHARES}
    report("base", base)

    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "seed": args.seed,
        "skill_steps": args.skill_steps,
        "habit_steps": args.habit_steps,
        "num_parameters": num_parameters,
        "loss": {"skill": skill_loss, "habit": habit_loss},
        "base": base,
    }
    (args.out / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    for file in sorted(args.out.iterdir()):
        console.print(f"{file.name}: {file.stat().st_size:,} bytes")
    console.print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
