"""A mirror map on disk: readable, complete, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mirrorpo
from mirrorpo.divergences import MirrorMap
from mirrorpo.divergences.neural.file import VERSION, load_map, save_map
from mirrorpo.divergences.neural.map import GROUPS


@pytest.mark.parametrize("made", [MirrorMap.random(seed=3), MirrorMap.like("itakura_saito")], ids=repr)
def test_a_map_comes_back_bit_for_bit(made: MirrorMap, tmp_path: Path) -> None:
    save_map(tmp_path / "map.json", made)
    back = load_map(tmp_path / "map.json")
    assert torch.equal(back.parameters, made.parameters)
    assert (back.origin, back.fit_error) == (made.origin, made.fit_error)
    assert torch.equal(mirrorpo.divergence("neural", path=tmp_path / "map.json").map.parameters, made.parameters)
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.json"]


def test_the_file_names_the_groups(tmp_path: Path) -> None:
    save_map(tmp_path / "map.json", MirrorMap.random(seed=0))
    content = json.loads((tmp_path / "map.json").read_text())
    assert content["version"] == VERSION == 1
    assert tuple(content["groups"]) == GROUPS
    parameters = MirrorMap.random(seed=0).parameters
    assert content["groups"]["sqrt"]["w"] == parameters[126 + 42 : 126 + 63].tolist()
    assert (content["a"], content["c"]) == (parameters[378].item(), parameters[379].item())


def edited(tmp_path: Path, edit: Any) -> Path:
    path = tmp_path / "map.json"
    save_map(path, MirrorMap.random(seed=0))
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=2), "version must be 1, got 2"),
        (lambda c: c.update(version=True), "version must be 1, got True"),
        (lambda c: c.update(format="other"), "format must be 'mirrorpo mirror map', got 'other'"),
        (lambda c: c.update(d=1.0), "unknown key in the file 'd'"),
        (lambda c: c.pop("a"), "the file needs the key 'a'"),
        (lambda c: c.update(c="1"), r"c must be a number in \[0, inf\), got '1'"),
        (lambda c: c.update(c=-0.5), r"c must be in \[0, inf\), got -0.5"),
        (lambda c: c["groups"].pop("log"), "groups needs the key 'log'"),
        (lambda c: c["groups"].update(tanh={}), "unknown key in groups 'tanh'"),
        (lambda c: c["groups"]["exp"].pop("b"), "group 'exp' needs the key 'b'"),
        (lambda c: c["groups"]["exp"]["b"].pop(), "b of group 'exp' must be a list of 21 numbers"),
        (lambda c: c["groups"]["exp"]["b"].__setitem__(0, None), "b of group 'exp' must be a number"),
        (lambda c: c["groups"]["cbrt"]["w"].__setitem__(2, -1.0), r"w\[65\] \(group 'cbrt'\) must be in"),
        (lambda c: c["groups"]["cbrt"]["w"].__setitem__(2, float("nan")), r"w\[65\] \(group 'cbrt'\) must be in"),
        (lambda c: c.update(groups=[]), "groups must be an object"),
    ],
)
def test_a_file_that_is_not_such_a_map_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_map(edited(tmp_path, edit))
    assert "map.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, "\ufffe"])
def test_text_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    with pytest.raises(ValueError, match="holds no mirror map"):
        load_map(tmp_path / "map.json")


def test_no_file_and_no_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_map(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot be read"):
        load_map(tmp_path)
    with pytest.raises(FileNotFoundError):
        save_map(tmp_path / "none" / "map.json", MirrorMap.random())
