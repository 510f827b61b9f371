"""Rows of an attack run: what each attack did to each image, and what the masking checks found."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np

from art_denoised.checks import InputError
from art_denoised.runs.journal import Contents, Kind, Row, Run, read_run

Key: TypeAlias = tuple[str, str, float]  # attack, gradient and eps: a column of the run
NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]

CLEAN = "clean"
"""Name of the attack that changes nothing."""
CHECKS = (
    "gradient-free attacks",
    "stronger attack",
    "zero gradients",
    "more steps",
    "larger eps",
    "eps large enough",
    "gradient against random",
    "transfer",
    "logits",
    "global seed",
)
"""Names of the masking checks, in the order they are made. A result needs all of them."""


class TimedRow(Row, frozen=True):
    """A row about an image. Rows that differ in their cost alone are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TimedRow) and self._untimed == other._untimed

    def __hash__(self) -> int:
        return hash((type(self), self.key))

    @property
    def _untimed(self) -> tuple[type, dict[str, Any]]:
        values = msgspec.structs.asdict(self)
        return type(self), {name: values[name] for name in values.keys() - {"seconds", "queries"}}


class AttackRow(TimedRow, frozen=True, tag_field="kind", tag="attack"):
    """What one attack did to one image. Rows that differ in their cost alone are equal.

    Every run holds a row of the attack "clean" for each image: eps is 0 and nothing is changed.

    Attributes:
        index: Index of the image in its data set.
        label: True class.
        attack: Name of the attack.
        gradient: How the attack took gradients: "exact" (autograd through the forward pass),
            "bpda" (the approximate gradient of a defence that offers one), or "none" (it used
            scores or labels alone).
        norm: "linf" or "l2".
        eps: Radius of the ball, image units.
        clean: Whether the unattacked image was right in any of its evaluations. If not, it was not
            attacked, and ``counted`` and ``fresh`` are False throughout.
        counted: Whether the attacked image was still right by the attack's own count.
        fresh: Whether it was right in each later evaluation, with fresh noise. One entry for a
            deterministic model.
        distance_linf: Largest change of a pixel; 0 where it was not attacked.
        distance_l2: Euclidean length of the change.
        seconds: Wall-clock time of the attack, divided over the images of its batch.
        queries: Number of forward passes of the model for the image, in the attack and the later
            evaluations, divided over the images of its batch; 0 in earlier logs.
    """

    index: int
    label: int
    attack: str
    gradient: str
    norm: Literal["linf", "l2"]
    eps: NonNegative
    clean: bool
    counted: bool
    fresh: tuple[bool, ...]
    distance_linf: float
    distance_l2: float
    seconds: NonNegative
    queries: float = 0.0

    def __post_init__(self) -> None:
        if not self.fresh:
            raise ValueError("fresh is empty")
        if not self.clean and (self.counted or any(self.fresh)):
            raise ValueError("an image that is wrong without attack cannot be right under attack")

    @property
    def key(self) -> Hashable:
        """Column and image."""
        return ("attack", self.column, self.index)

    @property
    def column(self) -> Key:
        """Attack, gradient and eps."""
        return (self.attack, self.gradient, self.eps)

    @property
    def worst(self) -> bool:
        """Whether the image was right in every evaluation, including the attack's own."""
        return self.counted and all(self.fresh)

    @property
    def mean(self) -> float:
        """Share of the later evaluations in which the image was right."""
        return sum(self.fresh) / len(self.fresh)


class CheckRow(Row, frozen=True, tag_field="kind", tag="check"):
    """What one masking check found.

    Attributes:
        name: Name of the check. A later row of the same name replaces an earlier one.
        passed: None where the check does not apply, has no verdict, or could not be made.
        finding: The result in words, with the numbers that decided.
        numbers: The same numbers by name. It holds "error" if an error prevented the check.
    """

    name: str
    passed: bool | None
    finding: str
    numbers: Mapping[str, Any] = msgspec.field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """Name of the check."""
        return ("check", self.name)

    def replaces(self, earlier: Any) -> bool:
        """Checks are made again on resuming."""
        return True


