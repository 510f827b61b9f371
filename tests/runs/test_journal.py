"""The journal: written row by row, resumed exactly, one writer."""

from __future__ import annotations

import datetime
import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from art_denoised.checks import InputError
from art_denoised.runs import Kind, Row, Run, read_run
from art_denoised.runs.journal import write_whole
from tests.forked import forked

SETTINGS = {"sigma": 0.25, "n": 100, "model": "a:b", "denoiser": None}


class Answer(Row, frozen=True, kw_only=True):
    index: int
    answer: str = "cat"

    @property
    def key(self) -> int | None:
        return self.index if self.index >= 0 else None

    def replaces(self, earlier) -> bool:
        return self.answer > earlier.answer


ANSWERS = Kind("answers", Answer)
OTHERS = Kind("others", Answer)


def write(folder: Path, *indices: int, **options) -> None:
    with Run(folder, ANSWERS, SETTINGS, **options) as run:
        run.append([Answer(index=index) for index in indices])


def read(folder: Path) -> list[int]:
    return list(read_run(folder, ANSWERS).rows)


def test_written_rows_are_read_back(tmp_path):
    write(tmp_path, 3, 1, 2)
    contents = read_run(tmp_path, OTHERS, ANSWERS)
    assert list(contents.rows.values()) == [Answer(index=i) for i in (3, 1, 2)]
    assert (contents.kind, contents.settings, contents.notices) == (ANSWERS, SETTINGS, ())


def test_a_journal_says_when_it_was_begun(tmp_path):
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    with Run(tmp_path, ANSWERS, SETTINGS) as run:
        begun = run.begun
    after = datetime.datetime.now(datetime.UTC)
    assert before <= datetime.datetime.fromisoformat(begun) <= after
    with Run(tmp_path, ANSWERS, SETTINGS, resume=True) as run:
        assert run.begun == read_run(tmp_path, ANSWERS).begun == begun


def test_a_row_may_replace_an_earlier_one_if_it_says_so(tmp_path):
    with Run(tmp_path, ANSWERS, SETTINGS) as run:
        run.append([Answer(index=1, answer="a"), Answer(index=1, answer="b")])
    assert read_run(tmp_path, ANSWERS).rows[1].answer == "b"
    with Run(tmp_path, ANSWERS, SETTINGS, resume=True) as run:
        run.append([Answer(index=1, answer="a")])
    with pytest.raises(InputError, match="answers.jsonl:4"):
        read(tmp_path)


def test_rows_without_a_key_are_all_kept(tmp_path):
    write(tmp_path, -1, -1, 5)
    assert len(read(tmp_path)) == 3


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1, resume=True)
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start + 1, len(whole)):
        path.write_bytes(whole[:cut])
        contents = read_run(path, ANSWERS)
        assert (list(contents.rows), len(contents.notices)) == ([0], 1)
        write(tmp_path, 1, resume=True)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("torn", ['{"art', '{"art_denoised": "answers log", "ver'])
def test_a_torn_header_starts_again(tmp_path, torn):
    (tmp_path / "answers.jsonl").write_text(torn)
    with Run(tmp_path, ANSWERS, SETTINGS, resume=True) as run:
        assert len(run.notices) == 1
    assert read(tmp_path) == []


def test_a_foreign_file_stays_as_it_is(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"my": "only line"}')
    with pytest.raises(InputError):
        Run(tmp_path, ANSWERS, SETTINGS, resume=True)
    assert path.read_text() == '{"my": "only line"}'


