"""Checkpoints: reading them without executing anything, and finding out what they hold."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from art_denoised.checks import InputError
from art_denoised.denoisers.dncnn import DnCNN
from art_denoised.denoisers.memnet import MemNet
from art_denoised.denoisers.one_shot import OneShotDenoiser
from art_denoised.denoisers.unet import UNetDenoiser
from art_denoised.diffusion.loading import find_scheduler
from art_denoised.storage import write_whole

# First bytes of what is a pickle: the zip that torch.save writes, or a bare one.
_PICKLES = (b"PK", b"\x80")
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
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    ):
        raise InputError(f"checkpoint {path} holds no state dict; save model.state_dict()")
    return dict(found)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"checkpoint {path} is no safetensors file: {error}") from None


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():  # about what is refused below anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            is_pickle = file.read(2).startswith(_PICKLES)
        if is_pickle and "weights only" in str(error).lower():
            raise InputError(
                f"checkpoint {path} needs unsafe unpickling, which could run any code; "
                "where you trust it, convert its state dict to safetensors"
            ) from None
    except PermissionError:
        raise InputError(f"checkpoint {path} cannot be read; check its permissions") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        pass  # the ways in which a file that is cut off or of another format fails
    raise InputError(f"checkpoint {path} is damaged or of another format; give an intact copy")


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into a module of your own, prefixes ``module.`` and ``1.`` stripped.

    Args:
        module: Receives the weights in its own dtype; untouched where they do not fit.
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
    module.load_state_dict(_fitting_state(module, read_state_dict(path), path))


def _fitting_state(
    module: nn.Module, state: dict[str, Tensor], path: Path | str
) -> dict[str, Tensor]:
    """Return ``state`` under the names of ``module``, or raise InputError where it does not fit."""
    own = module.state_dict()
    state = _strip_prefixes(state, own.keys())
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
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise InputError(
                f"checkpoint {path} holds {name} as {state[name].dtype}; "
                "give floating-point weights"
            )
    return state


def load_denoiser(path: Path | str) -> nn.Module:
    """Load a denoiser in eval mode, its architecture and dtype read off the checkpoint.

    Args:
        path: A checkpoint of `DnCNN` or `MemNet` in any of the field's forms, a file of
            `save_denoiser`; a diffusers folder with a scheduler (`OneShotDenoiser`), or without, of
            a UNet2DModel that predicts the noise (`UNetDenoiser`).

    Raises:
        InputError: Unreadable, or of none of these architectures.

    Example:
        >>> from art_denoised.demo import digits_denoiser  # loads its weights through this
        >>> type(digits_denoiser()).__name__
        'DnCNN'
    """
    path = Path(path)
    with torch.random.fork_rng(devices=[]):  # building a network draws weights, soon replaced
        if path.is_dir():
            kind = OneShotDenoiser if find_scheduler(path) else UNetDenoiser
            return kind.from_folder(path)
        state = _strip_prefixes(read_state_dict(path), ())
        try:
            denoiser = _unet_from_metadata(path) or _infer_architecture(state)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            denoiser = None
    if denoiser is None:
        raise InputError(
            f"checkpoint {path} is neither DnCNN, MemNet nor a saved U-Net (first key "
            f"{min(state)!r}); give package.module:factory for another denoiser"
        )
    # assign: a certificate holds for the weights as saved, in their dtype
    denoiser.load_state_dict(_fitting_state(denoiser, state, path), assign=True)
    return denoiser.eval()


def save_denoiser(denoiser: nn.Module, path: Path | str) -> None:
    """Write a denoiser to one .safetensors file that `load_denoiser` reads, all or nothing.

    Raises:
        InputError: Another type than DnCNN, MemNet or UNetDenoiser, another suffix, or a place that
            cannot be written.

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
    if type(denoiser) is UNetDenoiser:
        metadata[_UNET_CONFIG] = json.dumps(_public(denoiser.unet.config))  # type: ignore[arg-type]
    elif type(denoiser) not in (DnCNN, MemNet):  # a subclass would come back as its base
        raise InputError(
            f"{type(denoiser).__name__} is not DnCNN, MemNet or UNetDenoiser; save its state_dict "
            "with safetensors.torch.save_file"
        )
    state = {name: tensor.contiguous() for name, tensor in denoiser.state_dict().items()}
    write_whole(path, to_bytes(state, metadata))


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
    return UNetDenoiser.from_config(**_public(json.loads(config)))


def _public(config: Mapping[str, object]) -> dict[str, object]:
    """Drop the notes that diffusers keeps in a configuration, paths of this machine among them."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _infer_architecture(state: Mapping[str, Tensor]) -> nn.Module | None:
    # Layers are counted, not read off the largest index: a file cannot ask for more than it holds.
    if "dncnn.0.weight" in state:
        width, channels = state["dncnn.0.weight"].shape[:2]
        depth = sum(tensor.ndim == 4 for tensor in state.values())
        return DnCNN(channels, depth, width)
    if "feature_extractor.conv.weight" in state:
        width, channels = state["feature_extractor.conv.weight"].shape[:2]
        places = [name.split(".") for name in state if ".recursive_unit." in name]
        memory_blocks = len({place[1] for place in places})
        residual_blocks = len({place[3] for place in places})
        return MemNet(channels, width, memory_blocks, residual_blocks)
    return None
