"""GRPO with a KL penalty in plain torch: sample, grade, weigh, step. No trainer, one file, a CPU.

Expected: accuracy on unseen problems from about 0.35 to above 0.7 after 6 steps, in well under a minute.

    python examples/own_loop.py
"""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import mirrorpo
from mirrorpo.models import builtin_path
from mirrorpo.tasks.arithmetic import Arithmetic

STEPS, PROMPTS, GROUP, TOKENS = 6, 16, 16, 40

disable_progress_bar()
torch.manual_seed(0)
torch.set_num_threads(1)
path = builtin_path("tiny")
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
policy = AutoModelForCausalLM.from_pretrained(path).eval()
reference = copy.deepcopy(policy).requires_grad_(False)
optimiser = torch.optim.AdamW(policy.parameters(), lr=2e-4)
task = Arithmetic(difficulty="medium", test_size=128)
objective = mirrorpo.objective("dr_grpo", divergence="kl", estimator="score", coefficient=0.01)


def sample(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, int, list[str]]:
    """Ids of prompts with completions, the attention mask, the prompts' width, and the completions as text."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    width = inputs.input_ids.shape[1]
    with torch.no_grad():
        ids = policy.generate(**inputs, max_new_tokens=TOKENS)
    ended = (ids[:, width:] == tokenizer.eos_token_id).cumsum(1)
    kept = (ended == 0) | ((ended == 1) & (ids[:, width:] == tokenizer.eos_token_id))  # up to the end token
    mask = torch.cat([inputs.attention_mask, kept.long()], 1)
    answers = [row[one] for row, one in zip(ids[:, width:], kept, strict=True)]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return ids, mask, width, texts


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """Of each completion token, (completions, tokens)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, width:, None]).squeeze(-1)


def accuracy() -> float:
    """On problems that are never trained on."""
    rows = task.rows("test")
    texts = sample([row["prompt"] for row in rows])[3]
    return sum(task.grade(text, row).reward or 0.0 for text, row in zip(texts, rows, strict=True)) / len(rows)


before = accuracy()
rows = task.rows("train")
for step in range(STEPS):
    batch = [row for row in rows[step * PROMPTS : (step + 1) * PROMPTS] for _ in range(GROUP)]
    ids, mask, width, texts = sample([row["prompt"] for row in batch])
    rewards = torch.tensor([task.grade(text, row).reward or 0.0 for text, row in zip(texts, batch, strict=True)])
    with torch.no_grad():
        logp_ref = log_probabilities(reference, ids, mask, width)
    logp = log_probabilities(policy, ids, mask, width)
    out = objective(
        logp=logp,
        logp_old=logp.detach(),  # one step a batch: the policy that sampled is the one that learns
        logp_ref=logp_ref,
        advantages=mirrorpo.advantages(rewards, GROUP, "dr_grpo"),
        mask=mask[:, width:].float(),
        max_completion_length=TOKENS,
    )
    optimiser.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimiser.step()
    print(f"step {step + 1}: reward {rewards.mean():.3f}")
print(f"accuracy {before:.3f} -> {accuracy():.3f}")
