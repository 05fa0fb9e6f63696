"""``python -m mirrorpo``."""

from mirrorpo.cli.start import main

main(module_run=True)
