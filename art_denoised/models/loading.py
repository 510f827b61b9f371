"""What the command line names as strings: networks by factory, denoisers by file, devices."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.denoisers.checkpoints import load_denoiser


def load_module(option: str, name: str) -> nn.Module:
    """Call the factory ``package.module:factory``, found from the current folder too.

    Args:
        option: The option that named it, for messages.
        name: The factory; called without arguments.

    Raises:
        InputError: It cannot be imported, fails, or returns something else than a module.

    Example:
        >>> type(load_module("--model", "art_denoised.demo:digits_denoiser")).__name__
        'DnCNN'
    """
    module_name, colon, factory_name = name.partition(":")
    if not (colon and module_name and factory_name):
        raise InputError(f"{option} is {name!r}; give package.module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except Exception as error:  # whatever the module runs while it is imported
        kind = "" if isinstance(error, (ImportError, AttributeError)) else type(error).__name__
        reason = f"{kind}: {one_line(error)}" if kind else one_line(error)
        raise InputError(f"{option} {name} cannot be imported: {reason}") from error
    try:
        module = factory()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{option} {name}() failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{option} {name}() returned {type(module).__name__}, not an nn.Module")
    return module


def load_denoiser_option(name: str, option: str = "--denoiser") -> nn.Module:
    """Load a denoiser named by a checkpoint or a factory; a file of that name comes first.

    Raises:
        InputError: As for `load_module` and `load_denoiser`.

    Example:
        >>> type(load_denoiser_option("art_denoised.demo:digits_denoiser")).__name__
        'DnCNN'
    """
    if Path(name).exists() or ":" not in name:
        return load_denoiser(name)
    return load_module(option, name)


def find_device(name: str) -> torch.device:
    """Return a device that works here; ``auto`` is a GPU if there is one.

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
        raise InputError(f"--device {name} cannot be used here: {one_line(error)}") from None
    return device


def one_line(error: BaseException) -> str:
    r"""Return the message of an error on one line, its type where it has none.

    Example:
        >>> one_line(ValueError("so\nmany lines")), one_line(ValueError())
        ('so many lines', 'ValueError')
    """
    return " ".join(str(error).split()) or type(error).__name__
