"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mirrorpo.files import write_bytes_atomic, write_text_atomic


def test_text_is_written_as_utf8_with_its_line_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text_atomic(target, "für\r\nalle\n")
    assert target.read_bytes() == b"f\xc3\xbcr\r\nalle\n"


def test_an_existing_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    write_bytes_atomic(target, b"old")
    write_bytes_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_reader_of_the_old_file_keeps_the_old_content(tmp_path: Path) -> None:
    # In-place writing would change what an open reader sees; a rename does not.
    target = tmp_path / "a.bin"
    write_bytes_atomic(target, b"old")
    with target.open("rb") as reader:
        write_bytes_atomic(target, b"new")
        assert reader.read() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX matter")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_the_mode_is_0644_less_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    target = tmp_path / "a.bin"
    before = os.umask(mask)
    try:
        write_bytes_atomic(target, b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == mode


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_keeps_the_old_file_and_removes_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(OSError, match="disk full"):
        write_bytes_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_interrupt_removes_the_temporary_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(tmp_path / "a.bin", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_text_atomic(tmp_path / "nowhere" / "a.txt", "x")


def test_text_that_is_no_utf8_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(tmp_path / "a.txt", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"keep")
    link = tmp_path / "link"
    link.symlink_to(other)
    write_bytes_atomic(link, b"new")
    assert other.read_bytes() == b"keep"
    assert link.read_bytes() == b"new"
    assert not link.is_symlink()
