"""Where the program stands in what models write.

About seven of the formats come from public bug reports on code extraction; the others are variations of them, and
forms that Markdown and prompts allow.
"""

from __future__ import annotations

import pytest

from mirrorpo.rewards.extraction import extract_code

F = "def f(x):\n    return x + 1"
WRONG = "def f(x):\n    return x"
DOCUMENTED = 'def f(x):\n    """Adds.\n\n    ```python\n    f(1)\n    ```\n    """\n    return x + 1'

# Completions in which f(1) is 2, and the name that the tests use is f.
COMPLETIONS = {
    "a fence": f"```python\n{F}\n```",
    "a fence without a language": f"```\n{F}\n```",
    "another name of the language": f"```Python3\n{F}\n```",
    "attributes after the language": f"```python title='f.py' linenums=1\n{F}\n```",
    "braces around the language": f"```{{.python}}\n{F}\n```",
    "four backticks": f"````python\n{F}\n````",
    "tildes": f"~~~python\n{F}\n~~~",
    "backticks inside tildes": f"~~~\n{DOCUMENTED}\n~~~",
    "carriage returns": f"Sure!\r\n```python\r\n{F}\r\n```\r\nDone.\r\n".replace("\n    ", "\r\n    "),
    "no closing fence": f"```python\n{F}",
    "closing fence at the end of the last line": f"```python\n{F}```",
    "closing fence at the end of the last line, then words": f"```python\n{F}```\nIt adds one.",
    "code on the line of the opening fence": "```def f(x):\n    return x + 1\n```",
    "code after the language on the same line": "```python def f(x): return x + 1```",
    "one line of backticks": "```f = lambda x: x + 1```",
    "only the closing fence": f"{F}\n```\nThis adds one.",
    "only the closing fence, then an example": f"{F}\n```\nFor example:\n```python\nprint(f(1))\n```",
    "item of a list": "1. The function:\n\n   ```python\n   def f(x):\n       return x + 1\n   ```\n2. Done.",
    "fence on the bullet's line": "- ```python\n  def f(x):\n      return x + 1\n  ```",
    "quotation": "> ```python\n> def f(x):\n>     return x + 1\n> ```",
    "indented fence, code at the margin": f"   ```python\n{F}\n   ```",
    "a fence in a docstring": f"```python\n{DOCUMENTED}\n```\nThat is all.",
    "a fence in a docstring, bare": DOCUMENTED,
    "a fence in a comment": f"```python\n# ```\n{F}\n```",
    "example usage afterwards": f"```python\n{F}\n```\nUse:\n```python\nprint(f(1))\n```",
    "example usage in a function": f"```python\n{F}\n```\n```python\ndef main():\n    print(f(1))\nmain()\n```",
    "tests afterwards": f"```python\n{F}\n```\n```python\ndef test_f():\n    assert f(1) == 2\ntest_f()\n```",
    "tests as a class": f"```python\n{F}\n```\n```python\nfrom unittest import *\nclass T(TestCase):\n    pass\n```",
    "output afterwards": f"```python\n{F}\n```\nOutput:\n```\n2\n```",
    "a session afterwards": f"```python\n{F}\n```\n```\n>>> f(1)\n2\n```",
    "shell before": f"```bash\npip install numpy\n```\n```python\n{F}\n```",
    "another language afterwards": f"```python\n{F}\n```\n```javascript\nfunction f(x) {{ return x }}\n```",
    "a draft before": f"```python\n{WRONG}\n```\nThat is wrong.\n```python\n{F}\n```",
    "a draft before that does not parse": f"```python\ndef f(x:\n```\nFixed:\n```python\n{F}\n```",
    "another function afterwards": f"```python\n{F}\n```\nAlso:\n```python\ndef g(x):\n    return 0\n```",
    "imports before": "```python\nimport math\n```\n```python\ndef f(x):\n    return x + int(math.sqrt(1))\n```",
    "helper before": "```python\ndef one():\n    return 1\n```\nThen\n```python\ndef f(x):\n    return x + one()\n```",
    "helper afterwards": "```python\ndef f(x):\n    return x + one()\n```\n```python\ndef one():\n    return 1\n```",
    "a helper's helper": (
        "```python\nONE = 1\n```\n```python\ndef one():\n    return ONE\n```\n"
        "```python\ndef f(x):\n    return x + one()\n```"
    ),
    "helper before, in a block with a draft": (
        f"```python\ndef one():\n    return 1\n{WRONG}\n```\n```python\ndef f(x):\n    return x + one()\n```"
    ),
    "a block that was never closed": f"```python\n{WRONG}\n\n```python\n{F}\n```",
    "[PYTHON] tags": f"[PYTHON]\n{F}\n[/PYTHON]\nDone",
    "[PYTHON] tags, not closed": f"[PYTHON]\n{F}",
    "[BEGIN] and [DONE]": f"[BEGIN]\n{F}\n[DONE]\nassert f(1) == 3",
    "answer tags": f"Thinking def f(x) ...\n<answer>\n{F}\n</answer>",
    "answer tags around a fence": f"```python\n{WRONG}\n```\n<answer>\n```python\n{F}\n```\n</answer>",
    "answer tags with words": f"<answer>Here is the function:\n{F}\nIt adds one.</answer>",
    "code tags": f"<code>\n{F}\n</code>",
    "thoughts": f"<think>\n```python\n{WRONG}\n```\n</think>\n```python\n{F}\n```",
    "thoughts without a beginning": f"maybe\n```python\n{WRONG}\n```\n</think>\n{F}",
    "bare code": F,
    "words before bare code": f"Here is the function.\n\n{F}",
    "words that look like code before bare code": f"from this follows the solution:\nimport nothing else!\n\n{F}",
    "words after bare code": f"{F}\n\nThis function adds one to its argument, e.g. f(1) gives 2.",
    "words that begin like code after bare code": f"{F}\n\nfor example, it returns 2.\nif you want more, ask",
    "words between bare functions": f"def g(x):\n    return 0\n\nAnd now the other one.\n\n{F}\n",
    "an indented answer": "    def f(x):\n        return x + 1\n",
    "end of text marks": f"{F}<|im_end|>",
    "a lambda": "```python\nf = lambda x: x + 1\n```",
    "an annotated assignment": "```python\nfrom typing import Callable\nf: Callable = lambda x: x + 1\n```",
    "a class with the method's name": (
        "```python\nclass Solution:\n    def f(self, x):\n        return x + 1\n"
        "def f(x):\n    return Solution().f(x)\n```"
    ),
    "headings and rules": f"### Solution\n---\n**Code:**\n\n```python\n{F}\n```\n---\n### Complexity\nO(1)",
    "a main block": f"```python\n{F}\n\nif __name__ == '__main__':\n    print(f(int(input())))\n```",
    "inline code around": f"The function `f` uses `x`:\n```python\n{F}\n```\nCall `f(1)`.",
    "a label without a fence": f"python\n{F}",
    "a byte order mark": f"\ufeff```python\n{F}\n```",
    "spaces after the fences": f"```python   \n{F}\n```   \n",
    "text in an unlabelled fence before": f"```\nInput: 1\nOutput: 2\n```\n```python\n{F}\n```",
    "words behind a closing fence on the last line": "```python\ndef f(x):\n    return x + 1``` Done.",
    "three backticks in a comment": f"```python\nx = 1  # see ``` there\n{F}\n```",
    "an indented answer between words": "Solution:\n\n    def f(x):\n        return x + 1\n\nThat is it.",
    "an indented answer in a list": "1. So:\n\n       def f(x):\n           return x + 1\n\n2. Done",
    "words after bare code that are Python": f"{F}\n\nDone\nComplexity: O(1)",
    "html breaks": f"<pre><code>\n{F}\n</code></pre>",
    "a question after bare code": F + "\nQ: another\ndef g(x): pass",
    "a code tag with attributes": f'<pre><code class="language-python">\n{F}</code></pre>',
    "an inline fence after words": "Here it is: ```def f(x): return x + 1```.",
    "a thought that ends": f"<think>f = 1</think>\n{F}",
}


