"""The program in a completion: fences of every kind, tags, bare code; the block that defines what the tests use.

Nothing is ever run here. A completion comes from a model and may be anything, ten megabytes of fences included.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from mirrorpo.rewards.sandbox.roles import bound_in, global_loads

MAX_CODE_CHARACTERS = 200_000
_MAX_BLOCKS = 60  # the last ones; a completion with more of them is no answer
_MAX_CLOSINGS = 8
_MAX_FENCE_LINE = 2000
_MAX_CUTS = 60
_OPENING = re.compile(r"^([ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(`{3,}|~{3,})[ \t]*\{?\.?([\w+.#-]*)\}?[^`\n]*$")
# What follows a fence on its line, if it is code and no name of a language.
_CODE = r"(?:(?:async[ \t]+)?def[ \t]|class[ \t]|import[ \t]|from[ \t]|@\w|\w+[ \t]*(?::[^=\n]+)?=[^=])"
_GLUED_OPENING = re.compile(rf"^([ \t>]*)(`{{3,}}|~{{3,}})[ \t]*({_CODE}[^`\n]*)$")
_INLINE = re.compile(rf"^[^`\n]*`{{3,}}[ \t]*(?:(?:python3?|py)[ \t]+)?({_CODE}[^`]*)`{{3,}}[ \t.]*$")
_PYTHON = ("", "python", "py", "python3", "python2", "py3", "ipython", "ipython3")
_OTHER = frozenset(
    word
    for line in (
        "bash sh shell zsh console terminal cmd powershell output json yaml yml toml xml html css javascript js ts",
        "typescript java c cpp c++ cs csharp go rust ruby php sql diff pycon doctest markdown latex tex julia kotlin",
    )
    for word in line.split()
)
_TAGGED = re.compile(r"\[(PYTHON|CODE|ANSWER)\](.*?)(?:\[/\1\]|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<(answer|code|python|solution)(?: [^<>\n]*)?>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_CODE_LINE = re.compile(r"^[ \t]*(?:def|class|import|from|async def|@\w)[^\n]*|^\w+[ \t]*=[^=\n][^\n]*", re.MULTILINE)
_DEFINITION = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)
_TEST_NAME = re.compile(r"^(?:[Tt]est|check)")
_END_OF_THOUGHT = "</think>"
_OPEN_THOUGHT = re.compile(r"\s*(?:<\|[a-z_]{1,20}\|>(?:assistant)?\s*)*<think>")  # cut off while it thinks
_END_MARKS = ("[DONE]", "[END]", "<|im_end|>", "<|endoftext|>", "</s>")


@dataclass
class _Block:
    """A piece of code: what it defines, and what it uses without defining it."""

    code: str
    defines: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    parses: bool = False

    @classmethod
    def of(cls, code: str) -> _Block:
        tree = _tree(code)
        if tree is None:
            return cls(code, set(_DEFINITION.findall(code)))
        try:
            uses = {node.id for node in global_loads(tree)}
            defines = bound_in(tree.body)
        except RecursionError:
            return cls(code, set(_DEFINITION.findall(code)))
        return cls(code, defines, uses - defines - set(vars(builtins)), True)

    @property
    def functions(self) -> set[str]:
        """Functions and classes that it defines, without tests."""
        return {name for name in _DEFINITION.findall(self.code) if not _TEST_NAME.match(name)}


def extract_code(completion: str, names: Collection[str] = ()) -> str | None:
    """The program in a completion.

    Of several fenced blocks the last one that defines the names counts (without names: the last one that defines
    something), with the blocks that it needs: imports, helpers, other names. Text without a fence is read from its
    first line of code to the last line that is still Python.

    Args:
        completion: any text; what precedes ``</think>`` is not looked at, nor is a thought that does not end.
        names: what the tests use.

    Returns:
        Its text; None if there is none.

    Example:
        >>> extract_code("Sure:\\n```python\\ndef f():\\n    return 1\\n```\\nDone.")
        'def f():\\n    return 1\\n'
    """
    if _OPEN_THOUGHT.match(completion) and _END_OF_THOUGHT not in completion:
        return None
    text = completion.rpartition(_END_OF_THOUGHT)[2].replace("\r\n", "\n").replace("\ufeff", "")
    wanted = set(names)
    for part in _parts(text):
        blocks = [_Block.of(code) for code in _fenced(part)]
        if any(wanted & block.defines for block in blocks) or (blocks and not wanted):
            return _joined(blocks, wanted)
        if blocks:
            # None of them defines what is wanted: unless the text around them does, as well as can be.
            bare = _bare(part, names)
            found = bare is not None and wanted & _Block.of(bare).defines
            return bare if found else _joined(blocks, wanted)
    tagged = [m[2] for m in _TAGGED.finditer(text)] + [m[2] for m in _ANSWER.finditer(text)]
    for part in reversed(tagged):
        if _CODE_LINE.search(part):
            return _bare(part, names)
    return _bare(text, names)


def _parts(text: str) -> Iterator[str]:
    """Where fences are looked for: in the last answer tag, then everywhere."""
    for match in reversed(list(_ANSWER.finditer(text))[-_MAX_BLOCKS:]):
        yield match[2]
    yield text


def _tree(code: str) -> ast.Module | None:
    if len(code) > MAX_CODE_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _fenced(text: str) -> list[str]:
    """The code in fences that may be Python."""
    if "```" not in text and "~~~" not in text:
        return []
    lines = text.split("\n")
    found: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at] if len(lines[at]) < _MAX_FENCE_LINE else ""
        inline, glued, opening = _INLINE.match(line), _GLUED_OPENING.match(line), _OPENING.match(line)
        at += 1
        if inline is not None:
            found.append(inline[1] + "\n")
        elif glued is not None:
            code, at = _block([*lines[: at - 1], glued[3], *lines[at:]], at - 1, glued[1], glued[2])
            found.append(code)
        elif opening is not None:
            code, at = _block(lines, at, opening[1], opening[2])
            if _may_be_python(code, opening[3].lower()):
                found.append(code)
    return found[-_MAX_BLOCKS:]


def _may_be_python(code: str, language: str) -> bool:
    """Whether a block with this label holds a program: words and output in a bare fence are none."""
    if not code.strip() or language in _OTHER:
        return False
    return language in _PYTHON[1:] or _tree(code) is not None or _DEFINITION.search(code) is not None


def _block(lines: list[str], start: int, margin: str, fence: str) -> tuple[str, int]:
    """The code of a block, and the line after it.

    It ends at the first closing fence before which it is Python (a fence may stand in a docstring), else at the first.
    """
    closing = re.compile(rf"^[ \t>]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$")
    first: tuple[str, int] | None = None
    tried = 0
    for at in range(start, len(lines)):
        line = lines[at]
        ends = closing.match(line) is not None
        # The fence may stand at the end of the last line of code, with prose after it.
        before, _, after = line[:_MAX_FENCE_LINE].partition(fence)
        glued = not ends and before.strip(" \t>") != "" and line.count(fence) == 1
        glued = glued and (not after.strip() or (after[0] in " \t" and "#" not in before))
        opens = not ends and not glued and fence in line[:200] and _OPENING.match(line[:_MAX_FENCE_LINE]) is not None
        if not ends and not glued and not opens:
            continue
        tried += 1
        if tried > _MAX_CLOSINGS:
            break
        body = [*lines[start:at], *([before] if glued else [])]
        code = _without_margin(body, margin)
        if opens or glued:
            # Another block begins, or a comment ends with a fence: an end of this one only if it is whole.
            if code.strip() and _tree(code) is not None and not (glued and body[-1].lstrip().startswith("#")):
                return code, at if opens else at + 1
            continue
        if first is None:
            first = (code, at + 1)
            in_docstring = code.count('"""') % 2 or code.count("'''") % 2
            if not code.strip() or not in_docstring:
                return first
        elif _tree(code) is not None:
            return code, at + 1
    if first is not None:
        return first
    code = _without_margin(lines[start:], margin)
    return code[:-1] if code.endswith("\n") and lines[-1] else code, len(lines)


