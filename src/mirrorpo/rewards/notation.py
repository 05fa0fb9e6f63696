"""One spelling for mathematical text: Unicode signs, LaTeX dress and Markdown marks.

``ascii_of`` writes Unicode signs in ASCII and LaTeX (superscripts are powers, vulgar fractions are fractions, the
Unicode minus is a minus); ``tidy`` also takes away what only dresses an answer: dollars, bold marks, spaces, text
commands. What is invisible on a page (``\\phantom``, comments, zero-width characters) does not count as written.
"""

from __future__ import annotations

import re
import unicodedata

_SUPER = {
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True)),
    **dict(zip("ᵃᵇᶜᵈᵉᵏᵐᵖᵗˣʸᶻᵀ", "abcdekmptxyzT", strict=True)),
}
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₙₘₖᵢⱼₓ", "0123456789+-=()aenmkijx", strict=True))
_SUPER_RUN, _SUB_RUN = (re.compile(f"[{re.escape(''.join(table))}]+") for table in (_SUPER, _SUB))
_SUPER_OVER_SUB = re.compile(f"([{re.escape(''.join(_SUPER))}]+)[⁄/∕]([{re.escape(''.join(_SUB))}]+)")
# "1 1/2" as "1½", and "x½": the fraction stands apart from what is before it.
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
# Pictures say nothing, but for the signs of arithmetic among them.
_PICTURE_SIGNS = "\u2600-\u2714\u2717-\u2794\u2798-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff"
PICTURES = re.compile(f"[{_PICTURE_SIGNS}]")
_INVISIBLE = re.compile(f"[{_PICTURE_SIGNS}\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufe0e\ufe0f\ufeff]")
_WIDE = re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff\u2103\u2109\u212b\u2126\u00b5\u33d5\u338e-\u33a6]")
_NOT_PLAIN = re.compile("[^\\x00-\\x7f€£¥₹₽₩฿¢°]")
_ROOT = re.compile(r"([√∛∜])\s*([0-9]+(?:\.[0-9]+)?)")
_RANGE_DASH = re.compile(r"(?<=[0-9%])\s*[–—]\s*(?=[$€£¥]?[0-9])")
_SIGNS = {
    **dict.fromkeys("−﹣－‐‑‒–—", "-"),
    **dict.fromkeys(
        "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
    ),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("’‘ʼ′", "'"),
    **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("∗⁎", "*"),
    "×": "\\times ",
    "⨯": "\\times ",
    "✕": "\\times ",
    "\u2062": "\\cdot ",
    "\u2063": ",",
    "\u2064": "+",
    "·": "\\cdot ",
    "⋅": "\\cdot ",
    "∙": "\\cdot ",
    "•": "\\cdot ",
    "÷": "/",
    "√": "\\sqrt ",
    "∛": "\\sqrt[3]",
    "∜": "\\sqrt[4]",
    "π": "\\pi ",
    "∞": "\\infty ",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≠": "\\neq ",
    "≈": "\\approx ",
    "≃": "\\approx ",
    "±": "\\pm ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "∅": "\\emptyset ",
    "∖": "\\setminus ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}",
    "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}",
    "ℂ": "\\mathbb{C}",
    "⟨": "\\langle ",
    "⟩": "\\rangle ",
    "〈": "\\langle ",
    "〉": "\\rangle ",
    "⌊": "\\lfloor ",
    "⌋": "\\rfloor ",
    "⌈": "\\lceil ",
    "⌉": "\\rceil ",
    "º": "°",
    "˚": "°",
    "∶": ":",
    "，": ",",
    "。": ".",
}
_GREEK = "α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi ρ rho"
_GREEK += (
    " σ sigma τ tau φ phi χ chi ψ psi ω omega Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega"
)
_SIGNS.update(zip(_GREEK.split()[::2], [f"\\{name} " for name in _GREEK.split()[1::2]], strict=True))
_TRANSLATED = str.maketrans(_SIGNS)

