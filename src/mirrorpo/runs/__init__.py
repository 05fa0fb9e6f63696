"""Run folders: their files, and how they are read."""
