"""Checkpoints: reading them without executing anything, and finding out what they hold."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from art_denoised.checks import InputError
from art_denoised.denoisers.dncnn import DnCNN
from art_denoised.denoisers.memnet import MemNet
from art_denoised.denoisers.unet import UNetDenoiser

# A Sequential(normalise, network) numbers its network 1; DataParallel adds "module.".
_PREFIXES = ("module.", "1.")
_UNET_CONFIG = "unet_config"


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read named tensors from a .safetensors file or a torch checkpoint, executing nothing.

    Args:
        path: A .safetensors file, or a file of torch.save (.pt, .pth, .tar) that holds a state
            dict or a dictionary with one under ``state_dict``.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        InputError: The file is missing, damaged, holds no tensors, or needs unsafe unpickling.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, folder + "/a.pth.tar")
        ...     read_state_dict(folder + "/a.pth.tar")
        {'w': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give a file")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not (
        isinstance(found, Mapping)
        and found
        and all(isinstance(value, Tensor) for value in found.values())
    ):
        raise InputError(f"checkpoint {path} holds no state dict; save model.state_dict()")
    return dict(found)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"checkpoint {path} is no safetensors file: {error}") from None


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower().replace(" ", "_"):
            raise InputError(f"checkpoint {path} is damaged or of another format") from None
        raise InputError(
            f"checkpoint {path} needs unsafe unpickling, which could run any code; "
            "where you trust it, convert its state dict to safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise InputError(f"checkpoint {path} is damaged or of another format") from None


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into a module of your own, prefixes ``module.`` and ``1.`` stripped.

    Args:
        module: Receives the weights; untouched where they do not fit.
        path: As for `read_state_dict`.

    Raises:
        InputError: Unreadable, or names or shapes that do not match.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"1.module." + k: v for k, v in layer.state_dict().items()},
        ...                folder + "/a.pth")
        ...     load_weights(layer, folder + "/a.pth")
    """
    own = module.state_dict()
    state = _strip_prefixes(read_state_dict(path), own.keys())
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} (first {names[0]!r})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise InputError(
            f"checkpoint {path} does not match {type(module).__name__}: keys "
            f"{' and '.join(parts)}; give the architecture that was trained"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"checkpoint {path} does not match {type(module).__name__}: {name} has shape "
                f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            )
    module.load_state_dict(state)


def load_denoiser(path: Path | str) -> nn.Module:
    """Load a denoiser, its architecture read off the checkpoint, in eval mode.

    Args:
        path: A checkpoint of `DnCNN` or `MemNet` in any of the field's forms, a file of
            `save_denoiser`, or a diffusers folder of a UNet2DModel that predicts the noise.

    Raises:
        InputError: Unreadable, or of none of these architectures.

    Example:
        >>> from art_denoised.demo import digits_denoiser  # loads its weights through this
        >>> type(digits_denoiser()).__name__
        'DnCNN'
    """
    path = Path(path)
    if path.is_dir():
        return UNetDenoiser.from_folder(path)
    state = read_state_dict(path)
    names = _strip_prefixes(state, ())
    try:
        denoiser = _unet_from_metadata(path) or _infer_architecture(names)
    except (KeyError, IndexError, TypeError, ValueError):
        denoiser = None
    if denoiser is None:
        raise InputError(
            f"checkpoint {path} is neither DnCNN, MemNet nor a saved U-Net (first key "
            f"{min(state)!r}); give package.module:factory for another denoiser"
        )
    load_weights(denoiser, path)
    return denoiser.eval()


def save_denoiser(denoiser: nn.Module, path: Path | str) -> None:
    """Write a denoiser to one .safetensors file that `load_denoiser` reads, all or nothing.

    Raises:
        InputError: Another type than DnCNN, MemNet or UNetDenoiser, or another suffix.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_denoiser(DnCNN(1, depth=3, width=4), folder + "/a.safetensors")
        ...     load_denoiser(folder + "/a.safetensors").training
        False
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} does not end in .safetensors; weights are saved in no other form")
    metadata = {"format": "pt"}
    if isinstance(denoiser, UNetDenoiser):
        metadata[_UNET_CONFIG] = json.dumps(dict(denoiser.unet.config))  # type: ignore[arg-type]
    elif not isinstance(denoiser, (DnCNN, MemNet)):
        raise InputError(
            f"{type(denoiser).__name__} is not DnCNN, MemNet or UNetDenoiser; save its state_dict "
            "with safetensors.torch.save_file"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        state = {name: tensor.contiguous() for name, tensor in denoiser.state_dict().items()}
        save_file(state, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _strip_prefixes(state: dict[str, Tensor], wanted: object) -> dict[str, Tensor]:
    """Strip known prefixes that all names share, until the names are those wanted."""
    while state.keys() != wanted:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                break
        else:
            break
    return state


def _unet_from_metadata(path: Path) -> nn.Module | None:
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        config = (file.metadata() or {}).get(_UNET_CONFIG)
    if config is None:
        return None
    options = {name: value for name, value in json.loads(config).items() if name[0] != "_"}
    return UNetDenoiser.from_config(**options)


def _infer_architecture(state: Mapping[str, Tensor]) -> nn.Module | None:
    if "dncnn.0.weight" in state:
        width, channels = state["dncnn.0.weight"].shape[:2]
        last = max(int(name.split(".")[1]) for name in state)
        return DnCNN(channels, depth=(last - 2) // 3 + 2, width=width)
    if "feature_extractor.conv.weight" in state:
        width, channels = state["feature_extractor.conv.weight"].shape[:2]
        places = [name.split(".") for name in state if ".recursive_unit." in name]
        memory_blocks = 1 + max(int(place[1]) for place in places)
        residual_blocks = 1 + max(int(place[3]) for place in places)
        return MemNet(channels, width, memory_blocks, residual_blocks)
    return None
