"""The leaderboard as a table on the terminal and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from art_denoised.checks import InputError
from art_denoised.leaderboard.entries import Entry, check, read_entries
from art_denoised.reports.terminal import Column, Table, show, text
from art_denoised.runs.journal import write_whole

VERIFIED, UNVERIFIED = "votes", "unverified"
_HEADS = ("entry", "defence", "classifier", "sigma", "images", "samples")
_INTRODUCTION = """\
# Certified leaderboard

<!-- Made from the entries of {folder} by: art-denoised leaderboard {folder} --out {out} -->

Certified accuracy in percent: the share of images whose label is right and certified at l2 radius r
(pixels in [0, 1]). An abstention counts as wrong.

- **votes**: the entry comes with the votes of each image. `art-denoised verify` recomputes it. A
  log cannot show that the votes are those of the network; who has the network can repeat the run.
- **unverified**: published figures, quoted by reference, whose votes are not available.

Entries of different data sets, images or classifiers are not comparable. "best" means that each
radius has the best of several noise levels.
"""


@dataclass(frozen=True)
class Leaderboard:
    """All entries; ``str`` is the plain table.

    Attributes:
        entries: Entries in the order of the table: by data set, then by accuracy.
    """

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return text(self._blocks())

    def show(self) -> None:
        """Print the table: styled on a terminal, plain elsewhere."""
        show(self._blocks())

    def to_json(self) -> list[dict[str, Any]]:
        """Return all entries as plain JSON values."""
        return [msgspec.to_builtins(entry, str_keys=True) for entry in self.entries]

    def to_markdown(self) -> str:
        """Return a section with a table for each data set, and the sources."""
        parts = []
        for table in self._blocks():
            heads = [column.head for column in table.columns]
            lines = [heads, ["---"] * len(heads), *table.rows]
            rows = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
            parts.append(f"## {table.title}\n\n{rows}\n")
        sources = "\n".join(f"- {entry.name}: {entry.source}" for entry in self.entries)
        return "\n".join([*parts, f"## Sources\n\n{sources}\n"])

    def _blocks(self) -> list[Table]:
        return [
            _table(data, list(entries))
            for data, entries in groupby(self.entries, key=lambda entry: entry.data)
        ]


def leaderboard(folder: Path | str) -> Leaderboard:
    """Return the leaderboard of a folder, once each entry has been recomputed from its votes.

    Raises:
        InputError: An entry does not follow from its log, or the format.

    Example:
        >>> print(leaderboard("no/such/folder"))
        Traceback (most recent call last):
            ...
        art_denoised.checks.values.InputError: no/such/folder holds no entries; ...
    """
    entries = read_entries(folder)
    for file in entries:
        if found := check(file):
            raise InputError(f"{file} is not consistent: {found[0].problem}; see verify")

    def order(entry: Entry) -> tuple[Any, ...]:
        return entry.data, [-share for _, share in sorted(entry.accuracy.items())], entry.name

    return Leaderboard(tuple(sorted(entries.values(), key=order)))


def write_page(folder: Path | str, out: Path | str) -> None:
    """Write the leaderboard of a folder as a page in Markdown.

    Example:
        >>> write_page("no/such/folder", "page.md")
        Traceback (most recent call last):
            ...
        art_denoised.checks.values.InputError: no/such/folder holds no entries; ...
    """
    head = _INTRODUCTION.format(folder=Path(folder).as_posix(), out=Path(out).as_posix())
    body = leaderboard(folder).to_markdown()
    write_whole(Path(out), f"{head}\n{body}".encode())


def _table(data: str, entries: list[Entry]) -> Table:
    radii = sorted({radius for entry in entries for radius in entry.accuracy})
    return Table(
        (
            *(Column(head, left=head in _HEADS[:3]) for head in _HEADS),
            *(Column(f"r={radius:g}") for radius in radii),
            Column("checked by", left=True),
        ),
        tuple(tuple(_cells(entry, radii)) for entry in entries),
        title=data,
    )


def _cells(entry: Entry, radii: list[float]) -> list[str]:
    votes = entry.votes
    shares = [f"{100 * entry.accuracy[r]:.1f}" if r in entry.accuracy else "-" for r in radii]
    return [
        *(entry.name, entry.defence, entry.model),
        "best" if entry.sigma is None else f"{entry.sigma:g}",
        *(("-", "-") if votes is None else (str(votes.images), f"{votes.n:,}")),
        *shares,
        UNVERIFIED if votes is None else VERIFIED,
    ]


def _cell(words: Any) -> str:
    """Return text so that it stays in its cell of a Markdown table."""
    return str(words).replace("|", "\\|")
