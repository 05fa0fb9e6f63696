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
    # Checkpoints: written
    "_save_checkpoint": ("model", "trial"),
    "_get_output_dir": ("trial",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_scaler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    # Checkpoints: read
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "_get_train_sampler": ("dataset",),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
}

__all__ = ["SEAMS"]
