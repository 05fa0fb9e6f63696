"""Losses of a batch of completions: objectives, their parts, and the presets of the papers."""
