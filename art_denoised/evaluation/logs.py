"""Logs on disk: a header with the settings of the run, then one row an image, as it is made.

Each row is appended in a single write, so a killed process leaves at most a torn last line.
docs/logs.md describes the format, and the TSV of the field that is read too.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from art_denoised.checks import InputError
from art_denoised.evaluation.records import KINDS, Log, Row, from_json, supersedes, to_json
from art_denoised.evaluation.tsv import HEADERS, read_tsv


def read_log(path: Path | str) -> Log:
    r"""Read a log of ours or a TSV log of the field.

    ``correct`` is never believed: it is recomputed from the classes, and a column that says
    otherwise (some codes write a running total) is mentioned in the notices. A torn last line is
    left out and mentioned.

    Raises:
        InputError: No such file, none of these formats, or a damaged line before the last.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        ...     _ = file.write(HEADERS["certify"] + "\n0\t3\t3\t0.41\t1\t0:00:15.4\n")
        ...     file.flush()
        ...     row = read_log(file.name).rows[0]
        >>> row.correct, row.radius, row.seconds
        (True, 0.41, 15.4)
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"log {path} does not exist; give a file that certify wrote")
    text = path.read_bytes().decode("utf-8", errors="replace")
    first = text.split("\n", 1)[0].strip()
    for kind, header in HEADERS.items():
        if first.split() == header.split():
            return read_tsv(path, kind, text)
    if not first.startswith("{"):
        raise InputError(
            f"{path} is no log; give a certify.jsonl, or a TSV that begins "
            f"{' '.join(HEADERS['certify'].split())!r}"
        )
    return _read_jsonl(path, text)[0]


class LogWriter:
    """Appends rows to a JSON-lines log, one write a row; a context manager.

    Args:
        path: The log.
        kind: "certify" or "predict".
        settings: What determines the rows; plain JSON values.
        resume: Continue the log if it exists.

    Attributes:
        rows: Image -> its latest row, of those already in the log and those appended.
        notices: What had to be repaired on resuming.

    Raises:
        InputError: The log exists and ``resume`` is not set, has other settings, is damaged, or
            is being written by another process.
        OSError: The disk does not take it. Rows before that stay readable.

    Example:
        >>> import tempfile
        >>> from art_denoised.evaluation.records import PredictRow
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "predict.jsonl")
        ...     for resume in (False, True):
        ...         with LogWriter(path, "predict", {"n": 9}, resume=resume) as log:
        ...             log.append(PredictRow(len(log.rows), label=1, predict=1, seconds=0.1))
        ...     len(read_log(path).rows)
        2
    """

    def __init__(
        self, path: Path, kind: str, settings: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.path, self.kind, self.settings = path, kind, dict(settings)
        self.rows: dict[int, Row] = {}
        self.notices: list[str] = []
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            self._lock()
            self._open(resume)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def append(self, row: Row) -> None:
        """Write one row. A process killed meanwhile leaves at most a torn last line."""
        self._write(to_json(row))
        self.rows[row.idx] = row

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path} is being written by another process") from None

    def _open(self, resume: bool) -> None:
        if not self.path.is_file():
            raise InputError(f"{self.path} is not a regular file; choose another folder")
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        if text and not resume:
            raise InputError(
                f"{self.path.parent} already holds a run ({self.path.name}); "
                "pass --resume to continue it or choose another folder"
            )
        if text and "\n" not in text:
            self.notices.append(f"{self.path}: header torn, starting again")
            text = ""
            os.ftruncate(self._file, 0)
        if not text:
            self._write({"art_denoised": f"{self.kind} log", "version": 1}, self.settings)
            return
        log, whole = _read_jsonl(self.path, text)
        if log.kind != self.kind:
            raise InputError(f"{self.path} is a log of {log.kind}, not of {self.kind}")
        _compare(self.path, dict(log.settings or {}), json.loads(json.dumps(self.settings)))
        os.ftruncate(self._file, whole)
        self.rows = {row.idx: row for row in log.rows}
        self.notices += [f"{self.path}: {notice}" for notice in log.notices]

    def _write(self, record: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> None:
        record = dict(record) if settings is None else {**record, "settings": settings}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written, reason = os.write(self._file, line), "no space for a whole row"
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written != len(line):
            raise OSError(
                f"{self.path} cannot be written ({reason}); the rows before are kept, "
                "make room and pass --resume"
            )


def _read_jsonl(path: Path, text: str) -> tuple[Log, int]:
    """Return the log and the length in bytes of its whole lines."""
    *lines, torn = text.split("\n")
    try:
        header = json.loads(lines[0])
        name, settings = header["art_denoised"], header["settings"]
        kind = {f"{kind} log": kind for kind in KINDS}[name]
    except (ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path} is no log: its first line is not a header of ours") from None
    notices = ["a torn last line was left out"] if torn else []
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = from_json(kind, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}:{number} is damaged ({type(error).__name__}: {error})"
            ) from None
        if row.idx in rows and not supersedes(row, rows[row.idx]):
            raise InputError(f"{path}:{number} holds image {row.idx} a second time")
        rows[row.idx] = row
    whole = len(text.encode()) - len(torn.encode())
    return Log(kind, settings, tuple(rows[idx] for idx in sorted(rows)), tuple(notices)), whole


def _compare(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        changes = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)
        raise InputError(f"{path} is a log of other settings ({changes}); choose another folder")
