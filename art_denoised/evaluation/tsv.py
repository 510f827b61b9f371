"""The field's TSV logs, as Cohen et al. (2019) write them and others after them."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from art_denoised.checks import InputError
from art_denoised.evaluation.records import CertifyRow, Log, PredictRow, Row, parse_radius
from art_denoised.smoothing.statistics import ABSTAIN
from art_denoised.storage import Closing

HEADERS = {
    "certify": "idx\tlabel\tpredict\tradius\tcorrect\ttime",
    "predict": "idx\tlabel\tpredict\tcorrect\ttime",
}


class TsvWriter(Closing):
    """Writes the field's TSV beside a log, row by row; a context manager.

    Args:
        path: The file, written anew.
        kind: "certify" or "predict".
        rows: Rows to begin with.
        enabled: Whether to write at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TsvWriter(Path(folder, "a.tsv"), "certify", []) as table:
        ...         table.append(CertifyRow(7, 3, 3, 0.25, seconds=1.5))
        ...     print(Path(folder, "a.tsv").read_text().splitlines()[1].split())
        ['7', '3', '3', '0.250000', '1', '0:00:01.500000']
    """

    def __init__(self, path: Path, kind: str, rows: Iterable[Row], *, enabled: bool = True) -> None:
        self._file: TextIO | None = None
        if enabled:
            self._file = path.open("w", encoding="utf-8", buffering=1)
            self._file.write(HEADERS[kind] + "\n")
            for row in rows:
                self.append(row)

    def close(self) -> None:
        """Close the table."""
        if self._file is not None:
            self._file.close()

    def append(self, row: Row) -> None:
        """Write one row."""
        if self._file is not None:
            self._file.write(_tsv_line(row))


def _tsv_line(row: Row) -> str:
    cells = [str(row.idx), str(row.label), str(row.predict)]
    if isinstance(row, CertifyRow):
        cells.append(f"{row.radius:.6f}")  # exact: radii are multiples of 1e-6, rounded down
    cells += [str(int(row.correct)), str(datetime.timedelta(seconds=row.seconds))]
    return "\t".join(cells) + "\n"


def read_tsv(path: Path, kind: str, text: str) -> Log:
    r"""Read the text of a TSV log, header included.

    Args:
        path: For messages.
        kind: "certify" or "predict".
        text: The file's contents.

    Raises:
        InputError: A line before the last is damaged.

    Example:
        >>> text = HEADERS["predict"] + "\n0\t3\t3\t1\t15.4\n"
        >>> read_tsv(Path("a.tsv"), "predict", text).rows[0].seconds
        15.4
    """
    lines = text.split("\n")
    rows: list[Row] = []
    columns: list[int] = []
    notices = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            row, column = _from_cells(kind, line.rstrip("\r").split("\t"))
        except (ValueError, IndexError) as error:
            if number == len(lines):
                notices.append("a torn last line was left out")
                break
            raise InputError(f"{path}:{number} is damaged: {error}") from None
        rows.append(row)
        columns.append(column)
    notices += _check_correct(rows, columns)
    return Log(kind, None, tuple(rows), tuple(notices))


def _from_cells(kind: str, cells: list[str]) -> tuple[Row, int]:
    if len(cells) != len(HEADERS[kind].split("\t")):
        raise ValueError(f"{len(cells)} cells")
    idx, label, predict = (int(cell) for cell in cells[:3])
    seconds, column = _seconds(cells[-1]), int(float(cells[-2]))
    if predict < ABSTAIN:
        raise ValueError(f"predicted class {predict}")
    if kind == "predict":
        return PredictRow(idx, label, predict, seconds), column
    return CertifyRow(idx, label, predict, parse_radius(cells[3]), seconds), column


def _check_correct(rows: Iterable[Row], columns: Iterable[int]) -> Iterator[str]:
    wrong = sum(int(row.correct) != column for row, column in zip(rows, columns, strict=True))
    if wrong:
        total = " (it holds a running total)" if max(columns) > 1 else ""
        yield f"column `correct` disagrees with the classes in {wrong} rows{total}; recomputed"


def _seconds(cell: str) -> float:
    """Parse "15.4", "0:02:32.717239" or "1 day, 0:00:01"."""
    days, _, clock = cell.rpartition(" day")
    total = float(days or 0) * 86_400
    parts = clock.lstrip("s, ").split(":")
    return total + sum(float(part) * 60**i for i, part in enumerate(reversed(parts)))
