"""Progress: a bar on a terminal, whole lines elsewhere, and a word about silent waits."""

from __future__ import annotations

import io
import sys

import pytest

from art_denoised.runs import progress
from art_denoised.runs.progress import Progress, waiting, watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_whole_lines_with_speed_time_left_and_note(capsys):
    with Progress("certify", 4, done=1, interval=0.0) as shown:
        shown.update(note=lambda: "certified 50.0% at r=0")
    first, middle, last = capsys.readouterr().err.splitlines()
    assert first == "certify: 1/4 images"
    assert middle.startswith("certify: 2/4 images, ")
    assert "images/s, 0:00:0" in middle
    assert middle.endswith(" left, certified 50.0% at r=0")
    assert last.startswith("certify: 2/4 images, ")


def test_notes_are_made_only_when_they_are_shown(capsys):
    made = []
    with Progress("certify", None, unit="row") as shown:
        for _ in range(50):
            shown.update(note=lambda: made.append(1) or "note")
    assert len(made) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("cer[tify]", 4) as shown:
        shown.update(4, note=lambda: "all done")
    assert "cer[tify]" in terminal.getvalue()
    assert "4/4 images" in terminal.getvalue()
    assert "all done" in terminal.getvalue()


def test_nothing_is_shown_unless_it_is_wanted(capsys):
    with Progress("certify", 4, visible=False, interval=0.0) as shown:
        shown.update()
    assert list(watched([1, 2], "reading")) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("visible", [True, False])
def test_long_waits_say_what_is_done(capsys, monkeypatch, visible):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with waiting("loading the network", visible=visible):
        while visible and not (heard := capsys.readouterr().err):
            pass
    list(watched([1, 2], "reading", visible=visible))
    if visible:
        assert heard == "notice: loading the network ...\n"
        assert capsys.readouterr().err.splitlines()[-1].startswith("reading: 2/2 images")
    assert not visible or heard
    assert visible or capsys.readouterr().err == ""
