"""What the command line names as strings: networks by factory, denoisers by file, devices."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.denoisers.checkpoints import load_denoiser
from art_denoised.models.weights import fitting_state, read_state_dict
from art_denoised.networks.activation_surgery import smooth_activations
from art_denoised.networks.activations import ParametricSoftplus, SmoothReLU
from art_denoised.networks.surgery import add_feature_denoising


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


def load_trained(option: str, name: str, weights: Path) -> nn.Module:
    """Call a factory and load what `art-denoised train-robust` made of its network, in eval mode.

    Blocks and activations are put in as the file says. It does not say which code to call: that is
    the caller's to name.

    Args:
        option: As for `load_module`.
        name: The factory.
        weights: A model.safetensors of train-robust, or other weights of the network as it is.

    Raises:
        InputError: As for `load_module`; or weights that cannot be read or do not fit.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from art_denoised.demo import digits_network
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     save_file(digits_network().state_dict(), path)
        ...     load_trained("--model", "art_denoised.demo:digits_network", path).training
        False
    """
    state = read_state_dict(weights)
    note: dict[str, Any] = {}
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            text = (file.metadata() or {}).get("art_denoised", "{}")
        try:
            note = _checked_note(json.loads(text))
        except (TypeError, ValueError, AttributeError):
            raise InputError(f"{weights} has a damaged note {text[:40]!r}") from None
    with torch.random.fork_rng(devices=[]):  # building draws weights, soon replaced
        model = change_network(load_module(option, name), note)
    model.load_state_dict(fitting_state(model, state, weights))
    return model.eval()


def _checked_note(note: Any) -> dict[str, Any]:
    """Return a note of train-robust.

    Raises:
        TypeError, ValueError, AttributeError: It holds what train-robust does not write.
    """
    names = ("activation", "feature_denoising", "where")
    if not all(isinstance(note.get(name), str | None) for name in names):
        raise TypeError
    if note.get("feature_denoising") and not note.get("input_shape"):
        raise ValueError
    if note.get("input_shape"):
        channels, height, width = (checks.count("input_shape", n) for n in note["input_shape"])
        note = {**note, "input_shape": (channels, height, width)}
    return dict(note)


def change_network(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """Return the model with its activations replaced and denoising blocks put in.

    Args:
        model: Any network.
        changes: As train-robust notes them, each or None: ``activation``, a name;
            ``feature_denoising``, an operation; ``where``, names joined by commas;
            ``input_shape``, of an image.

    Raises:
        InputError: As for `smooth_activations` and `add_feature_denoising`.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> model = change_network(digits_network(), {"activation": "silu"})
        >>> any(isinstance(module, torch.nn.SiLU) for module in model.modules())
        True
    """
    if activation := changes.get("activation"):
        others = {"softplus": ParametricSoftplus(), "smoothrelu": SmoothReLU()}
        model = smooth_activations(model, others.get(activation, activation))
    if operation := changes.get("feature_denoising"):
        where = changes.get("where") or "stages"
        model = add_feature_denoising(
            model,
            where.split(",") if "," in where else where,
            operation,
            input_shape=tuple(changes["input_shape"]),
        )
    return model


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
