"""Logs on disk: a header with the settings of the run, then one row an image, as it is made.

Each row is appended in a single write, so a killed process leaves at most a torn last line.
docs/logs.md describes the format, and the TSV of the field that is read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from art_denoised.checks import InputError
from art_denoised.evaluation.records import KINDS, Log, Row, from_json, supersedes, to_json
from art_denoised.evaluation.tsv import HEADERS, read_tsv
from art_denoised.storage import Closing, Journal, read_journal


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
    return _read_jsonl(path)


class LogWriter(Closing):
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
        self._journal = Journal(path, f"{kind} log", settings, resume=resume)
        self.notices = self._journal.notices
        try:
            self.rows = _rows(path, kind, self._journal.records)
        except BaseException:
            self._journal.close()
            raise

    def close(self) -> None:
        """Close the log and let others write it."""
        self._journal.close()

    def append(self, row: Row) -> None:
        """Write one row. A process killed meanwhile leaves at most a torn last line."""
        self._journal.append(to_json(row))
        self.rows[row.idx] = row


def _read_jsonl(path: Path) -> Log:
    contents = read_journal(path)
    kinds = {f"{kind} log": kind for kind in KINDS}
    if contents.title not in kinds:
        raise InputError(f"{path} is a {contents.title}, not a log of {' or '.join(KINDS)}")
    kind = kinds[contents.title]
    rows = _rows(path, kind, contents.records)
    return Log(
        kind, contents.settings, tuple(rows[i] for i in sorted(rows)), tuple(contents.notices)
    )


def _rows(path: Path, kind: str, records: list[Any]) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    for number, record in enumerate(records, start=2):
        try:
            row = from_json(kind, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}:{number} is damaged ({type(error).__name__}: {error})"
            ) from None
        if row.idx in rows and not supersedes(row, rows[row.idx]):
            raise InputError(f"{path}:{number} holds image {row.idx} a second time")
        rows[row.idx] = row
    return rows
