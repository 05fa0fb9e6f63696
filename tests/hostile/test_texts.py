"""Whatever text a model writes: no terminal obeys it, no page runs it, no spreadsheet calculates it."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_cli import run

from mirrorpo.config.study import Job, study_from
from mirrorpo.reports import write_curve, write_report
from mirrorpo.reports.study_page import as_json, write_study_report
from mirrorpo.search.evolve_run import _Run
from mirrorpo.studies.collection import Collection, Failure, by_seed, read_run
from mirrorpo.studies.runner import Progress
from run_folder import SAMPLE, line_of, write_run, write_samples
from simulated import write_simulated

TEXTS = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "C1 colour": "\x9b31mred",
    "hyperlink": "\x1b]8;;http://example.org\x1b\\click\x1b]8;;\x1b\\",
    "rich markup": "[red]no[/red] [/nothing] [link=http://example.org]x[/link] :boom:",
    "script": "</script></pre><script>alert(1)</script><img src=x onerror=alert(2)>",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "style": "</style><style>body{display:none}</style>",
    "comment": "<!-- --!> <![CDATA[",
    "equals": "=cmd|'/c calc'!A1",
    "plus": "+1+1",
    "minus": "-2+3",
    "at": "@SUM(A1)",
    "tab": "\t=1+1",
    "return": "\r=1+1",
    "blank": "  =1+1",
    "full width": "\uff1d1+1",
    "overwrite": "failed\rpassed",
    "line end": "a\nforged line,=1",
    "bidi override": "\u202eevil\u202c",
    "bidi isolate": "\u2066evil\u2069\u200f\u061c",
    "separators": "a\u2028b\u2029c\u0085d",
    "zero width": "a\u200bb\ufeffc\u00ad",
    "NUL": "a\0b",
    "delete": "a\x7f\x08b",
    "half a character": "a\ud800b",
    "formula": r"$\frac{$ x_1^2 \n",
    "markdown": "|[x](javascript:alert(1))` **b** <b> # _i_",
}
texts = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


def is_plain(text: str) -> bool:
    """Whether a terminal shows it and does nothing else."""
    return all(c.isprintable() or c in "\n\u00a0" for c in text)


def written_out(text: str) -> str:
    """As terminals, Markdown and tables show it."""
    return "".join(c if c.isprintable() else f"[U+{ord(c):04X}]" for c in text)


class Page(HTMLParser):
    """The tags of a page, and the text of its elements."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(path: Path, text: str, harmless: Path) -> None:
    """Has the elements of a page with a harmless text, and shows the hostile one."""
    source = path.read_bytes().decode("utf-8")
    page, other = Page(source), Page(harmless.read_text(encoding="utf-8"))
    assert all(c.isprintable() or c in "\n\t\u00a0" for c in source)
    tags = [tag for tag in page.tags if tag[0] != "b"]  # what is written out stands in <b>
    assert tags == [tag for tag in other.tags if tag[0] != "b"]
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"U+{ord(c):04X}" for c in text)
    assert page.text.count(shown) >= 3