@pytest.mark.parametrize("completion", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_the_program_is_found(completion: str) -> None:
    code = extract_code(completion, ["f"])
    assert code is not None
    names: dict[str, object] = {"__name__": "solution"}
    exec(code, names)
    assert names["f"](1) == 2  # type: ignore[operator]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I cannot do that.",
        "```\n```",
        "```python\n\n```",
        "<think>\n```python\nx = 1\n```\n</think>",
        "```bash\nls\n```",
        "<think>\n```python\ndef f(x):\n    return x + 1\n```",
    ],
)
def test_where_there_is_no_program_none_is_found(completion: str) -> None:
    assert not (extract_code(completion, ["f"]) or "").strip()


def test_several_names_are_collected_from_several_blocks() -> None:
    text = f"```python\nclass Pair:\n    pass\n```\n```python\n{F}\n```\n```python\nprint(f(1))\n```"
    code = extract_code(text, ["f", "Pair"])
    assert code is not None
    assert "class Pair" in code
    assert "def f" in code
    assert "print" not in code


def test_a_correct_block_is_not_replaced_by_the_programs_own_test_of_the_same_name() -> None:
    text = f"```python\n{F}\n```\n```python\ndef check(candidate):\n    assert candidate(1) == 3\ncheck(f)\n```"
    assert extract_code(text, ["f"]) == F + "\n"
