"""Logs: rows of certify and predict, and the logs of any run, read and joined from shards.

The TSV of the field is read and written, too. Shards of a run become the log that one machine
would have written.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.images import Shard, index_range
from art_denoised.evaluation.attack_rows import (
    ATTACK,
    CLEAN,
    AttackLog,
    CheckRow,
    ImageRow,
    Key,
    TimedRow,
    planned_columns,
    read_attack_log,
)
from art_denoised.evaluation.masking import autoattack_flags
from art_denoised.runs.journal import Contents, Kind, Run, differences, read_run, write_whole
from art_denoised.smoothing.statistics import (
    Bound,
    Certificate,
    Looks,
    Mixture,
    Proof,
    Sequential,
    Vote,
)

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


_KINDS = (CERTIFY, PREDICT, ATTACK)


def merge(
    out: Path | str, runs: Sequence[Path | str], *, partial: bool = False
) -> dict[Path, Log | AttackLog]:
    """Join the shards of a run into one log, as one machine would have written it.

    Rows are in the order of the images; with `AtRadii` and `Anytime`, one machine writes them in
    the order in which images were finished. The masking checks of an attack need the rows of all
    images, so shards have none: call `evaluate` with the merged run, ``resume=True`` and no shard.
    That also computes rows which are missing. AutoAttack's warnings are joined, too.

    Args:
        out: Folder to write, without a log of this kind.
        runs: Folders of the shards, in any order, or their logs. Logs of several commands in one
            folder are merged each with its own kind.
        partial: Whether to accept missing shards and missing rows, which the notices of the log
            then name.

    Returns:
        The merged logs by file.

    Raises:
        InputError: A log is no shard or damaged; shards have different settings, are given twice
            or hold foreign images; something is missing and ``partial`` is false; or ``out`` holds
            a run. Nothing was written.
        OSError: The log cannot be written.

    Example:
        >>> import tempfile
        >>> from art_denoised import FixedN, Shard, Smoother, certify, load_data
        >>> from art_denoised.demo import digits_classifier
        >>> smoother, data = Smoother(digits_classifier(), sigma=0.1), load_data("digits")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     runs = [f"{folder}/{part}" for part in (1, 2)]
        ...     for part, run in enumerate(runs, start=1):
        ...         some = Shard(range(5), part, 2)
        ...         _ = certify(
        ...             smoother, data, FixedN(100), run=run, indices=some, progress=False
        ...         )
        ...     (log,) = merge(f"{folder}/all", runs).values()
        >>> [row.index for row in log.rows]
        [0, 1, 2, 3, 4]
    """
    out, found = Path(out), dict[str, list[_Part]]()
    checks.flag("partial", partial)
    for path in map(Path, [runs] if isinstance(runs, (str, Path)) else runs):
        for part in _parts_of(path):
            found.setdefault(part.contents.kind.name, []).append(part)
    whole = [_Whole(parts) for parts in found.values()]
    if not whole:
        raise InputError("there is nothing to merge; give the folders of all shards")
    for one in whole:
        if (path := out / f"{one.kind.name}.jsonl").exists():
            raise InputError(f"{path} exists; choose another folder")
        if one.gaps and not partial:
            raise InputError(f"{one.gaps[0]}; finish and merge all shards", partial=True)
    return {out / f"{one.kind.name}.jsonl": one.write(out) for one in whole}


@dataclass(frozen=True)
class _Part:
    """The log of a shard as read."""

    path: Path
    contents: Contents[Any]
    shard: Shard

    @classmethod
    def of(cls, path: Path, contents: Contents[Any]) -> _Part:
        """Return a part whose header says which it is, and whose rows agree."""
        settings = contents.settings
        try:
            part, parts = map(int, settings["shard"].split("/"))
            block = settings["batch_size"] if contents.kind is ATTACK else 1
            shard = Shard(index_range(settings["indices"]), part, parts, block)
        except (KeyError, AttributeError, TypeError, ValueError):
            raise InputError(
                f"{path} is not a log of a shard; give folders that were written with a shard"
            ) from None
        mine = set(shard)
        for row in contents.rows.values():
            if not isinstance(row, CheckRow) and row.index not in mine:
                raise InputError(
                    f"{path} holds image {row.index}, which is not in shard {shard.name}; "
                    "run this shard again"
                )
        return cls(path, contents, shard)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the whole run."""
        return {name: v for name, v in self.contents.settings.items() if name != "shard"}

    @property
    def gaps(self) -> Iterator[str]:
        """What the part lacks, in words."""
        rows = self.contents.rows
        keys: list[Hashable] = list(self.shard)
        if self.contents.kind is ATTACK:
            keys = [("attack", c, i) for c in _columns(self.settings) for i in self.shard]
        if missing := sum(key not in rows for key in keys):
            yield f"{self.path} lacks {missing} of its {len(keys)} rows"


