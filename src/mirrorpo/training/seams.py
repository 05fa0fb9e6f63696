"""Private methods of TRL and transformers that the trainer overrides, with the parameters that it relies on.

A contract test compares this table with the classes of both sides: an override that is missing here fails it, and so
does a release that changes a signature.
"""

from __future__ import annotations

# Method to its parameters, without `self`; of the longest one, those that are passed by position.
SEAMS: dict[str, tuple[str, ...]] = {
    # Rewards, advantages and loss
    "_generate": ("prompts",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_prepare_inputs": ("generation_batch",),
    "_get_per_token_logps_and_entropies": (
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ),
    "_compute_loss": ("model", "inputs"),
    "_get_grad_norm": ("model", "grad_norm"),
    # Checkpoints, and the order of the data after one
    "_save_checkpoint": ("model", "trial"),
    "_get_output_dir": ("trial",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_get_train_sampler": ("dataset",),
}

__all__ = ["SEAMS"]
