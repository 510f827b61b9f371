"""Rows of certify and predict runs, and the logs that hold them: ours, and the field's TSV."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import ATTACK, AttackLog, TimedRow, read_attack_log
from art_denoised.runs.journal import Contents, Kind, Run, read_run, write_whole
from art_denoised.smoothing.bounds import Looks, Mixture, Proof, Sequential
from art_denoised.smoothing.statistics import Bound, Certificate, Vote

Index: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Prediction: TypeAlias = Annotated[int, Meta(ge=-1)]
Votes: TypeAlias = dict[Prediction, Annotated[int, Meta(ge=1, le=2**53)]]
NonNegative: TypeAlias = Annotated[float, Meta(ge=0, le=1e300)]
Positive: TypeAlias = Annotated[float, Meta(gt=0, le=1e300)]
Alpha: TypeAlias = Annotated[float, Meta(gt=0, lt=0.5)]

HEADERS = {  # of the field's logs, as Cohen et al. (2019) write them
    "certify": "idx\tlabel\tpredict\tradius\tcorrect\ttime",
    "predict": "idx\tlabel\tpredict\tcorrect\ttime",
}
# What a row takes over from an answer under its name.
_OF_BOTH = ("counts", "alpha", "sigma", "seed", "dtype", "noise")
_OF_CERTIFICATE = (*_OF_BOTH, "radius", "p_lower", "selection_counts", "tv", "drawn", "proofs")
_OF_VOTE = (*_OF_BOTH, "p_value")


class LabelledRow(TimedRow, frozen=True, kw_only=True):
    """What a run says of one image. Time takes no part in comparisons.

    Attributes:
        index: Index of the image in its data set.
        label: True class.
        prediction: Class that was certified or predicted; -1 for an abstention.
        seconds: Wall-clock time since the row before; images share batches.
        n: Number of votes in ``counts``.
        counts, alpha, sigma, seed, dtype, noise: As in `Certificate` and `Vote`; not there in a row
            read from a TSV.
    """

    index: Index
    label: Index
    prediction: Prediction
    seconds: float
    n: int = 0
    counts: Votes | None = None
    alpha: Alpha | None = None
    sigma: Positive | None = None
    seed: int = 0
    dtype: str = "float32"
    noise: str = "gaussian"

    def __post_init__(self) -> None:
        _check_total("n", self.n, self.counts)
        if self.counts is not None and None in (self.alpha, self.sigma):
            raise ValueError("the votes lack alpha or sigma")

    @property
    def key(self) -> int:
        """The index."""
        return self.index

    @property
    def correct(self) -> bool:
        """Whether the prediction is the true class."""
        return self.prediction == self.label


class CertifyRow(LabelledRow, frozen=True, kw_only=True):
    """What a certify run says of one image.

    Attributes:
        radius: Certified l2 radius in image units; 0 for an abstention.
        p_lower, selection_counts, tv, drawn, proofs: As in `Certificate`.
        n0: Number of votes in ``selection_counts``.
        mode: Kind of the bound: "fixed" (one look), "sequential" (a table of radii) or "anytime";
            in earlier logs "looks" (a table of radii by a union bound).
        looks: First and last sample count at which the votes may be looked at, for tables.
        prior: Parameters (a, b) of the mixture, for "anytime".
    """

    radius: NonNegative
    p_lower: float = 0.0
    n0: int = 0
    drawn: int = 0
    mode: str = "fixed"
    looks: tuple[Index, Index] | None = None
    prior: tuple[Positive, Positive] | None = None
    selection_counts: Votes | None = None
    tv: float = 0.0
    proofs: tuple[Proof, ...] = ()

    def __post_init__(self) -> None:
        LabelledRow.__post_init__(self)
        _check_total("n0", self.n0, self.selection_counts)
        if self.selection_counts is not None:
            if self.counts is None:
                raise ValueError("the votes lack counts")
            _ = self.bound  # raises unless it is one of the known kinds

    @classmethod
    def of(cls, index: int, label: int, answer: Certificate, seconds: float = 0.0) -> CertifyRow:
        """Return the row of a certificate.

        Example:
            >>> c = Certificate.from_counts({3: 50}, {3: 1000}, alpha=0.001, sigma=0.25)
            >>> row = CertifyRow.of(7, 3, c)
            >>> row.correct, row.certificate == c
            (True, True)
        """
        bound: dict[str, Any] = {"mode": "fixed"}
        if isinstance(answer.bound, Mixture):
            bound = {"mode": "anytime", "prior": (answer.bound.a, answer.bound.b)}
        elif isinstance(answer.bound, Sequential) or answer.bound.first < answer.bound.last:
            mode = "sequential" if isinstance(answer.bound, Sequential) else "looks"
            bound = {"mode": mode, "looks": (answer.bound.first, answer.bound.last)}
        held = {name: _plain(getattr(answer, name)) for name in (*_OF_CERTIFICATE, "n0", "n")}
        return cls(
            index=index, label=label, prediction=answer.label, seconds=seconds, **held, **bound
        )

    @property
    def bound(self) -> Bound:
        """How ``p_lower`` follows from the votes."""
        if self.mode == "anytime" and self.prior is not None:
            return Mixture(*self.prior)
        tables: dict[str, type[Looks | Sequential]] = {"looks": Looks, "sequential": Sequential}
        if self.mode in tables and self.looks and 0 < self.looks[0] <= self.looks[1]:
            return tables[self.mode](*self.looks)
        if self.mode == "fixed":
            return Looks.fixed(self.n)
        raise ValueError(f"mode is {self.mode!r}, looks {self.looks}, prior {self.prior}")

    @property
    def certificate(self) -> Certificate | None:
        """All that was certified; None in a row without votes."""
        if self.selection_counts is None:
            return None
        held: dict[str, Any] = {name: getattr(self, name) for name in _OF_CERTIFICATE}
        return Certificate(label=self.prediction, bound=self.bound, **held)

    def replaces(self, earlier: Any) -> bool:
        """Whether this goes on from an earlier row: more votes, with a bound for all counts."""
        if not isinstance(earlier, CertifyRow) or self.counts is None or earlier.counts is None:
            return False
        return (
            self.mode == earlier.mode == "anytime"
            and self.prior == earlier.prior
            and self.n > earlier.n
            and self.selection_counts == earlier.selection_counts
            and all(self.counts.get(c, 0) >= votes for c, votes in earlier.counts.items())
        )


class PredictRow(LabelledRow, frozen=True, kw_only=True):
    """What a predict run says of one image, with the ``p_value`` of its `Vote`."""

    p_value: float = 1.0

    @classmethod
    def of(cls, index: int, label: int, answer: Vote, seconds: float = 0.0) -> PredictRow:
        """Return the row of a vote.

        Example:
            >>> vote = Vote.from_counts({3: 90, 5: 10}, alpha=0.001, sigma=0.25)
            >>> PredictRow.of(7, 3, vote).vote == vote
            True
        """
        held = {name: _plain(getattr(answer, name)) for name in _OF_VOTE}
        held["n"] = sum(answer.counts.values())
        return cls(index=index, label=label, prediction=answer.label, seconds=seconds, **held)

    @property
    def vote(self) -> Vote | None:
        """The answer with its votes; None in a row without them."""
        if self.counts is None:
            return None
        held: dict[str, Any] = {name: getattr(self, name) for name in _OF_VOTE}
        return Vote(label=self.prediction, **held)


def _upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of version 1 under today's names."""
    names = {"idx": "index", "predict": "prediction"}
    return {names.get(name, name): value for name, value in record.items() if name != "correct"}


