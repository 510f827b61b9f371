"""What a user names by a string: networks by factory, and devices."""

from __future__ import annotations

import importlib
import sys

import torch
from torch import nn

from art_denoised.checks import InputError


def load_module(name: str) -> nn.Module:
    """Call the function ``package.module:function`` and return the module that it makes.

    Args:
        name: Name of the function, which is found from the current folder too and is called
            without arguments.

    Raises:
        InputError: It cannot be imported, fails, or returns something else than a module.

    Example:
        >>> type(load_module("art_denoised.demo:digits_denoiser")).__name__
        'DnCNN'
    """
    module_name, colon, factory_name = name.partition(":")
    if not (colon and module_name and factory_name):
        raise InputError(f"network is {name!r}; give package.module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except Exception as error:  # whatever the module runs while it is imported
        kind = "" if isinstance(error, (ImportError, AttributeError)) else type(error).__name__
        reason = f"{kind}: {one_line(error)}" if kind else one_line(error)
        raise InputError(f"{name} cannot be imported: {reason}") from error
    try:
        module = factory()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name}() returned {type(module).__name__}; return an nn.Module")
    return module


def find_device(name: str) -> torch.device:
    """Return a device that works here.

    Args:
        name: Name of the device, as torch knows it; "auto" is a GPU if there is one, else the CPU.

    Raises:
        InputError: There is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name} cannot be used here: {one_line(error)}") from None
    return device


def one_line(error: BaseException) -> str:
    r"""Return the message of an error on one line, its type where it has none.

    Example:
        >>> one_line(ValueError("so\nmany lines")), one_line(ValueError())
        ('so many lines', 'ValueError')
    """
    return " ".join(str(error).split()) or type(error).__name__
