"""Code that torch.compile must leave alone, or that cannot be traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def is_traced() -> bool:
    """Whether calls are recorded, by ``torch.jit.trace``, ``torch.export`` or ``make_fx``."""
    is_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7
    if torch.jit.is_tracing() or is_exporting():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if torch.compiler.is_compiling():  # which leaves our noise alone, and cannot see what follows
        return False
    fx = sys.modules.get("torch.fx.experimental.proxy_tensor")  # slow to import, if nobody has
    return fx is not None and fx.get_proxy_mode() is not None


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Keep a function out of compiled graphs, as ``torch.compiler.disable`` does.

    That decorator imports the compiler where a function is defined, which takes seconds. This one
    leaves it until something is compiled.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)

    return run