class _Whole:
    """All shards of one kind of log; ``gaps`` says in words what is missing."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        first = parts[0]
        self.kind: Kind[Any] = first.contents.kind
        self._settings, self._shard = first.settings, first.shard
        self._parts: dict[int, _Part] = {}
        for part in parts:
            changes = differences(
                {**first.settings, "shards": first.shard.parts},
                {**part.settings, "shards": part.shard.parts},
            )
            if changes:
                raise InputError(
                    f"{first.path} and {part.path} are of different runs ({changes}); give the "
                    "shards of one run"
                )
            twin = self._parts.setdefault(part.shard.part, part)
            if twin is not part:
                raise InputError(
                    f"{twin.path} and {part.path} are both shard {part.shard.name}; give one"
                )
        numbers = range(1, first.shard.parts + 1)
        self.gaps = [
            f"shard {number}/{first.shard.parts} of {self.kind.name} is missing"
            for number in numbers
            if number not in self._parts
        ]
        self._parts = {number: self._parts[number] for number in numbers if number in self._parts}
        self.gaps += [gap for part in self._parts.values() for gap in part.gaps]

    def write(self, folder: Path) -> Log | AttackLog:
        """Write the log and return it."""
        notices = [n for part in self._parts.values() for n in part.contents.notices]
        with Run(folder, self.kind, self._settings) as run:
            run.append(self._rows())
            notices += self.gaps
            return (AttackLog if self.kind is ATTACK else Log).of(run, notices)

    def _rows(self) -> Iterator[Any]:
        rows = {k: row for p in self._parts.values() for k, row in p.contents.rows.items()}
        if self.kind is not ATTACK:
            yield from (rows[index] for index in self._shard.whole if index in rows)
            return
        pictures: dict[Any, list[ImageRow]] = {}
        flags: dict[str, list[CheckRow]] = {}  # warnings of AutoAttack are all that shards check
        for part in self._parts.values():
            for row in part.contents.rows.values():
                if isinstance(row, ImageRow):
                    key = ((row.attack, row.gradient, row.eps), row.index)
                    pictures.setdefault(key, []).append(row)
                elif isinstance(row, CheckRow) and "flags" in row.numbers:
                    flags.setdefault(row.name, []).append(row)
        size, whole = self._settings["batch_size"], self._shard.whole
        for column in _columns(self._settings):
            for first in range(0, len(whole), size):  # a batch, then its pictures
                block = whole[first : first + size]
                keys = [("attack", column, index) for index in block]
                yield from (rows[key] for key in keys if key in rows)
                yield from (p for index in block for p in pictures.get((column, index), ()))
        for name, said in flags.items():
            every = dict.fromkeys(flag for row in said for flag in row.numbers["flags"])
            yield autoattack_flags(name, tuple(every), said[-1].numbers["randomised"])


def _parts_of(path: Path) -> Iterator[_Part]:
    """Yield the logs of a folder, or the one log that is named."""
    kinds = [kind for kind in _KINDS if (path / f"{kind.name}.jsonl").is_file()]
    for kind in kinds:
        yield _Part.of(path, read_run(path, kind))
    if not kinds:
        yield _Part.of(path, read_run(path, *_KINDS))


def _columns(settings: Mapping[str, Any]) -> list[Key]:
    """Return the columns of a run in their order."""
    return [(CLEAN, "none", 0.0), *planned_columns(settings)]
