"""Rows of certify and predict runs, and the logs that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec
from msgspec import Meta

from art_denoised.checks import InputError
from art_denoised.runs.journal import Kind, Row, read_run
from art_denoised.smoothing.bounds import Looks, Mixture
from art_denoised.smoothing.sequential import Proof, Sequential
from art_denoised.smoothing.statistics import Bound, Certificate, Vote

Index: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Prediction: TypeAlias = Annotated[int, Meta(ge=-1)]
Votes: TypeAlias = dict[Prediction, Annotated[int, Meta(ge=1, le=2**53)]]
NonNegative: TypeAlias = Annotated[float, Meta(ge=0, le=1e300)]
Positive: TypeAlias = Annotated[float, Meta(gt=0, le=1e300)]


class LabelledRow(Row, frozen=True, kw_only=True, eq=False):
    """What a run says of one image. Time takes no part in comparisons.

    Attributes:
        index: Index of the image in its data set.
        label: True class.
        prediction: Class that was certified or predicted; -1 for an abstention.
        seconds: Wall-clock time since the row before; images share batches.
    """

    index: Index
    label: Index
    prediction: Prediction
    seconds: float

    @property
    def key(self) -> int:
        """The index."""
        return self.index

    @property
    def correct(self) -> bool:
        """Whether the prediction is the true class."""
        return self.prediction == self.label

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LabelledRow) or type(self) is not type(other):
            return False
        return self._timeless() == other._timeless()

    def __hash__(self) -> int:
        return hash((type(self), self.index, self.label, self.prediction))

    def _timeless(self) -> dict[str, Any]:
        return {**msgspec.structs.asdict(self), "seconds": None}


class CertifyRow(LabelledRow, frozen=True, kw_only=True, eq=False):
    """What a certify run says of one image.

    Attributes:
        radius: Certified l2 radius in image units; 0 for an abstention.
        p_lower, selection_counts, counts, alpha, sigma, seed, dtype, noise, tv, drawn: As in
            `Certificate`; not there in a row read from a TSV.
        n0, n: Numbers of votes in ``selection_counts`` and ``counts``.
        mode: Kind of the bound: "fixed" (one look), "sequential" (a table of radii), "anytime", or
            "looks" (a table of radii in logs of earlier versions).
        looks: First and last sample count at which the votes may be looked at, for "sequential" and
            "looks".
        proofs: Proved radii of a table: radius, number of samples, votes among them.
        prior: Parameters (a, b) of the mixture, for "anytime".
    """

    radius: NonNegative
    p_lower: float = 0.0
    n0: int = 0
    n: int = 0
    drawn: int = 0
    mode: str = "fixed"
    looks: tuple[Index, Index] | None = None
    prior: tuple[Positive, Positive] | None = None
    selection_counts: Votes | None = None
    counts: Votes | None = None
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] | None = None
    sigma: Positive | None = None
    seed: int = 0
    dtype: str = "float32"
    noise: str = "gaussian"
    tv: float = 0.0
    proofs: tuple[tuple[NonNegative, Index, Index], ...] = ()

    def __post_init__(self) -> None:
        _check_total("n0", self.n0, self.selection_counts)
        _check_total("n", self.n, self.counts)
        if self.selection_counts is not None:
            if None in (self.counts, self.alpha, self.sigma):
                raise ValueError("the votes lack counts, alpha or sigma")
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
        names = ("radius", "p_lower", "n0", "n", "drawn", "alpha", "sigma", "seed", "dtype")
        return cls(
            index=index,
            label=label,
            prediction=answer.label,
            seconds=seconds,
            selection_counts=_ordered(answer.selection_counts),
            counts=_ordered(answer.counts),
            **{name: getattr(answer, name) for name in (*names, "noise", "tv", "proofs")},
            **_bound_fields(answer.bound),
        )

    @property
    def bound(self) -> Bound:
        """How ``p_lower`` follows from the votes."""
        if self.mode == "anytime" and self.prior is not None:
            return Mixture(*self.prior)
        kinds: dict[str, type[Looks | Sequential]] = {"looks": Looks, "sequential": Sequential}
        if self.looks is not None and 0 < self.looks[0] <= self.looks[1] and self.mode in kinds:
            return kinds[self.mode](*self.looks)
        if self.mode == "fixed":
            return Looks.fixed(self.n)
        raise ValueError(f"mode is {self.mode!r}, looks {self.looks}, prior {self.prior}")

    @property
    def certificate(self) -> Certificate | None:
        """All that was certified; None in a row without votes."""
        if self.selection_counts is None or self.counts is None:
            return None
        names = ("radius", "p_lower", "selection_counts", "counts", "alpha", "sigma", "seed")
        same = {name: getattr(self, name) for name in (*names, "dtype", "noise", "tv", "drawn")}
        proofs = tuple(Proof(*proof) for proof in self.proofs)
        return Certificate(label=self.prediction, bound=self.bound, proofs=proofs, **same)

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


class PredictRow(LabelledRow, frozen=True, kw_only=True, eq=False):
    """What a predict run says of one image.

    Attributes:
        p_value, counts, alpha, sigma, seed, dtype, noise: As in `Vote`; not there in a row read
            from a TSV.
        n: Number of votes.
    """

    p_value: float = 1.0
    n: int = 0
    counts: Votes | None = None
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] | None = None
    sigma: Positive | None = None
    seed: int = 0
    dtype: str = "float32"
    noise: str = "gaussian"

    def __post_init__(self) -> None:
        _check_total("n", self.n, self.counts)
        if self.counts is not None and None in (self.alpha, self.sigma):
            raise ValueError("the votes lack alpha or sigma")

    @classmethod
    def of(cls, index: int, label: int, answer: Vote, seconds: float = 0.0) -> PredictRow:
        """Return the row of a vote.

        Example:
            >>> vote = Vote.from_counts({3: 90, 5: 10}, alpha=0.001, sigma=0.25)
            >>> PredictRow.of(7, 3, vote).vote == vote
            True
        """
        names = ("p_value", "alpha", "sigma", "seed", "dtype", "noise")
        return cls(
            index=index,
            label=label,
            prediction=answer.label,
            seconds=seconds,
            n=sum(answer.counts.values()),
            counts=_ordered(answer.counts),
            **{name: getattr(answer, name) for name in names},
        )

    @property
    def vote(self) -> Vote | None:
        """The answer with its votes; None in a row without them."""
        if self.counts is None:
            return None
        names = ("p_value", "counts", "alpha", "sigma", "seed", "dtype", "noise")
        return Vote(label=self.prediction, **{name: getattr(self, name) for name in names})


def _upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of version 1 under today's names."""
    names = {"idx": "index", "predict": "prediction"}
    return {names.get(name, name): value for name, value in record.items() if name != "correct"}


