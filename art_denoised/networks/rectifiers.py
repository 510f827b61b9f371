"""Which rectifiers a forward pass really runs, counted where torch dispatches them."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from art_denoised.checks import InputError
from art_denoised.networks import trial
from art_denoised.networks.trial import Shape

_RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
_HARDTANH = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)


def count_rectifiers(model: nn.Module, input_shape: Shape = (3, 64, 64)) -> dict[str, int]:
    """Count the calls of ReLU and ReLU6 in one forward pass, in the mode that the model is in.

    A copy of the model is run on two images of noise, so that functional calls count like modules.
    On the meta device this is free. `smooth_activations` uses the same count.

    Args:
        model: Any network.
        input_shape: Shape of an image that the model takes.

    Returns:
        Number of calls by the name of the module that makes them; "" is the model itself.

    Raises:
        InputError: The model cannot take such images.

    Example:
        >>> from torchvision.models import densenet121
        >>> with torch.device("meta"):
        ...     counts = count_rectifiers(densenet121())
        >>> sum(counts.values()), counts[""]  # 120 modules, and one functional call
        (121, 1)
    """
    return dict(watch(model, input_shape, training=model.training).rectifiers)


class RunError(InputError):
    """A model failed; ``module`` is the name of the module that was running."""

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What one forward pass does, seen from hooks on every module.

    Attributes:
        rectifiers: Number of rectifiers that were dispatched, by the innermost module running.
        given: For each module that is not torch's, the arguments with a default that each of its
            calls gave another value.
        repeated: Modules that one call of another module called more than once.
        result: What the model returned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rectifiers: Counter[str] = Counter()
        self.given: dict[str, set[frozenset[str]]] = {}
        self.repeated: set[str] = set()
        self.result: Any = None
        self._running: list[tuple[str, set[str]]] = [("", set())]  # names, and what they called
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(self._leave)

    @property
    def running(self) -> str:
        """Return the name of the innermost module that is running, or that has failed."""
        return self._running[-1][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation if it is a rectifier, and run it."""
        # ReLU6 arrives as hardtanh(x, 0, 6).
        if func in _RELU or (func in _HARDTANH and tuple(args[1:]) == (0, 6)):
            self.rectifiers[self.running] += 1
        return func(*args, **(kwargs or {}))

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        called = self._running[-1][1]
        if name in called:
            self.repeated.add(name)
        called.add(name)
        self._running.append((name, set()))
        if not is_from_torch(module):
            self.given.setdefault(name, set()).add(_given(module, args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


def watch(model: nn.Module, input_shape: Shape, *, training: bool) -> Watch:
    """Run a copy of a model on two images of noise, and return what was seen.

    Raises:
        RunError: The model fails.
    """
    model = copy.deepcopy(model)
    watched = Watch(model)
    try:
        with watched:
            watched.result = trial.run(model, input_shape, images=2, training=training)
    except InputError as error:
        raise RunError(str(error), watched.running) from error
    return watched


def is_from_torch(module: nn.Module) -> bool:
    """Whether the class of a module comes with torch."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def _given(module: nn.Module, args: Any, kwargs: Any) -> frozenset[str]:
    """Return the arguments that have a default and get another value in this call."""
    signature = inspect.signature(module.forward)
    given = signature.bind(*args, **kwargs).arguments
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    return frozenset(n for n in defaults if n in given and given[n] is not defaults[n])
