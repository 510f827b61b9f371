"""Certified accuracy at chosen radii: results of certify logs, and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.evaluation.logs import CertifyRow, Log
from art_denoised.reports.terminal import Block, Column, Shown, Table, separated
from art_denoised.smoothing.statistics import (
    ABSTAIN,
    TableRow,
    accuracy_rows,
    average_certified_radius,
)

CSV_COLUMNS = (
    *("name", "images", "radius", "certified_accuracy", "low", "high", "at_least"),
    *("abstained", "acr"),
)
LOWER_BOUND = ">=: a lower bound, because the run stopped sampling at other radii."


def accuracy_table(rows: Sequence[CertifyRow], radii: Sequence[float]) -> list[TableRow]:
    """Return certified accuracy at each l2 radius in image units, with its 95% interval."""
    return accuracy_rows(*_columns(rows), radii)


@dataclass(frozen=True)
class CertifiedRun:
    """Certified accuracy of one run.

    Attributes:
        name: Name of the run.
        images: Number of images.
        accuracy: Certified accuracy and its interval, in [0, 1], at each radius.
        at_least: Whether each accuracy is a lower bound, because the run stopped sampling at other
            radii.
        abstained: Share of images without a certified class.
        acr: Average certified radius: mean radius in image units, 0 for a wrong class.
        acr_at_least: Whether ``acr`` is a lower bound.
    """

    name: str
    images: int
    accuracy: tuple[TableRow, ...]
    at_least: tuple[bool, ...]
    abstained: float
    acr: float
    acr_at_least: bool

    @classmethod
    def of(cls, name: str, log: Log, radii: Sequence[float]) -> CertifiedRun:
        """Return the results of a log at some radii."""
        rows, asked = log.rows, asked_radii(log.settings)
        return cls(
            name=name,
            images=len(rows),
            accuracy=tuple(accuracy_table(rows, radii)),
            at_least=tuple(is_lower_bound(radius, asked) for radius in radii),
            abstained=sum(row.prediction == ABSTAIN for row in rows) / len(rows),
            acr=average_certified_radius(*_columns(rows))[0],
            acr_at_least=any(row.mode in ("looks", "sequential") for row in rows),
        )

    def cells(self) -> tuple[str | tuple[str, ...], ...]:
        """Return the run as a row of the table."""
        shares = [
            (
                ">=" * at_least + f"{100 * entry.certified_accuracy:.1f}",
                f"{100 * entry.low:.0f}-{100 * entry.high:.0f}",
            )
            for entry, at_least in zip(self.accuracy, self.at_least, strict=True)
        ]
        abstained, acr = f"{100 * self.abstained:.1f}%", f"{self.acr:.3f}"
        return (self.name, str(self.images), *shares, abstained, acr)


@dataclass(frozen=True)
class CertifiedTable(Shown):
    """Certified accuracy of several runs at the same radii; ``str`` is the plain table.

    Attributes:
        radii: l2 radii in image units.
        runs: Results of each run.
    """

    radii: tuple[float, ...]
    runs: tuple[CertifiedRun, ...]

    def blocks(self) -> list[Block]:
        """Return what is shown."""
        return [self.block()]

    def block(self) -> Table:
        """Return the table to show."""
        note = [
            "Below each share its 95% interval over images (Clopper-Pearson). An abstention counts "
            "as wrong.",
            "ACR: mean certified radius, 0 where wrong; image units.",
        ]
        if any(run.acr_at_least for run in self.runs):
            note[-1] += " A lower bound where sampling stopped at radii."
        if any(any(run.at_least) for run in self.runs):
            note.append(LOWER_BOUND)
        return Table(
            (
                Column("", left=True, width=6),
                Column("images"),
                *(Column(f"r={radius:g}", width=9) for radius in self.radii),
                Column("abstain"),
                Column("ACR", width=6),
            ),
            tuple(run.cells() for run in self.runs),
            "certified accuracy (%) at l2 radius r",
            tuple(note),
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return {radius, certified_accuracy, low, high, at_least} for each radius.

        Where there are several runs, "log" names the run.
        """
        return [
            ({"log": run.name} if len(self.runs) > 1 else {})
            | {**entry._asdict(), "at_least": at_least}
            for run in self.runs
            for entry, at_least in zip(run.accuracy, run.at_least, strict=True)
        ]

    def to_csv(self) -> str:
        """Return one line for each run and radius, with shares in [0, 1], for `read_curves`."""
        lines = (
            (run.name, run.images, *entry, at_least, run.abstained, run.acr)
            for run in self.runs
            for entry, at_least in zip(run.accuracy, run.at_least, strict=True)
        )
        return separated([CSV_COLUMNS, *lines])


