"""Settings of the site: Sphinx reads the Markdown pages of this folder, and the reference from the docstrings."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

project = "mirrorpo"
author = "The mirrorpo authors"
version = release = version_of("mirrorpo")
html_title = f"mirrorpo {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "index"
default_role = "code"  # single backticks in docstrings
suppress_warnings = ["myst.header"]  # pages that begin with a heading of the second level

myst_enable_extensions = ["colon_fence", "dollarmath", "linkify"]
myst_heading_anchors = 3
myst_linkify_fuzzy_links = False  # `report.md` in a text is no address

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# A fragment of the site: the examples of docstrings are run by the tests, each in a namespace of its own.
doctest_test_doctest_blocks = ""

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["explorer.html"]
html_theme_options = {"navigation_with_keys": True}

# A code block that is marked for the tests is Python all the same.
_FENCE = re.compile(r"^```python no-run$", re.MULTILINE)
# Links to folders of the repository, which are no pages: their text stays.
_FOLDER = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)\)")

_LITERAL = re.compile(r"(:math:`[^`]*`|``.*?``|`[^`]*`)")


def _for_the_site(app: Any, page: str, source: list[str]) -> None:
    """Plain Markdown, as the repository shows it, in the words that MyST knows."""
    folder = (HERE / page).parent
    text = _FENCE.sub("```python", source[0]).replace("(../README.md#", "(index.md#")

    def link(found: re.Match[str]) -> str:
        target = found[2]
        if ":" in target or not (folder / target).is_dir():
            return found[0]
        return f"`{found[1].strip('`')}`"

    source[0] = _FOLDER.sub(link, text)


def _bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A bar in a docstring is an absolute value, where reStructuredText would look for a substitution."""
    for number, line in enumerate(lines):
        parts = _LITERAL.split(line)
        lines[number] = "".join(part if _LITERAL.fullmatch(part) else part.replace("|", "\\|") for part in parts)


def setup(app: Any) -> None:
    app.connect("source-read", _for_the_site)
    app.connect("autodoc-process-docstring", _bars)
