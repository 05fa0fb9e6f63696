"""Single expressions of LaTeX and plain text, read by math-verify's grammar (latex2sympy).

What the grammar would misread is respelled before (fractions without braces, roots, decimals as exact fractions) or
refused: words, numbers side by side, primes.
"""

from __future__ import annotations

import math
import re
from typing import Any

from mirrorpo.rewards.notation import Unreadable, words

_OPEN, _CLOSE = "([{", ")]}"
_DECIMAL = re.compile(r"(?<![0-9A-Za-z_.])([0-9]*)\.([0-9]+)(?![0-9.])")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?(?![0-9])")
_POWER_OF_DECIMAL = re.compile(r"\^\s*(-?[0-9]*\.[0-9]+)")
_POWER_OF_SIGN = re.compile(r"\^\s*(-\s*[0-9A-Za-z]+|[0-9]{2,})")
_POWER_IN_BRACKETS = re.compile(r"\^\s*\(([^()]*)\)")
_TOKEN = r"(?:[0-9A-Za-z]|\\[A-Za-z]+)"
_FRACTION = re.compile(rf"\\frac\s*(?:\{{((?:[^{{}}])*)\}}|({_TOKEN}))\s*(?:\{{((?:[^{{}}])*)\}}|({_TOKEN}))")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])(?![A-Za-z])")
_DOUBLE_FACTORIAL = re.compile(r"(?<![0-9A-Za-z.)}])([0-9]{1,3})!!(?!!)")
_CHOOSE = re.compile(r"(\A|\{)([^{}]*)\\choose(?![a-z])([^{}]*)(\Z|\})")
# The grammar adds a number and what stands beside it, as in a mixed one, if that is rational: "3(1/2)" would be 7/2.
_BESIDE = re.compile(r"((?<![0-9A-Za-z_^.])[0-9]+(?:\.[0-9]+)?|\))\s*(?=\(|\[|\\binom|e\s*\^)")
_BESIDE_BINOMIAL = re.compile(r"([)}]|(?<![\\A-Za-z])[A-Za-z])\s*(?=\\binom)")
_TIMES = re.compile(r"(?<=[0-9)])\s+[xX]\s+(?=[0-9(.])")  # "6 x 7"
_COMBINATIONS = re.compile(r"(?:\{\s*\}\s*)?[_^]\{?([0-9]{1,3})\}?\s*C\s*_\s*\{?([0-9]{1,3})\}?")  # "{}_5C_2"
_OF_NUMBERS = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-z])")
_SUBFACTORIAL = re.compile(r"(\A|[-+*/=({,]|\\(?:cdot|times)(?![a-z]))\s*!\s*([0-9]{1,3})(?![0-9!.])")
_ROOT = re.compile(rf"\\sqrt\s*(\[[^\[\]]*\])?\s*({_TOKEN}(?![A-Za-z])|[0-9]+)")
_ROOT_IN_BRACKETS = re.compile(r"(?<![A-Za-z])\\?sqrt\s*\(([^()]*)\)")
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|arcsin|arccos|arctan|sinh|cosh|tanh|max|min|gcd|lcm)(?![A-Za-z])"
)
_NESTED_PARENTHESES, _NESTED_BRACES = re.compile(r"\((\([^()]*\))\)"), re.compile(r"\{(\{[^{}]*\})\}")
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_ENDS = re.compile(
    r"(?:(?<=[(\[][0-9])|(?<=[(\[-][0-9]{2})|(?<=[(\[-][0-9]{3})|(?<=-[0-9])),(?=[0-9]{3}[)\]])"
)  # of an interval
_SINGLE_INDEX = re.compile(r"([_^])\s*([0-9A-Za-z])(?![0-9A-Za-z])")
_SIDE_BY_SIDE = re.compile(r"[0-9.]\s+[0-9.]")
_MIXED = re.compile(r"(?<![0-9.}])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.])")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,4})(?![0-9A-Za-z.])")
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*°")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ASIDE = re.compile(r"_\s*\{[^{}]*\}|\\(?:begin|end)\s*\{[^{}]*\}(?:\{[clr|@{}\s]*\})?")
_JOIN = re.compile(r"\b(?:and|or)\b")
_LETTERS = re.compile(r"[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_SMALL_WORDS = words("or to is in of by as so if no an at it on we be up do me he my")
_LETTER_GROUPS = tuple(
    map(set, ("abcd", "wxyz", "pqrst", "klmn", "uvw", "efgh", "ijk", "rst", "ABCD", "WXYZ", "PQRST", "KLMN", "EFGH"))
)
_REFUSED = re.compile(
    r"\\(?:p?mod|not|text|begin|end|cancel|exists|forall|underbrace|overbrace|stackrel|substack|ldots|dots|cdots)(?![a-z])|['\"`#$&?@~]|\.\.|[^\x00-\x7f°]|\\\\"
)


def splits(text: str, pattern: str) -> list[str]:
    """Splits a text at a pattern, outside brackets only."""
    inside = _depths(text)
    parts, start = [], 0
    for found in re.finditer(pattern, text):
        if inside[found.start()] == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def top_level(text: str, separator: str, *, thousands: bool = False) -> list[str]:
    """Splits a text at a separator outside brackets; with ``thousands``, "1,234" stays whole."""
    inside = _depths(text)
    whole = {at for found in _THOUSANDS.finditer(text) for at in range(*found.span())} if thousands else set()
    parts, start = [], 0
    for at, character in enumerate(text):
        if character == separator and inside[at] == 0 and at not in whole:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _depths(text: str) -> list[int]:
    """The depth of brackets at each character; half-open intervals close like any other pair."""
    depths, depth = [], 0
    for at, character in enumerate(text):
        if character in _OPEN:
            depths.append(depth)
            depth += 1
        elif character in _CLOSE:
            depth -= 1
            depths.append(depth)
        else:
            depths.append(depth)
        if text.startswith("\\begin", at):
            depth += 1
        elif text.startswith("\\end", at):
            depth -= 1
    return depths


def has_words(text: str) -> bool:
    """Whether a text is written in words: letters that are neither variables nor functions ("and", "or" aside).

    Example:
        >>> has_words("2xy + sin x"), has_words("abc"), has_words("yes"), has_words("5 or 6")
        (False, False, True, False)
    """
    bare = _FUNCTION.sub(" ", _INFINITY.sub(" ", _COMMAND.sub(" ", _ASIDE.sub(" ", text))))
    bare = _JOIN.sub(" ", bare)
    return any(_is_word(word) for word in _WORD.findall(bare))


def _is_word(word: str) -> bool:
    if len(word) == 2:
        return word in _SMALL_WORDS
    return not any(set(word) <= group for group in _LETTER_GROUPS) and not (word.isupper() and len(word) <= 3)


def respelled(text: str) -> str:
    """A tidy text as the grammar reads it.

    Example:
        >>> respelled(r"\\frac12 + 0.5"), respelled("sqrt(x)**2")
        ('\\\\frac{1}{2} + \\\\frac{5}{10}', '\\\\sqrt{x}^2')
    """
    text = text.replace("**", "^").replace("\\infin ", "\\infty ").replace("\\lt", "<").replace("\\gt", ">")
    text = text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\neq ").replace("\\ne ", "\\neq ")
    for nested in (_NESTED_PARENTHESES, _NESTED_BRACES):
        while (changed := nested.sub(r"\1", text)) != text:
            text = changed
    if "\\cup" in text or "\\cap" in text:
        text = _ENDS.sub(", ", text)
    text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    text = _DOUBLE_FACTORIAL.sub(lambda m: str(math.prod(range(int(m[1]), 1, -2))), text)
    text = _TIMES.sub(r"\\times ", text.replace("\\lg ", "\\log_{10} ").replace("\\lg(", "\\log_{10}("))
    text = _COMBINATIONS.sub(r"\\binom{\1}{\2}", text)
    text = text.replace("\\dbinom", "\\binom").replace("\\tbinom", "\\binom")
    text = _CHOOSE.sub(r"\\binom{\2}{\3}", text)
    text = _BESIDE_BINOMIAL.sub(r"\1 \\cdot ", text)
    if not _OF_NUMBERS.search(text):
        text = _BESIDE.sub(r"\1 \\cdot ", text)
    text = _SUBFACTORIAL.sub(lambda m: f"{m[1]} {_derangements(int(m[2]))}", text)
    text = _SCIENTIFIC.sub(r"(\1 \\cdot 10^{\2})", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _INFINITY.sub(r"\\infty ", text)
    while (changed := _ROOT_IN_BRACKETS.sub(r"\\sqrt{\1}", text)) != text:
        text = changed
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = text.replace("*", " \\cdot ").replace("\\div", "/").replace("\\arc ", "\\arc")
    text = _ROOT.sub(lambda m: f"\\sqrt{m[1] or ''}{{{m[2]}}}", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    text = _POWER_IN_BRACKETS.sub(r"^{\1}", text)
    text = _POWER_OF_DECIMAL.sub(r"^{\1}", text)
    text = _POWER_OF_SIGN.sub(r"^{\1}", text)
    text = _REPEATING.sub(_exact_repeating, text)
    text = _DECIMAL.sub(lambda m: f"\\frac{{{(m[1] + m[2]).lstrip('0') or '0'}}}{{{10 ** len(m[2])}}}", text)
    if "°" in text:
        text = _DEGREES.sub(r"(\1 \\cdot \\pi / 180)", text) if _TRIGONOMETRY.search(text) else text.replace("°", "")
    return text.strip()


def _derangements(count: int) -> int:
    found = 1
    for size in range(1, count + 1):
        found = size * found + (-1) ** size
    return found


def _exact_repeating(found: re.Match[str]) -> str:
    start, fixed, again = found[1] or "0", found[2], found[3]
    bottom = (10 ** len(again) - 1) * 10 ** len(fixed)
    top = int(start + fixed + again) - int(start + fixed)
    return f"\\frac{{{top}}}{{{bottom}}}"


def read_expression(text: str, both: str) -> Any:
    """The sympy object that a text states.

    Args:
        text: tidy.
        both: the two texts that are compared, a line each: capitals are told from small letters only if one of them
            has both of a letter; ``i`` is the imaginary unit unless ``j``, ``k`` or a sum's index is there too.

    Raises:
        Unreadable: it states none.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    text = _SINGLE_INDEX.sub(r"\1{\2}", text)
    if has_words(text) or _JOIN.search(text) or _SIDE_BY_SIDE.search(_MIXED.sub("", text)) or _REFUSED.search(text):
        raise Unreadable(text)
    sides = [set("".join(_LETTERS.findall(_COMMAND.sub(" ", side)))) for side in both.split("\n")]
    mixed_case = any(letter.swapcase() in side for side in sides for letter in side)
    letters = set().union(*sides)
    try:
        value = latex2sympy(
            respelled(text),
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=not mixed_case),
        )
    except Exception as error:  # the text is the model's: whatever the grammar raises, it could not be read
        raise Unreadable(text) from error
    if value is None or isinstance(value, str | bool | list) or not hasattr(value, "free_symbols"):
        raise Unreadable(text)
    if value.has(sympy.nan, sympy.zoo) if hasattr(value, "has") else False:
        raise Unreadable(text)
    if not {"j", "k"} & letters and "\\sum" not in both and "\\prod" not in both:
        value = value.xreplace({symbol: sympy.I for symbol in value.free_symbols if str(symbol) == "i"})
    return value
