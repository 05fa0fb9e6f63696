"""The picture and the page say what the files say, whatever the files hold."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mirrorpo.reports import write_curve, write_report
from run_folder import HOSTILE, SAMPLE, SUMMARY, line_of, write_run, write_samples

_GEOMETRY = ("d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "data-low", "data-high", "data-values")


class _Page(HTMLParser):
    """The elements of a page with their attributes, and its text without style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, str] = {}
        self._texts: list[str] = []
        self._within = ""
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)
        self.close()
        self.text = "".join(self._texts).replace("\u00a0", " ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("style", "script"):
            self.raw[self._within] = self.raw.get(self._within, "") + data
        else:
            self._texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a tag; `class_` wants one of the classes."""
        wanted = attributes.pop("class_", None)
        found = [given for name, given in self.elements if name == tag]
        return [given for given in found if wanted is None or wanted in (given.get("class") or "").split()]


def _report(folder: Path) -> _Page:
    return _Page(write_report(folder))


def test_the_conclusion_comes_first_and_says_what_the_numbers_show(tmp_path: Path) -> None:
    page = _report(write_run(tmp_path))
    assert "Accuracy rose from 38.0 % to 97.0 % on 500 unseen problems." in page.text
    assert "33.9–42.4 % before and 95.1–98.2 % after" in page.text
    assert "do not overlap: the gain is beyond sampling noise" in page.text
    assert "from 11.2 to 26.0 tokens" in page.text
    assert "40 steps in 61.2 s" in page.text
    assert page.text.index("Accuracy rose") < page.text.index("Training, step by step")


@pytest.mark.parametrize(
    ("after", "interval", "words"),
    [
        (0.40, [0.36, 0.44], "overlap: these numbers alone do not set the difference apart from sampling noise"),
        (0.20, [0.17, 0.24], "do not overlap: the loss is beyond sampling noise"),
        (0.38, None, "No interval was recorded"),
    ],
)
def test_overlap_loss_and_absence_are_not_called_a_gain(
    tmp_path: Path, after: float, interval: list[float] | None, words: str
) -> None:
    page = _report(write_run(tmp_path, accuracy_after=after, accuracy_after_interval=interval))
    assert words in page.text
    assert "the gain is" not in page.text
    assert not page.all("section", class_="gain")


def test_curves_carry_every_recorded_value_and_leave_gaps(tmp_path: Path) -> None:
    lines = [line_of(step, reward=None if step == 3 else 0.5 * step) for step in range(1, 7)]
    del lines[4]["reward"]  # step 5 lacks the key altogether
    page = _report(write_run(tmp_path, lines))
    reward = next(path for path in page.all("path") if path.get("data-label") == "mean")
    assert reward["data-values"] == "0.5,1,,2,,3"
    # Three stretches: 1-2 a line, 4 and 6 alone, each a dot (a line of no length).
    assert (reward["d"] or "").count("M") == 3
    assert (reward["d"] or "").count("h0") == 2


def test_a_divergence_over_decades_gets_a_logarithmic_axis_and_a_flat_one_does_not(tmp_path: Path) -> None:
    wide = _report(write_run(tmp_path))  # 1e-6 to 0.16
    assert "Logarithmic axis" in wide.text
    lines = [line_of(s, **{"divergence/prob_l2/mean": 0.1, "divergence/reverse_kl/mean": 0.2}) for s in range(1, 5)]
    assert "Logarithmic axis" not in _report(write_run(tmp_path, lines)).text


def test_zeros_below_a_logarithmic_axis_are_counted_not_hidden(tmp_path: Path) -> None:
    lines = [line_of(step) for step in range(1, 41)]
    lines[0]["divergence/prob_l2/mean"] = 0.0
    lines[1]["divergence/prob_l2/mean"] = -1e-9
    assert "2 of 80 values are at or near zero, below the axis" in _report(write_run(tmp_path, lines)).text


def test_hostile_text_never_becomes_an_element_and_nothing_in_it_stays_invisible(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        [line_of(1, **{f"divergence/{HOSTILE}/mean": 0.5, HOSTILE: 1.0})],
        **dict.fromkeys(("task", "objective", "objective_line", "model", "command", "commit"), HOSTILE),
        mirrorpo_version=HOSTILE,
        versions={HOSTILE: HOSTILE},
        reasons_after={HOSTILE: 3},
    )
    write_samples(run, {**SAMPLE, **dict.fromkeys(("prompt", "completion", "answer", "reason"), HOSTILE)})
    (run / "recipe.yaml").write_bytes(HOSTILE.encode("utf-8", "surrogatepass"))
    page = _report(run)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert "alert" not in page.raw["script"]
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    for invisible in "\x1b\u202e\x00\ud800":
        assert invisible not in page.source
        assert f"U+{ord(invisible):04X}" in page.text
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert write_curve(run).is_file()


def test_the_page_asks_for_nothing_and_its_policy_allows_only_its_own_style_and_script(tmp_path: Path) -> None:
    page = _report(write_run(tmp_path))
    loads = [given[name] for _, given in page.elements for name in ("src", "href", "srcset", "action") if name in given]
    assert loads == ["data:,"]  # an empty icon, so that no browser asks a server for one
    assert not [True for _, given in page.elements if "style" in given]  # the policy would drop them
    assert "url(" not in page.raw["style"]
    assert "@import" not in page.raw["style"]
    policy = next(given for given in page.all("meta") if given.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(maxsplit=1) for rule in (policy["content"] or "").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_samples_of_a_prompt_stand_together_and_long_ones_are_cut_with_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_samples(
        run, {**SAMPLE, "when": "before", "completion": "  kept\n\tas is"}, {**SAMPLE, "completion": "x" * 5000}
    )
    page = _report(run)
    assert len(page.all("article")) == 1
    assert "  kept\n\tas is" in page.text
    assert "cut here: 1,200 of 5,000 characters shown" in page.text
    assert "x" * 1201 not in page.text


def test_verdicts_before_and_after_are_counted(tmp_path: Path) -> None:
    text = _report(write_run(tmp_path)).text
    assert "485 97.0 %" in text  # 485 of 500
    assert "310 62.0 %" in text  # 310 of 500
    assert text.index("match") < text.index("no_answer")


def test_recipe_command_commit_and_versions_are_shown(tmp_path: Path) -> None:
    text = _report(write_run(tmp_path)).text
    for shown in ("task: {name: arithmetic}", "--out runs/demo", "abc1234", "2.13.0", "builtin:tiny"):
        assert shown in text


def test_a_long_run_stays_small_and_says_that_it_is_thinned(tmp_path: Path) -> None:
    # Every letter is invisible: the longest HTML that samples can become.
    lines = [line_of(step, reward=1.0 if step == 1234 else 0.001 * (step % 7)) for step in range(1, 2001)]
    run = write_run(tmp_path, lines)
    write_samples(run, *({**SAMPLE, "prompt": f"{i}", "completion": "\u202e" * 5000} for i in range(200)))
    page = _report(run)
    assert len(page.source.encode()) < 1_000_000
    assert "thinned for drawing" in page.text
    assert "of 200 problems shown" in page.text
    reward = next(path for path in page.all("path") if path.get("data-label") == "mean")
    values = (reward["data-values"] or "").split(",")
    assert len(values) < 700
    assert "1" in values  # the one peak of 2,000 steps


@pytest.mark.parametrize("num_lines", [0, 1, 2])
def test_very_short_runs_render(tmp_path: Path, num_lines: int) -> None:
    run = write_run(tmp_path, [line_of(step) for step in range(1, num_lines + 1)], steps=num_lines)
    page = _report(run)
    assert len(page.all("figure", class_="panel")) == (10 if num_lines else 0)
    assert write_curve(run).is_file()


EQUAL = "the rewards within every group were all equal"
TOO_SMALL = "its steps are too small for the precision of its weights"


@pytest.mark.parametrize(
    ("flat", "divergence", "grad_norm", "said"),
    [
        (0.0, 0.1, 0.5, ()),
        (0.5, 0.1, 0.5, ()),  # half of the groups had a spread
        (1.0, 0.0, 0.0, (EQUAL,)),  # nothing moved, as nothing pushed
        (0.0, 0.0, 0.5, (TOO_SMALL,)),
        (0.5, 0.0, 0.5, (TOO_SMALL,)),
        (0.0, 0.0, 0.0, ()),
    ],
)
def test_equal_rewards_are_told_apart_from_steps_that_are_too_small(
    tmp_path: Path, flat: float, divergence: float, grad_norm: float, said: tuple[str, ...]
) -> None:
    measured = {"divergence/prob_l2/mean": divergence, "divergence/reverse_kl/mean": divergence}
    lines = [line_of(s, frac_reward_zero_std=flat, grad_norm=grad_norm, **measured) for s in range(1, 6)]
    text = _report(write_run(tmp_path, lines, steps=5)).text
    assert tuple(words for words in (EQUAL, TOO_SMALL) if words in text) == said
    if said == (EQUAL,):
        assert "In 5 of 5 steps" in text


def test_the_first_step_alone_shows_nothing_about_precision(tmp_path: Path) -> None:
    zero = {"divergence/prob_l2/mean": 0.0, "divergence/reverse_kl/mean": 0.0}
    assert TOO_SMALL not in _report(write_run(tmp_path, [line_of(1, **zero)], steps=1)).text


@pytest.mark.parametrize(
    "value", [0.0, 1.0, -2.5, 1e-300, 1e290, 0.1 + 1e-17, None, float("nan"), float("-inf"), 10**400]
)
def test_constant_missing_and_extreme_values_render(tmp_path: Path, value: float | None) -> None:
    constant = [{"step": step, **dict.fromkeys(list(line_of(1))[1:], value)} for step in range(1, 6)]
    mixed = [{**line, "reward": 0.5, "grad_norm": 1e-5 * (i + 1)} for i, line in enumerate(constant)]
    for lines in (constant, mixed, [line_of(1), *constant[1:]]):
        run = write_run(tmp_path, lines)
        page = _report(run)
        drawn = [text for _, given in page.elements for name, text in given.items() if name in _GEOMETRY and text]
        assert not [text for text in drawn if "nan" in text or "inf" in text]
        assert write_curve(run).is_file()


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    page = _report(write_run(tmp_path, [line_of(1, loss=float("nan")), line_of(2, grad_norm=float("inf"))]))
    assert "not finite, left out as gaps: 2" in page.text


def test_a_run_without_evaluation_renders_without_samples(tmp_path: Path) -> None:
    keys = [key for key in SUMMARY if key.startswith(("accuracy", "mean_length", "reasons"))]
    run = write_run(tmp_path, **dict.fromkeys([*keys, "problems", "commit", "command"]))
    (run / "samples.jsonl").unlink()
    page = _report(run)
    assert "Accuracy was not measured." in page.text
    assert "No samples were recorded." in page.text
    assert write_curve(run).is_file()


def test_the_picture_opens_at_twice_the_width_of_a_readme(tmp_path: Path) -> None:
    with Image.open(write_curve(write_run(tmp_path))) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1800, 900))
        assert len(set(picture.convert("RGB").resize((90, 45)).get_flattened_data())) > 10


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write('{"step": 41, "note": "é'.encode()[:-1])  # cut inside a letter
    page = _report(run)
    assert "last line of metrics.jsonl was cut off" in page.text
    assert "40 steps" in page.text
    assert write_curve(run).is_file()


def test_a_resumed_run_keeps_the_later_of_two_lines_for_a_step(tmp_path: Path) -> None:
    first = [line_of(step, reward=0.1) for step in (1, 2, 3)]
    page = _report(write_run(tmp_path, [*first, *(line_of(step, reward=0.9) for step in (2, 3, 4))]))
    reward = next(path for path in page.all("path") if path.get("data-label") == "mean")
    assert reward["data-values"] == "0.1,0.9,0.9,0.9"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "recipe.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl, line 2"),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', "metrics.jsonl, line 2: key 'step' is missing"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', "line 1: key 'loss' must be a number or null, got 'low'"),
        ("samples.jsonl", '{"when": "after"}\n{}\n', "samples.jsonl, line 1: key 'prompt' is missing"),
        ("samples.jsonl", '{"when": "never"}\n', "key 'when' must be 'before' or 'after', got 'never'"),
        ("summary.json", "{", "summary.json: not JSON"),
        ("summary.json", "[]", "summary.json: expected a JSON object, found list"),
    ],
)
def test_a_broken_file_is_named_with_line_and_key(tmp_path: Path, name: str, content: str, words: str) -> None:
    (write_run(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match=r"(summary|metrics|samples)\.json") as caught:
        write_report(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["task", "objective", "seed", "steps", "seconds", "accuracy_before", "mean_length_after"]
)
def test_a_missing_key_of_the_summary_is_named(tmp_path: Path, key: str) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").write_text(json.dumps({name: value for name, value in SUMMARY.items() if name != key}))
    for write in (write_report, write_curve):
        with pytest.raises(ValueError, match=f"summary.json: key '{key}' is missing"):
            write(run)


@pytest.mark.parametrize("values", [{"accuracy_after": 97.0}, {"accuracy_after_interval": [0.9]}, {"steps": 1.5}])
def test_a_summary_that_cannot_be_true_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"summary.json: key '{next(iter(values))}' must"):
        write_report(write_run(tmp_path, **values))


def test_both_are_written_whole_and_leave_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    before = set(os.listdir(run))
    assert write_report(run) == run / "report.html"
    assert write_curve(run) == run / "curve.png"
    assert set(os.listdir(run)) - before == {"report.html", "curve.png"}
