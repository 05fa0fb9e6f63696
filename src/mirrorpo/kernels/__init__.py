"""The objective from hidden states."""