_TEXT_NAMES = (
    "text|textrm|textnormal|textup|textsf|texttt|textbf|textit|textmd|mathrm|mathbf|mathsf|mathtt|mathit|mathnormal|"
    "boldsymbol|bm|mbox|hbox|operatorname|underline|emph|boxed|fbox|ensuremath|displaystyle|Large|large|huge|Huge|mathop"
)
_TEXT_COMMAND = re.compile(rf"\\(?:{_TEXT_NAMES})\*?\s*\{{([^{{}}]*)\}}")
_BARE_COMMAND = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|Large|large|LARGE|huge|Huge|bf|rm|it|sf|tt|"
    r"left(?![a-z])|right(?![a-z])|[bB]igg?[lrm]?(?![a-z])|mathstrut|strut|allowbreak|quad(?![a-z])|qquad|hfill|nobreak|"
    r"noindent|centering|par(?![a-z])|text(?![a-z])|mathrm(?![a-z])|mathbf(?![a-z])|boldsymbol(?![a-z]))(?![A-Za-z])\.?"
)
_BRACED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_STILL_UNSEEN = re.compile(r"\\[hv]?phantom(?![A-Za-z])")
_UNSEEN = re.compile(
    r"\\(?:[hv]?phantom|hspace\*?|vspace\*?|label|tag\*?|mspace|kern|mkern|hskip|nonumber|notag)(?![A-Za-z])"
    rf"\s*(?:{_BRACED}|-?[0-9.]+\s*(?:pt|em|ex|mu|cm|mm)(?![a-z]))?|(?<!\\)%[^\n%]*\n"
)
_LAST_BREAK = re.compile(r"\\\\\s*\Z")
_SYSTEM = re.compile(r"\\begin\s*\{cases\}([^&{}]*=[^&{}]*)\\end\s*\{cases\}")
_LINES = re.compile(r"\\(?:begin|end)\s*\{(?:aligned|align|gathered|gather|equation|split|displaymath|math)\*?\}")
_IN_DOLLARS = re.compile(r"\$(?!\s)([^$]*[^\s$])\$(?![0-9])")
_COLOUR = re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*(?=\{)|\\color\s*\{[^{}]*\}")
_STRUCK = re.compile(r"~~[^~]+~~")
_INVISIBLE_COLOUR = re.compile(r"\\(?:textcolor|color)\s*\{\s*(?:white|transparent)\s*\}")
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9])\s*(?:\{\s*,\s*\}|,\\!)\s*(?=[0-9])")
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|\\textdegree(?![a-z])")
_REPLACED = (
    ("\\!", ""),
    ("\\,", " "),
    ("\\;", " "),
    ("\\:", " "),
    ("\\>", " "),
    ("~", " "),
    ("\\%", "%"),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("\\pounds", "£"),
    ("\\euro", "€"),
    ("\\#", "#"),
    ("\\&", "&"),
    ("\\leqslant", "\\le"),
    ("\\geqslant", "\\ge"),
    ("\\lbrace", "\\{"),
    ("\\rbrace", "\\}"),
    ("\\lbrack", "["),
    ("\\rbrack", "]"),
    ("\\thinspace", " "),
    ("\\cdotp", "\\cdot"),
    ("\\colon", ":"),
    ("\\varnothing", "\\emptyset"),
)
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("***", "***"), ("**", "**"), ("__", "__"))
_WRAPPERS += (
    ("*", "*"),
    ("_", "_"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("{", "}"),
    ("``", "''"),
    ("==", "=="),
    ("<", ">"),
)
_FIRST_OF_WRAPPERS = {left[0] for left, _ in _WRAPPERS}
_NOTHING_TO_DO = re.compile(r"[-+]?\$?[0-9]+(?:[,.][0-9]+)*(?: [A-Za-z]+){0,3}")
_GOES_ON = re.compile(r",\s*\.{3,}(\W*)\Z")  # "1, 2, 3, ..." is no list of three
_LEADING = " \t\r\n:,;"  # not the point of ".5"
_TRAILING = " \t\r\n.,;:?"  # not the "!" of a factorial
_MAX_NESTED = 12


# What announces an answer: its abbreviation, and in other languages.
_ANNOUNCED = re.compile(
    r"(?<![A-Za-z])(?:Ans|ANS)\s*[.:=]\s*[:=]?"
    r"|(?:最终|最后的?|正确)?答案(?:应该|应当)?(?:是|为|為|[:：=])|答えは|答え\s*[:：]|(?:정?답|정답)(?:은|\s*[:：])"
    r"|(?:[Rr]éponse|[Rr]espuesta|[Rr]isposta|[Rr]esposta)(?: (?!n[oã])\w+)?(?: (?:est|es|è|é)\b|\s*:)"
    r"|Antwort(?: (?:ist|lautet|beträgt)\b|\s*:)|[Оо]твет(?: равен|\s*[:—–-])|[Jj]ibu ni\b"
)
_SPEAKS = (
    "Ans:",
    "Ans.",
    "Ans =",
    "Ans=",
    "ANS:",
    "ANS =",
    "Antwort",
    "espuest",
    "espost",
    "ispost",
    "éponse",
    "答",
    "답",
    "вет",
    "ibu ni",
)
# "42个苹果", "42です": what follows a number in those languages, but for words that change it.
_AFTER_NUMBER = re.compile(
    r"(?<=[0-9%}])\s*(?![万萬千百十亿億兆倍分半割成厘]|만|천|백|억|배|분)[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]+"
    r"(?![^\s.,;。，]*[0-9])"
)


def in_english(text: str) -> str:
    """A text with what announces an answer, abbreviated or in other languages, as "The answer is".

    Example:
        >>> in_english("Ans: 42"), in_english("答案是42个。"), in_english("La respuesta es 42")
        ('The answer is 42', 'The answer is 42. ', 'La The answer is  42')
    """
    if not any(word in text for word in _SPEAKS):
        return text
    said = _ANNOUNCED.sub("The answer is ", text)
    return said if said == text else _AFTER_NUMBER.sub("", said).replace("。", ". ")


class Unreadable(ValueError):
    """A text that states nothing that can be compared."""


def words(text: str) -> frozenset[str]:
    """The words of a list in a text."""
    return frozenset(text.split())


def ascii_of(text: str) -> str:
    """A text with its Unicode signs written in ASCII and LaTeX.

    Example:
        >>> ascii_of("10⁵"), ascii_of("1½"), ascii_of("−3"), ascii_of("36 cm²")
        ('10^{5}', '1 \\\\frac{1}{2}', '-3', '36 cm^{2}')
    """
    if text.isascii() or not _NOT_PLAIN.search(text):
        return text
    text = _INVISIBLE.sub("", text)
    text = _WIDE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = _ROOT.sub(r"\1{\2}", text)
    text = _RANGE_DASH.sub(" to ", text)
    text = _SUPER_OVER_SUB.sub(
        lambda m: f" \\frac{{{''.join(map(_SUPER.__getitem__, m[1]))}}}{{{''.join(map(_SUB.__getitem__, m[2]))}}}", text
    )
    text = _SUPER_RUN.sub(lambda m: f"^{{{''.join(map(_SUPER.__getitem__, m[0]))}}}", text)
    text = _SUB_RUN.sub(lambda m: f"_{{{''.join(map(_SUB.__getitem__, m[0]))}}}", text)
    text = _VULGAR.sub(_vulgar, text).translate(_TRANSLATED)
    return "".join(_digit(c) if c > "\x7f" and c.isdecimal() else c for c in text)


def _vulgar(found: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", found[0]).partition("⁄")
    before = found.string[found.start() - 1 : found.start()]
    return f"{' ' if before and before.isdigit() else ''}\\frac{{{top}}}{{{bottom}}}"


def _digit(character: str) -> str:
    return str(unicodedata.decimal(character))


def tidy(text: str) -> str:
    """An answer without what only dresses it.

    Example:
        >>> tidy(r"**$\\text{about }\\$1{,}000$.**")
        'about $1,000'
    """
    if _NOTHING_TO_DO.fullmatch(text):
        return text
    text = ascii_of(text)
    if "\\" in text or "{" in text or "%" in text[:-1]:
        text = _without_dress(text)
    elif "$" in text:
        text = text.replace("\0", "")
    if "~" in text:
        text = _STRUCK.sub(" ", text).replace("~", " ")
    if "..." in text:
        text = _GOES_ON.sub(r", \\ldots\1", text)
    while True:
        before = text
        text = text.lstrip(_LEADING).rstrip(_TRAILING)
        if text[:1] not in _FIRST_OF_WRAPPERS:
            break
        for left, right in _WRAPPERS:
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                inside = text[len(left) : -len(right)]
                if _wraps(left, right, inside):
                    text = inside
        if text == before:
            break
    if "$" in text[1:]:
        text = _IN_DOLLARS.sub(r"\1", text)
    if text[:1] == "=" != text[1:2]:
        text = text[1:]
    text = " ".join(text.split())
    return text.replace("\0", "$") if "\0" in text else text


def _wraps(left: str, right: str, inside: str) -> bool:
    """Whether the marks around ``inside`` belong together: not as in ``**5** or **6**``."""
    if left == "{":
        return "}" not in inside
    if left in "'<" and not inside.isalnum():
        return False
    return left not in inside and right not in inside


def _without_dress(text: str) -> str:
    """LaTeX without colours, spacing, text commands and what is not seen."""
    text = text.replace("\0", "").replace("\\$", "\0")
    if _INVISIBLE_COLOUR.search(text):
        return ""
    text = _UNSEEN.sub(" ", text)
    if _STILL_UNSEEN.search(text):
        return ""
    if "cases" in text:
        text = _SYSTEM.sub(lambda m: m[1].replace("\\\\", ","), text)
    if "\\begin" in text and _LINES.search(text):
        text = _LINES.sub(" ", text)
        if "\\begin" not in text:
            text = text.replace("&", "").replace("\\\\", ",")
    if "\\\\" in text:
        text = _LAST_BREAK.sub("", text)
    text = _COLOUR.sub("", text)
    text = _THOUSANDS_COMMA.sub(",", text)
    for _ in range(_MAX_NESTED):
        changed = _TEXT_COMMAND.sub(r" \1 ", text)
        if changed == text:
            break
        text = changed
    text = _BARE_COMMAND.sub(" ", text)
    rows = "\\\\" in text  # "\\," and the like must not take a row break apart
    if rows:
        text = text.replace("\\\\", "\x01")
    for old, new in _REPLACED:
        if old in text:
            text = text.replace(old, new)
    text = re.sub(r"\\(?=\s|\Z)", "", text)
    text = _DEGREES.sub("°", text)
    return text.replace("\x01", " \\\\ ") if rows else text
