"""`mirrorpo grade`: one line in, one line out, nothing dropped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrorpo.cli import main
from mirrorpo.files import MAX_LINE
from mirrorpo.rewards import lines
from mirrorpo.rewards.code import CodeVerifier
from mirrorpo.rewards.maths import MathVerifier

MATHS = [
    b'{"completion": "#### 4", "answer": "4"}',
    b"not JSON",
    b"",
    b"[1]",
    b'{"completion": "#### 4"}',
    b'{"completion": 4, "answer": "4"}',
    b'{"completion": "#### 4", "answer": 4}',
    b'{"completion": "\xff", "answer": "4"}',
    b"[" * 100_000,
    b'{"completion": "#### \\ud800", "answer": "4"}',
    b'{"completion": "#### 5", "answer": "4"}',
]


def test_maths_lines_keep_their_order_and_broken_ones_their_number() -> None:
    verifier = MathVerifier()
    out = [json.loads(line) for line in lines.grade_maths(MATHS, verifier)]
    verifier.close()
    assert [list(line) for line in out] == [["reward", "reason"]] * len(MATHS)
    assert [line["reward"] for line in out] == [1.0, 0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0]
    reasons = [line["reason"] for line in out]
    assert reasons[1].startswith("line 2: not JSON")
    assert reasons[2:6] == [
        "line 3: empty",
        "line 4: must be a JSON object, got list",
        "line 5: no field 'answer'",
        "line 6: field 'completion' must be a text, got int",
    ]
    assert reasons[7].startswith("line 8: not UTF-8")
    assert reasons[8].startswith("line 9: not JSON")
    assert reasons[9:] == ["malformed", "mismatch"]


def test_code_lines_keep_their_order_and_are_read_as_needed() -> None:
    verifier = CodeVerifier(require="limits", in_flight=4)
    read = 0

    def source() -> Iterator[bytes]:
        nonlocal read
        for index in range(60):
            read += 1
            row = {"completion": f"def f(): return {index}", "tests": [f"assert f() == {index - index % 2}"]}
            yield b"?" if index == 30 else json.dumps(row).encode()

    graded = lines.grade_code(source(), verifier)
    first = json.loads(next(graded))
    assert read < 30, "a long file is not read at once"
    out = [first, *map(json.loads, graded)]
    verifier.close()
    expected = [1.0 if index % 2 == 0 and index != 30 else 0.0 for index in range(60)]
    assert [line["reward"] for line in out] == expected
    assert out[30]["reason"].startswith("line 31: not JSON")


@pytest.mark.parametrize("kind", ["math", "code"])
def test_a_line_beyond_the_limit_is_refused_before_any_verdict(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.jsonl"
    row = {"completion": "#### 4", "answer": "4", "tests": ["assert True"]}
    longest = json.dumps({**row, "more": ""})
    longest = json.dumps({**row, "more": "a" * (MAX_LINE - len(longest) - 1)}) + "\n"
    assert len(longest) == MAX_LINE, "a line of just this length is read"
    monkeypatch.setattr(sys, "argv", ["mirrorpo", "grade", kind, str(path), "--require", "limits"])
    path.write_text(json.dumps(row) + "\n" + longest)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    path.write_text(json.dumps(row) + "\n" + " " + longest)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: {path}: line 2 is longer than 16,000,000 bytes\n"


def test_the_command_exits_0_and_2(tmp_path: Path) -> None:
    path = tmp_path / "maths.jsonl"
    path.write_bytes(b"\n".join(MATHS) + b"\n")
    command = [sys.executable, "-m", "mirrorpo.cli", "grade", "math"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(MATHS)
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert missing.stderr == f"error: {tmp_path / 'none'}: no such file\n"
