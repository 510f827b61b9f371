"""The one journal: a header with the settings of a run, then typed rows, one JSON line each."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import filelock
import msgspec

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.runs.identity import differences

if TYPE_CHECKING:
    from typing import Self

VERSION = 2
_START = '{"art_denoised"'  # how each header begins
R = TypeVar("R", bound="Row")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a journal. A subclass adds fields; the file holds them under their names."""

    @property
    def key(self) -> Hashable | None:
        """What the row is about: a journal holds one valid row for each key, all rows of None."""
        raise NotImplementedError

    def replaces(self, earlier: Any) -> bool:
        """Whether this row goes on from an earlier one of the same key, and may replace it."""
        return False


@dataclass(frozen=True)
class Kind(Generic[R]):
    """A kind of journal.

    Attributes:
        name: Name of the kind, such as "certify": the file is ``certify.jsonl``.
        row: Type of the rows, as msgspec takes it: a subclass of `Row` or a tagged union of them.
        upgrade: Function from a record as version 1 wrote it to one of today.
        title: What the header says; by default "NAME log".
    """

    name: str
    row: Any
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict
    title: str = ""

    @property
    def heading(self) -> str:
        """What the header says."""
        return self.title or f"{self.name} log"


@dataclass(frozen=True)
class Contents(Generic[R]):
    """A journal as read, its rows by key; notices say what the reader had to repair.

    ``begun`` is the time at which it was begun, in UTC as ISO 8601; empty in earlier journals.
    """

    kind: Kind[R]
    settings: Mapping[str, Any]
    rows: Mapping[Hashable, R]
    version: int = VERSION
    notices: tuple[str, ...] = ()
    whole: int = 0  # bytes of the lines that are not torn
    begun: str = ""


