"""Join the shards of a run into the log that one machine would have written."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    planned_columns,
)
from art_denoised.evaluation.masking import autoattack_flags
from art_denoised.evaluation.rows import CERTIFY, PREDICT, Log
from art_denoised.runs.identity import differences
from art_denoised.runs.journal import Contents, Kind, Run, read_run

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
        for part in _read(path):
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


def _read(path: Path) -> Iterator[_Part]:
    """Yield the logs of a folder, or the one log that is named."""
    kinds = [kind for kind in _KINDS if (path / f"{kind.name}.jsonl").is_file()]
    for kind in kinds:
        yield _Part.of(path, read_run(path, kind))
    if not kinds:
        yield _Part.of(path, read_run(path, *_KINDS))


def _columns(settings: Mapping[str, Any]) -> list[Key]:
    """Return the columns of a run in their order."""
    return [(CLEAN, "none", 0.0), *planned_columns(settings)]
