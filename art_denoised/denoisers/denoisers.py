"""Denoisers: DnCNN, MemNet, a U-Net, and diffusion models in one step; and their checkpoints.

The architecture of a checkpoint is inferred from the file.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.folders import (
    embedded_classes,
    find_scheduler,
    is_published,
    load_diffusion,
    read_unet,
)
from art_denoised.diffusion.levels import SIGMA_DATA
from art_denoised.diffusion.model import DiffusionModel, checked_diffusion
from art_denoised.models.loading import (
    find_published,
    fitting_state,
    load_module,
    read_state_dict,
    strip_prefixes,
)
from art_denoised.runs.journal import write_whole

if TYPE_CHECKING:
    from art_denoised.types import Images, Sigmas

_NOTE = "art_denoised"  # one entry alone: of several the format writes the order at random
_UNET = "unet_config"


class DnCNN(nn.Module):
    """Residual convolutional denoiser: the network predicts the noise and subtracts it.

    Source: Zhang et al., "Beyond a Gaussian Denoiser" (TIP 2017, arXiv 1608.03981). The layer
    numbers and names are those of the denoised-smoothing release, so its checkpoints load as they
    are.

    Args:
        image_channels: Number of image channels: 1 for grey, 3 for colour.
        depth: Number of convolutions, at least 2; 17 in the release.
        width: Number of hidden channels; 64 in the release, 128 in its wide form.

    Raises:
        InputError: A value is too small.

    Example:
        >>> denoiser = DnCNN()
        >>> sum(p.numel() for p in denoiser.parameters())
        558400
        >>> denoiser(torch.rand(2, 3, 32, 32), 0.25).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, image_channels: int = 3, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        checks.count("image_channels", image_channels)
        checks.count("depth", depth, 2)
        checks.count("width", width)
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width, eps=1e-4, momentum=0.95),
                nn.ReLU(),
            ]
        layers.append(nn.Conv2d(width, image_channels, 3, padding=1, bias=False))
        self.dncnn = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight)

    def forward(self, x_noisy: Images, sigma: Sigmas | None = None) -> Images:
        """Return x_hat. The network is blind: ``sigma`` is accepted and not used."""
        x_noisy = checks.batch(x_noisy)
        return x_noisy - self.dncnn(x_noisy.to(checks.model_dtype(self, x_noisy.dtype)))


