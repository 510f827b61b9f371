"""What determines the rows of a run, as JSON values that are the same in every process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from art_denoised.storage import weights_fingerprint

_OPENED = 3  # objects within objects that are looked into


def describe(value: Any, opened: int = _OPENED) -> Any:
    """Return options as JSON values without addresses in memory.

    Objects become their class and their attributes, functions their name with what they hold
    (defaults and closure; an edit of their body is not seen), tensors and arrays a hash.

    Args:
        value: Anything.
        opened: Objects within objects deeper than this become the name of their class.

    Example:
        >>> describe({"steps": 3, "loss": nn.ReLU, "at": (0.5, None)})
        {'steps': 3, 'loss': 'torch.nn.modules.activation.ReLU', 'at': [0.5, None]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _array(value)
    if isinstance(value, nn.Module):
        return {"weights": weights_fingerprint(value), "options": module_options(value)}
    if isinstance(value, Mapping):
        return {str(describe(key, opened)): describe(one, opened) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(one, opened) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((describe(one, opened) for one in value), key=json.dumps)
    if isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords, vars(value)]
        return [describe(part, opened) for part in parts]
    if isinstance(value, type) or inspect.isroutine(value):
        return _named(value, opened)
    held = attributes(value)
    if not held:
        words = repr(value)  # of a device, a data type, a path
        return words if " at 0x" not in words else _name(type(value))
    left = opened if is_dataclass(value) else opened - 1
    if left < 0:
        return _name(type(value))
    return {"type": _name(type(value)), **describe(held, left)}


def attributes(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, and the attributes of any other object.

    Example:
        >>> attributes(types.SimpleNamespace(steps=3))
        {'steps': 3}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return held | dict(getattr(value, "__dict__", {}))


def module_options(module: nn.Module) -> str:
    """Return a short hash of what determines a module beside its weights and buffers.

    That is the class of each part, and its public attributes: numbers, text, tensors, functions,
    dataclasses, and lists and mappings of them; of other objects the class alone.

    Example:
        >>> net = nn.Dropout(0.5)
        >>> before, net.p = module_options(net), 0.1
        >>> module_options(net) == before
        False
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        options = {
            key: describe(value, int(inspect.isroutine(value)))
            for key, value in vars(part).items()
            if not key.startswith("_") and key != "training"
        }
        entry = [name, _name(type(part)), options]
        digest.update(json.dumps(entry, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def data_fingerprint(pairs: Iterable[tuple[int, Tensor, int]]) -> str:
    """Return a short hash of (index, image, label) triples, in order.

    Example:
        >>> image = torch.zeros(1, 2, 2)
        >>> data_fingerprint([(0, image, 3)]) == data_fingerprint([(0, image, 4)])
        False
    """
    digest = hashlib.sha256()
    for index, image, label in pairs:
        digest.update(f"{int(index)} {int(label)} {_array(image)}".encode())
    return digest.hexdigest()[:16]


def _array(value: Any) -> str:
    array = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    raw = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(raw.tobytes()).hexdigest()[:16]
    return f"{array.dtype} {tuple(array.shape)} {digest}"


def _named(value: Any, opened: int) -> Any:
    """Return a class or function by name, with what a function holds."""
    if not isinstance(value, types.FunctionType) or opened == 0:
        return _name(value)
    nonlocals = {
        name: cell.cell_contents
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        if cell.cell_contents is not value
    }
    held = [value.__defaults__, value.__kwdefaults__, nonlocals, vars(value)]
    if not any(held):
        return _name(value)
    return [_name(value), *(describe(one, opened - 1) for one in held)]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None) or ''}.{getattr(value, '__qualname__', value)}"
