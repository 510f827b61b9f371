"""Rows of an attack run: what each attack did to each image, and what the masking checks found."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from art_denoised.checks import InputError
from art_denoised.storage import Closing, Journal, read_journal

TITLE = "attack log"
CLEAN = "clean"  # the name of the attack that changes nothing
GRADIENTS = ("exact", "bpda", "none")
STAGES = ("clean", "attacked", "denoised", "attacked and denoised")
CHECKS = (  # the masking checks, all of which a figure needs; `masking` makes them in this order
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


@dataclass(frozen=True, slots=True)
class AttackRow:
    """What one attack did to one image. Time does not take part in comparisons.

    Each run holds a row of the attack "clean" for every image: eps 0, nothing changed.

    Attributes:
        index: Of the image in its data set.
        label: Its true class.
        attack: Name of the attack; with ``gradient`` and ``eps`` one column of the run.
        gradient: What the attack saw: "exact" (autograd through the forward pass), "bpda" (the
            identity for likelihood maximization), or "none" (it used scores or labels alone).
        norm: "linf" or "l2".
        eps: Radius of its ball, image units.
        clean: Whether the unattacked image was right in any of its evaluations. If not, it was not
            attacked, and ``counted`` and ``fresh`` are False throughout.
        counted: Whether it was still right as the attack itself counted.
        fresh: Whether it was right in each later evaluation, with fresh noise; one entry for a
            deterministic model.
        distance_linf: Largest change of a pixel; 0 where it was not attacked.
        distance_l2: Euclidean length of the change.
        seconds: Wall-clock time of the attack, divided over the images of its batch.
    """

    KIND: ClassVar[str] = "attack"

    index: int
    label: int
    attack: str
    gradient: str
    norm: str
    eps: float
    clean: bool
    counted: bool
    fresh: tuple[bool, ...]
    distance_linf: float
    distance_l2: float
    seconds: float = field(compare=False)

    @property
    def column(self) -> tuple[str, str, float]:
        """Attack, gradient and eps: rows of a run that agree in them differ in their image."""
        return (self.attack, self.gradient, self.eps)

    @property
    def worst(self) -> bool:
        """Whether it was right in every evaluation, the attack's own among them."""
        return self.counted and all(self.fresh)

    @property
    def mean(self) -> float:
        """Share of the later evaluations in which it was right."""
        return sum(self.fresh) / len(self.fresh)