class MemNet(nn.Module):
    """Chain of memory blocks with dense connections and a global residual.

    Source: Tai et al., "MemNet: A Persistent Memory Network for Image Restoration" (ICCV 2017,
    arXiv 1708.02209). The names are those of the denoised-smoothing release.

    Args:
        image_channels: Number of image channels: 1 for grey, 3 for colour.
        width: Number of hidden channels; 64 in the release.
        memory_blocks: Number of memory blocks; 3 in the release.
        residual_blocks: Number of recursions in a memory block; 6 in the release.

    Raises:
        InputError: A value is below 1.

    Example:
        >>> denoiser = MemNet()
        >>> sum(p.numel() for p in denoiser.parameters())
        1436678
        >>> denoiser(torch.rand(1, 3, 16, 16), 0.25).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        image_channels: int = 3,
        width: int = 64,
        memory_blocks: int = 3,
        residual_blocks: int = 6,
    ) -> None:
        super().__init__()
        checks.count("image_channels", image_channels)
        checks.count("width", width)
        checks.count("memory_blocks", memory_blocks)
        checks.count("residual_blocks", residual_blocks)
        self.feature_extractor = _bn_relu_conv(image_channels, width)
        self.reconstructor = _bn_relu_conv(width, image_channels)
        self.dense_memory = nn.ModuleList(
            _MemoryBlock(width, residual_blocks, long_term=i + 1) for i in range(memory_blocks)
        )

    def forward(self, x_noisy: Images, sigma: Sigmas | None = None) -> Images:
        """Return x_hat. The network is blind: ``sigma`` is accepted and not used."""
        x_noisy = checks.batch(x_noisy)
        memories = [self.feature_extractor(x_noisy.to(checks.model_dtype(self, x_noisy.dtype)))]
        for block in self.dense_memory:
            memories.append(block(memories))
        return self.reconstructor(memories[-1]) + x_noisy


class UNetDenoiser(nn.Module):
    """A diffusers UNet2DModel that predicts the noise and is told the noise level.

    ``x_hat = x_noisy - sigma * unet(c_in * x_noisy, 1000 * c_noise)`` with c_in =
    1 / sqrt(sigma^2 + sigma_data^2) and c_noise = ln(sigma) / 4 (Karras et al., "EDM", NeurIPS
    2022, arXiv 2206.00364, table 1). A U-Net trained as a DDPM expects other timesteps and scales:
    load it as a diffusion model instead.

    Args:
        unet: Network, called as ``unet(sample, timestep).sample``.
        patch: Side of the squares of pixels that are folded into channels and back. The same U-Net
            then costs 1 / patch^2 as much; it has patch^2 times the channels of the images.

    Attributes:
        patch: Side of those squares; 1 where nothing is folded.

    Raises:
        InputError: The network is not a UNet2DModel, predicts other channels than it is given,
            needs class labels, or has a time embedding that takes no negative timesteps; or its
            channels cannot be unfolded.

    Example:
        >>> denoiser = UNetDenoiser.from_config(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        ...     down_block_types=("DownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
        ... )
        >>> denoiser(torch.rand(2, 1, 8, 8), torch.tensor([0.25, 0.5])).shape
        torch.Size([2, 1, 8, 8])
    """

    # Set on the instance only where pixels are folded: public attributes are part of a model's
    # identity, and that of all others is in logs that were written before there was a patch.
    patch: int = 1

    def __init__(self, unet: nn.Module, *, patch: int = 1) -> None:
        super().__init__()
        _check_unet(unet)
        self.unet = unet
        if checks.count("patch", patch) > 1:
            channels: int = unet.config.in_channels  # type: ignore
            if channels % patch**2:
                raise InputError(
                    f"patch is {patch}, but the U-Net has {channels} channels; give it a multiple "
                    f"of {patch**2}"
                )
            self.patch = patch

    @classmethod
    def from_config(cls, *, patch: int = 1, **config: Any) -> UNetDenoiser:
        """Build an untrained denoiser; other keyword arguments are those of UNet2DModel."""
        from diffusers import UNet2DModel

        return cls(UNet2DModel(**config), patch=patch)

    @classmethod
    def from_folder(cls, folder: Path | str) -> UNetDenoiser:
        """Load a diffusers folder (config.json and .safetensors) in its own dtype, in eval mode."""
        return cls(read_unet(Path(folder))).eval()

    def forward(self, x_noisy: Images, sigma: Sigmas) -> Images:
        """Return x_hat; ``sigma`` is positive, one number or one per image, in image units."""
        x_noisy = checks.batch(x_noisy)
        if any(side % self.patch for side in x_noisy.shape[2:]):
            raise InputError(
                f"the images have {x_noisy.shape[2]}x{x_noisy.shape[3]} pixels, which squares of "
                f"{self.patch}x{self.patch} do not fill; resize or pad them"
            )
        # In float32 at least: half precision would round the timestep to whole numbers.
        precision = torch.promote_types(x_noisy.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=precision, device=x_noisy.device)
        level = level.reshape(-1).expand(len(x_noisy))
        scale = level.reshape(-1, 1, 1, 1)
        c_in = (scale**2 + SIGMA_DATA**2).rsqrt()
        sample = (c_in * x_noisy).to(checks.model_dtype(self, x_noisy.dtype))
        folded = self.unet(F.pixel_unshuffle(sample, self.patch), 250 * level.log()).sample
        noise = F.pixel_shuffle(folded, self.patch)
        return (x_noisy - scale * noise).to(x_noisy.dtype)


class OneShotDenoiser(nn.Module):
    """The posterior mean of a diffusion model at the noise level of the certificate, clipped.

    The model is told t*, the smallest noise level of its training that is not below sigma; the
    noise on the image stays exactly sigma. So a certificate at sigma never rests on less noise
    than it states, and a model with few steps denoises a little too much, never too little.
    Certify at ``level(sigma)`` to lose nothing.

    Source: Carlini et al., "(Certified!!) Adversarial Robustness for Free!" (ICLR 2023, arXiv
    2206.10550), algorithm 1.

    Args:
        model: Diffusion model.

    Example:
        >>> from art_denoised.diffusion.preconditioning import Native
        >>> class Shrink(nn.Module):
        ...     def forward(self, x, sigma, y):
        ...         return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
        >>> denoiser = OneShotDenoiser(DiffusionModel(Shrink(), Native()))
        >>> denoiser(torch.rand(2, 1, 8, 8), 0.25).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.model = checked_diffusion(model)
        self.training = model.training

    @classmethod
    def from_folder(cls, folder: Path | str) -> OneShotDenoiser:
        """Load an unconditional diffusers folder, in eval mode."""
        if (embedded := embedded_classes(Path(folder))) is not None:
            raise InputError(
                f"the U-Net in {folder} is class-conditional ({embedded} class embeddings), and a "
                "denoiser is told no class; give an unconditional one, or if its last class is a "
                f"null class OneShotDenoiser(load_diffusion(..., classes={embedded - 1})) in Python"
            )
        return cls(load_diffusion(folder)).eval()

    def level(self, sigma: float) -> float:
        """Return the noise level that the model is told, at least ``sigma``; image units."""
        return self.model.at_least(sigma)

    def forward(self, x_noisy: Images, sigma: Sigmas) -> Images:
        """Return x_hat in [0, 1]; ``sigma`` is positive, one number or one per image."""
        if isinstance(sigma, Tensor) and sigma.ndim:
            level: Sigmas = torch.tensor([self.level(s) for s in sigma.tolist()]).to(x_noisy.device)
        else:
            level = self.level(float(sigma))
        x_hat: Images = self.model(x_noisy, level)
        return x_hat.clamp(0, 1)


class _MemoryBlock(nn.Module):
    """Residual blocks in a row, and a gate over their outputs and all earlier memories."""

    def __init__(self, width: int, residual_blocks: int, long_term: int) -> None:
        super().__init__()
        self.recursive_unit = nn.ModuleList(_ResidualBlock(width) for _ in range(residual_blocks))
        self.gate_unit = _bn_relu_conv((residual_blocks + long_term) * width, width, kernel=1)

    def forward(self, memories: list[Tensor]) -> Tensor:
        short_term = []
        x = memories[-1]
        for layer in self.recursive_unit:
            x = layer(x)
            short_term.append(x)
        gated: Tensor = self.gate_unit(torch.cat(short_term + memories, dim=1))
        return gated


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.relu_conv1 = _bn_relu_conv(width, width)
        self.relu_conv2 = _bn_relu_conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu_conv2(self.relu_conv1(x)) + x


def _bn_relu_conv(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    layers = OrderedDict(bn=nn.BatchNorm2d(in_channels), relu=nn.ReLU(), conv=conv)
    return nn.Sequential(layers)


def _check_unet(unet: nn.Module) -> None:
    from diffusers import UNet2DModel

    if not isinstance(unet, UNet2DModel):
        raise InputError(f"the network is a {type(unet).__name__}; give a diffusers UNet2DModel")
    config = unet.config
    if config.time_embedding_type != "positional":
        raise InputError(
            f"time_embedding_type is {config.time_embedding_type!r}; give 'positional', the only "
            "one that takes the negative timesteps 250 ln(sigma)"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise InputError("the U-Net needs class labels; give one without class embeddings")
    if config.in_channels != config.out_channels:
        raise InputError(
            f"the U-Net maps {config.in_channels} channels to {config.out_channels}; "
            "give one that predicts the noise and nothing else"
        )


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