def _without_margin(lines: list[str], margin: str) -> str:
    """The lines of a block without what a list or a quotation put in front of each."""
    if ">" in margin:
        lines = [re.sub(r"^[ \t]*>[ \t]?", "", line) for line in lines]
    code = "\n".join(lines) + ("\n" if lines else "")
    if margin.strip(" \t") or (margin and _tree(code) is None):
        width = len(margin.replace("\t", "    "))
        cut = [line[min(width, len(line) - len(line.lstrip(" "))) :] for line in lines]
        code = "\n".join(cut) + "\n"
    return textwrap.dedent(code) if code[:1] in (" ", "\t") else code


def _joined(blocks: list[_Block], names: set[str]) -> str:
    """The block that counts, with those that it needs, in their order."""
    chosen = _chosen(blocks, names)
    taken = {chosen}
    missing = (names - blocks[chosen].defines) | blocks[chosen].uses
    while True:
        new = (
            {
                next((i for i in reversed(range(len(blocks))) if name in blocks[i].defines and blocks[i].parses), None)
                for name in missing
            }
            - {None}
            - taken
        )
        if not new:
            break
        taken |= {i for i in new if i is not None}
        defined = {name for i in taken for name in blocks[i].defines}
        missing = {name for i in taken for name in blocks[i].uses} | names
        missing -= defined
    # The block that counts comes last among those that define the same.
    order = sorted(
        taken, key=lambda i: (i == chosen and any(blocks[j].defines & blocks[i].defines for j in taken - {i}), i)
    )
    return "\n".join(blocks[i].code for i in order) if len(order) > 1 else blocks[chosen].code


