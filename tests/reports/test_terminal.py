"""Tables and lines: plain where they are piped, styled on a terminal, harmless on both."""

from __future__ import annotations

import sys

import pytest

from art_denoised.reports import Report
from art_denoised.reports.terminal import Column, Lines, Table, escaped, show, text
from tests.reports.test_page import hostile_model

TABLE = Table(
    (Column("attack", left=True), Column("robust", width=9)),
    (("[bold]pgd[/bold]", ("41.2", "30-52")), ("a\x1b[2J", "3.0")),
    title="red\x1b[31m",
    note=("a note",),
)
PLAIN = r"""first

        red\x1b[31m
attack               robust
[bold]pgd[/bold]       41.2
                      30-52
a\x1b[2J                3.0
a note"""


def test_plain_text_is_aligned_and_printed_where_it_is_piped(capsys):
    assert text([Lines(("first",), style="bold"), TABLE]) == PLAIN
    show([Lines(("first",), style="bold"), TABLE])
    assert capsys.readouterr().out == PLAIN + "\n"


def test_a_terminal_gets_styles_and_no_escapes_of_a_log(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show([Lines(("first \x1b[5m",), style="bold"), TABLE])
    Report((hostile_model(),), ("notice \x1b[5m",)).show()
    out = capsys.readouterr().out
    assert "\x1b[1m" in out  # ours
    assert "[bold]pgd[/bold]" in out  # text, not markup
    for code in ("\x1b[5m", "\x1b[2J", "\x1b[31m"):
        assert code not in out
    assert r"\x1b[5m" in out


def test_a_narrow_terminal_loses_no_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    model = hostile_model()
    Report((model,)).show()
    assert capsys.readouterr().out.count("  not reliable") == len(model.results)


def test_long_lines_are_not_wrapped():
    words = "word " * 100
    assert text([Lines((words,))]) == words.rstrip()
    wide = text([Table(tuple(Column(f"column {i}") for i in range(60)), ())])
    assert len(wide.splitlines()) == 1


@pytest.mark.parametrize("words", ["\x00", "\x7f", "\x9b1m", "\u202e", "\n", "\udc80", "\r"])
def test_control_characters_become_escapes(words):
    assert escaped(words).isprintable()
    assert escaped(f"a{words}b").startswith("a\\")
