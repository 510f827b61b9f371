"""Files that survive, and fingerprints of weights."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.storage import Journal, read_journal, weights_fingerprint, write_whole


def refuse(_file: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_write_cut_short_leaves_no_torn_line(tmp_path, monkeypatch):
    """The disk is full for one row and has room again for the next."""
    path, write = tmp_path / "a.jsonl", os.write
    with Journal(path, "answers", {}) as journal:
        journal.append({"n": 1})
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda file, line: write(file, line[:5]))
            with pytest.raises(OSError, match="no space"):
                journal.append({"n": 2})
        journal.append({"n": 3})
    contents = read_journal(path)
    assert (contents.records, contents.notices) == ([{"n": 1}, {"n": 3}], [])


def test_a_row_that_the_disk_does_not_confirm_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with Journal(path, "answers", {}) as journal:
        journal.append({"n": 1})
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", refuse)
            with pytest.raises(OSError, match="Input/output error"):
                journal.append({"n": 2})
    assert read_journal(path).records == [{"n": 1}]


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """Where the disk does not confirm the new content, the old is there."""
    path = tmp_path / "a"
    write_whole(path, b"old")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(InputError, match="Input/output error"):
            write_whole(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])


def test_only_a_torn_header_of_ours_is_begun_again(tmp_path):
    path = tmp_path / "a.jsonl"
    for torn in ('{"art', '{"art_denoised": "answers", "ver'):
        path.write_text(torn)
        with Journal(path, "answers", {}, resume=True) as journal:
            assert "header torn" in journal.notices[0]
    path.write_text('{"my": "only line"}')
    with pytest.raises(InputError, match="is no log"):
        Journal(path, "answers", {}, resume=True)
    assert path.read_text() == '{"my": "only line"}'


class Extra(nn.Linear):
    def __init__(self, extra: object) -> None:
        super().__init__(2, 2)
        self.extra = extra
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_extra_state_counts_among_the_weights():
    states = [{"a": 1}, {"a": 2}, {"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "text", None, [1]]
    prints = [weights_fingerprint(Extra(state)) for state in states]
    assert len(set(prints)) == len(states)
    assert prints == [weights_fingerprint(Extra(state)) for state in states]
