"""Code that a trace would make a constant of, found while it is traced."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_VALUES = (
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__),
    *(Tensor.__float__, Tensor.__int__, Tensor.__index__),
)


class UntraceableError(Exception):
    """The forward of a module cannot be traced; says why."""


class NoValues(TorchFunctionMode):
    """Refuses to read values of tensors, with an UntraceableError."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, if it is none of those."""
        if func in _VALUES:
            raise UntraceableError("it reads the value of a tensor, which a trace would keep")
        return func(*args, **kwargs or {})


@contextmanager
def no_draws() -> Iterator[None]:
    """Put the global random states back at the end, and refuse code that moved one.

    Raises:
        UntraceableError: torch's, Python's or numpy's state moved.
    """
    cuda = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    before = _states(cuda)
    try:
        yield
        moved = _bytes(_states(cuda)) != _bytes(before)
    finally:
        ours, devices, python, numpy = before
        torch.set_rng_state(ours)
        torch.cuda.set_rng_state_all(devices)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
    if moved:
        raise UntraceableError("it draws at random, and a trace would keep the one draw")


def _states(cuda: bool) -> tuple[Tensor, list[Tensor], Any, Any]:
    devices = torch.cuda.get_rng_state_all() if cuda else []
    return torch.get_rng_state(), devices, random.getstate(), np.random.get_state()  # noqa: NPY002


def _bytes(states: tuple[Tensor, list[Tensor], Any, Any]) -> tuple[Any, ...]:
    """Return states that can be compared."""
    ours, devices, python, numpy = states
    torchs = [state.numpy().tobytes() for state in (ours, *devices)]
    return torchs, python, [np.asarray(part).tobytes() for part in numpy]
