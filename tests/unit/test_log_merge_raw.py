"""Raw output among a rank's lines, and secrets in either: both engines of the merge, by hand."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from strop.obs import log_files, secrets
from strop.obs.log_text import Selection, View
from strop.obs.merge import lines
from tests.unit.log_helpers import VIEWS, LogRun, at, both, line

# ----------------------------------------------------------------------------------------------- raw


def test_raw_lines_stand_before_the_line_that_marks_them(tmp_path: Path) -> None:
    """The one that began before the mark and ended behind it belongs to the mark."""
    run = LogRun(tmp_path / "run")
    run.attempt(1, {0: 0.0})
    first, second = b"early\nhalf a", b" line\n\nafter\n"
    path = run.write(0, first, second, raw=True)
    last = run.write(0, b"new segment\nthe end", raw=True, index=1)
    os.utime(path, (1, 1))
    os.utime(last, (1_795_143_610.5, 1_795_143_610.5))  # 03:00:10.5
    run.write(
        0,
        line(1.0, "no mark"),
        line(2.0, "mark", raw=[0, len(first)], step=4, phase="train"),
        line(3.0, "raw output", raw=[1, 3], level="DEBUG", logger="raw"),
        line(4.0, "last", step=5),
    )
    assert both(run.directory)[0].splitlines() == [
        "2026-11-20 03:00:01.000 [0] INFO     no mark",
        "2026-11-20 03:00:02.000 [0] RAW      early",
        "2026-11-20 03:00:02.000 [0] RAW      half a line",
        "2026-11-20 03:00:02.000 [0] INFO     train 4: mark",
        "2026-11-20 03:00:03.000 [0] RAW      train 4: after",
        "2026-11-20 03:00:03.000 [0] RAW      train 4: new segment",
        "2026-11-20 03:00:04.000 [0] INFO     step 5: last",
        "2026-11-20 03:00:10.500 [0] RAW      step 5: the end",
    ]
    assert [fields["level"] for fields in lines(log_files.find(run.directory, raw=False), Selection())] == [
        "INFO", "INFO", "INFO",
    ]  # fmt: skip


def test_secrets_are_taken_out_of_raw_lines(tmp_path: Path) -> None:
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    token = "hf_" + "a1B2" * 8
    run.write(0, f"login with {token}\n".encode(), raw=True)
    for view in VIEWS:
        text, _ = both(run.directory, view)
        assert "login with" in text
        assert token not in text
    nothing, _ = both(run.directory, selection=Selection(grep=re.compile("a1B2")))
    assert nothing == ""


SECRETS = ("hf_" + "a1B2" * 8, 'quo"ted\\back', "caf\u00e9-au-lait", "slash/es/here", "ghp_" + "x1" * 12)


TOLD = re.compile(
    "|".join(map(re.escape, (*SECRETS, "swordfish.swordfish", "'swordfish'", '"swordfish', "swordfish")))
)


@pytest.mark.parametrize("text", [
    "login with {0}", "password: {1}", "the value {1}", "{2} and {2}", "{3}", "a {4} b",
    "API_KEY = 'swordfish'", 'token": "swordfish', "Bearer swordfish.swordfish",
    "https://me:swordfish@host/", "{0}\n{3}\x9b",
])  # fmt: skip
@pytest.mark.parametrize("form", ["ours", "ascii", "slashes"])
def test_secrets_of_another_writer_are_taken_out_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, form: str
) -> None:
    """In whichever way JSON may write a character: in the message, the traceback, a field of its own.
    The truth is the text with each secret replaced by hand."""
    for i in (1, 2, 3):
        monkeypatch.setenv(f"MY_{i}_PASSWORD", SECRETS[i])
    secrets.learn([])  # the environment is read anew
    message = text.format(*SECRETS)
    fields = {
        "time": at(1.0),
        "level": "INFO",
        "message": message,
        "traceback": f"T {message}",
        "note": message,
    }
    row = json.dumps({**fields, "api_key": "swordfish"}, ensure_ascii=form == "ascii", separators=(",", ":"))
    row = row.replace("/", "\\/") if form == "slashes" else row
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    run.write(0, row.encode() + b"\n", line(2.0, "12 tokens: secretly"))
    try:
        for view in VIEWS:
            shown, _ = both(run.directory, view)
            assert "12 tokens: secretly" in shown
            assert "\x9b" not in shown
            if view.json:
                first, told = json.loads(shown.splitlines()[0]), TOLD.sub("[secret]", message)
                assert (first["message"], first["note"], first["traceback"]) == (told, told, f"T {told}")
                assert first["api_key"] == "[secret]"
            for secret in (*SECRETS, "swordfish"):
                assert secret not in shown
                assert json.dumps(secret)[1:-1] not in shown
    finally:
        monkeypatch.undo()
        secrets.learn([])


def test_control_characters_in_json_are_escaped(tmp_path: Path) -> None:
    """DEL and 80 to 9F, which JSON allows and a terminal obeys; 9B begins a command as ESC [ does."""
    text = "\x1b[31m \x7f \x80 \x9b2J \x9f \xa0 \u00c2 \u4e2d"
    run = LogRun(tmp_path / "run")
    run.attempt(1)
    run.write(0, line(1.0, text))
    run.write(1, text.encode() + b"\n", raw=True)
    shown, _ = both(run.directory, View(json=True))
    assert [json.loads(row)["message"] for row in shown.splitlines()] == [text, text]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
