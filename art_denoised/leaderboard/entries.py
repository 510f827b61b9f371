"""Entries of a leaderboard, each with the log that it follows from, and the pages of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.images import index_range
from art_denoised.evaluation.logs import CERTIFY, Log, read_log
from art_denoised.evaluation.verify import Finding, names_images, verify
from art_denoised.reports.certified import accuracy_table, default_radii
from art_denoised.reports.terminal import Block, Column, Shown, Table, markdown, plain_markdown
from art_denoised.runs.journal import write_whole

_NAME = r"[a-z0-9][a-z0-9._-]*"
Radius = Annotated[float, Meta(ge=0, le=1e6)]
Share = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(min_length=1, max_length=300)]
_CONTROL = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of Unicode that break or reorder a line
_NO_INDICES = (
    "the log's header does not name its indices and labels; certify again with this version"
)
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


class Votes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The log of an entry, and what follows from it."""

    path: Text  # relative to the folder of the entry
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    images: int
    n: int  # the largest number of samples of an image
    alpha: float
    seed: int
    weights: str | None = None
    named: bool = True  # whether the header names indices and labels; see `names_images`

    def __post_init__(self) -> None:
        _refuse_control_characters(self, "path", "weights")


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the leaderboard.

    Attributes:
        schema: Version of the format.
        name: Name of the entry and of its file: lower-case letters, digits, dots and hyphens.
        defence: What makes the classifier robust, in words.
        model: The classifier, in words.
        data: Data set and which of its images, in words.
        source: Where it comes from: a paper with its table, or a page.
        sigma: Noise level; None if each radius has the best of several.
        accuracy: Certified accuracy in [0, 1] at each l2 radius in image units.
        votes: The log with its votes; None for published figures, which are not verified.

    Example:
        >>> Entry(
        ...     name="paper", defence="none", model="ResNet-110", data="CIFAR-10",
        ...     source="Somebody et al. 2020, table 1", accuracy={0.25: 0.07},
        ... ).votes is None
        True
    """

    schema: Literal[1] = 1
    name: Annotated[str, Meta(pattern=rf"^{_NAME}\Z", max_length=80)]
    defence: Text
    model: Text
    data: Text
    source: Text
    sigma: float | None = None
    accuracy: Annotated[dict[Radius, Share], Meta(min_length=1)]
    votes: Votes | None = None

    def __post_init__(self) -> None:
        words = ("name", "defence", "model", "data", "source")
        _refuse_control_characters(self, *words)
        for name in words:
            if not getattr(self, name).strip():
                raise InputError(f"{name} is {getattr(self, name)!r}; say it in words")


def submit(
    run: Path | str,
    folder: Path | str,
    *,
    name: str,
    defence: str,
    model: str,
    data: str,
    source: str,
    radii: Sequence[float] | None = None,
) -> Path:
    """Make the entry of a certify run.

    The log is copied to ``folder/logs``, unless it lies beside the folder: then it is referred to.

    Args:
        run: Folder of the run, or its certify.jsonl.
        folder: Folder of the leaderboard, created where it is missing.
        name: Name of the entry.
        defence: What makes the classifier robust, in words.
        model: The classifier, in words.
        data: Data set and which of its images, in words.
        source: Where the run is described, such as a URL.
        radii: l2 radii in image units; None: those that the run stopped at, or round steps.

    Returns:
        The file of the entry.

    Raises:
        InputError: The log has no votes, does not name its images, lacks some of them, or is not
            consistent; a value is empty or has control characters; or an entry of that name, or of
            the same run, exists.

    Example:
        >>> import tempfile
        >>> from art_denoised import FixedN, Smoother, certify, load_data
        >>> from art_denoised.demo import digits_classifier
        >>> smoother, data = Smoother(digits_classifier(), sigma=0.1), load_data("digits")
        >>> with tempfile.TemporaryDirectory() as top:
        ...     _ = certify(
        ...         smoother, data, FixedN(100), run=f"{top}/run", indices=range(3), progress=False
        ...     )
        ...     entry = submit(
        ...         f"{top}/run", f"{top}/board", name="digits", defence="noise", model="small CNN",
        ...         data="3 digits", source="this example",
        ...     )
        ...     check(entry)
        []
    """
    if not re.fullmatch(_NAME, name):
        raise InputError(f"name is {name!r}; give lower-case letters, digits, dots and hyphens")
    path, folder = Path(run), Path(folder)
    path = path / f"{CERTIFY.name}.jsonl" if path.is_dir() else path
    log = _sound(path)
    at = checks.radii(default_radii([log]) if radii is None else radii)
    beside = path.resolve().is_relative_to(folder.resolve().parent)
    where = _relative(path, folder) if beside else f"logs/{name}.jsonl"
    words = {"name": name, "defence": defence, "model": model, "data": data, "source": source}
    entry = _valid(words | _figures(log, where, path.read_bytes(), at))
    target = folder / f"{name}.json"
    if target.exists():
        raise InputError(f"{target} exists; choose another name")
    for file, other in (read_entries(folder) if any(folder.glob("*.json")) else {}).items():
        if other.votes and entry.votes and other.votes.sha256 == entry.votes.sha256:
            raise InputError(f"{file} is of the same run; an entry is made once")
    folder.mkdir(parents=True, exist_ok=True)
    if not beside:
        (folder / "logs").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / where)
    text = json.dumps(msgspec.to_builtins(entry, str_keys=True), indent=2, ensure_ascii=False)
    target.write_text(text + "\n", encoding="utf-8")
    return target


def read_entries(folder: Path | str) -> dict[Path, Entry]:
    """Read the entries of a folder, or the one in a file.

    Raises:
        InputError: There are none, or one does not follow the format.

    Example:
        >>> read_entries("no/such/folder")
        Traceback (most recent call last):
            ...
        art_denoised.checks.values.InputError: no/such/folder holds no entries; ...
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"{folder} holds no entries; make one with submit")
    entries = {}
    for file in files:
        try:
            entries[file] = msgspec.json.decode(file.read_bytes(), type=Entry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{file} is no entry of a leaderboard: {error}") from None
        if entries[file].name != file.stem:
            raise InputError(f"{file} is the entry {entries[file].name!r}; name the file like it")
    return entries


def check(file: Path | str) -> list[Finding]:
    """Recompute an entry from the votes of its log.

    The log must be the file that was submitted, each row must follow from its votes (`verify`), and
    the figures of the entry from the rows. The log must name its images and labels, unless the
    entry says that it does not (``votes.named``), which the page shows. Consistently forged votes
    are not found: only the run repeated at its seed shows them.

    Args:
        file: File of the entry.

    Returns:
        What is wrong; nothing for a sound entry, and nothing for one without votes.

    Raises:
        InputError: The entry does not follow the format.

    Example:
        >>> check("no-such-entry.json")
        Traceback (most recent call last):
            ...
        art_denoised.checks.values.InputError: no-such-entry.json holds no entries; ...
    """
    file = Path(file)
    (entry,) = read_entries(file).values()
    votes = entry.votes
    if votes is None:
        return []
    path = (file.parent / votes.path).resolve()
    if not path.is_relative_to(file.resolve().parent.parent):
        return [Finding(None, f"the log {votes.path} lies outside the folder of the leaderboard")]
    try:
        content = path.read_bytes()
    except OSError as error:
        return [Finding(None, f"the log {votes.path} cannot be read ({error.strerror})")]
    try:
        log = read_log(path)
        if found := _problems(log):
            return found
        if votes.named and not names_images(log):
            return [Finding(None, _NO_INDICES)]
        again = _figures(log, votes.path, content, list(entry.accuracy))
    except InputError as error:
        return [Finding(None, str(error))]
    return [Finding(None, what) for what in _differences(entry, again)]


def _sound(path: Path) -> Log:
    log = read_log(path)
    if found := _problems(log):
        raise InputError(f"{path} is not consistent: {found[0].problem}; see verify")
    if not names_images(log):
        raise InputError(f"{path} cannot be submitted: {_NO_INDICES}")
    return log


def _problems(log: Log) -> list[Finding]:
    """Return what is wrong with a log; images may have been left out by their results."""
    if log.kind != CERTIFY.name:
        raise InputError(f"the log is of {log.kind}; give a log of certify")
    found = verify(log)
    planned = (log.settings or {}).get("indices")
    if planned is not None and not found and len(log.rows) < len(index_range(planned)):
        missing = len(index_range(planned)) - len(log.rows)
        found.append(Finding(None, f"{missing} of the run's images lack a row; finish the run"))
    return found


def _figures(log: Log, path: str, content: bytes, radii: Sequence[float]) -> dict[str, Any]:
    """Return the fields of an entry that follow from its log."""
    settings: Mapping[str, Any] = log.settings or {}
    votes = Votes(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        images=len(log.rows),
        n=max(row.n for row in log.rows),
        alpha=settings["alpha"],
        seed=settings["seed"],
        weights=settings.get("weights"),
        named=names_images(log),
    )
    accuracy = {row.radius: row.certified_accuracy for row in accuracy_table(log.rows, radii)}
    return {"sigma": settings["sigma"], "accuracy": accuracy, "votes": votes}


def _valid(fields: Mapping[str, Any]) -> Entry:
    try:
        return msgspec.convert(msgspec.to_builtins(fields), Entry)
    except msgspec.ValidationError as error:
        raise InputError(f"this is no entry of a leaderboard: {error}") from None


def _refuse_control_characters(struct: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(struct, name)
        if isinstance(value, str) and any(unicodedata.category(c) in _CONTROL for c in value):
            raise InputError(f"{name} is {value!r}; leave out line breaks and control characters")


def _differences(entry: Entry, again: Mapping[str, Any]) -> list[str]:
    """Compare what an entry says with what follows from its log."""
    said, found = (msgspec.to_builtins(one, str_keys=True) for one in (entry, again))
    pairs = [("sigma", said["sigma"], found["sigma"])]
    pairs += [(name, said["votes"][name], found["votes"][name]) for name in found["votes"]]
    pairs += [
        (f"accuracy at {radius}", value, found["accuracy"][radius])
        for radius, value in said["accuracy"].items()
    ]
    return [f"{name} is {a}, the log gives {b}" for name, a, b in pairs if a != b]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


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