CERTIFY: Kind[Any] = Kind("certify", CertifyRow, _upgrade)
"""Kind of the journal `certify.jsonl`."""
PREDICT: Kind[Any] = Kind("predict", PredictRow, _upgrade)
"""Kind of the journal `predict.jsonl`."""


@dataclass(frozen=True)
class Log:
    """A log as read.

    Attributes:
        kind: "certify" or "predict".
        settings: Settings of the run; None for a TSV.
        rows: By index; those of a TSV in the order of the file.
        notices: What the reader had to repair or recompute, for the user to see.
        begun: Time at which the log was begun, in UTC as ISO 8601; empty in TSV and earlier logs.
    """

    kind: str
    settings: Mapping[str, Any] | None
    rows: tuple[Any, ...]
    notices: tuple[str, ...] = ()
    begun: str = field(default="", compare=False)

    @classmethod
    def of(cls, journal: Contents[Any] | Run[Any], notices: Iterable[str] = ()) -> Log:
        """Return the log that a journal holds, its rows by index."""
        rows: Mapping[Any, Any] = journal.rows
        ordered = tuple(rows[index] for index in sorted(rows))
        return cls(
            journal.kind.name, dict(journal.settings), ordered, tuple(notices), journal.begun
        )


def read_log(path: Path | str) -> Log:
    r"""Read a log of certify or predict: ours, or a TSV of the field.

    ``correct`` is never believed: it follows from the classes, and a column of a TSV that says
    otherwise (some codes write a running total) is mentioned in the notices. A torn last line is
    left out and mentioned. So are images that an interrupted run lacks.

    Args:
        path: The file, or the folder of a run.

    Raises:
        InputError: No such file, none of these formats, or damage before the last line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        ...     _ = file.write("idx label predict radius correct time\n0\t3\t3\t0.41\t1\t15.4\n")
        ...     file.flush()
        ...     row = read_log(file.name).rows[0]
        >>> row.correct, row.radius, row.seconds
        (True, 0.41, 15.4)
    """
    path = Path(path)
    if path.is_file():
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
        first = text.partition("\n")[0].strip()
        for kind, header in HEADERS.items():
            if first.split() == header.split():
                return _read_tsv(path, kind, text)
        if not first.startswith("{"):
            raise InputError(
                f"{path} is not a log; give a certify.jsonl, or a TSV that begins "
                f"{' '.join(HEADERS['certify'].split())!r}"
            )
    contents = read_run(path, CERTIFY, PREDICT)
    return Log.of(contents, (*contents.notices, *_missing(contents)))


