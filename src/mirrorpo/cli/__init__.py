"""The command line."""

from mirrorpo.cli.app import app, main

__all__ = ["app", "main"]
