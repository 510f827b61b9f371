"""Files that survive a killed process."""

from __future__ import annotations

import errno
import os

import pytest

from art_denoised.checks import InputError
from art_denoised.runs import make_folder, write_whole


def refuse(_file: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """Where the disk does not confirm the new content, the old is there."""
    path = tmp_path / "a"
    write_whole(path, b"old")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(InputError, match="Input/output error"):
            write_whole(path, b"new")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(InputError, match="not a directory"):
        make_folder(tmp_path / "a")
    assert make_folder(tmp_path / "b" / "c").is_dir()
