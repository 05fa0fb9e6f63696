"""Which style sheet, script and template does a page carry, and how does its policy name them?"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources


def asset(name: str, package: str = "mirrorpo.reports") -> str:
    """The text of a file that lies beside a package's modules.

    Args:
        name: of the file.
        package: whose it is.

    Example:
        >>> asset("report.js").startswith('"use strict"')
        True
    """
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def source_hash(text: str) -> str:
    """What a Content-Security-Policy calls the source of an inline style or script.

    Args:
        text: between the tags, exactly.

    Example:
        >>> source_hash("")
        'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
