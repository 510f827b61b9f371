"""Which names the Python code of a module's class uses, read and not run."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import nn

_ASKS = frozenset(("isinstance", "issubclass", "type", "hasattr", "callable"))  # of a proxy: wrong
_ASKS_BY_ATTRIBUTE = frozenset(("is_tensor", "is_floating_point", "is_complex", "__class__"))


def mentions(kind: type[nn.Module], word: str) -> bool:
    """Whether the code of a class, or of functions that it calls, uses a name with this word."""
    known = methods(kind)
    return any(_mentions(f, word) for f in [*known.values(), *_reached([*known.values()], known)])


def function_mentions(function: Any, word: str) -> bool:
    """Whether a function has this word in its name or, if it is no one of torch's, in its code."""
    if word in str(getattr(function, "__name__", function)).lower():
        return True
    return any(_mentions(f, word) for f in _reached([function], {}))


def _mentions(function: Any, word: str) -> bool:
    if isinstance(function, torch.jit.ScriptFunction):
        return word in str(function.graph)
    return any(word in name.lower() for name in _names(function.__code__))


def methods(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """Return the functions of a class that nn.Module does not have, by name."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    found = {n: getattr(f, "__func__", f) for c in reversed(own) for n, f in vars(c).items()}
    return {name: f for name, f in found.items() if isinstance(f, FunctionType)}


def calling(kind: type[nn.Module], names: frozenset[str]) -> list[str]:
    """Return the methods beside ``forward`` that use one of these names themselves."""
    return [
        name
        for name, f in methods(kind).items()
        if name != "forward" and not _is_dunder(name) and names & set(_names(f.__code__))
    ]


def asks_for_types(kind: type[nn.Module]) -> str | None:
    """Return what ``forward`` and the functions it calls use that asks what kind a value is."""
    start = cast(FunctionType, inspect.unwrap(kind.forward))
    for function in _reached([start], methods(kind)):
        if not isinstance(function, FunctionType):
            continue
        for code in _codes(function.__code__):
            for step in dis.get_instructions(code):
                by_name = step.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME"))
                if step.argval in (_ASKS if by_name else _ASKS_BY_ATTRIBUTE):
                    return str(step.argval)
    return None


def _reached(start: Sequence[Any], known: Mapping[str, FunctionType]) -> list[Any]:
    """Return those of ``start``, and what they call, that are Python's or scripted, not torch's.

    Args:
        start: Functions.
        known: What names mean before they are looked up beside the function that uses them.
    """
    reached: list[Any] = []
    waiting = [*start]
    for called in waiting:  # grows
        function = inspect.unwrap(called) if callable(called) else called
        scripted = isinstance(function, torch.jit.ScriptFunction)
        if not (scripted or isinstance(function, FunctionType)) or function in reached:
            continue
        if not scripted and (function.__module__ or "").startswith("torch."):
            continue
        reached.append(function)
        if not scripted:
            names = _names(function.__code__)
            waiting += [known.get(name, function.__globals__.get(name)) for name in names]
    return reached


def _names(code: CodeType) -> Iterator[str]:
    for part in _codes(code):
        yield from part.co_names


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and those of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
