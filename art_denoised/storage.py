"""Files that survive a killed process, and weights that can be told apart."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from art_denoised.checks import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the new, whenever process or machine dies.

    Raises:
        InputError: It cannot be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a"), b"content")
        ...     Path(folder, "a").read_bytes()
        b'content'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before its name: else a loss of power may leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Return a folder that exists, making it where it does not.

    Raises:
        InputError: Something else is in its way.

    Example:
        >>> make_folder(Path("/")).is_dir()
        True
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} is in the way of the output folder; give another") from None
    return folder


@contextmanager
def sole_writer(folder: Path | None) -> Iterator[None]:
    """Hold a folder, if there is one, for this process alone.

    Raises:
        InputError: Another process holds it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name, sole_writer(Path(name)):
        ...     Path(name, "a").touch()
    """
    if folder is None:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        _lock(file, folder)
        yield
    finally:
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is being written by another process") from None


def weights_fingerprint(model: nn.Module) -> str:
    """Return a short hash of all weights and buffers: equal for equal models, whatever the file.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = weights_fingerprint(layer)
        >>> _ = layer.bias.data.add_(1)
        >>> weights_fingerprint(layer) == before
        False
    """
    state = sorted(model.state_dict().items())
    return tensors_fingerprint(**{part: value for item in state for part, value in _flat(*item)})


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an entry of a state dict; extra state is what its module likes."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in items:
            yield from _flat(f"{name}.{key}", part)
    else:
        yield f"{name}={_words(value)}", torch.zeros(0)


def structure_fingerprint(model: nn.Module) -> str:
    """Return a short hash of what modules say of themselves and weights do not: a slope, ...

    Example:
        >>> a, b = torch.nn.LeakyReLU(0.1), torch.nn.LeakyReLU(0.2)
        >>> structure_fingerprint(a) == structure_fingerprint(b)
        False
    """
    return hashlib.sha256(_words(model).encode()).hexdigest()[:16]


def _words(value: object) -> str:
    """Return the repr of an object without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def tensors_fingerprint(*tensors: Tensor, **named: Tensor) -> str:
    """Return a short hash of the values, shapes, dtypes and names of tensors, in their order.

    Example:
        >>> tensors_fingerprint(torch.zeros(2)) == tensors_fingerprint(torch.zeros(1, 2))
        False
    """
    digest = hashlib.sha256()
    for name, tensor in [*(("", tensor) for tensor in tensors), *named.items()]:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:16]


class Closing:
    """A context manager that closes itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what is held."""


_START = '{"art_denoised"'  # how each header begins


class Journal(Closing):
    """An append-only file of JSON objects, a header with settings first; a context manager.

    Each record is appended in a single write and is on the disk when `append` returns. A killed
    process or a loss of power leaves at most a torn last line, which is dropped when the file is
    opened again. One process writes at a time.

    Args:
        path: The file.
        title: Says what it is, such as "certify log".
        settings: What determines the records; plain JSON values.
        resume: Continue the file if it exists.

    Attributes:
        records: Those that the file held when it was opened.
        notices: What had to be repaired.

    Raises:
        InputError: The file exists and ``resume`` is not set, has another title or other settings,
            is damaged, or is being written by another process.
        OSError: The disk does not take it. Records before that stay readable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.jsonl")
        ...     with Journal(path, "answers", {"n": 9}) as journal:
        ...         journal.append({"answer": "cat"})
        ...     read_journal(path).records
        [{'answer': 'cat'}]
    """

    def __init__(
        self, path: Path, title: str, settings: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.path = path
        self.records: list[Any] = []
        self.notices: list[str] = []
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _lock(self._file, path)
            self._open({"art_denoised": title, "version": 1, "settings": dict(settings)}, resume)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Close the file and let others write it."""
        os.close(self._file)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record or nothing; if the process is killed meanwhile, perhaps a torn line."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._file).st_size
        try:
            written, reason = os.write(self._file, line), "no space for a whole row"
            os.fsync(self._file)
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written != len(line):
            os.ftruncate(self._file, before)  # the next record must not be glued to a torn one
            raise OSError(
                f"{self.path} cannot be written ({reason}); the rows before are kept, "
                "make room and pass --resume"
            )

    def _open(self, header: dict[str, Any], resume: bool) -> None:
        if not self.path.is_file():
            raise InputError(f"{self.path} is not a regular file; choose another folder")
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        if text and not resume:
            raise InputError(
                f"{self.path.parent} already holds a run ({self.path.name}); "
                "pass --resume to continue it or choose another folder"
            )
        if text and "\n" not in text and (text.startswith(_START) or _START.startswith(text)):
            self.notices.append(f"{self.path}: header torn, starting again")
            text = ""
            os.ftruncate(self._file, 0)
        if not text:
            self.append(header)
            return
        contents = read_journal(self.path)
        if contents.title != header["art_denoised"]:
            raise InputError(f"{self.path} is a {contents.title}, not a {header['art_denoised']}")
        _compare(self.path, contents.settings, json.loads(json.dumps(header["settings"])))
        os.ftruncate(self._file, contents.whole)
        self.records = contents.records
        self.notices += [f"{self.path}: {notice}" for notice in contents.notices]


class Contents(NamedTuple):
    """What a journal holds."""

    title: str
    settings: Mapping[str, Any]
    records: list[Any]
    notices: list[str]
    whole: int  # bytes of the lines that are not torn


def read_journal(path: Path) -> Contents:
    """Read a file that `Journal` wrote.

    Raises:
        InputError: Damaged before the last line, or no such file.
    """
    raw = path.read_bytes()
    *lines, torn = raw.decode("utf-8", errors="replace").split("\n")
    try:
        header = json.loads(lines[0])
        title, settings = str(header["art_denoised"]), dict(header["settings"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path} is no log: its first line is not a header of ours") from None
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{path}:{number} is damaged ({type(error).__name__}: {error})"
            ) from None
    notices = ["a torn last line was left out"] if torn else []
    return Contents(title, settings, records, notices, raw.rfind(b"\n") + 1)


def _compare(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        changes = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)
        raise InputError(f"{path} is a log of other settings ({changes}); choose another folder")
