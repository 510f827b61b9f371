"""An inert reader of EDM's network pickles: what they hold becomes data, and nothing in them runs.

EDM writes each object as a call of ``torch_utils.persistence._reconstruct_persistent_obj`` on a
dictionary that holds the source code of its class, the name of the class and its state; its own
reader compiles that code. Here the name and the state are kept and the code is dropped. Whatever
else a pickle could do is not possible here:

- Only the opcodes of `_OPCODES` are known: those that build plain values, look up a name and call.
- A name stands for one of the few functions of `_NAMES`: those defined in this file, dict and set.
  Nothing is imported, whatever the file says.
- Storages of tensors, which are pickles inside the pickle, are left to ``torch.load`` with
  ``weights_only=True``, in the one format that EDM writes.
- The interpreter is the one in Python: the one in C reserves memory for any number that a file
  names as a place in its memo.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.checks import InputError

_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET"),
    *("LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
)
_OLD_FORMAT = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)  # how torch.save began until 1.6
_NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}  # of numpy, by struct's


class _RefusedError(Exception):
    """What the file holds that is not read."""


@dataclass(eq=False)
class _Object:
    """Stands for an object of the file."""

    kind: str
    state: Any


def read_edm_pickle(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of EDMPrecond and the averaged weights in a pickle of EDM.

    Whatever else than such a file needs is in it, is refused by name. Nothing of it has run.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the storages that it loads
            root = _Reader(file).load()
        return _network(root)
    except _RefusedError as error:
        reason = checks.one_line(error)[:160]
        raise InputError(
            f"{path} is not read, because it {reason}; give an intact file of EDM"
        ) from None
    # Bytes of a stranger may fail in any way, such as with too deep a nesting.
    except Exception as error:
        reason = checks.one_line(error)[:120]
        raise InputError(
            f"{path} is damaged or no pickle of EDM ({reason}); give an intact file"
        ) from None


def _network(root: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    network = root.get("ema") if isinstance(root, dict) else None
    if not isinstance(network, _Object):
        raise _RefusedError("holds no network under 'ema'")
    if network.kind != "EDMPrecond":
        raise _RefusedError(f"holds {network.kind[:60]!r} where only EDMPrecond is supported")
    if network.state.get("_init_args"):
        raise _RefusedError("gives arguments without their names")
    return dict(network.state["_init_kwargs"]), dict(_tensors(network, "", set()))


def _tensors(module: _Object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module and of its parts, by name."""
    if id(module) in seen:  # a tree that shares its branches is exponentially large
        raise _RefusedError(f"uses the module {prefix} twice")
    seen.add(id(module))
    tensors = {**module.state["_parameters"], **module.state["_buffers"]}
    for name, thing in {**tensors, **module.state["_modules"]}.items():
        if not re.fullmatch(r"\w{1,40}", name):
            raise _RefusedError(f"holds a part named {name[:40]!r}")
        if isinstance(thing, Tensor):
            yield f"{prefix}{name}", thing
        elif isinstance(thing, _Object):
            yield from _tensors(thing, f"{prefix}{name}.", seen)
        elif thing is not None:
            raise _RefusedError(f"holds a {type(thing).__name__} as {prefix}{name}")


class _Reader(pickle._Unpickler):
    """An unpickler that knows a few opcodes and a few names."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]

    def load(self) -> Any:
        """Return what the file holds, as plain values, tensors and stand-ins."""
        try:
            return super().load()
        except KeyError as error:
            if isinstance(error.args[0], int) and error.args[0] not in self.dispatch:
                raise _RefusedError(f"has the opcode {error.args[0]:#04x}") from None
            raise

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Return the function that a name stands for."""
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _RefusedError(f"names {module[:60]}.{name[:60]}") from None


def _build(reader: Any) -> None:
    """Give a stand-in its state."""
    state = reader.stack.pop()
    target = reader.stack[-1]
    if not isinstance(target, _Object):
        raise _RefusedError(f"sets the state of a {type(target).__name__}")
    target.state = state


def _newobj(reader: Any) -> None:
    """Make a stand-in for an object of a class."""
    args = reader.stack.pop()
    reader.stack[-1] = reader.stack[-1](*args)


_KNOWN = pickle._Unpickler.dispatch
_Reader.dispatch = {getattr(pickle, name)[0]: _KNOWN[getattr(pickle, name)[0]] for name in _OPCODES}
_Reader.dispatch |= {pickle.BUILD[0]: _build, pickle.NEWOBJ[0]: _newobj}


def _persistent(meta: Mapping[str, Any]) -> _Object:
    return _Object(str(meta["class_name"]), dict(meta["state"]))


def _storage(raw: bytes) -> Tensor:
    """Return the numbers of a storage, which torch.save wrote in its old format."""
    # Archives may unpack to any size, and torch before 2.6 runs what is in a tar.
    if not raw.startswith(_OLD_FORMAT) or tarfile.is_tarfile(io.BytesIO(raw)):
        raise _RefusedError("holds a storage in another format than EDM's")
    found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    if not isinstance(found, torch.storage.TypedStorage):
        raise _RefusedError(f"holds a {type(found).__name__} where a storage belongs")
    return torch.empty(0, dtype=found.dtype).set_(found._untyped_storage)


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    numbers = [offset, *size, *stride]
    if min(numbers) < 0 or last >= len(storage) or torch.Size(size).numel() > len(storage):
        raise _RefusedError(f"has a tensor of shape {size} over {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _dtype(code: str, *_: Any) -> _Object:
    return _Object(code, None)


def _scalar(dtype: _Object, raw: bytes) -> float:
    if dtype.kind not in _NUMBERS or ">" in dtype.state:
        raise _RefusedError(f"holds a number of numpy type {dtype.kind[:20]!r}")
    (number,) = struct.unpack(_NUMBERS[dtype.kind], raw)
    return float(number) if dtype.kind.startswith("f") else number


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.nn.modules.container", "ModuleDict"): lambda: _Object("Module", None),
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    ("builtins", "set"): set,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}