def _missing(contents: Contents[Any]) -> Iterator[str]:
    """Say of a run that was interrupted, or of a shard, that it lacks images."""
    planned, shard = (contents.settings.get(name) for name in ("images", "shard"))
    if isinstance(planned, int) and len(contents.rows) < planned:
        what, remedy = (
            ("the run is incomplete", "resume it")
            if shard is None
            else (f"this is shard {shard}", "merge all shards")
        )
        yield f"{what}: {len(contents.rows)} of {planned} images; {remedy}"


def read_logs(path: Path | str, *kinds: Kind[Any]) -> dict[Path, Log | AttackLog]:
    """Read the logs of these kinds in the folder of a run, or the log in a file."""
    path = Path(path)
    files = [path / f"{kind.name}.jsonl" for kind in kinds] if path.is_dir() else [path]
    if found := {file: _read(file) for file in files if file.is_file()}:
        return found
    state = "holds none of its logs" if path.exists() else "does not exist"
    wanted = " or ".join(kind.name for kind in kinds)
    raise InputError(f"{path} {state}; give a folder that {wanted} wrote, or a log")


def _read(path: Path) -> Log | AttackLog:
    with path.open("rb") as file:
        is_attack = ATTACK.heading.encode() in file.readline().partition(b",")[0]
    return read_attack_log(path) if is_attack else read_log(path)


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


def _read_tsv(path: Path, kind: str, text: str) -> Log:
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


def _plain(value: Any) -> Any:
    """Return votes by class in ascending order; anything else as it is."""
    return dict(sorted(value.items())) if isinstance(value, Mapping) else value


def _check_total(name: str, total: int, votes: Mapping[int, int] | None) -> None:
    if votes is not None and total != sum(votes.values()):
        raise ValueError(f"{name} is {total}, but there are {sum(votes.values())} votes")