def header(**changes) -> str:
    return json.dumps({"art_denoised": "answers log", "version": 2, "settings": {}, **changes})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (header() + '\n{"index": 1, "ans\n{"index": 2}\n', ":2 "),
        (header() + '\n{"index": 1}\n{"index": 1}\n', ":3 "),
        (header() + '\n{"index": 2.7}\n', ":2 "),
        (header() + '\n{"index": Infinity}\n', ":2 "),
        (header() + '\n{"index": 1e400}\n', ":2 "),
        (header() + f'\n{{"index": {"9" * 5000}}}\n', ":2 "),
        (header() + "\n" + "[" * 5000 + "]" * 5000 + "\n", ":2 "),
        ('{"index": 1}\n', "header"),
        (header(art_denoised="cat log") + "\n", "cat log"),
        (header(version="two") + "\n", "header"),
        ('{"art_denoised": "answers log", "version": 2, "settings": NaN}\n', "header"),
        ("[" * 5000 + "\n", "header"),
        ("hello\n", "header"),
    ],
)
def test_damage_is_one_line(tmp_path, text, value):
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(InputError, match=value) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_blank_lines_are_read(tmp_path):
    text = "\ufeff" + header() + '\n{"index": 1}\n\n'
    (tmp_path / "answers.jsonl").write_text(text, encoding="utf-8")
    assert read(tmp_path) == [1]


def test_other_runs_are_not_mixed(tmp_path):
    write(tmp_path, 0)
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(InputError, match="already holds a run"):
        Run(tmp_path, ANSWERS, SETTINGS)
    with pytest.raises(InputError, match=r"sigma is 0\.25, not 0\.5"):
        Run(tmp_path, ANSWERS, SETTINGS | {"sigma": 0.5}, resume=True)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_runs_of_earlier_versions_are_read_and_not_continued(tmp_path):
    (tmp_path / "answers.jsonl").write_text(header(version=1) + '\n{"idx": 1}\n')
    old = Kind("answers", Answer, lambda record: {"index": record["idx"]})
    assert list(read_run(tmp_path, old).rows) == [1]
    with pytest.raises(InputError, match="earlier version"):
        Run(tmp_path, old, {}, resume=True)


def hold(folder: Path, ready, done) -> None:
    with Run(folder, ANSWERS, SETTINGS):
        ready.set()
        done.wait()


def test_two_processes_cannot_write_one_run(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    other = forked(hold, tmp_path, ready, done)
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process"):
        Run(tmp_path, ANSWERS, SETTINGS, resume=True)
    done.set()
    other.join(60)
    write(tmp_path, 0, resume=True)


def test_a_device_is_refused(tmp_path):
    (tmp_path / "answers.jsonl").symlink_to("/dev/null")
    with pytest.raises(InputError, match="regular file"):
        Run(tmp_path, ANSWERS, SETTINGS)


def test_a_write_cut_short_leaves_no_torn_line(tmp_path, monkeypatch):
    """The disk is full for one row and has room again for the next."""
    os_write = os.write
    with Run(tmp_path, ANSWERS, SETTINGS) as run:
        run.append([Answer(index=1)])
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda file, line: os_write(file, line[:5]))
            with pytest.raises(OSError, match="space"):
                run.append([Answer(index=2)])
        run.append([Answer(index=3)])
    assert read(tmp_path) == [1, 3]


def test_a_row_that_the_disk_does_not_confirm_is_not_kept(tmp_path, monkeypatch):
    def refuse(_file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with Run(tmp_path, ANSWERS, SETTINGS) as run:
        run.append([Answer(index=1)])
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", refuse)
            with pytest.raises(OSError, match="Input/output error"):
                run.append([Answer(index=2)])
    assert read(tmp_path) == [1]


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
        Run(tmp_path / "a", ANSWERS, SETTINGS)
    write(tmp_path / "b" / "c", 1)
    assert read(tmp_path / "b" / "c") == [1]


@pytest.mark.parametrize("version", [0, 3])
def test_a_log_of_an_unknown_version_is_not_read(tmp_path, version):
    """Its rows were read as if they meant what those of today do."""
    write(tmp_path, 1)
    path = tmp_path / "answers.jsonl"
    path.write_text(path.read_text().replace('"version": 2', f'"version": {version}'))
    with pytest.raises(InputError, match=f"version {version}"):
        read(tmp_path)
