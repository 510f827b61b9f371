"""Checkpoints of denoisers; the architecture is inferred from the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from art_denoised.checks import InputError
from art_denoised.denoisers.architectures import DnCNN, MemNet, UNetDenoiser
from art_denoised.denoisers.one_shot import OneShotDenoiser
from art_denoised.diffusion.schedulers import find_scheduler
from art_denoised.models.loading import fitting_state, load_module, read_state_dict, strip_prefixes
from art_denoised.runs.journal import write_whole

_UNET_CONFIG = "unet_config"


def load_denoiser(path: Path | str) -> nn.Module:
    """Load a denoiser in eval mode; architecture and dtype are those of the checkpoint.

    Args:
        path: Checkpoint of `DnCNN` or `MemNet`, file of `save_denoiser`, or diffusers folder: with
            a scheduler a diffusion model (`OneShotDenoiser`), without one a UNet2DModel that
            predicts the noise (`UNetDenoiser`). Or ``package.module:function``, a function that
            returns a denoiser.

    Raises:
        InputError: The file cannot be read or holds none of these architectures, or the function
            fails.

    Example:
        >>> from art_denoised.demo import digits_denoiser  # loads its weights through this
        >>> type(digits_denoiser()).__name__
        'DnCNN'
    """
    if ":" in str(path) and not Path(path).exists():
        return load_module(str(path))
    path = Path(path)
    with torch.random.fork_rng(devices=[]):  # building a network draws weights, soon replaced
        if path.is_dir():
            kind = OneShotDenoiser if find_scheduler(path) else UNetDenoiser
            return kind.from_folder(path)
        state = strip_prefixes(read_state_dict(path), ())
        try:
            denoiser = _unet_from_metadata(path) or _infer_architecture(state)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            denoiser = None
    if denoiser is None:
        raise InputError(
            f"checkpoint {path} is not DnCNN, MemNet or a saved U-Net (first key {min(state)!r}); "
            "give package.module:function for another denoiser"
        )
    # assign: a certificate holds for the weights as saved, in their dtype
    denoiser.load_state_dict(fitting_state(denoiser, state, path), assign=True)
    return denoiser.eval()


def save_denoiser(denoiser: nn.Module, path: Path | str) -> None:
    """Write a denoiser to one .safetensors file that `load_denoiser` reads, all or nothing.

    Args:
        denoiser: `DnCNN`, `MemNet` or `UNetDenoiser`.
        path: Output file, ending in .safetensors.

    Raises:
        InputError: The denoiser has another type, the path another suffix, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_denoiser(DnCNN(1, depth=3, width=4), folder + "/a.safetensors")
        ...     load_denoiser(folder + "/a.safetensors").training
        False
    """
    path = Path(path)
    check_saveable(denoiser)
    if path.suffix != ".safetensors":
        raise InputError(f"the file is {path}; give one that ends in .safetensors")
    metadata = {"format": "pt"}
    if type(denoiser) is UNetDenoiser:
        metadata[_UNET_CONFIG] = json.dumps(_public(denoiser.unet.config))  # type: ignore[arg-type]
    state = {name: tensor.contiguous() for name, tensor in denoiser.state_dict().items()}
    write_whole(path, to_bytes(state, metadata))


def check_saveable(denoiser: nn.Module) -> None:
    """Check that `save_denoiser` can save a denoiser; call it before a training.

    Raises:
        InputError: The denoiser is not a `DnCNN`, `MemNet` or `UNetDenoiser`.

    Example:
        >>> check_saveable(DnCNN(1, depth=3, width=4))
    """
    if type(denoiser) not in (DnCNN, MemNet, UNetDenoiser):  # a subclass comes back as its base
        raise InputError(
            f"the denoiser is a {type(denoiser).__name__}; give DnCNN, MemNet or UNetDenoiser, or "
            "train it in Python and save its state_dict with safetensors.torch.save_file"
        )


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