@dataclass(frozen=True, slots=True)
class CheckRow:
    """What one masking check found.

    Attributes:
        name: Of the check; a later row of the same name replaces it.
        passed: None where it does not apply, leaves the matter to another, or could not be made.
        finding: In words, with the numbers that decided.
        numbers: The same for machines; with "error" where an error kept it from being made.
    """

    KIND: ClassVar[str] = "check"

    name: str
    passed: bool | None
    finding: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A picture of one image at one stage, for people to look at: rounded to 8 bits.

    Attributes:
        index: Of the image in its data set.
        attack: As in `AttackRow`; "clean" for stages without attack.
        gradient: As in `AttackRow`.
        eps: As in `AttackRow`.
        stage: One of `STAGES`.
        shape: (channels, height, width).
        pixels: Base64 of the bytes.
    """

    KIND: ClassVar[str] = "image"

    index: int
    attack: str
    gradient: str
    eps: float
    stage: str
    shape: tuple[int, int, int]
    pixels: str

    @classmethod
    def of(
        cls, image: Any, *, index: int, attack: str, gradient: str, eps: float, stage: str
    ) -> ImageRow:
        """Return the row of an image (channels, height, width) in [0, 1].

        Example:
            >>> row = ImageRow.of(
            ...     np.ones((1, 2, 2)), index=0, attack=CLEAN, gradient="none", eps=0, stage="clean"
            ... )
            >>> row.array.shape, int(row.array.max())
            ((1, 2, 2), 255)
        """
        array = np.asarray(image, dtype=np.float64)
        raw = np.clip(np.rint(array * 255), 0, 255).astype(np.uint8).tobytes()
        pixels = base64.b64encode(raw).decode("ascii")
        shape = (array.shape[0], array.shape[1], array.shape[2])
        return cls(index, attack, gradient, eps, stage, shape, pixels)

    @property
    def array(self) -> np.ndarray:
        """The image as bytes (channels, height, width)."""
        raw = base64.b64decode(self.pixels, validate=True)
        return np.frombuffer(raw, dtype=np.uint8).reshape(self.shape)


Row: TypeAlias = AttackRow | CheckRow | ImageRow


@dataclass(frozen=True)
class AttackLog:
    """A run as read.

    Attributes:
        settings: Of the run: "model" and "data" as the user named them, "weights", "images" (their
            number), "classes", "randomised" (whether two calls of the model differ), "noise"
            ("fixed", "fresh" or "none"), "repeats" (later evaluations an image), "seed",
            "attacks" (a list of mappings with "name", "eps", "norm", "gradients" and the attack's
            own settings) and "versions" (package to version).
        rows: By column in the order of the run, then by image.
        checks: In the order they were made; empty if the run has not come to them.
        images: Pictures of the first images.
        notices: What the reader had to repair, for the user to see.
    """

    settings: Mapping[str, Any]
    rows: tuple[AttackRow, ...]
    checks: tuple[CheckRow, ...] = ()
    images: tuple[ImageRow, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[tuple[str, str, float], tuple[AttackRow, ...]]:
        """The rows of each (attack, gradient, eps)."""
        columns: dict[tuple[str, str, float], list[AttackRow]] = {}
        for row in self.rows:
            columns.setdefault(row.column, []).append(row)
        return {column: tuple(rows) for column, rows in columns.items()}

    @property
    def trusted(self) -> bool | None:
        """Whether no check failed; None if not all of `CHECKS` were made."""
        return verdict(self.checks, unmade(self.checks))


def unmade(checks: Iterable[CheckRow]) -> tuple[str, ...]:
    """Return the names of the masking checks that are missing, or that an error prevented.

    Example:
        >>> unmade([CheckRow(name, True, "fine") for name in CHECKS if name != "logits"])
        ('logits',)
    """
    made = {check.name for check in checks if "error" not in check.numbers}
    return tuple(name for name in CHECKS if name not in made)


def verdict(checks: Iterable[CheckRow], missing: Collection[str]) -> bool | None:
    """Return whether figures may be believed: no if a check failed, None if any is missing.

    Example:
        >>> verdict([CheckRow("logits", True, "fine")], missing=["global seed"]) is None
        True
    """
    found = [(check.name in CHECKS, check.passed) for check in checks]
    if any(passed is False for _, passed in found):
        return False
    return True if (True, True) in found and not missing else None


def to_json(row: Row) -> dict[str, Any]:
    """Return a row as plain JSON values.

    Example:
        >>> to_json(CheckRow("constant logits", True, "logits differ"))["kind"]
        'check'
    """
    return {"kind": row.KIND, **asdict(row)}


def from_json(record: Mapping[str, Any]) -> Row:
    """Return the row that `to_json` made ``record`` from.

    Raises:
        KeyError, TypeError, ValueError: ``record`` is no such row.

    Example:
        >>> row = CheckRow("constant logits", True, "logits differ", {"spread": 0.5})
        >>> from_json(to_json(row)) == row
        True
    """
    values = {name: value for name, value in record.items() if name != "kind"}
    if record["kind"] == CheckRow.KIND:
        numbers = dict(values.get("numbers", {}))
        json.dumps(numbers, allow_nan=False)
        return CheckRow(**{**values, "numbers": numbers})
    if record["kind"] not in (ImageRow.KIND, AttackRow.KIND):
        raise ValueError(f"kind {record['kind']!r}")
    kinds = {"index": int, "attack": str, "gradient": str, "eps": int | float, "stage": str}
    for name, kind in kinds.items():
        if name in record and not isinstance(record[name], kind):
            raise ValueError(f"{name} {record[name]!r}")
    if record["kind"] == ImageRow.KIND:
        return ImageRow(**{**values, "shape": tuple(values["shape"])})
    row = AttackRow(**{**values, "fresh": tuple(bool(right) for right in values["fresh"])})
    if not row.fresh or row.gradient not in GRADIENTS:
        raise ValueError(f"fresh {row.fresh}, gradient {row.gradient!r}")
    if not row.clean and (row.counted or any(row.fresh)):
        raise ValueError("an image that was never right cannot be right under attack")
    return row


def read_attack_log(path: Path | str) -> AttackLog:
    """Read a run.

    Args:
        path: The folder of the run, or its ``attack.jsonl``.

    Raises:
        InputError: No such file, not such a log, or a damaged line before the last.
    """
    path = Path(path)
    path = path / "attack.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a folder that attack wrote")
    contents = read_journal(path)
    if contents.title != TITLE:
        raise InputError(f"{path} is a {contents.title}, not an {TITLE}")
    return _log(path, contents.settings, contents.records, contents.notices)


class AttackLogWriter(Closing):
    """Appends rows to the log of a run, one write a row; a context manager.

    Args:
        path: The log.
        settings: What determines the rows; plain JSON values.
        resume: Continue the log if it exists.

    Raises:
        InputError: As for `Journal`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with AttackLogWriter(Path(folder, "attack.jsonl"), {"model": "net"}) as log:
        ...         log.append(CheckRow("constant logits", True, "logits differ"))
        ...     read_attack_log(folder).checks[0].finding
        'logits differ'
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self._journal = Journal(path, TITLE, settings, resume=resume)
        try:
            log = _log(path, settings, self._journal.records, self._journal.notices)
        except BaseException:
            self._journal.close()
            raise
        self.notices = log.notices
        self._settings = settings
        self._rows: list[Row] = [*log.rows, *log.checks, *log.images]

    @property
    def log(self) -> AttackLog:
        """All that the file holds."""
        return _sorted(self._settings, self._rows, self.notices)

    def append(self, row: Row) -> None:
        """Write one row. A process killed meanwhile leaves at most a torn last line."""
        self._journal.append(to_json(row))
        self._rows.append(row)

    def close(self) -> None:
        """Close the log and let others write it."""
        self._journal.close()


def _log(path: Path, settings: Mapping[str, Any], records: list[Any], notices: Any) -> AttackLog:
    rows = []
    for number, record in enumerate(records, start=2):
        try:
            rows.append(from_json(record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}:{number} is damaged ({type(error).__name__}: {error})"
            ) from None
    log = _sorted(settings, rows, tuple(notices))
    keys = {(row.column, row.index) for row in log.rows}
    if len(keys) != len(log.rows):
        raise InputError(f"{path} holds an image twice under the same attack")
    return log


def _sorted(settings: Mapping[str, Any], rows: list[Row], notices: tuple[str, ...]) -> AttackLog:
    attacked = [row for row in rows if isinstance(row, AttackRow)]
    columns = list(dict.fromkeys(row.column for row in attacked))
    attacked.sort(key=lambda row: (columns.index(row.column), row.index))
    checks = {row.name: row for row in rows if isinstance(row, CheckRow)}
    images = {
        (row.index, row.attack, row.gradient, row.eps, row.stage): row
        for row in rows
        if isinstance(row, ImageRow)
    }
    found = tuple(checks.values()), tuple(images.values())
    return AttackLog(settings, tuple(attacked), *found, notices)
