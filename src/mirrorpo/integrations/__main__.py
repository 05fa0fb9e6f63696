"""Settings of a framework that run an objective file: ``python -m mirrorpo.integrations FRAMEWORK FILE``.

Prints them, one a line; exit status 2 and one line on stderr for what the framework cannot express.
"""

from __future__ import annotations

import argparse
import sys

from mirrorpo.config.objective_file import read_objective
from mirrorpo.errors import InputError
from mirrorpo.integrations import prime_rl, skyrl, slime, verl_settings

FRAMEWORKS = {
    "verl": lambda source, objective: "\n".join(verl_settings.overrides(source, objective)),
    "prime-rl": prime_rl.settings,
    "slime": slime.settings,
    "skyrl": skyrl.settings,
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mirrorpo.integrations", description=__doc__)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("objective", help="objective file, its text in braces, or a preset's name")
    given = parser.parse_args(arguments)
    try:
        text = FRAMEWORKS[given.framework](given.objective, read_objective(given.objective))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