CERTIFY: Kind[Any] = Kind("certify", CertifyRow, _upgrade)
PREDICT: Kind[Any] = Kind("predict", PredictRow, _upgrade)


@dataclass(frozen=True)
class Log:
    """A log as read.

    Attributes:
        kind: "certify" or "predict".
        settings: Settings of the run; None for a TSV.
        rows: By index; those of a TSV in the order of the file.
        notices: What the reader had to repair or recompute, for the user to see.
    """

    KINDS: ClassVar[Mapping[str, Kind[Any]]] = {"certify": CERTIFY, "predict": PREDICT}

    kind: str
    settings: Mapping[str, Any] | None
    rows: tuple[Any, ...]
    notices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        kind: Kind[Any],
        settings: Mapping[str, Any],
        rows: Mapping[Any, LabelledRow],
        notices: tuple[str, ...] = (),
    ) -> Log:
        """Return the log that holds these rows, by index."""
        return cls(kind.name, dict(settings), tuple(rows[i] for i in sorted(rows)), notices)


def read_log(path: Path | str) -> Log:
    r"""Read a log of certify or predict: ours, or a TSV of the field.

    ``correct`` is never believed: it follows from the classes, and a column of a TSV that says
    otherwise (some codes write a running total) is mentioned in the notices. A torn last line is
    left out and mentioned.

    Args:
        path: The file, or the folder of a run.

    Raises:
        InputError: No such file, none of these formats, or damage before the last line.

    Example:
        >>> import tempfile
        >>> from art_denoised.evaluation.tsv import HEADERS
        >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        ...     _ = file.write(HEADERS["certify"] + "\n0\t3\t3\t0.41\t1\t0:00:15.4\n")
        ...     file.flush()
        ...     row = read_log(file.name).rows[0]
        >>> row.correct, row.radius, row.seconds
        (True, 0.41, 15.4)
    """
    from art_denoised.evaluation.tsv import HEADERS, read_tsv

    path = Path(path)
    if path.is_file():
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
        first = text.split("\n", 1)[0].strip()
        for kind, header in HEADERS.items():
            if first.split() == header.split():
                return read_tsv(path, kind, text)
        if not first.startswith("{"):
            raise InputError(
                f"{path} is not a log; give a certify.jsonl, or a TSV that begins "
                f"{' '.join(HEADERS['certify'].split())!r}"
            )
    contents = read_run(path, *Log.KINDS.values())
    return Log.of(contents.kind, contents.settings, contents.rows, contents.notices)


def _bound_fields(bound: Bound) -> dict[str, Any]:
    if isinstance(bound, Mixture):
        return {"mode": "anytime", "prior": (bound.a, bound.b)}
    if isinstance(bound, Looks) and bound.first == bound.last:
        return {"mode": "fixed"}
    mode = "sequential" if isinstance(bound, Sequential) else "looks"
    return {"mode": mode, "looks": (bound.first, bound.last)}


def _ordered(counts: Mapping[int, int]) -> dict[int, int]:
    return {c: counts[c] for c in sorted(counts)}


def _check_total(name: str, total: int, votes: Mapping[int, int] | None) -> None:
    if votes is not None and total != sum(votes.values()):
        raise ValueError(f"{name} is {total}, but there are {sum(votes.values())} votes")
