"""The one rule for where the final answer of a text is.

1. What is inside ``<think>`` does not count.
2. ``####``, ``\\\\boxed{}`` and ``<answer>`` beat a phrase; the last of them counts.
3. A phrase ("the answer is ...", "**Answer:** ...", a heading "Final Answer") counts only if something readable
   follows.
4. Several answers offered at once ("5 or 6", two boxes in a sentence) are all of them the answer.
5. With ``last_number``, a text without any of these answers with its last number, read whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mirrorpo.rewards.notation import PICTURES, ascii_of, in_english, words
from mirrorpo.rewards.numbers import in_digits, last_number_in, read_number

# A final answer stands at the end; the rest of a long text is not looked at.
TAIL_CHARACTERS = 100_000
_NEAR_CHARACTERS = 2_000  # of a phrase, a line
_BOX_CHARACTERS = 10_000
_MAX_LOOKS = 50  # marks or phrases tried, from the end
_MARKER = "####"

_THOUGHT_END = re.compile(
    r"</\s*(?:think|thinking|thought|reasoning)\s*>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.IGNORECASE
)
_THOUGHT = re.compile(
    r"<\s*(?:think|thinking|thought|reasoning)\s*>|\[THINK\]|◁think▷|<\|channel\|>analysis<\|message\|>", re.IGNORECASE
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE_BOX = re.compile(r"[-+]?[0-9][0-9.,]*|[A-Za-z](?![A-Za-z])")
_BOX_BEGINS = re.compile(rf"{_BOX.pattern}(?:\{{|\Z|{_BARE_BOX.pattern})")  # not where a text only speaks of \\boxed
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_IS = r"(?:is|are|equals|be|becomes|was|(?:comes|works)\s+(?:out\s+)?to)"
_PHRASE = re.compile(
    rf"nswers?(?![A-Za-z])(?:\s*\([^()\n]{{1,40}}\))?(?:[*_`]{{0,3}}\s*(?:[:=]|\s(?:[-–—]+>?|[→⇒])(?=\s))[*_`]{{0,3}}|(?:[^.\n:=!?]|\.(?=[0-9])){{0,80}}?[\s*_]{_IS}\b[*_`]{{0,3}}\s*:?|"
    rf"(?P<about>\s(?:to|for|in)\b[^.\n:=!?]{{0,50}}:)|"
    rf"(?P<heading>[*_`]{{0,3}}[ \t]*\n))",
    re.IGNORECASE,
)
_JSON = re.compile(r"nswer[\"']\s*:\s*(?:\"((?:[^\"\\\n]|\\.)*)\"|'([^'\n]*)'|([-+0-9.eE]+|true|false)\s*[,}\n])")
_KEY = re.compile(r"[\"'](?:(?:final|correct|numerical)[_ ]?)?\Z", re.IGNORECASE)
_DENIED = re.compile(
    rf"(?:\b(?:not|never|cannot|(?:false|untrue|impossible|unlikely)\s+(?:that|to))|n['’]t)\s+(?:\w+\s+)?{_IS}\b[*_`]{{0,3}}\s*:?\Z",
    re.IGNORECASE,
)
_SEEKING = re.compile(
    r"\b(?:find|get|check|verify|know|compute|calculate|determine|write|give|need)\s+(?:\w+\s+){0,2}\Z", re.I
)
_BEFORE_LINE = re.compile(r"\s*\n\s*(?:>\s*|```[a-z]*\s*\n)")
_COMMENT, _COMMENT_END = "<!--", "-->"
_TAG = "<answer>"
_TAGS = re.compile(r"<(/?)\s*(?:final[ _-]?)?answer\s*>", re.IGNORECASE)
# A model's marks for the end of its text.
_END = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|return)\|>|<end_of_turn>|<eos>|<｜end▁of▁sentence｜>|</s>(?=\s*\Z)"
)
_TAG_BEFORE = re.compile(r"<answer>([^<]{1,200})</answer>[\s,;.]*(?:or|and)[\s,;:]*\Z", re.IGNORECASE)
_TEXT = re.compile(r"\\text(?:bf|rm)?\s*\{([^{}]*)\}")
_HEADING = re.compile(
    r"[\s#*_`>]*(?:\d+[.)]\s*)?(?:the\s+|so\s+|my\s+)?(?:final\s+|correct\s+|numeric(?:al)?\s+|short\s+)?(?:answers?|results?|solution)\s*"
    r"(?P<colon>:|[*_]+\s*:)?[\s*_`:]*(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_LINE_BEFORE = re.compile(r"[\s#*_`>0-9.)-]*(?:[A-Za-z]+\s+){0,3}[Aa]?\Z")
# Regions of mathematics are skipped; what ends a sentence outside them ends the answer.
_SENTENCE = re.compile(
    r"\$\$[^$]{1,1000}\$\$|\\\[.{1,1000}?\\\]|\\\(.{1,1000}?\\\)|\\begin\{([a-z]+\*?)\}.{1,1000}?\\end\{\1\}"
    r"|\$(?![\s$])[^$\n]{0,300}(?<![\s\\])\$(?!\d)"
    r"|(?P<end>(?<!Rs)[.;!?]+(?=[\s*_)\"'`]|$)|\n|,\s+(?!(?:or|and)\b)(?=[a-z]{2}|[ie]\.)"
    r"|(?<!\s)\s{1,20}(?:[-–—]+\s+(?=[A-Za-z])|\((?=[A-Za-z]{2})"
    r"|(?=(?:because|since|which|so that|I hope|as required|as desired|as expected|as needed|as follows)\b)))",
    re.DOTALL,
)
_OPTION = re.compile(r"[*_(]*[A-Ja-j]")
_UP_TO_LAST_IS = re.compile(rf".*\b{_IS}\b:?\s+(?=\S)", re.DOTALL)
# A number and at most a word, to the end: most answers are.
_PLAIN_LINE = re.compile(r"(-?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?: [A-Za-z]+)?)\.?\s*")
_HEDGE = re.compile(
    r"\b(?:or|maybe|possibly|perhaps|alternatively|else|otherwise|if|unless|but|when|could|might)\b[^.\n]*[0-9]",
    re.IGNORECASE,
)
_NEXT_OFFERS = re.compile(r"\s*(?:or|maybe|perhaps|possibly|alternatively)\b[^.\n]{0,20}[0-9]", re.IGNORECASE)
_SENTENCE_BREAK = re.compile(r"[.!?](?=\s|$)|\n")
_JOINED = re.compile(r"[\s$*,;()\[\]\\.]*\b(?:or|and)\b[\s$*,;()\[\]\\]*", re.IGNORECASE)
_OR_BEFORE = re.compile(r"(\S{1,60})\s+or\s+[$\\(\[*\s]*\Z")
_OR_AFTER = re.compile(
    r"[\s$*)\]\\,.]*\b[oO]r\s+(?:is\s+|just\s+|maybe\s+|possibly\s+)?([$\\(*-]*[0-9][^\s,;!?]{0,60})"
)
_BULLET = re.compile(r"[-*•]\s+(.*)")
_MARKDOWN = re.compile(
    r"(?<![\w)}*_])[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}(?![\w(\\{\[*_-])|`|</?(?:b|strong|i|em|u|mark|code|p|span|center)>"
)
_FILLER = re.compile(
    r"(?:(?:indeed|of course|a total of|in total|"
    r"simply|therefore|thus|then|clearly|that|now|also|equal to|given by|option|choice|the number|just|"
    r"definitely|still|hence)\b[\s:,]*)+",
    re.IGNORECASE,
)
# "The answer is, in metres: 42"
_ABOUT = re.compile(
    r"(?:in|as|to|for|given|rounded|simplified|expressed|written|measured|below|shown)\b[^\n:.!?=]{0,60}:[\s*]*(?=\S)",
    re.IGNORECASE,
)
_STARTS_AS_MATHS = re.compile(r"(?:[\s$(\[{<+\-.~|≈±√'\"−]|\\[a-zA-Z]+)*[0-9¼-¾⅐-⅞]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_FUNCTIONS = words(
    "sqrt sin cos tan cot sec csc log ln exp pi inf mod max min gcd lcm arcsin arccos arctan sinh cosh tanh"
)
_SHORT_ANSWERS = words("yes no true false none infinity infinite undefined")
_SMALL_WORDS = words("of to by it as so an up at in on if we is be or my he do me us not the for")
_REMARK = words(
    "correct right wrong incorrect consistent valid rounded in given exact only reasonable below above as not the "
    "same to by expected verified confirmed therefore based obtained found derived shown left simply also still "
    "now well plausible clear obvious sensible independent already unique positive negative an a at for from on "
    "what supposed required simplified written expressed of"
)


@dataclass(frozen=True)
class Answer:
    """A final answer as it stands in a text.

    Attributes:
        parts: what is offered; one text, or several that are offered at once.
        exclaimed: an exclamation mark followed; it ends a sentence, unless the right answer has a factorial.
    """

    parts: tuple[str, ...]
    exclaimed: bool = False


def find_answer(completion: str, *, last_number: bool = False) -> Answer | None:
    """The final answer of a text; None without one, an empty part if a mark is followed by nothing.

    Args:
        completion: any text; its last 100 000 characters are looked at.
        last_number: without a mark, take the last number.

    Example:
        >>> find_answer("\\\\boxed{42}. So the answer is correct.").parts
        ('42',)
        >>> find_answer("either \\\\boxed{5} or \\\\boxed{6}").parts
        ('5', '6')
    """
    text = _seen(_after_thought(completion)[-TAIL_CHARACTERS:])
    if "<" in text:
        text = _TAGS.sub(r"<\1answer>", _END.split(text, maxsplit=1)[0])
    empty = None
    for kind, at in _marks(text):
        found = _marked(text, kind, at)
        if found is None:
            continue
        if found.parts != ("",):
            return found
        empty = empty or found
        if kind == "box" and "}" not in text[at:]:  # the text was cut off inside its last box
            return found
    text = in_english(text)
    if "nswer" in text or "NSWER" in text:
        found = _by_phrase(text)
        if found is not None:
            return found
    if empty is not None:
        return empty
    if not last_number:
        return None
    said = last_number_in(_MARKDOWN.sub("", ascii_of(text[-_NEAR_CHARACTERS:])).replace("\\approx", ""))
    return None if said is None else Answer((said,))


def final_answer(completion: str, *, last_number: bool = False) -> str | None:
    """The text of the final answer, as it stands.

    Args:
        completion: any text; its last 100 000 characters are looked at.
        last_number: without a mark, take the last number.

    Returns:
        The text, empty if a mark is followed by nothing (or a box is not closed); None without a mark. Several
        answers offered at once are joined by commas.

    Example:
        >>> final_answer(r"so \\\\boxed{\\\\frac{1}{2}} it is")
        '\\\\\\\\frac{1}{2}'
        >>> final_answer("The answer is $72. Done.")
        '$72'
    """
    found = find_answer(completion, last_number=last_number)
    return None if found is None else ", ".join(found.parts)


def _after_thought(text: str) -> str:
    """What follows the last closed thought and is in no open one."""
    if "<" not in text and "[/T" not in text and "[T" not in text and "◁" not in text:
        return text
    end = 0
    for found in _THOUGHT_END.finditer(text):
        end = found.end()
    opened = _THOUGHT.search(text, end)
    return text[end : opened.start() if opened else None] if end or opened else text


def _seen(text: str) -> str:
    """A text without pictures and the comments of HTML."""
    if not text.isascii():
        text = PICTURES.sub("", text)
    if _COMMENT not in text:
        return text
    kept, at = [], 0
    while (start := text.find(_COMMENT, at)) >= 0 and (end := text.find(_COMMENT_END, start)) >= 0:
        kept.append(text[at:start])
        at = end + len(_COMMENT_END)
    return "".join([*kept, text[at:]])


def _marks(text: str) -> Iterator[tuple[str, int]]:
    """Kind and position of the marks, from the last to the first."""
    hashes = text.rfind(_MARKER)
    box = _last_box(text, len(text)) if "\\" in text else -1
    tag = text.rfind(_TAG) if "<" in text else -1
    for _ in range(_MAX_LOOKS):
        at = max(hashes, box, tag)
        if at < 0:
            return
        if at == hashes:
            start = len(text[:at].rstrip("#")) if at and text[at - 1] == "#" else at
            yield "hashes", at
            hashes = text.rfind(_MARKER, 0, start)
        elif at == box:
            box = _outermost(text, box)
            yield "box", box
            box = _last_box(text, box)
        else:
            yield "tag", at
            tag = text.rfind(_TAG, 0, at)


def _last_box(text: str, end: int) -> int:
    at = end
    for _ in range(_MAX_LOOKS):
        start = max(0, at - _BOX_CHARACTERS)
        found = max(text.rfind("\\boxed", start, at), text.rfind("\\fbox", start, at))
        if found < 0 and start > 0:
            found = max(text.rfind("\\boxed", 0, at), text.rfind("\\fbox", 0, at))
        at = found
        if at < 0 or _BOX_BEGINS.match(text, at):
            return at
    return -1


def _outermost(text: str, at: int) -> int:
    """The start of the box that holds the box at a position, itself if it is in none."""
    before = at
    for _ in range(_MAX_LOOKS):
        before = _last_box(text, before)
        if before < 0 or at - before > _BOX_CHARACTERS:
            return at
        end = _box(text, before)[1]
        if end > at:
            at = before
        elif end > 0:
            return at
    return at


def _marked(text: str, kind: str, at: int) -> Answer | None:
    """What a mark marks; None if it is a heading and marks nothing."""
    if kind == "box":
        return _boxed(text, at)
    if kind == "tag":
        inside = text[at + len(_TAG) :].partition("</answer>")[0]
        if _MARKER in inside or "\\boxed" in inside:
            return find_answer(inside)
        found = _labelled(inside.strip())
        other = _TAG_BEFORE.search(text[max(0, at - 300) : at])
        return Answer((other[1].strip(), *found.parts)) if other and other[1].strip() not in found.parts else found
    rest = text[at + len(_MARKER) : at + _NEAR_CHARACTERS].lstrip("# \t\r\n")
    if "answer" in rest[:60].lower() and _HEADING.fullmatch(rest.partition("\n")[0]):
        return _labelled(rest)
    line, _, more = rest.partition("\n")
    found = _first_sentence(line.strip(), prose=False)
    if more.strip() and not _readable(found.parts[0]) and found.parts[0] and len(found.parts[0].split()) > 1:
        return None
    return found


def _labelled(text: str) -> Answer:
    """An answer that may begin with "Answer:" or "The answer is"."""
    phrase = re.match(r"[\s#*_`>]*(?:(?:the|so|my|thus|final|correct)[\s,]+){0,3}a", text, re.IGNORECASE)
    if phrase and (found := _PHRASE.match(text, phrase.end())):
        text = text[found.end() :].lstrip(" \t\r\n:*_")
    elif phrase and (heading := _HEADING.fullmatch(text)):
        text = heading["rest"]
    return _first_sentence(text.strip(), prose=False)


def _box(text: str, at: int) -> tuple[str, int]:
    """What the box at a position holds and where it ends; ("", -1) if it is not closed."""
    opening = _BOX.match(text, at)
    assert opening is not None
    if text[opening.end() : opening.end() + 1] != "{":
        bare = _BARE_BOX.match(text, opening.end())
        return (bare[0].rstrip(".,"), bare.end()) if bare else ("", -1)
    depth = 0
    for brace in _BRACES.finditer(text, opening.end(), opening.end() + _BOX_CHARACTERS):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[opening.end() + 1 : brace.start()].strip(), brace.end()
    return "", -1


def _boxed(text: str, at: int) -> Answer:
    """The box at a position with all that its sentence offers beside it."""
    inside, end = _box(text, at)
    if not inside:
        return Answer(("",))
    if "nswer" in inside:
        inside = _labelled(_TEXT.sub(r"\1", inside)).parts[0]
    parts, start = [inside], at
    for _ in range(_MAX_LOOKS):
        before = _last_box(text, start)
        if before < 0:
            break
        before = _outermost(text, before)
        other, other_end = _box(text, before)
        between = text[max(other_end, 0) : start]
        if (
            other_end < 0
            or len(between) > 300
            or not (_JOINED.fullmatch(between) or not _SENTENCE_BREAK.search(between))
        ):
            break
        if other:
            parts.insert(0, other)
        start = before
    near = text[max(0, start - 100) : start]
    if "or" in near[-20:] and (earlier := _OR_BEFORE.search(near)) and re.search(r"[0-9]", earlier[1]):
        parts.insert(0, earlier[1].strip("$*"))
    parts += _offered_after(text[end : end + 300])
    return Answer(tuple(dict.fromkeys(parts)))


def _offered_after(rest: str) -> list[str]:
    """What the rest of a sentence offers after a marked answer: "or 6", "so the answer is 42"."""
    if later := _OR_AFTER.match(rest):
        return [later[1].rstrip(".").strip("$*")]
    if "nswer" not in rest:
        return []
    sentence = _SENTENCE_BREAK.split(rest, maxsplit=1)[0]
    said = _phrases(sentence)
    return [found.parts[0] for found in said if _readable(found.parts[0])][:1]


def _by_phrase(text: str) -> Answer | None:
    """What the last phrase with something readable after it states; else the last that a word may answer."""
    in_words = None
    for found in _phrases(text):
        if _readable(found.parts[0]):
            return found
        if in_words is None and _in_words(found.parts[0]):
            in_words = found
    return in_words


def _phrases(text: str) -> Iterator[Answer]:
    """What follows "answer is", "Answer:" and the like, from the last to the first."""
    at = len(text)
    for _ in range(_MAX_LOOKS):
        at = max(text.rfind("nswer", 0, at), text.rfind("NSWER", 0, at))
        if at < 1:
            return
        if (json := _JSON.match(text, at)) and _KEY.search(text, max(0, at - 12), at - 1):
            yield Answer(((json[1] or json[2] or json[3] or "").replace("\\\\", "\\").strip(),))
            continue
        found = _PHRASE.match(text, at) if text[at - 1] in "aA" and not text[at - 2 : at - 1].isalpha() else None
        if found is None or (found[0].find("n", 1) > 0 and _DENIED.search(found[0])):
            continue
        if found["about"] and _SEEKING.search(text, max(0, at - 40), at - 1):
            continue
        if found["heading"] and not _LINE_BEFORE.fullmatch(text[max(0, at - 100) : at].rpartition("\n")[2]):
            continue
        rest = text[found.end() : found.end() + _NEAR_CHARACTERS]
        if "\n" in rest[:20]:
            rest = _BEFORE_LINE.sub("\n", rest, count=1)
        yield _stated(rest.lstrip(" \t\r*_:`,"))


def _stated(rest: str) -> Answer:
    """What a phrase states, up to the end of its sentence."""
    line = rest.lstrip()
    if (about := _ABOUT.match(line)) is not None:
        rest = line = line[about.end() :].lstrip()
    if line is not rest and "\n" in rest[: len(rest) - len(line)] and _BULLET.match(line):
        points = []
        for point in line.splitlines():
            bullet = _BULLET.match(point)
            if bullet is None:
                break
            points.append(_first_sentence(bullet[1], prose=True).parts[0])
        return Answer(tuple(points))
    found = _first_sentence(_FILLER.sub("", line, count=1) if _FILLER.match(line) else line, prose=True)
    said = found.parts[0]
    if not _readable(said) and (last := _UP_TO_LAST_IS.match(said)) and not _DENIED.search(last[0].rstrip()):
        return Answer((said[last.end() :],), found.exclaimed)
    return found


def _first_sentence(text: str, *, prose: bool) -> Answer:
    """The first sentence, without Markdown; mathematics between dollars is never cut."""
    if plain := _PLAIN_LINE.fullmatch(text):
        return Answer((plain[1],))
    for found in _SENTENCE.finditer(text):
        mark = found["end"]
        if mark is None:
            continue
        if not prose and mark.strip(" !") == "" and mark.strip():
            continue  # after #### a "!" is a factorial
        rest = text[found.end() :]
        if _NEXT_OFFERS.match(rest) or (
            mark[:2] == ".." and (rest.lstrip()[:1].isdigit() or text[: found.start()].rstrip().endswith(","))
        ):
            continue
        if (
            mark == "."
            and _OPTION.fullmatch(text[: found.start()])
            and rest.lstrip()[:1] in "$-\\0123456789"
            and rest.strip()
        ) or (mark[:1] == "," and in_digits(rest) != rest):
            continue
        if mark[:1] in ",; (" and _HEDGE.search(_SENTENCE_BREAK.split(rest, maxsplit=1)[0]):
            continue
        parts = [_MARKDOWN.sub("", text[: found.start()]).strip()]
        if (
            not prose
            and "nswer" in (sentence := _SENTENCE_BREAK.split(rest, maxsplit=1)[0])
            and mark != "\n"
            and mark[0] not in ".?;"
        ):
            parts += [said.parts[0] for said in _phrases(sentence) if _readable(said.parts[0])][:1]
        return Answer(tuple(dict.fromkeys(parts)), prose and mark == "!")
    return Answer((_MARKDOWN.sub("", text).strip(),))


def _readable(text: str) -> bool:
    """Whether a text begins as an answer does: with mathematics, an option's letter or a word such as "yes"."""
    if _STARTS_AS_MATHS.match(text):
        return True
    bare = _COMMAND.sub(" ", text)
    said = [word.lower() for word in _WORD.findall(bare)]
    if not said:
        return any(character.isalnum() and character < "\u3040" for character in text) and not (
            text[:2] in ("a ", "A ") and len(text) > 3
        )
    if "\\text" in text or "\\mathrm" in text:
        return len(said) <= 6
    if len(said) <= 12 and read_number(text) is not None:
        return True
    if said[0] in ("minus", "negative"):
        return len(said) <= 2 or text[len(said[0]) :].lstrip()[:1].isdigit()
    if said[0] in _SHORT_ANSWERS:
        return len(said) <= 2
    if all(word in _FUNCTIONS or (len(word) <= 2 and word not in _SMALL_WORDS) for word in said):
        return True
    return re.match(r"\(?[A-J][).:]\s", text) is not None


def _in_words(text: str) -> bool:
    said = text.lower().split()
    return bool(said) and len(said) <= 8 and said[0].strip(".,:;()") not in _REMARK
