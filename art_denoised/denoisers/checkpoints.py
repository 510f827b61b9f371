"""Checkpoints of denoisers; the architecture is inferred from the file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.denoisers.architectures import DnCNN, MemNet, OneShotDenoiser, UNetDenoiser
from art_denoised.diffusion.folders import load_diffusion
from art_denoised.diffusion.published import is_published
from art_denoised.diffusion.schedulers import find_scheduler
from art_denoised.models.loading import (
    find_published,
    fitting_state,
    load_module,
    read_state_dict,
    strip_prefixes,
)
from art_denoised.runs.journal import write_whole

_NOTE = "art_denoised"  # one entry alone: of several the format writes the order at random

_UNET = "unet_config"


def load_denoiser(path: Path | str, *, sigma: float | None = None) -> nn.Module:
    """Load a denoiser in eval mode; architecture and dtype are those of the checkpoint.

    Args:
        path: Checkpoint of `DnCNN` or `MemNet`, file of `save_denoiser`, or diffusers folder: with
            a scheduler a diffusion model (`OneShotDenoiser`), without one a UNet2DModel that
            predicts the noise (`UNetDenoiser`). Or ``package.module:function``, a function that
            returns a denoiser; or a file of OpenAI or EDM that `load_diffusion` knows by its name,
            such as 256x256_diffusion_uncond.pt; or ``art-denoised:cifar10-hybrid-0.25``, one of
            the weights that results/weights.json of a clone lists.
        sigma: Noise level that the denoiser is used at. If a file of `save_denoiser` says that it
            was trained for others, a warning does so too; certificates hold, but are small.

    Raises:
        InputError: The file cannot be read or holds none of these architectures, or the function
            fails.

    Example:
        >>> from art_denoised.demo import digits_denoiser  # loads its weights through this
        >>> type(digits_denoiser()).__name__
        'DnCNN'
    """
    path = find_published(path)
    if ":" in str(path) and not Path(path).exists():
        return load_module(str(path))
    path = Path(path)
    with torch.random.fork_rng(devices=[]):  # building a network draws weights, soon replaced
        if path.exists() and is_published(path, None):
            return OneShotDenoiser(load_diffusion(path)).eval()
        if path.is_dir():
            kind = OneShotDenoiser if find_scheduler(path) else UNetDenoiser
            return kind.from_folder(path)
        state, note = strip_prefixes(read_state_dict(path), ()), _read_note(path)
        try:
            denoiser = _infer_architecture(state, note)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            denoiser = None
    if denoiser is None:
        raise InputError(
            f"checkpoint {path} is not DnCNN, MemNet or a saved U-Net (first key {min(state)!r}); "
            "give package.module:function for another denoiser"
        )
    if note.get("sigma") and sigma is not None:
        _compare(path, note["sigma"], checks.sigma(sigma))
    # assign: a certificate holds for the weights as saved, in their dtype
    denoiser.load_state_dict(fitting_state(denoiser, state, path), assign=True)
    return denoiser.eval()


def save_denoiser(
    denoiser: nn.Module, path: Path | str, *, sigma: float | tuple[float, float] | None = None
) -> None:
    """Write a denoiser to one .safetensors file that `load_denoiser` reads, all or nothing.

    Args:
        denoiser: `DnCNN`, `MemNet` or `UNetDenoiser`.
        path: Output file, ending in .safetensors.
        sigma: Noise level that it was trained for, or the lowest and the highest; None: not said.

    Raises:
        InputError: The denoiser has another type, the path another suffix, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_denoiser(DnCNN(1, depth=3, width=4), folder + "/a.safetensors", sigma=0.25)
        ...     load_denoiser(folder + "/a.safetensors").training
        False
    """
    path = Path(path)
    check_saveable(denoiser)
    if path.suffix != ".safetensors":
        raise InputError(f"the file is {path}; give one that ends in .safetensors")
    note: dict[str, Any] = {}
    if sigma is not None:
        note["sigma"] = [checks.sigma(s) for s in (sigma if isinstance(sigma, tuple) else [sigma])]
    if isinstance(denoiser, UNetDenoiser):
        config: Mapping[str, Any] = denoiser.unet.config  # type: ignore[assignment]
        # Without the notes that diffusers keeps, paths of this machine among them.
        note["unet"] = {name: value for name, value in config.items() if name[0] != "_"}
        if denoiser.patch > 1:
            note["patch"] = denoiser.patch
    state = {name: tensor.contiguous() for name, tensor in denoiser.state_dict().items()}
    write_whole(path, to_bytes(state, {_NOTE: json.dumps(note)}))


def check_saveable(denoiser: nn.Module) -> None:
    """Check that `save_denoiser` can save a denoiser; call it before a training."""
    if type(denoiser) not in (DnCNN, MemNet, UNetDenoiser):  # a subclass comes back as its base
        raise InputError(
            f"the denoiser is a {type(denoiser).__name__}; give DnCNN, MemNet or UNetDenoiser, or "
            "train it in Python and save its state_dict with safetensors.torch.save_file"
        )


def _read_note(path: Path) -> dict[str, Any]:
    """Return what `save_denoiser` wrote beside the weights; empty for files of others."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        held = file.metadata() or {}
    # Files of before noises were noted hold the configuration of a U-Net alone.
    text = held.get(_NOTE, f'{{"unet": {held[_UNET]}}}' if _UNET in held else "{}")
    try:
        note = dict(json.loads(text))
        if "sigma" in note:
            note["sigma"] = [checks.sigma(level) for level in note["sigma"]]
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: its note is {text[:80]!r}") from None
    return note


def _compare(path: Path, trained: Sequence[float], sigma: float) -> None:
    """Warn if a denoiser was trained for other noise levels than the one it is used at."""
    low, high = min(trained), max(trained)
    if not low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6):
        levels = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        warnings.warn(
            f"the denoiser in {path} was trained for sigma {levels}, but sigma is {sigma:g}; give "
            "one that was trained for it, or use it at its own",
            stacklevel=3,
        )


def _infer_architecture(state: Mapping[str, Tensor], note: Mapping[str, Any]) -> nn.Module | None:
    if "unet" in note:
        return UNetDenoiser.from_config(patch=note.get("patch", 1), **note["unet"])
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
