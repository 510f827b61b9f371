"""Rows of certify and predict runs, and their JSON form: one object that carries everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from art_denoised import checks
from art_denoised.smoothing.bounds import Anytime, Bound, Looks
from art_denoised.smoothing.statistics import Certificate, Vote

KINDS = ("certify", "predict")


@dataclass(frozen=True, slots=True)
class CertifyRow:
    """What a certify run says of one image. Time does not take part in comparisons.

    Attributes:
        idx: Index of the image in its data set.
        label: Its true class.
        predict: The certified class, -1 for an abstention.
        radius: Certified l2 radius in image units.
        seconds: Wall-clock time since the row before; images share batches.
        certificate: All of it; None in a row read from a TSV.
    """

    idx: int
    label: int
    predict: int
    radius: float
    seconds: float = field(compare=False)
    certificate: Certificate | None = None

    @property
    def correct(self) -> bool:
        """Whether the certified class is the true one."""
        return self.predict == self.label


@dataclass(frozen=True, slots=True)
class PredictRow:
    """What a predict run says of one image. Attributes as in `CertifyRow`."""

    idx: int
    label: int
    predict: int
    seconds: float = field(compare=False)
    vote: Vote | None = None

    @property
    def correct(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.predict == self.label


Row: TypeAlias = CertifyRow | PredictRow


@dataclass(frozen=True)
class Log:
    """A log as read.

    Attributes:
        kind: "certify" or "predict".
        settings: Of the run; None for a TSV.
        rows: By index; those of a TSV in the order of the file.
        notices: What the reader had to repair or recompute, for the user to see.
    """

    kind: str
    settings: Mapping[str, Any] | None
    rows: tuple[Any, ...]
    notices: tuple[str, ...] = ()


def to_json(row: Row) -> dict[str, Any]:
    """Return a row as plain JSON values.

    Example:
        >>> to_json(PredictRow(7, label=3, predict=-1, seconds=0.5))
        {'idx': 7, 'label': 3, 'predict': -1, 'correct': False, 'seconds': 0.5}
    """
    record: dict[str, Any] = {"idx": row.idx, "label": row.label, "predict": row.predict}
    if isinstance(row, CertifyRow):
        record |= {"radius": row.radius, "correct": row.correct, "seconds": row.seconds}
        if (c := row.certificate) is not None:
            record |= {"p_lower": c.p_lower, "n0": c.n0, "n": c.n, "drawn": c.drawn}
            record |= _json_bound(c.bound)
            record |= {"selection_counts": _json_counts(c.selection_counts)}
            record |= _json_sampling(c)
            record |= {"tv": c.tv}
        return record
    record |= {"correct": row.correct, "seconds": row.seconds}
    if (v := row.vote) is not None:
        record |= {"p_value": v.p_value, "n": sum(v.counts.values()), **_json_sampling(v)}
    return record


def _json_sampling(answer: Certificate | Vote) -> dict[str, Any]:
    return {
        "counts": _json_counts(answer.counts),
        "alpha": answer.alpha,
        "sigma": answer.sigma,
        "seed": answer.seed,
        "dtype": answer.dtype,
        "noise": answer.noise,
    }


def _json_bound(bound: Bound) -> dict[str, Any]:
    if isinstance(bound, Anytime):
        return {"mode": "anytime", "prior": [bound.a, bound.b]}
    if bound.first == bound.last:
        return {"mode": "fixed"}
    return {"mode": "looks", "looks": [bound.first, bound.last]}


def _bound(record: Mapping[str, Any], n: int) -> Bound:
    mode = record.get("mode", "fixed")
    if mode == "anytime":
        return Anytime(*record["prior"])
    if mode == "looks":
        first, last = record["looks"]
        if not 0 < first <= last:
            raise ValueError(f"looks {record['looks']}")
        return Looks(first, last)
    if mode != "fixed":
        raise ValueError(f"mode {mode!r}")
    return Looks.fixed(n)


def _json_counts(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(c): counts[c] for c in sorted(counts)}


def from_json(kind: str, record: Mapping[str, Any]) -> Row:
    """Return the row that `to_json` made ``record`` from.

    Args:
        kind: "certify" or "predict".
        record: The JSON object.

    Raises:
        KeyError, TypeError, ValueError: ``record`` is no such row.

    Example:
        >>> row = CertifyRow(7, label=3, predict=3, radius=0.25, seconds=0.5)
        >>> from_json("certify", to_json(row)) == row
        True
    """
    common = {"idx": int(record["idx"]), "label": int(record["label"])}
    predict, seconds = int(record["predict"]), float(record["seconds"])
    sampling: dict[str, Any] = {}
    for total, votes in (("n0", "selection_counts"), ("n", "counts")):
        if total in record and record[total] != sum(record[votes].values()):
            raise ValueError(f"{total} is {record[total]}, but {votes} hold another number")
    if "counts" in record:
        sampling = {
            "alpha": checks.alpha(record["alpha"]),
            "sigma": checks.positive("sigma", record["sigma"]),
        }
        sampling |= {"seed": int(record["seed"]), "dtype": str(record["dtype"])}
        sampling["counts"] = _counts(record["counts"])
        sampling["noise"] = record.get("noise", "gaussian")
    if kind == "predict":
        vote = Vote(predict, float(record["p_value"]), **sampling) if sampling else None
        return PredictRow(**common, predict=predict, seconds=seconds, vote=vote)
    radius = parse_radius(record["radius"])
    certificate = None
    if sampling:
        selection = _counts(record["selection_counts"])
        n = sum(sampling["counts"].values())
        certificate = Certificate(
            predict,
            radius,
            float(record["p_lower"]),
            selection,
            **sampling,
            bound=_bound(record, n),
            tv=float(record.get("tv", 0.0)),
            drawn=int(record.get("drawn", n)),
        )
    return CertifyRow(
        **common, predict=predict, radius=radius, seconds=seconds, certificate=certificate
    )


def supersedes(row: Row, earlier: Row) -> bool:
    """Whether a row goes on from an earlier one of the same image: more votes, valid at any time.

    Example:
        >>> def row(n):
        ...     c = Certificate.from_counts({1: 9}, {1: n}, alpha=0.01, sigma=1, bound=Anytime())
        ...     return CertifyRow(0, 1, c.label, c.radius, seconds=0, certificate=c)
        >>> supersedes(row(200), row(100)), supersedes(row(100), row(200))
        (True, False)
    """
    if not (isinstance(row, CertifyRow) and isinstance(earlier, CertifyRow)):
        return False
    new, old = row.certificate, earlier.certificate
    if new is None or old is None or new.bound != old.bound or new.n <= old.n:
        return False
    return (
        isinstance(new.bound, Anytime)
        and new.selection_counts == old.selection_counts
        and all(new.counts.get(c, 0) >= votes for c, votes in old.counts.items())
    )


def _counts(record: Mapping[str, int]) -> dict[int, int]:
    counts = {int(c): int(votes) for c, votes in record.items()}
    if min(counts.values(), default=1) < 1:
        raise ValueError(f"votes {record}")
    return counts


def parse_radius(value: Any) -> float:
    """Return a radius as a float.

    Raises:
        ValueError: Negative, infinite, or not a number.

    Example:
        >>> parse_radius("0.25")
        0.25
    """
    radius = float(value)
    if not 0 <= radius < float("inf"):
        raise ValueError(f"radius {value}")
    return radius
