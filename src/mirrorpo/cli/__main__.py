"""``python -m mirrorpo.cli``, which launchers take."""

from mirrorpo.cli.start import main

main(module_run=True)
