"""On-policy distillation in plain torch: a student writes, a teacher scores every token of it, and the gap is the loss.

The student is the built-in tiny model with noise on its weights, the teacher the same model without. Expected: the
divergence from the teacher, on what the student writes, falls to below half of what it was, in well under a minute.

    python examples/distill.py
"""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import mirrorpo
from mirrorpo.models import builtin_path
from mirrorpo.tasks.arithmetic import Arithmetic

STEPS, PROMPTS, TOKENS, NOISE = 10, 64, 24, 0.03

disable_progress_bar()
torch.manual_seed(0)
torch.set_num_threads(1)
path = builtin_path("tiny")
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
teacher = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
student = copy.deepcopy(teacher).requires_grad_(True)
with torch.no_grad():
    for parameter in student.parameters():
        parameter.add_(NOISE * torch.randn_like(parameter))
optimiser = torch.optim.AdamW(student.parameters(), lr=2e-4)
# No policy term and no reward: the whole loss is the divergence toward the teacher, summed over the vocabulary. Where
# only the teacher's log-probabilities of the written tokens are known, leave `estimator` out: the preset's is `score`.
objective = mirrorpo.objective("opd", estimator="exact")
measure = mirrorpo.divergence("reverse_kl")
rows = Arithmetic(difficulty="medium").rows("train")


def logits_of(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """Of each completion token, (completions, tokens, vocabulary)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]


distances = []
for step in range(STEPS):
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows[step * PROMPTS : (step + 1) * PROMPTS]]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    width = inputs.input_ids.shape[1]
    with torch.no_grad():
        ids = student.generate(**inputs, max_new_tokens=TOKENS)
    tokens = ids[:, width:, None]
    ended = (tokens.squeeze(-1) == tokenizer.eos_token_id).cumsum(1)
    kept = (ended == 0) | ((ended == 1) & (tokens.squeeze(-1) == tokenizer.eos_token_id))
    mask = torch.cat([inputs.attention_mask, kept.long()], 1)
    with torch.no_grad():
        theirs = logits_of(teacher, ids, mask, width)
    ours = logits_of(student, ids, mask, width)
    distances.append(measure.exact(ours.detach(), theirs)[kept].mean().item())
    logp = ours.log_softmax(-1).gather(-1, tokens).squeeze(-1)
    out = objective(
        logp=logp,
        logp_old=logp.detach(),
        logits=ours,
        logits_teacher=theirs,
        advantages=torch.zeros(PROMPTS),  # `opd` has no policy term
        mask=kept.float(),
    )
    optimiser.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimiser.step()
    print(f"step {step + 1}: KL(student || teacher) {distances[-1]:.4f}")
print(f"{distances[0]:.4f} -> {distances[-1]:.4f} nats a token")
