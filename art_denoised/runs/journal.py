"""The one journal: a header with the settings of a run, then typed rows, one JSON line each.

Settings are JSON values that are equal in every process. Headers, resuming and joining runs in a
report all compare them, so that "the function that was attacked is the function that was certified"
is a comparison of two mappings.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import filelock
import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError

if TYPE_CHECKING:
    from typing import Self

_OPENED = 3  # objects inside objects that are looked into
_HASH = re.compile(r"[0-9a-f]{16}")
_PACKAGES = ("torch", "numpy", "art-denoised")
_version = functools.cache(metadata.version)  # which reads a file
_BEGUN: ContextVar[frozenset[int]] = ContextVar("begun", default=frozenset())  # ids of modules
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
        self.settings: Mapping[str, Any] = checks.json_values("settings", settings)
        self.path = _make_folder(checks.path("run", folder)) / f"{kind.name}.jsonl"
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


def identity(model: Any) -> dict[str, Any]:
    """Return what tells a model from any other.

    Args:
        model: Module or function.

    Returns:
        Hashes of ``weights`` (all parameters and buffers), ``structure`` (what modules print of
        themselves) and ``attributes`` (classes and public attributes of all submodules), with the
        ``dtype`` that the model computes in and the kind of ``device``. Of a function: its name,
        defaults and closure as ``function``.

    Example:
        >>> net = nn.Dropout(0.5)
        >>> before, net.note = identity(net), "other"
        >>> differences(before, identity(net))
        'attributes differs'
    """
    if not isinstance(model, nn.Module):
        return {"function": describe(model)}
    if id(model) in _BEGUN.get():  # a part that holds the whole as an attribute
        return {"type": _name(type(model))}
    begun = _BEGUN.set(_BEGUN.get() | {id(model)})
    try:
        attributes = [
            [name, _name(type(part)), _public_attributes(part)]
            for name, part in model.named_modules()
        ]
    finally:
        _BEGUN.reset(begun)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    # The state dict lacks buffers that are not persistent.
    state = dict(model.named_buffers(remove_duplicate=False)) | model.state_dict()
    return {
        "weights": fingerprint(**dict(_flat(sorted(state.items())))),
        "structure": _hash(_words(model)),
        "attributes": _hash(json.dumps(attributes, sort_keys=True)),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
    }


def versions(*libraries: str) -> dict[str, str]:
    """Return the versions of Python, of the packages on which rows depend, and of others.

    Of these ``libraries`` those that are not installed are left out.
    """
    found = {name: _version(name) for name in _PACKAGES}
    for name in libraries:
        with suppress(metadata.PackageNotFoundError):
            found[name] = _version(name)
    return {**found, "python": platform.python_version()}


def processor(device: torch.device) -> str:
    """Return the model of a GPU; of a CPU the instructions that torch chooses its kernels by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.backends.cpu.get_cpu_capability())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return in one line what differs between two headers or identities; empty: nothing.

    Args:
        old: Values of the log.
        new: Values of the run that wants to go on.

    Example:
        >>> differences({"n": 1000, "data": {"first": 0}}, {"n": 500, "data": {"first": 0}})
        'n is 1000, not 500'
    """
    return ", ".join(_changes(old, new))


def fingerprint(*tensors: Tensor, **named: Tensor) -> str:
    """Return a short hash of the values, shapes, dtypes and names of tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in [*(("", tensor) for tensor in tensors), *named.items()]:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(value: Any, opened: int = _OPENED) -> Any:
    """Return options as JSON values without addresses in memory; objects are ``opened`` so deep.

    Objects become class and attributes; functions their name with defaults, closure and the global
    networks and tensors that they name (an edit of the body is not seen); tensors a hash.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {fingerprint(value)}"
    if isinstance(value, (np.ndarray, np.generic)):
        return describe(torch.as_tensor(np.asarray(value)), opened)
    if isinstance(value, nn.Module):
        return identity(value)
    if isinstance(value, Mapping):
        return {str(describe(key, opened)): describe(one, opened) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(one, opened) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((describe(one, opened) for one in value), key=json.dumps)
    if isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords, vars(value)]
        return [describe(part, opened) for part in parts]
    if isinstance(value, types.MethodType) and opened == _OPENED:  # such as model.forward
        return [_named(value.__func__, opened), describe(value.__self__, opened - 1)]
    if isinstance(value, type) or inspect.isroutine(value):
        return _named(value, opened)
    held = _attributes(value)
    if not held:
        words = repr(value)  # of a device, a data type, a path
        return words if " at 0x" not in words else _name(type(value))
    left = opened if is_dataclass(value) else opened - 1
    if left < 0:
        return _name(type(value))
    return {"type": _name(type(value)), **describe(held, left)}


def _public_attributes(part: nn.Module) -> dict[str, Any]:
    return {
        key: describe(value, int(inspect.isroutine(value)))
        for key, value in vars(part).items()
        if not key.startswith("_") and key != "training"
    }


def _attributes(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, or the attributes of any other object."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return held | dict(getattr(value, "__dict__", {}))


def _named(value: Any, opened: int) -> Any:
    """Return a class or function by name, with what a function holds."""
    if not isinstance(value, types.FunctionType) or opened == 0:
        return _name(value)
    nonlocals = {
        name: cell.cell_contents
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        if cell.cell_contents is not value
    }
    if opened == _OPENED:  # the network of `lambda x: net(x).logits` in a script
        used = {name: value.__globals__.get(name) for name in value.__code__.co_names}
        nonlocals |= {n: one for n, one in used.items() if isinstance(one, (nn.Module, Tensor))}
    held = [value.__defaults__, value.__kwdefaults__, nonlocals, vars(value)]
    if not any(held):
        return _name(value)
    return [_name(value), *(describe(one, opened - 1) for one in held)]


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None) or ""
    if module == "__mp_main__":  # what worker processes call the module of a script
        module = "__main__"
    if module.startswith("art_denoised."):  # files of a room may be parted or joined
        module = ".".join(module.split(".")[:2])
    return f"{module}.{getattr(value, '__qualname__', value)}"


def _flat(items: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict; extra state may be anything."""
    for name, value in items:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)):
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            yield from _flat([(f"{name}.{key}", part) for key, part in inner])
        else:
            yield f"{name}={_words(value)}", torch.zeros(0)


def _words(value: object) -> str:
    """Return the repr of an object without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in {**old, **new}:
        was, now, full = old.get(name), new.get(name), f"{prefix}{name}"
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _changes(was, now, f"{full}.")
        elif was != now:
            # A hash, or a mapping that the other side lacks, tells a reader nothing.
            opaque = any(isinstance(v, Mapping) or _is_hash(v) for v in (was, now))
            yield f"{full} differs" if opaque else f"{full} is {was!r}, not {now!r}"
