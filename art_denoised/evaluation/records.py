"""Rows of certify and predict runs, and their JSON form: one object that carries everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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
        seconds: Time it took.
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
        rows: In the order of the file.
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
            record |= {"p_lower": c.p_lower, "n0": c.n0, "n": c.n}
            record |= {"selection_counts": _json_counts(c.selection_counts)}
            record |= _json_sampling(c)
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
    }


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
    if "counts" in record:
        sampling = {name: record[name] for name in ("alpha", "sigma", "seed", "dtype")}
        sampling["counts"] = _counts(record["counts"])
    if kind == "predict":
        vote = Vote(predict, record["p_value"], **sampling) if sampling else None
        return PredictRow(**common, predict=predict, seconds=seconds, vote=vote)
    radius = parse_radius(record["radius"])
    certificate = None
    if sampling:
        selection = _counts(record["selection_counts"])
        certificate = Certificate(predict, radius, record["p_lower"], selection, **sampling)
    return CertifyRow(
        **common, predict=predict, radius=radius, seconds=seconds, certificate=certificate
    )


def _counts(record: Mapping[str, int]) -> dict[int, int]:
    return {int(c): int(votes) for c, votes in record.items()}


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