def run_with(folder: Path, text: str) -> Path:
    """A finished run whose every outside text is this one; the folder's name is not."""
    folder.mkdir()
    names = ("task", "objective", "objective_line", "model", "command", "commit")
    write_run(
        folder,
        [line_of(1, **{text: 1.0})],
        **dict.fromkeys(names, text),
        mirrorpo_version=text,
        versions={text: text},
        reasons_after={text: 3},
    )
    write_samples(folder, {**SAMPLE, **dict.fromkeys(("prompt", "completion", "answer", "reason"), text)})
    (folder / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


@texts
def test_the_report_of_a_run_shows_the_text_and_nothing_more(text: str, tmp_path: Path) -> None:
    harmless = write_report(run_with(tmp_path / "harmless", "harmless"))
    folder = run_with(tmp_path / "run", text)
    check_page(write_report(folder), text, harmless)


@pytest.mark.parametrize("name", ["formula", "half a character", "NUL", "bidi override"])
def test_the_picture_of_a_run_is_drawn_whatever_its_names_are(name: str, tmp_path: Path) -> None:
    assert write_curve(run_with(tmp_path / "run", TEXTS[name])).stat().st_size > 5_000


def study_with(folder: Path, text: str) -> Collection:
    """Two arms, one of them named by the text; a failed run whose reason quotes it."""
    runs = {}
    for n, arm in enumerate(("dr_grpo", text)):
        found = [
            read_run(
                write_simulated(
                    folder / str(n) / str(seed), "dr_grpo", seed, 0.5 + 0.1 * n, completion=text, task=text,
                    model=text, commit=text, objective_line=text, versions={"x": text},
                ),
                arm,
            )
            for seed in range(2)
        ]  # fmt: skip
        runs[arm] = by_seed(arm, found)
    return Collection(
        title=text, arms=runs, baseline="dr_grpo", target=0.5, margin=0.02, changes={text: text},
        failed=(Failure(arm=text, seed=7, reason=text),), command=text, study=text, notes=(text,),
    )  # fmt: skip


@texts
def test_the_report_of_a_study_shows_the_text_and_nothing_more(text: str, tmp_path: Path) -> None:
    (tmp_path / "harmless").mkdir()
    harmless = write_study_report(study_with(tmp_path / "harmless", "harmless"), tmp_path / "harmless")[0]
    found = study_with(tmp_path, text)
    page, markdown, table = write_study_report(found, tmp_path)
    check_page(page, text, harmless)

    words = markdown.read_bytes().decode("utf-8")
    assert is_plain(words)
    before_command, _, command = words.partition("## Command")
    assert written_out(text) in command, "in a fence, as it is"
    for mark in ("<script", "<img", "<style", "<b>", "<!--", "[x]("):
        assert mark not in before_command

    rows = list(csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8"))))
    assert len(rows) == 5, "no text makes a row of its own"
    cells = [cell for row in rows for name, cell in row.items() if name in ("arm", "reason", "model", "task")]
    assert all(is_plain(cell) for cell in cells)
    assert not [cell for cell in cells if cell.lstrip()[:1] in ("=", "+", "-", "@", "\uff1d")]
    assert rows[-1]["reason"].removeprefix("'") == written_out(text)

    assert json.loads(json.dumps(as_json(found)))["failed"][0]["reason"] == text


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, no_color=True, width=500, highlight=False), out


@texts
def test_a_failed_run_and_a_failed_member_are_told_without_obeying_the_text(text: str, tmp_path: Path) -> None:
    study = study_from(
        {"base": {"task": {"name": "arithmetic"}}, "arms": ["grpo", "dapo"], "seeds": [0], "baseline": "grpo"}
    )
    job: Job = study.jobs()[0]
    silent, out = console(False)
    with Progress(silent, [job], {job.name}, tmp_path) as progress:
        progress.finished(job, {"status": "failed", "reason": text})
    assert is_plain(out.getvalue())
    assert f"failed ({written_out(text)})" in out.getvalue()

    silent, out = console(True)
    member = SimpleNamespace(job=SimpleNamespace(key="start/s0"), result={"failed": text}, deaths=0, seconds=1.0)
    _Run._tell(SimpleNamespace(console=silent), member)  # pyright: ignore[reportArgumentType]
    assert is_plain(out.getvalue())
    assert f"start/s0 failed ({written_out(text)})" in out.getvalue()


REWARD = """
import json
from mirrorpo.rewards.verdict import Grade

def verdict(completion, row):
    return Grade(reward=1.0, reason=json.loads(row["text"]))

def broken(completion, row):
    raise ValueError(json.loads(row["text"]))
"""


def own_task(folder: Path, given: list[str], function: str) -> str:
    """A task of the user's own whose reward quotes the texts, each of them for one problem of either split."""
    (folder / "mine.py").write_text(REWARD)
    for name in ("train", "test"):
        rows = [{"prompt": f"{name} {i}", "text": json.dumps(text)} for i, text in enumerate(given)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task={{name: jsonl, path: train.jsonl, test_path: test.jsonl, reward: 'mine:{function}'}}"


def test_eval_prints_no_text_that_a_terminal_obeys(tmp_path: Path) -> None:
    task = own_task(tmp_path, list(TEXTS.values()), "verdict")
    arguments = ("eval", "builtin:tiny", task, "train.max_completion_length=2", "--task", "jsonl")
    done = run(*arguments, cwd=tmp_path)
    assert is_plain(done.stdout + done.stderr)
    (reasons,) = [line for line in done.stdout.splitlines() if line.startswith("reasons ")]
    for text in TEXTS.values():
        assert f"{written_out(text)} 1" in reasons, "on its line, whatever it holds"
    as_data = run(*arguments, "--json", cwd=tmp_path).stdout
    assert as_data.isascii()
    assert is_plain(as_data)
    assert json.loads(as_data)["reasons"] == dict.fromkeys(TEXTS.values(), 1)


SMALL = ("train.steps=1", "train.prompts_per_step=2", "train.group_size=2", "train.max_completion_length=2")


def test_train_prints_no_text_that_a_terminal_obeys_and_draws_its_report(tmp_path: Path) -> None:
    task = own_task(tmp_path, list(TEXTS.values()), "verdict")
    done = run("train", "arithmetic", task, *SMALL, "--out", "run", cwd=tmp_path)
    assert is_plain(done.stdout + done.stderr)
    source = (tmp_path / "run" / "report.html").read_bytes().decode("utf-8")
    assert all(c.isprintable() or c in "\n\t\u00a0" for c in source)
    assert "U+202E" in source
    assert "<script>alert" not in source


@pytest.mark.parametrize("name", ["colour", "rich markup", "overwrite"])
def test_an_error_that_quotes_the_text_is_one_plain_line(name: str, tmp_path: Path) -> None:
    task = own_task(tmp_path, [TEXTS[name]] * 2, "broken")
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text().replace("train", "learn"))
    done = run("train", "arithmetic", task, *SMALL, "eval.problems=0", "--out", "run", cwd=tmp_path, status=1)
    assert is_plain(done.stdout + done.stderr)
    assert "raised ValueError" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["math", "code"])
def test_grade_prints_one_ascii_line_a_completion(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for text in TEXTS.values():
        rows += [
            {"completion": text, "answer": "4", "tests": [text]},
            {"completion": "#### 4", "answer": text, "tests": ["assert True"]},
            {"completion": f"raise ValueError({text!r})", "answer": "4", "tests": ["assert f()"]},
            {text: text},
        ]
    lines = [json.dumps(row) for row in rows] + [repr(text) for text in TEXTS.values()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    done = run("grade", kind, str(tmp_path / "rows.jsonl"), "--require", "limits")
    assert done.stdout.isascii()
    assert is_plain(done.stdout)
    assert len(done.stdout.splitlines()) == len(lines)
    assert all(set(json.loads(line)) == {"reward", "reason"} for line in done.stdout.splitlines())