class Run(Generic[R]):
    """A journal that is being written: a header, typed rows, one writer; a context manager.

    Rows are on the disk when `append` returns. A killed process or a power cut leaves at most a
    torn last line, which is dropped when the run is resumed.

    Args:
        folder: Folder of the run, created where it is missing.
        kind: Kind of the journal.
        settings: What determines the rows; JSON values.
        resume: Continue the journal if it exists; its settings are compared.

    Attributes:
        rows: The valid row of each key, of those read and those appended.
        notices: What had to be repaired.
        begun: Time at which the journal was begun, in UTC as ISO 8601; empty in earlier ones.

    Raises:
        InputError: The journal exists and ``resume`` is false, is of another kind or other
            settings, is damaged, or is being written by another process.
        OSError: The disk does not take it. Rows before that stay readable.

    Example:
        >>> import tempfile
        >>> class Answer(Row, frozen=True, kw_only=True):
        ...     index: int
        ...     answer: str
        ...     @property
        ...     def key(self):
        ...         return self.index
        >>> kind = Kind("answers", Answer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Run(folder, kind, {"n": 9}) as run:
        ...         run.append([Answer(index=3, answer="cat")])
        ...     read_run(folder, kind).rows[3].answer
        'cat'
    """

    def __init__(
        self,
        folder: Path | str,
        kind: Kind[R],
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
    ) -> None:
        checks.flag("resume", resume)
        self.kind = kind
        self.settings: Mapping[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        self.path = _make_folder(Path(folder)) / f"{kind.name}.jsonl"
        self.rows: dict[Hashable, R] = {}
        self.notices: list[str] = []
        self.begun = ""
        with ExitStack() as stack:
            stack.callback(_locked(self.path).release)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            stack.callback(os.close, self._file)
            self._open(resume)
            self._held = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the journal and let others write it."""
        self._held.close()

    def append(self, rows: Iterable[R]) -> None:
        """Write rows, all or none; a killed process may leave a torn last line."""
        rows = list(rows)
        self._write([msgspec.to_builtins(row, str_keys=True) for row in rows])
        for row in rows:
            self.rows[_key(row, len(self.rows))] = row

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        lines = b"".join(json.dumps(r, allow_nan=False).encode() + b"\n" for r in records)
        before = os.fstat(self._file).st_size
        try:
            written, reason = os.write(self._file, lines), "no space for whole rows"
            os.fsync(self._file)
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written != len(lines):
            os.ftruncate(self._file, before)  # the next row must not be glued to a torn one
            raise OSError(
                f"{self.path} cannot be written ({reason}); completed rows are kept: make room and "
                "resume the run"
            )

    def _open(self, resume: bool) -> None:
        if not self.path.is_file():
            raise InputError(f"{self.path} is not a regular file; choose another folder")
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        if text and not resume:
            raise _existing(self.path)
        if text and "\n" not in text and (text.startswith(_START) or _START.startswith(text)):
            self.notices.append(f"{self.path}: the header was torn; the run starts again")
            os.ftruncate(self._file, 0)
            text = ""
        if not text:
            self.begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            header = {"art_denoised": self.kind.heading, "version": VERSION, "begun": self.begun}
            self._write([{**header, "settings": self.settings}])
            return
        contents = read_run(self.path, self.kind)
        if contents.version != VERSION:
            raise InputError(
                f"{self.path} was written by an earlier version of art_denoised, which compared "
                "less; choose another folder"
            )
        if changes := differences(contents.settings, self.settings):
            remedy = "choose another folder"
            if contents.settings.get("indices") != self.settings.get("indices"):
                remedy = "a run keeps its images: give others a folder of their own"
            raise InputError(
                f"{self.path} was written with different settings ({changes}); {remedy}"
            )
        os.ftruncate(self._file, contents.whole)
        self.rows, self.begun = dict(contents.rows), contents.begun
        self.notices += [f"{self.path}: {notice}" for notice in contents.notices]


def refuse_existing(folder: Path | str, kind: str) -> None:
    """Refuse a folder that holds a journal of this kind, where none is to be resumed.

    `Run` refuses it as well; this is for programs that load models first.
    """
    path = Path(folder) / f"{kind}.jsonl"
    if path.is_file() and path.stat().st_size:
        raise _existing(path)


def _existing(path: Path) -> InputError:
    return InputError(
        f"{path.parent} already holds a run ({path.name}); resume it or choose another folder",
        resume=True,
    )


def read_run(path: Path | str, *kinds: Kind[Any]) -> Contents[Any]:
    """Read a journal.

    Args:
        path: The file, or the folder of a run.
        kinds: Kinds that the caller can use.

    Returns:
        Its rows and settings. A torn last line is left out, with a notice.

    Raises:
        InputError: There is no such file, it is of another kind, or it is damaged before the last
            line.
    """
    path = _find(Path(path), kinds)
    raw = path.read_bytes()
    *lines, torn = raw.decode("utf-8-sig", errors="replace").split("\n")
    try:
        header = msgspec.json.decode(lines[0] if lines else torn, type=_Header)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise InputError(f"{path} is not a log: its first line is not a header of ours") from None
    kind = next((kind for kind in kinds if kind.heading == header.art_denoised), None)
    if kind is None:
        wanted = " or ".join(kind.heading for kind in kinds)
        raise InputError(f"{path} is a {header.art_denoised!r}; give a {wanted}")
    if header.version not in (1, VERSION):
        raise InputError(
            f"{path} has version {header.version}, which this art_denoised does not know; read it "
            "with the one that wrote it"
        )
    rows: dict[Hashable, Row] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line, type=dict[str, Any])
            record = kind.upgrade(record) if header.version == 1 else record
            row = msgspec.convert(record, kind.row, str_keys=True)
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}:{number} is damaged ({error})") from None
        key = _key(row, len(rows))
        if key in rows and not row.replaces(rows[key]):
            raise InputError(f"{path}:{number} holds {key} a second time; remove one of them")
        rows[key] = row
    notices = ("a torn last line was left out",) if torn.strip() else ()
    whole = raw.rfind(b"\n") + 1
    return Contents(kind, header.settings, rows, header.version, notices, whole, header.begun)


def _key(row: Row, number: int) -> Hashable:
    return ("row", number) if row.key is None else row.key


def _find(path: Path, kinds: tuple[Kind[Any], ...]) -> Path:
    names = [f"{kind.name}.jsonl" for kind in kinds]
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a run's folder or its {' or '.join(names)}")
    return path


class _Header(msgspec.Struct):
    """The first line of a journal."""

    art_denoised: str
    version: int
    settings: dict[str, Any]
    begun: str = ""


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file so that it always holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a power cut could leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another place"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} exists and is not a directory; choose another folder") from None
    except OSError as error:
        raise InputError(
            f"{folder} cannot be created ({error.strerror}); choose another folder"
        ) from None
    return folder


def _locked(path: Path) -> filelock.BaseFileLock:
    """Return the lock of a file, a hidden file beside it, once this process alone holds it."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        if not Path(lock.lock_file).exists():  # as on a file system that takes no files
            raise InputError(f"{path} cannot be written; choose another folder") from None
        raise InputError(
            f"{path} is being written by another process; wait for it or choose another folder"
        ) from None
    return lock
