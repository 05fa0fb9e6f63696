"""The objective from hidden states: log-probabilities, losses and exact divergences without logits in memory."""

from mirrorpo.kernels.attention import prefix_attention
from mirrorpo.kernels.fused import (
    PerToken,
    SinglePass,
    exact_from_hidden,
    measure_from_hidden,
    single_pass,
    token_logps,
    top_k_from_hidden,
)
from mirrorpo.kernels.head import Head
from mirrorpo.kernels.objective_head import objective_from_hidden
from mirrorpo.kernels.packing import Packing, RowTooLongError, pack
from mirrorpo.kernels.vocabulary import Anchor, Entries, VocabularyTerm

__all__ = [
    # head, vocabulary: what is given
    "Anchor",
    "Entries",
    "Head",
    "VocabularyTerm",
    # fused: losses and values from hidden states
    "PerToken",
    "SinglePass",
    "exact_from_hidden",
    "measure_from_hidden",
    "single_pass",
    "token_logps",
    "top_k_from_hidden",
    # objective_head: the library's own loss
    "objective_from_hidden",
    # packing, attention: completions that share their prompt
    "Packing",
    "RowTooLongError",
    "pack",
    "prefix_attention",
]