def _chosen(blocks: list[_Block], names: set[str]) -> int:
    numbers = list(reversed(range(len(blocks))))
    wanted = [(len(names & blocks[i].defines), blocks[i].parses, i) for i in numbers]
    best = max((count, parses) for count, parses, _ in wanted)
    if best[0]:
        return next(i for count, parses, i in wanted if (count, parses) == best)
    return next((i for i in numbers if blocks[i].functions), numbers[0])


def _bare(text: str, names: Collection[str]) -> str | None:
    """Code without a fence: from the first line that begins something which is Python, to the last such line."""
    for mark in _END_MARKS:
        text = text.partition(mark)[0]
    starts = [match.start() for match in _CODE_LINE.finditer(text)]
    if not starts:
        return None
    fallback = text[starts[0] :].partition("\n```")[0]
    best: tuple[int, int] | None = None
    result = fallback
    budget = _MAX_CUTS
    for start in starts[:_MAX_CUTS] if len(fallback) <= MAX_CODE_CHARACTERS else []:
        if budget <= 0:
            break
        code, used = _longest(text[start:].partition("\n```")[0], budget)
        budget -= used
        if code is None:
            continue
        block = _Block.of(code)
        score = (len(set(names) & block.defines), len(block.functions))
        if best is None or score > best:
            best, result = score, code
        if best is not None and best[0] == len(set(names)) and (names or best[1]):
            break
    return result


def _without_remarks(code: str, tree: ast.Module) -> str | None:
    """Code without prose at its end that happens to be Python: ``Done``, ``Complexity: O(n)``."""
    body = list(tree.body)
    known = bound_in(body) | set(vars(builtins))

    def is_remark(node: ast.stmt) -> bool:
        said = isinstance(node, ast.Expr) or (isinstance(node, ast.AnnAssign) and not node.value)
        return said and any(name.id not in known for name in global_loads(node))

    # A label after the program ("Question: ...") begins another text of the model.
    label = next(
        (at for at, node in enumerate(body) if at and isinstance(node, ast.AnnAssign) and is_remark(node)), None
    )
    if label is not None:
        code = "\n".join(code.split("\n")[: body[label].lineno - 1])
        del body[label:]
    while body and is_remark(body[-1]):
        code = "\n".join(code.split("\n")[: body.pop().lineno - 1])
    return code if body else None


def _longest(code: str, budget: int) -> tuple[str | None, int]:
    """The longest beginning of a text that is Python, cut where Python stops reading; and how many tries that took."""
    lines = code.split("\n")
    margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    lines = list(itertools.takewhile(lambda line: not line.strip() or line.startswith(margin), lines))
    code = textwrap.dedent("\n".join(lines))
    lines = code.split("\n")
    for tried in range(1, budget + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(code)
            return _without_remarks(code, tree), tried
        except SyntaxError as error:
            end = min(error.lineno or len(lines), len(lines)) - 1
            # An open bracket or text is reported where it begins, an indented block without end one line late.
            lines = lines[: max(0, end)]
        except (ValueError, RecursionError, MemoryError):
            return None, tried
        if not lines:
            return None, tried
        code = "\n".join(lines)
    return None, budget
