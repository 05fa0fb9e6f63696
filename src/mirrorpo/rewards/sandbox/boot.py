"""How is the template process started? By a bare interpreter that imports this folder and the standard library only."""

from __future__ import annotations

import os
import shutil
import sys

from mirrorpo.rewards.sandbox import namespaces

_FOLDER = os.path.dirname(os.path.realpath(__file__))
# Empty packages stand in for the real ones, whose import would load torch.
_PROGRAM = """
import sys, types
for name in ("mirrorpo", "mirrorpo.rewards", "mirrorpo.rewards.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules[name].__path__ = [{folder!r}]
from mirrorpo.rewards.sandbox.zygote import main
main({control}, {layers!r}, {preload})
"""


def interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def command(control: int, layers: list[str], preload: bool) -> list[str]:
    """The command line of the template process.

    Args:
        control: the inherited descriptor on which it takes orders.
        layers: which of "bubblewrap", "namespaces", "landlock", "seccomp" to use.
        preload: import much of the standard library, for all copies.

    Raises:
        OSError: bubblewrap is asked for and not installed.
    """
    inside = [layer for layer in layers if layer != "bubblewrap"]
    program = _PROGRAM.format(folder=_FOLDER, control=control, layers=inside, preload=preload)
    # No site packages, no environment, no current folder, nothing written; UTF-8.
    python = [interpreter(), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", program]
    if "bubblewrap" not in layers:
        return python
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise OSError("bubblewrap (bwrap) is not installed")
    return [bwrap, *_bubblewrap_options(), "--", *python]


def environment() -> dict[str, str]:
    """Of the template process, which clears it: a fixed hash seed makes sets print alike on every run."""
    return {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _bubblewrap_options() -> list[str]:
    """A root that holds the interpreter, the system's shared libraries and this folder."""
    library = namespaces.standard_library()
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in environment().items():
        options += ["--setenv", name, value]
    prefix = os.path.dirname(os.path.dirname(interpreter()))
    for path in ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            options += ["--ro-bind", path, path]
    seen = {"/usr/lib"}
    for path in (interpreter(), os.path.join(prefix, "lib"), library, _FOLDER):
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in seen):
            options += ["--ro-bind", path, path]
            seen.add(path)
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(os.path.join(library, name)):
            options += ["--tmpfs", os.path.join(library, name)]
    return [*options, "--dev-bind", "/dev/null", "/dev/null", "--chdir", "/"]
