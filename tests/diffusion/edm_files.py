"""Files laid out as EDM's pickles, made without its code."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

SOURCE = "raise SystemExit('the source code in a file must never run')"


class Call:
    """Is pickled as a call of a function that may not exist."""

    def __init__(self, module: str, name: str, *args: Any) -> None:
        self.module, self.name, self.args = module, name, args

    def __reduce__(self):
        return getattr(sys.modules[self.module], self.name), self.args


def persistent(class_name: str, state: dict[str, Any]) -> Call:
    """An object as EDM's persistence class writes it."""
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name}
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", {**meta, "state": state})


def module(network: nn.Module, class_name: str, **state: Any) -> Any:
    """A module and its parts."""
    parts = OrderedDict((n, module(m, type(m).__name__)) for n, m in network.named_children())
    if isinstance(network, nn.ModuleDict):
        copy = nn.ModuleDict()
        copy._modules = parts
        return copy
    state = {"training": False, "_init_args": (), "_init_kwargs": {}, **state}
    state |= {"_parameters": network._parameters, "_buffers": network._buffers, "_modules": parts}
    state |= {"_non_persistent_buffers_set": set(), "skip_scale": np.sqrt(0.5)}
    return persistent(class_name, state)


def precond(network: nn.Module, config: dict[str, Any]) -> Any:
    """The EDMPrecond around a network."""
    owner = nn.Module()
    owner.model = network
    return module(owner, "EDMPrecond", _init_kwargs=config, sigma_min=0, sigma_max=float("inf"))


def write(path: Path, root: Any, protocol: int = 4) -> Path:
    """Pickle ``root`` while the modules that it names exist."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in (
            ("torch_utils.persistence", "_reconstruct_persistent_obj"),
            ("another.package", "run"),
        ):
            fake = types.ModuleType(name)
            stub = types.FunctionType((lambda *args: None).__code__, {}, function)
            stub.__module__, stub.__qualname__ = name, function
            setattr(fake, function, stub)
            patch.setitem(sys.modules, name.partition(".")[0], types.ModuleType("parent"))
            patch.setitem(sys.modules, name, fake)
        path.write_bytes(pickle.dumps(root, protocol))
    return path
