"""What a run depends on, as JSON values that are equal in every process, and their comparison.

Headers, resuming and joining runs in a report all compare these values, so that "the function that
was attacked is the function that was certified" is a comparison of two mappings.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import platform
import re
import types
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OPENED = 3  # objects inside objects that are looked into
_HASH = re.compile(r"[0-9a-f]{16}")
_PACKAGES = ("torch", "numpy", "art-denoised")
_version = functools.cache(metadata.version)  # which reads a file
_BEGUN: ContextVar[frozenset[int]] = ContextVar("begun", default=frozenset())  # ids of modules


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
        with contextlib.suppress(metadata.PackageNotFoundError):
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
