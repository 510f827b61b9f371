"""Networks that `art-denoised train-robust` trained: changed as their files say, with weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.models.loading import fitting_state, read_state_dict
from art_denoised.networks.activation_surgery import smooth_activations
from art_denoised.networks.surgery import add_feature_denoising


def load_trained(network: nn.Module, weights: Path | str) -> nn.Module:
    """Return a copy of a network with the blocks, activations and weights of a file, in eval mode.

    Args:
        network: Network that was trained, as its own code builds it. The file says which blocks
            and activations to put in; which code to call is the caller's to name.
        weights: A model.safetensors of train-robust, or other weights of the network as it is.

    Raises:
        InputError: Weights that cannot be read or do not fit, or a damaged note in the file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from art_denoised.demo import digits_network
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     save_file(digits_network().state_dict(), path)
        ...     load_trained(digits_network(), path).training
        False
    """
    weights = Path(weights)
    state = read_state_dict(weights)
    with torch.random.fork_rng(devices=[]):  # blocks draw weights, which are replaced
        model = change_network(network, _note(weights) if weights.suffix == ".safetensors" else {})
    model.load_state_dict(fitting_state(model, state, weights))
    return model.eval()


def change_network(network: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a network with its activations replaced and denoising blocks put in.

    Args:
        network: Any network.
        changes: What train-robust notes in its files, each or None: ``activation``, a name;
            ``feature_denoising``, an operation; ``where``, names joined by commas;
            ``input_shape``, the shape of an image.

    Raises:
        InputError: See `smooth_activations` and `add_feature_denoising`.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> changes = {"activation": "silu", "input_shape": (1, 8, 8)}
        >>> model = change_network(digits_network(), changes)
        >>> any(isinstance(module, torch.nn.SiLU) for module in model.modules())
        True
    """
    model = copy.deepcopy(network)
    if activation := changes.get("activation"):
        model = smooth_activations(model, activation, input_shape=tuple(changes["input_shape"]))
    if operation := changes.get("feature_denoising"):
        where = changes.get("where") or "stages"
        model = add_feature_denoising(
            model,
            where.split(",") if "," in where else where,
            operation,
            input_shape=tuple(changes["input_shape"]),
        )
    return model


def _note(weights: Path) -> dict[str, Any]:
    """Return what a file says of its network; nothing if it has no note."""
    with safe_open(weights, "pt") as file:
        text = (file.metadata() or {}).get("art_denoised", "{}")
    try:
        return _checked(json.loads(text))
    except (TypeError, ValueError, AttributeError):
        raise InputError(
            f"{weights} has a damaged note {text[:40]!r}; train the network again"
        ) from None


def _checked(note: Any) -> dict[str, Any]:
    """Return a note in the form of train-robust.

    Raises:
        TypeError, ValueError, AttributeError: It holds what train-robust does not write.
    """
    names = ("activation", "feature_denoising", "where")
    if not all(isinstance(note.get(name), str | None) for name in names):
        raise TypeError
    if shape := note.get("input_shape"):
        channels, height, width = (checks.count("input_shape", n) for n in shape)
        note = {**note, "input_shape": (channels, height, width)}
    elif note.get("activation") or note.get("feature_denoising"):
        raise ValueError
    return dict(note)