def certified_table(
    logs: Mapping[str, Log], radii: Sequence[float] | None = None
) -> CertifiedTable:
    r"""Return certified accuracy of several runs.

    Args:
        logs: Name -> log of certify.
        radii: l2 radii in image units. By default those that the runs stopped at, else a grid up to
            the largest certified radius.

    Raises:
        InputError: A log holds no rows.

    Example:
        >>> rows = [
        ...     CertifyRow(index=i, label=1, prediction=1, radius=i / 4, seconds=0)
        ...     for i in range(4)
        ... ]
        >>> table = certified_table({"ours": Log("certify", None, tuple(rows))}, [0.0, 0.5])
        >>> print("\n".join(str(table).splitlines()[1:4]))
                images        r=0      r=0.5  abstain     ACR
        ours         4      100.0       50.0     0.0%   0.375
                           40-100       7-93
    """
    for name, log in logs.items():
        if log.kind != "certify":
            raise InputError(f"{name} is a log of {log.kind}; give a log of certify")
    at = default_radii([*logs.values()]) if radii is None else checks.numbers("radii", radii)
    return CertifiedTable(tuple(at), tuple(CertifiedRun.of(name, logs[name], at) for name in logs))


Headers = Sequence[Mapping[str, Any]]


def other_images(first: Headers, second: Headers) -> str:
    """Return in words how two sets of headers name other images; empty: as far as they tell, none.

    Pixels are one number for all images of a choice, so that they tell only of equal choices.
    """
    pixels = [
        {str(one["indices"]): one["pixels"] for one in logs if {"indices", "pixels"} <= one.keys()}
        for logs in (first, second)
    ]
    shared = pixels[0].keys() & pixels[1].keys()
    if any(pixels[0][choice] != pixels[1][choice] for choice in shared):
        return "other pixels under the same indices"
    data = [{str(one["data"]) for one in logs if "data" in one} for logs in (first, second)]
    if not shared and all(data) and data[0] != data[1]:
        return f"other data ({' and '.join('; '.join(sorted(names)) for names in data)})"
    return ""


def images_apart(logs: Mapping[str, Log]) -> list[str]:
    """Return in words which logs of certify are of other images than one before them."""
    found = []
    for later, (name, log) in enumerate(logs.items()):
        for other_name, other in [*logs.items()][:later]:
            held = [{(row.index, row.label) for row in one.rows} for one in (other, log)]
            counts = f"{len(held[0])} and {len(held[1])}, {len(held[0] & held[1])} in common"
            words = other_images([other.settings or {}], [log.settings or {}])
            if not words and held[0] != held[1]:
                words = f"certified on other images ({counts})"
            if words:
                found.append(f"{other_name} and {name}: {words}")
                break
    return found


def default_radii(logs: Sequence[Log]) -> list[float]:
    """Return the radii that runs stopped at; without any, 0 and up to six round steps."""
    if asked := {radius for log in logs for radius in asked_radii(log.settings)}:
        return sorted(asked)
    largest = max((row.radius for log in logs for row in log.rows), default=0)
    scale = 10.0 ** math.floor(math.log10(largest)) if largest > 0 else 1.0
    step = next(s for s in (scale / 4, scale / 2, scale, 2.5 * scale) if largest / s <= 6)
    return [round(i * step, 10) for i in range(int(largest / step) + 1)]


def asked_radii(settings: Mapping[str, Any] | None) -> tuple[float, ...]:
    """Return the radii at which a run stopped sampling; empty if its certificates are complete."""
    radii = (settings or {}).get("radii") or []
    numbers = isinstance(radii, list | tuple) and all(isinstance(r, int | float) for r in radii)
    if not numbers or not all(0 <= radius < math.inf for radius in radii):
        raise InputError(f"radii in the settings of the log are {radii!r}; the log is damaged")
    return tuple(radii)


def is_lower_bound(radius: float, asked: Sequence[float]) -> bool:
    """Return whether certified accuracy at a radius is a lower bound, in a run that asked."""
    # Sampling ended when those were decided: more samples would have certified more at others.
    return bool(asked) and not any(math.isclose(radius, one) for one in asked)


def _columns(rows: Sequence[CertifyRow]) -> tuple[list[bool], list[float]]:
    if not rows:
        raise InputError("the log holds no rows; certify some images first")
    return [row.correct for row in rows], [row.radius for row in rows]
