"""The leaderboard as a table on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from art_denoised.checks import InputError
from art_denoised.leaderboard.entries import Entry, check, read_entries
from art_denoised.reports.terminal import Block, Column, Shown, Table, markdown, plain_markdown
from art_denoised.runs.journal import write_whole

VERIFIED, UNNAMED, UNVERIFIED = "votes", "votes, images not named", "unverified"
_HEADS = ("entry", "defence", "classifier", "sigma", "images", "n", "alpha")
_INTRODUCTION = """\
# Certified leaderboard

<!-- Made from the entries of {folder} by: art-denoised leaderboard {folder} --out {out} -->

Certified accuracy in percent: the share of images whose label is right and certified at l2 radius r
(pixels in [0, 1]). An abstention counts as wrong.

- **votes**: the entry comes with the votes of each image. `art-denoised verify` recomputes it. A
  log cannot show that the votes are those of the network; who has the network can repeat the run.
- **votes, images not named**: also recomputed, but the log is of an older version, which does not
  name the images and labels of the run: images that were left out, and labels that were changed,
  are not found.
- **unverified**: published figures, quoted by reference, whose votes are not available.

n is the number of samples of an image, alpha the failure probability of each certificate. Entries
of different data sets, images, classifiers or alpha are not comparable. Each table is of one alpha;
"-" means that it is not recorded. "best" means that each radius has the best of several noise
levels.
"""


@dataclass(frozen=True)
class Leaderboard(Shown):
    """All entries, by data set and alpha, then by accuracy; ``str`` is the plain table."""

    entries: tuple[Entry, ...]

    def blocks(self) -> list[Block]:
        """Return a table for each data set and alpha."""
        return [*self._tables()]

    def to_json(self) -> list[dict[str, Any]]:
        """Return all entries as plain JSON values."""
        return [msgspec.to_builtins(entry, str_keys=True) for entry in self.entries]

    def to_markdown(self) -> str:
        """Return a section with a table for each data set and alpha, and the sources."""
        tables = [
            f"## {plain_markdown(table.title)}\n\n{markdown(replace(table, title=''))}\n"
            for table in self._tables()
        ]
        sources = "\n".join(
            f"- {plain_markdown(entry.name)}: {plain_markdown(entry.source)}"
            for entry in self.entries
        )
        return "\n".join([*tables, f"## Sources\n\n{sources}\n"])

    def _tables(self) -> Iterator[Table]:
        for (data, alpha), entries in groupby(self.entries, key=_group):
            yield _table(f"{data}, alpha = {alpha}" if alpha else data, list(entries))


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
        shares = [-share for _, share in sorted(entry.accuracy.items())]
        return _group(entry), shares, entry.name

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


def _group(entry: Entry) -> tuple[str, float]:
    """Return what the entries of a table share: those of another alpha are not ranked with them."""
    return entry.data, 0.0 if entry.votes is None else entry.votes.alpha


def _table(title: str, entries: list[Entry]) -> Table:
    radii = sorted({radius for entry in entries for radius in entry.accuracy})
    return Table(
        (
            *(Column(head, left=head in _HEADS[:3]) for head in _HEADS),
            *(Column(f"r={radius:g}") for radius in radii),
            Column("checked by", left=True),
        ),
        tuple(tuple(_cells(entry, radii)) for entry in entries),
        title=title,
    )


def _cells(entry: Entry, radii: list[float]) -> list[str]:
    votes = entry.votes
    counts, checked = ("-", "-", "-"), UNVERIFIED
    if votes is not None:
        counts = (str(votes.images), f"{votes.n:,}", str(votes.alpha))
        checked = VERIFIED if votes.named else UNNAMED
    shares = [f"{100 * entry.accuracy[r]:.1f}" if r in entry.accuracy else "-" for r in radii]
    return [
        *(entry.name, entry.defence, entry.model),
        "best" if entry.sigma is None else f"{entry.sigma:g}",
        *counts,
        *shares,
        checked,
    ]
