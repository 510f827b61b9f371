"""Diffusion models from diffusers folders, the hub, and files of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.families import DDPM, EDM, Family, Flow
from art_denoised.diffusion.hub import fetch
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.unet import UNetNetwork
from art_denoised.models.weights import fitting_state, read_state_dict

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCHEDULER = "scheduler_config.json"
_EXTRA = "art_denoised.json"  # what diffusers has no place for


def load_diffusion(
    source: Path | str,
    *,
    classes: int | None = None,
    into: DiffusionModel | None = None,
    revision: str | None = None,
) -> DiffusionModel:
    """Load a diffusion model, in eval mode; nothing is executed, no pickle is read.

    Args:
        source: A diffusers folder, a repository "owner/name" on the Hugging Face hub in that form,
            or a file of weights. The folder is a pipeline with ``unet`` and ``scheduler``, or holds
            config.json, weights in safetensors and scheduler_config.json itself. DDPM-like
            schedulers (with betas) of all three predictions, EDM and flow-matching ones are
            understood. A file is safetensors, or a state dict by torch.save.
        classes: Number of classes of a conditional U-Net. If it embeds one more, that is the null
            class.
        into: For a file of weights: the model that it belongs to, which receives them. The names
            are those of the model or of its network.
        revision: For the hub: branch, tag or commit.

    Raises:
        InputError: Missing or damaged files, weights that are not safetensors, a consistency or
            latent model, a scheduler that is not known, classes that do not fit the U-Net, or
            weights that do not fit the model.

    Example:
        >>> import tempfile
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        ...     down_block_types=("DownBlock2D", "DownBlock2D"),
        ...     up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     unet.save_pretrained(folder)
        ...     DDPMScheduler().save_pretrained(folder)
        ...     model = load_diffusion(folder)
        ...     torch.save(model.state_dict(), folder + "/weights.pt")
        ...     again = load_diffusion(folder + "/weights.pt", into=model)
        >>> model(torch.rand(2, 1, 8, 8), 0.25).shape
        torch.Size([2, 1, 8, 8])
    """
    folder = Path(source)
    if folder.is_file():
        return _from_file(folder, classes, into)
    if into is not None:
        raise InputError(f"{source} is no file of weights; give one, or no model to load into")
    if not folder.is_dir():
        folder = fetch(str(source), revision)
    _refuse_latents(folder)
    family = read_family(folder)
    unet = read_unet(folder / "unet" if (folder / "unet").is_dir() else folder)
    embedded = unet.config.num_class_embeds  # type: ignore[union-attr]
    if classes is None and embedded is not None:
        raise InputError(
            f"the U-Net in {folder} embeds {embedded} classes; say how many of them are classes "
            "(one more is a null class)"
        )
    if classes is not None and embedded not in (classes, classes + 1):
        raise InputError(
            f"classes is {classes}, but the U-Net in {folder} embeds {embedded or 'none'}; give "
            "that number, or one less if the last is a null class"
        )
    patch, image_range = read_extra(folder)
    channels = unet.config.in_channels, unet.config.out_channels  # type: ignore[union-attr]
    if channels[0] != channels[1]:
        raise InputError(
            f"the U-Net in {folder} maps {channels[0]} channels to {channels[1]}; one that also "
            "returns variances, or takes latents, is not supported"
        )
    return DiffusionModel(
        UNetNetwork(unet, patch=patch),
        family,
        classes=classes,
        null_class=classes if embedded is not None and embedded != classes else None,
        image_range=image_range,
    ).eval()


def _from_file(path: Path, classes: int | None, into: DiffusionModel | None) -> DiffusionModel:
    if into is None:
        raise InputError(
            f"{path} is a file of weights and does not say which network they are of; give "
            "into=DiffusionModel(network, family, ...)"
        )
    if classes not in (None, into.classes):
        raise InputError(f"classes is {classes}, but the model given has {into.classes}")
    state = read_state_dict(path)
    owner = into if state.keys() <= into.state_dict().keys() else into.network
    owner.load_state_dict(fitting_state(owner, state, path))
    return into.eval()


def save_diffusion(model: DiffusionModel, folder: Path | str) -> None:
    """Write a diffusion model of the family EDM to a diffusers folder that `load_diffusion` reads.

    Args:
        model: Over a UNet2DModel, as `unet_diffusion` and `load_diffusion` make it.
        folder: Gets ``unet`` and ``scheduler``.

    Raises:
        InputError: Another network or family, or a null class that is not the number of classes.

    Example:
        >>> import tempfile
        >>> from art_denoised.diffusion.unet import unet_diffusion
        >>> model = unet_diffusion(1, 8, classes=10, widths=(8, 16)).eval()
        >>> x, y = torch.rand(2, 1, 8, 8), torch.tensor([3, 10])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_diffusion(model, folder)
        ...     bool(torch.equal(load_diffusion(folder, classes=10)(x, 0.5, y), model(x, 0.5, y)))
        True
    """
    from diffusers import EDMEulerScheduler

    family = model.family
    if not isinstance(model.network, UNetNetwork) or not isinstance(family, EDM):
        raise InputError(
            f"the model is a {type(model.network).__name__} of family {type(family).__name__}; "
            "only U-Nets of diffusers of family EDM are saved so; use safetensors for others"
        )
    if model.null_class not in (None, model.classes):
        raise InputError(
            f"null_class is {model.null_class}, which the format has no place for; give it the "
            f"index {model.classes}"
        )
    scheduler = EDMEulerScheduler(
        sigma_data=family.sigma_data, sigma_min=family.sigma_min, sigma_max=family.sigma_max
    )
    model.network.unet.save_pretrained(Path(folder, "unet"))
    scheduler.save_pretrained(Path(folder, "scheduler"))
    extra = {"patch": model.network.patch, "image_range": list(model.image_range)}
    Path(folder, _EXTRA).write_text(json.dumps(extra) + "\n")


def read_extra(folder: Path) -> tuple[int, tuple[float, float]]:
    """Return the patch and the image range that `save_diffusion` noted beside the U-Net.

    Raises:
        InputError: A note that cannot be read.
    """
    path = folder / _EXTRA
    extra: dict[str, Any] = {}
    try:
        if path.is_file():
            extra = json.loads(path.read_text())
        low, high = map(float, extra.get("image_range", (-1, 1)))
        return checks.count("patch", extra.get("patch", 1)), (low, high)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def read_family(folder: Path) -> Family:
    """Return the family that a folder's scheduler_config.json describes.

    Raises:
        InputError: No such file, or a scheduler that no E[x | x_noisy] follows from.
    """
    path = find_scheduler(folder)
    if path is None:
        raise InputError(
            f"{folder} holds no scheduler_config.json; save the scheduler of the training there"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        name = str(config.get("_class_name", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if name.startswith(("CMStochastic", "LCM")):
        raise InputError(
            f"{path} is of a consistency model, which jumps to one possible image and not to "
            "the mean of all; give a diffusion model"
        )
    try:
        return _family(path, name, config)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _family(path: Path, name: str, config: dict[str, Any]) -> Family:
    if "FlowMatch" in name:
        return Flow(time_scale=float(config.get("num_train_timesteps", 1000)))
    if name.startswith("EDM"):
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise InputError(f"{path}: EDM with {config['prediction_type']} is not supported")
        names = ("sigma_data", "sigma_min", "sigma_max")
        return EDM(**{n: float(config[n]) for n in names if n in config})
    if not {"beta_start", "trained_betas"} & set(config):
        raise InputError(
            f"{path} is of {name or 'an unnamed scheduler'}, which has no betas; give a DDPM-like, "
            "EDM or flow-matching scheduler"
        )
    from diffusers import DDPMScheduler

    abar = DDPMScheduler.from_config(config).alphas_cumprod
    # A last step of pure noise (zero terminal SNR) has no finite sigma.
    return DDPM(
        tuple(abar[abar > 1e-9].tolist()), prediction=config.get("prediction_type", "epsilon")
    )


def _refuse_latents(folder: Path) -> None:
    """Refuse models whose images are the codes of an autoencoder, or that are no U-Net."""
    names = {path.name for path in folder.iterdir()}
    for path in (folder / "unet", folder):
        kind = _class_name(path / "config.json")
        if kind not in ("", "UNet2DModel"):
            names.add(kind)
    if "transformer" in names or {name for name in names if "Transformer2DModel" in name}:
        raise InputError(
            f"{folder} is of a diffusion transformer (DiT), which works on the codes of an "
            "autoencoder and also returns variances; give a UNet2DModel of pixels, or wrap it "
            "with its encoder in a DiffusionModel of your own"
        )
    if {"vae", "vqvae"} & names or _class_name(folder / "model_index.json") == "LDMPipeline":
        raise InputError(
            f"{folder} is of a latent diffusion model, whose images are the codes of an "
            "autoencoder; give a model of pixels"
        )


def _class_name(path: Path) -> str:
    try:
        return str(json.loads(path.read_text()).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""  # damaged ones are reported where they are read


def find_scheduler(folder: Path) -> Path | None:
    """Return the scheduler_config.json of a pipeline or of a single folder, if there is one."""
    places = (folder / "scheduler", folder)
    return next((p for place in places if (p := place / _SCHEDULER).is_file()), None)


def read_unet(folder: Path) -> nn.Module:
    """Load a UNet2DModel (config.json and safetensors) in its own dtype, in eval mode.

    Raises:
        InputError: The folder holds no UNet2DModel with safetensors weights that match it.
    """
    from diffusers import UNet2DModel

    weights = folder / _WEIGHTS
    if not weights.is_file() and list(folder.glob("diffusion_pytorch_model*.bin")):
        raise InputError(
            f"{folder} holds its weights as a pickle (.bin), which could run any code and is not "
            "read; where you trust it, convert it: unet.save_pretrained(folder)"
        )
    for file in (folder / "config.json", weights):
        if not file.is_file():
            raise InputError(
                f"{folder} is no folder of a diffusers UNet2DModel with safetensors: it holds "
                f"no {file.name}; write it with unet.save_pretrained(folder)"
            )
    try:
        unet, report = UNet2DModel.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=_dtype(weights),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} is no folder of a diffusers UNet2DModel: {reason}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:  # diffusers draws missing weights at random
            raise InputError(
                f"the weights in {folder} do not match its config.json: {len(report[what])} "
                f"{what.replace('_', ' ')} (first {min(report[what])!r}); give an intact copy"
            )
    unet.eval()
    return unet


def _dtype(weights: Path) -> torch.dtype:
    with safe_open(weights, "pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype
