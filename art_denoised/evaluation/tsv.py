"""The field's TSV logs, as Cohen et al. (2019) write them and others after them."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path

import msgspec

from art_denoised.checks import InputError
from art_denoised.evaluation.rows import CertifyRow, LabelledRow, Log, PredictRow
from art_denoised.runs.files import write_whole

HEADERS = {
    "certify": "idx\tlabel\tpredict\tradius\tcorrect\ttime",
    "predict": "idx\tlabel\tpredict\tcorrect\ttime",
}


def write_tsv(log: Log, path: Path | str) -> None:
    """Write a log in the field's columns.

    Args:
        log: Log of certify or predict.
        path: File to write; replaced if it exists.

    Raises:
        InputError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> row = CertifyRow(index=7, label=3, prediction=3, radius=0.25, seconds=1.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tsv(Log("certify", None, (row,)), Path(folder, "a.tsv"))
        ...     print(Path(folder, "a.tsv").read_text().splitlines()[1].split())
        ['7', '3', '3', '0.250000', '1', '0:00:01.500000']
    """
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(HEADERS[log.kind].split("\t"))
    for row in log.rows:
        radius = [_floored(row.radius)] if log.kind == "certify" else []
        time = datetime.timedelta(seconds=row.seconds)
        table.writerow([row.index, row.label, row.prediction, *radius, int(row.correct), time])
    write_whole(Path(path), text.getvalue().encode())


def _floored(radius: float) -> str:
    """Return a radius with six decimals, rounded down: those of a table may have more."""
    return str(Decimal(str(radius)).quantize(Decimal("1e-6"), ROUND_FLOOR))


def read_tsv(path: Path, kind: str, text: str) -> Log:
    r"""Read the text of a TSV log, header included.

    Args:
        path: File that the text is from, for messages.
        kind: "certify" or "predict".
        text: Contents of the file.

    Raises:
        InputError: A line before the last is damaged, or an image is there twice.

    Example:
        >>> text = HEADERS["predict"] + "\n0\t3\t3\t1\t15.4\n"
        >>> read_tsv(Path("a.tsv"), "predict", text).rows[0].seconds
        15.4
    """
    lines = text.split("\n")
    rows: dict[int, LabelledRow] = {}
    columns: list[int] = []
    notices = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            row, column = _row(kind, line.rstrip("\r").split("\t"))
        except (ValueError, IndexError, OverflowError) as error:
            if number == len(lines):
                notices.append("a torn last line was left out")
                break
            raise InputError(f"{path}:{number} is damaged: {error}") from None
        if row.index in rows:
            raise InputError(f"{path}:{number} holds {row.index} a second time; remove one of them")
        rows[row.index] = row
        columns.append(column)
    notices += _check_correct(rows.values(), columns)
    return Log(kind, None, tuple(rows.values()), tuple(notices))


def _row(kind: str, cells: Sequence[str]) -> tuple[LabelledRow, int]:
    names = HEADERS[kind].split("\t")
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells, not {len(names)}")
    record = {"index": int(cells[0]), "label": int(cells[1]), "prediction": int(cells[2])}
    known = {**record, "seconds": _seconds(cells[-1])}
    if kind == "certify":
        known["radius"] = float(cells[3])
    row = msgspec.convert(known, CertifyRow if kind == "certify" else PredictRow)
    return row, int(float(cells[-2]))


def _check_correct(rows: Iterable[LabelledRow], columns: Iterable[int]) -> Iterator[str]:
    columns = list(columns)
    wrong = sum(int(row.correct) != column for row, column in zip(rows, columns, strict=True))
    if wrong:
        total = " (it holds a running total)" if max(columns) > 1 else ""
        yield f"column `correct` disagrees with the classes in {wrong} rows{total}; recomputed"


def _seconds(cell: str) -> float:
    """Parse "15.4", "0:02:32.717239" or "1 day, 0:00:01"."""
    days, _, clock = cell.rpartition(" day")
    total = float(days or 0) * 86_400
    parts = clock.lstrip("s, ").split(":")
    total += sum(float(part) * 60**i for i, part in enumerate(reversed(parts)))
    if not math.isfinite(total):
        raise ValueError(f"the time is {cell}")
    return total