class ImageRow(Row, frozen=True, tag_field="kind", tag="image"):
    """A picture of one image at one stage, rounded to 8 bits.

    Attributes:
        index: Index of the image in its data set.
        attack: Name of the attack; "clean" for stages without attack.
        gradient: How the attack took gradients; see `AttackRow`.
        eps: Radius of the ball, image units.
        stage: "clean", "attacked", "denoised" or "attacked and denoised".
        shape: (channels, height, width).
        pixels: Bytes, in base64 in the file.
        prediction: Class that the model gave the image in one evaluation; None for pictures inside
            the model and in earlier logs.
    """

    index: int
    attack: str
    gradient: str
    eps: float
    stage: str
    shape: tuple[int, int, int]
    pixels: bytes
    prediction: int | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.pixels) == prod(self.shape):
            raise ValueError(f"a picture of shape {self.shape} has {len(self.pixels)} pixels")

    @property
    def key(self) -> Hashable:
        """Column, image and stage."""
        return ("image", self.attack, self.gradient, self.eps, self.index, self.stage)

    def replaces(self, earlier: Any) -> bool:
        """A batch that was interrupted is drawn again."""
        return True

    @classmethod
    def of(cls, image: Any, **fields: Any) -> ImageRow:
        """Return the row of an image (channels, height, width) in [0, 1], with its other fields."""
        array = np.clip(np.rint(np.asarray(image, dtype=np.float64) * 255), 0, 255).astype(np.uint8)
        return cls(shape=array.shape, pixels=array.tobytes(), **fields)

    @property
    def array(self) -> np.ndarray:
        """The picture as bytes of shape (channels, height, width)."""
        return np.frombuffer(self.pixels, dtype=np.uint8).reshape(self.shape)


ATTACK: Kind[Any] = Kind("attack", AttackRow | CheckRow | ImageRow)
"""Kind of the journal `attack.jsonl`."""


@dataclass(frozen=True)
class AttackLog:
    """A finished or interrupted attack run.

    Attributes:
        settings: Settings of the run, as its header names them (docs/reference/logs.md).
        rows: Rows by column in the order of the run, then by image.
        checks: Masking checks in the order they were made; empty before the run comes to them.
        images: Pictures of some images.
        notices: Remarks for the user, such as what the reader had to repair.
        begun: Time at which the log was begun, in UTC as ISO 8601; empty in earlier logs.
    """

    settings: Mapping[str, Any]
    rows: tuple[AttackRow, ...]
    checks: tuple[CheckRow, ...] = ()
    images: tuple[ImageRow, ...] = ()
    notices: tuple[str, ...] = ()
    begun: str = field(default="", compare=False)

    @classmethod
    def of(cls, journal: Contents[Any] | Run[Any], notices: Iterable[str] = ()) -> AttackLog:
        """Return the log that a journal holds, whose rows may have come in any order."""
        rows = list(journal.rows.values())
        attacked = [row for row in rows if isinstance(row, AttackRow)]
        place = {column: i for i, column in enumerate(dict.fromkeys(r.column for r in attacked))}
        return cls(
            journal.settings,
            tuple(sorted(attacked, key=lambda row: (place[row.column], row.index))),
            tuple(row for row in rows if isinstance(row, CheckRow)),
            tuple(row for row in rows if isinstance(row, ImageRow)),
            tuple(notices),
            journal.begun,
        )

    @property
    def columns(self) -> dict[Key, tuple[AttackRow, ...]]:
        """Rows of each (attack, gradient, eps)."""
        columns: dict[Key, list[AttackRow]] = {}
        for row in self.rows:
            columns.setdefault(row.column, []).append(row)
        return {column: tuple(rows) for column, rows in columns.items()}

    @property
    def trusted(self) -> bool | None:
        """Whether no check failed; None if some of `CHECKS` were not made."""
        return verdict(self.checks, unmade(self.checks))


def planned_columns(settings: Mapping[str, Any]) -> dict[Key, str]:
    """Return the columns that a header plans, in the order of the run, with their norms."""
    try:
        return {
            (attack["name"], gradient, float(attack["eps"])): attack["norm"]
            for attack in settings["attacks"]
            for gradient in attack["gradients"]
        }
    except (KeyError, TypeError, ValueError):
        raise InputError("the header's attacks are missing or damaged") from None


def unmade(checks: Iterable[CheckRow]) -> tuple[str, ...]:
    """Return the names of the masking checks that are missing, or that an error prevented."""
    made = {check.name for check in checks if "error" not in check.numbers}
    return tuple(name for name in CHECKS if name not in made)


def verdict(checks: Iterable[CheckRow], missing: Collection[str]) -> bool | None:
    """Return whether results are reliable: False if a check failed, None if any is missing."""
    found = [(check.name in CHECKS, check.passed) for check in checks]
    if any(passed is False for _, passed in found):
        return False
    return True if (True, True) in found and not missing else None


def read_attack_log(path: Path | str) -> AttackLog:
    """Read an attack run.

    Args:
        path: Folder of the run, or its ``attack.jsonl``.

    Raises:
        InputError: The file does not exist, is another kind of log, or is damaged before its last
            line.

    Example:
        >>> import tempfile
        >>> from art_denoised.runs import Run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Run(folder, ATTACK, {"model": "net"}) as run:
        ...         run.append([CheckRow("logits", True, "logits differ")])
        ...     read_attack_log(folder).checks[0].finding
        'logits differ'
    """
    contents = read_run(path, ATTACK)
    return AttackLog.of(contents, contents.notices)
