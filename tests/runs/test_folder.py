"""One folder, one writer, one beginning: the second process and the resumed one are told in one line what is wrong."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirrorpo.config.yaml import parse_yaml
from mirrorpo.errors import InputError
from mirrorpo.runs import folder as folders
from mirrorpo.runs.folder import EVALUATION, RUN, STUDY, Folder, Kind, versions, wait_until_free
from mirrorpo.runs.reader import read_before, recorded_steps

KINDS = pytest.mark.parametrize("kind", [RUN, STUDY, EVALUATION])
TEXT = "a: {b: 1}\n"


def opened(
    path: Path, kind: Kind, text: str = TEXT, resume: bool = False, say: Callable[[str], None] = lambda line: None
) -> Folder:
    return Folder(path, kind, text, parse_yaml, resume, say)


@KINDS
def test_every_kind_of_folder_is_begun_locked_and_resumed_alike(kind: Kind, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(InputError, match=f"--resume: .* holds no {kind.noun}"):
        opened(out, kind, resume=True)
    assert not (tmp_path / "deep").exists()
    first = opened(out, kind)
    assert (out / kind.file).read_text() == TEXT
    with pytest.raises(InputError, match=f"already holds {kind};"):
        opened(out, kind)
    with pytest.raises(InputError, match=rf"another process \({os.getpid()}\) is running in this folder"):
        opened(out, kind, resume=True)
    first.close()
    with pytest.raises(InputError, match=rf"--resume: a\.b is 2, the {kind.noun} in .* has 1; a resumed {kind.noun}"):
        opened(out, kind, "a: {b: 2}\n", resume=True)
    with pytest.raises(InputError, match=r"--resume: a\.b is None, the"):
        opened(out, kind, "c: 3\n".replace("c: 3", "a: {}"), resume=True)
    opened(out, kind, resume=True).close()


@KINDS
def test_a_kill_between_lock_and_settings_leaves_a_folder_to_begin_in(kind: Kind, tmp_path: Path) -> None:
    for name in (".lock", "versions.json", f".{kind.file}.0123456789ab.tmp"):
        (tmp_path / name).write_text("{}")
    opened(tmp_path, kind).close()
    assert not list(tmp_path.glob("*.tmp"))


@KINDS
@pytest.mark.parametrize("name", ["samples.jsonl", "model", ".lock", "versions.json"])
def test_a_folder_with_a_link_is_refused_and_nothing_is_written_through_it(
    kind: Kind, name: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    opened(out, kind).close()
    (tmp_path / "outside").write_text("precious")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        opened(out, kind, resume=True)
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("name", ["recipe.yaml", ".lock", "versions.json"])
def test_a_folder_in_place_of_a_file_is_one_line(name: str, tmp_path: Path) -> None:
    opened(tmp_path, RUN).close()
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(InputError) as caught:
        opened(tmp_path, RUN, resume=True)
    assert "\n" not in str(caught.value)


def test_versions_are_recorded_and_a_change_is_said_on_resume(tmp_path: Path) -> None:
    opened(tmp_path, RUN).close()
    said: list[str] = []
    opened(tmp_path, RUN, resume=True, say=said.append).close()
    assert said == []
    kept = json.loads((tmp_path / "versions.json").read_text())
    assert kept == {"format": 1, "begun_with": versions()}
    kept["begun_with"] |= {"mirrorpo": "0.0.9", "torch": "1.0"}
    (tmp_path / "versions.json").write_text(json.dumps(kept))
    opened(tmp_path, RUN, resume=True, say=said.append).close()
    assert len(said) == 1
    assert f"mirrorpo 0.0.9 (now {versions()['mirrorpo']}), torch 1.0 (now {versions()['torch']})" in said[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": 2, "begun_with": {}}, "has format 2, this version of mirrorpo reads format 1"),
        ({"format": 1}, "must hold the keys format and begun_with"),
        ([], "must hold the keys format and begun_with"),
        ("[" * 100_000, "versions.json: not JSON"),
        ("{", "versions.json: not JSON"),
    ],
)
def test_another_format_and_a_broken_record_of_versions_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    opened(tmp_path, RUN).close()
    (tmp_path / "versions.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=words):
        opened(tmp_path, RUN, resume=True)


def test_a_folder_without_recorded_versions_is_one_of_an_earlier_version_and_goes_on(tmp_path: Path) -> None:
    opened(tmp_path, RUN).close()
    (tmp_path / "versions.json").unlink()
    opened(tmp_path, RUN, resume=True).close()


def test_a_process_that_was_faster_is_noticed_behind_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Folder._take_lock

    def late(self: Folder) -> None:
        (tmp_path / RUN.file).write_text("a: {b: 9}\n")  # begun and finished in between
        take(self)

    monkeypatch.setattr(Folder, "_take_lock", late)
    with pytest.raises(InputError, match="already holds a run"):
        opened(tmp_path, RUN)
    assert (tmp_path / RUN.file).read_text() == "a: {b: 9}\n"


def test_waiting_for_a_lock_ends_when_it_is_free_or_patience_is_over(tmp_path: Path) -> None:
    wait_until_free(tmp_path / "absent", 60.0)
    held = opened(tmp_path, RUN)
    wait_until_free(tmp_path, 0.1)  # still held: the next to open it says by whom
    timer = threading.Timer(0.2, held.close)
    timer.start()
    wait_until_free(tmp_path, 60.0)
    timer.join()
    opened(tmp_path, RUN, resume=True).close()


def test_a_full_disk_takes_the_new_folders_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_text_atomic", full)
    with pytest.raises(InputError, match="cannot be written"):
        opened(tmp_path / "a" / "b", STUDY)
    assert not list(tmp_path.iterdir())


# ---- what a resumed run takes up


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (None, 0),
        ("", 0),
        ('{"step": 1}\n{"step": 2}\n', 2),
        ('{"step": 1}\n{"step": 2}', 1),  # the last line has no end: it may be cut
        ('{"step": 1}\n{"step": 3}\n', 1),
        ('{"step": 2}\n', 0),
        ('{"step": 1}\n{"st\n{"step": 3}\n', 1),
        ('{"step": 1}\n[' * 2 + "\n", 1),
        ('{"step": 1}\n' + "[" * 100_000 + "\n", 1),
        ('{"step": 1}\n5\n{"step": 2}\n', 1),
        ('{"step": 1, "seconds": "x"}\n', 0),
    ],
)
def test_the_steps_that_can_be_kept_end_before_the_first_line_that_is_not_whole(
    content: str | None, steps: int, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert len(recorded_steps(tmp_path)) == steps


SAMPLE = {"prompt": "p", "completion": "c", "answer": "a", "reward": 1.0, "reason": "match"}
NUMBERS = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "mean_length": 3.0, "reasons": {"match": 1}, "problems": 2}


def test_the_evaluation_before_training_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_before(tmp_path) is None
    for content in (None, {"summary": NUMBERS, "samples": [SAMPLE]}, {"summary": {**NUMBERS, "x": 1}, "samples": []}):
        (tmp_path / "before.json").write_text(json.dumps(content))
        assert read_before(tmp_path) == content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "before.json: not JSON"),
        ("[" * 100_000, "before.json: not JSON: nested too deeply"),
        ("5", "must be a JSON object with the keys summary and samples"),
        ('{"summary": {}}', "must be a JSON object with the keys summary and samples"),
        (json.dumps({"summary": 5, "samples": []}), "key 'summary' must be an object"),
        (json.dumps({"summary": {}, "samples": []}), "key 'accuracy_before' is missing"),
        (json.dumps({"summary": {**NUMBERS, "accuracy": 5}, "samples": []}), "'accuracy_before' must lie in"),
        (json.dumps({"summary": {**NUMBERS, "problems": "2"}, "samples": []}), "key 'problems' must be a number"),
        (json.dumps({"summary": {**NUMBERS, "reasons": []}, "samples": []}), "'reasons_before' must be an object"),
        (json.dumps({"summary": NUMBERS, "samples": [5]}), "sample 0: expected a JSON object, found int"),
        (json.dumps({"summary": NUMBERS, "samples": [{**SAMPLE, "prompt": 5}]}), "key 'prompt' must be text"),
    ],
)
def test_a_broken_evaluation_before_training_is_named_with_its_key(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_before(tmp_path)
