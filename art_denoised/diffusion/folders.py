"""Diffusion models in files: folders of diffusers, and the published files of OpenAI and of EDM.

Published files become a config and named tensors, and are written as a folder of config.json and
safetensors.

A scheduler of diffusers says how a network was trained (its noise schedule and what it predicts)
and how to draw samples from it. Only the training matters here, except where an option of sampling
changes the estimate x0 itself. Each key is therefore read as a preconditioning, known not to change
x0, or refused by name.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError, first_line, one_line
from art_denoised.diffusion.edm import DhariwalUNet, SongUNet, edm_diffusion
from art_denoised.diffusion.edm_pickle import read_edm_pickle
from art_denoised.diffusion.model import DiffusionModel
from art_denoised.diffusion.openai import (
    OpenAIUNet,
    check_flags,
    openai_diffusion,
    openai_flags,
    published_name,
)
from art_denoised.diffusion.preconditioning import DDPM, EDM, Flow, Preconditioning, Prediction
from art_denoised.models.loading import find_published, fitting_state, read_state_dict

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels

_SCHEDULER_CONFIG = "scheduler_config.json"
# fmt: off
VARIANCE_PRESERVING = (
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler",
    "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
VARIANCE_EXPLODING = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
_CONSISTENCY = (
    "CMStochasticIterativeScheduler", "FlowMatchLCMScheduler", "LCMScheduler", "TCDScheduler",
)
_SCHEDULE = (
    "beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "rescale_betas_zero_snr",
    "trained_betas",
)
_READ = {*_SCHEDULE, "predict_epsilon", "prediction_type", "sigma_data", "sigma_max", "sigma_min"}
_CHECKED = {
    "clip_sample", "clip_sample_range", "invert_sigmas", "thresholding", "timestep_type",
    "use_flow_sigmas",
}
# These choose the levels, the order and the noise of sampling; x0 at a level is the same.
_SAMPLING = {
    "algorithm_type", "base_image_seq_len", "base_shift", "corrector_order",
    "disable_corrector", "dynamic_thresholding_ratio", "eta", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped",
    "lower_order_final", "max_image_seq_len", "max_shift", "noise_sampler_seed", "predict_x0",
    "predictor_order", "rho", "sample_max_value", "set_alpha_to_one", "shift", "shift_terminal",
    "sigma_schedule", "skip_prk_steps", "solver_order", "solver_p", "solver_type",
    "steps_offset", "stochastic_sampling", "tau_func", "time_shift_type", "timestep_spacing",
    "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas",
    "use_lu_lambdas", "variance_type",
}
# fmt: on
KNOWN_KEYS = frozenset(_READ | _CHECKED | _SAMPLING)
WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED_NETWORKS = (OpenAIUNet, SongUNet, DhariwalUNet)
_BUILDERS: dict[str, Callable[..., DiffusionModel]] = {
    "OpenAIUNet": openai_diffusion,
    "EDM": edm_diffusion,
}
_TYPES = ("bfloat16", "float16", "float32", "float64")
_EXTRA = "art_denoised.json"  # what diffusers has no place for
# Nothing that would have to be unpickled is downloaded, however large the repository.
_DOWNLOADED = ("*.json", f"*{WEIGHTS}")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class UNetNetwork(nn.Module):
    """Calls a UNet2DModel on squares of ``patch`` x ``patch`` pixels, folded into channels."""

    def __init__(self, unet: Any, *, patch: int) -> None:
        super().__init__()
        self.unet, self.patch = unet, checks.count("patch", patch)

    def forward(self, x: Images, c_noise: Tensor, y: Labels | None) -> Images:
        """Return the U-Net's prediction."""
        folded = F.pixel_unshuffle(x, self.patch)
        return F.pixel_shuffle(self.unet(folded, c_noise, class_labels=y).sample, self.patch)


def unet_diffusion(
    channels: int,
    size: int,
    *,
    classes: int | None = None,
    widths: Sequence[int] = (32, 64, 64),
    layers: int = 1,
    patch: int = 1,
) -> DiffusionModel:
    """Build an untrained EDM over a small U-Net.

    Args:
        channels: Number of image channels.
        size: Height and width of the images; divisible by the patch, and then by 2 for each width
            after the first.
        classes: Number of classes, to which a null class is added; None: unconditional.
        widths: Number of channels at each resolution, the full one first; multiples of 8.
        layers: Number of residual blocks at each resolution.
        patch: Side of the squares of pixels that are folded into channels first: the same U-Net
            then costs 1 / patch^2 as much.

    Raises:
        InputError: The sizes do not fit together.

    Example:
        >>> model = unet_diffusion(1, 8, classes=10, widths=(8, 16))
        >>> model(torch.rand(2, 1, 8, 8), 0.5).shape
        torch.Size([2, 1, 8, 8])
    """
    from diffusers import UNet2DModel

    widths = tuple(checks.count("width", width, 8) for width in widths)
    if any(width % 8 for width in widths):
        raise InputError(f"widths are {widths}; give multiples of 8")
    halvings, patch = len(widths) - 1, checks.count("patch", patch)
    if checks.count("size", size) % (patch * 2**halvings):
        folded = f"folded by {patch} and " if patch > 1 else ""
        raise InputError(
            f"images of size {size} cannot be {folded}halved {halvings} times; give fewer widths"
            + (" or a smaller patch" if patch > 1 else "")
        )
    folded_channels = checks.count("channels", channels) * patch**2
    unet = UNet2DModel(
        sample_size=size // patch,
        in_channels=folded_channels,
        out_channels=folded_channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        layers_per_block=checks.count("layers", layers),
        norm_num_groups=8,
        num_class_embeds=None if classes is None else checks.count("classes", classes, 2) + 1,
        add_attention=False,
    )
    network = UNetNetwork(unet, patch=patch)
    return DiffusionModel(network, EDM(), classes=classes, null_class=classes)


def load_diffusion(
    source: Path | str,
    *,
    classes: int | None = None,
    into: DiffusionModel | None = None,
    revision: str | None = None,
    openai: str | Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
) -> DiffusionModel:
    """Load a diffusion model, in eval mode; nothing that a file contains is executed.

    With ``HF_HUB_OFFLINE=1`` in the environment only the cache of the hub is looked at.

    Args:
        source: Folder, repository "owner/name" on the Hugging Face hub in the same form, or file.
            A folder is one of `save_diffusion`, or of diffusers: a pipeline with ``unet`` and
            ``scheduler``, or config.json, weights in safetensors and scheduler_config.json. DDPM-
            like (with betas), EDM and flow-matching schedulers are supported. A file is a U-Net of
            OpenAI such as 256x256_diffusion_uncond.pt, a pickle of EDM such as
            edm-cifar10-32x32-cond-vp.pkl, which is read as data, or weights for ``into``.
        classes: Number of classes of a conditional U-Net. If it embeds one more, that is the null
            class.
        into: Model that receives the weights of a file of safetensors or of a state dict by
            torch.save. Names are those of the model or of its network.
        revision: Branch, tag or commit on the hub; None: its main branch. A commit makes a run
            repeatable.
        openai: Name of a published model of OpenAI, or its flags (`openai_diffusion`), for a file
            that does not have its published name.
        dtype: Floating-point type of the network, or its name. None: float32 for OpenAI and EDM,
            and that of the weights for others.

    Raises:
        InputError: Files are missing, damaged or not safetensors; the model is a consistency or
            latent model; the scheduler or one of its keys is not supported; flags, classes or
            weights do not fit; or a pickle holds anything but what a network of EDM needs.

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
    if dtype is not None:
        dtype = getattr(torch, checks.float_name(dtype, _TYPES))
    classes = None if classes is None else checks.count("classes", classes)
    path = Path(find_published(source))
    if openai is not None and (into is not None or not path.is_file()):
        raise InputError(
            f"openai names the network of a file, but {source} is no file or into is given too; "
            "leave out openai"
        )
    if into is not None:
        if not path.is_file():
            raise InputError(f"{source} is not a file of weights; give one, or leave out into")
        return _from_file(path, classes, into).to(dtype)
    if not path.exists():
        path = _downloaded(str(source), revision)
    if is_published(path, openai):
        return load_published(path, classes, openai).to(dtype)
    if path.is_file():
        raise InputError(
            f"{path} is a file of weights, which does not name its network; give "
            "into=DiffusionModel(network, preconditioning, ...), or openai= for a U-Net of OpenAI"
        )
    return _from_folder(path, classes).to(dtype)


def _from_folder(folder: Path, classes: int | None) -> DiffusionModel:
    _refuse_latents(folder)
    preconditioning = read_preconditioning(folder)
    unet = read_unet(folder / "unet" if (folder / "unet").is_dir() else folder)
    embedded = _check_unet(folder, unet.config, classes)
    patch, image_range = _read_extra(folder)
    return DiffusionModel(
        UNetNetwork(unet, patch=patch),
        preconditioning,
        classes=classes,
        null_class=classes if embedded is not None and embedded != classes else None,
        image_range=image_range,
    ).eval()


def _check_unet(folder: Path, config: Any, classes: int | None) -> int | None:
    """Return the number of class embeddings, checked."""
    embedded: int | None = config.num_class_embeds
    if config.class_embed_type is not None:
        raise InputError(
            f"the U-Net in {folder} has class_embed_type {config.class_embed_type!r}, which is not "
            "supported; give one with num_class_embeds, or an unconditional one"
        )
    if config.center_input_sample:
        raise InputError(
            f"the U-Net in {folder} has center_input_sample {config.center_input_sample!r}, so the "
            "range of its images is unclear; give one that takes images in [-1, 1]"
        )
    if classes is None and embedded is not None:
        raise InputError(
            f"the U-Net in {folder} embeds {embedded} classes; give classes={embedded}, or "
            f"classes={embedded - 1} if the last one is a null class"
        )
    if classes is not None and embedded not in (classes, classes + 1):
        raise InputError(
            f"classes is {classes}, but the U-Net in {folder} embeds {embedded or 'none'}; give "
            "that number, or one less if the last is a null class"
        )
    if config.in_channels != config.out_channels:
        raise InputError(
            f"the U-Net in {folder} maps {config.in_channels} channels to {config.out_channels}; "
            "give one that neither returns variances nor takes latents"
        )
    return embedded


def embedded_classes(folder: Path) -> int | None:
    """Return the number of class embeddings of the U-Net in a folder; None: none, or no U-Net."""
    found = [read_config(place / "config.json") for place in (folder / "unet", folder)]
    return next((n for config in found if (n := config.get("num_class_embeds"))), None)


def _downloaded(name: str, revision: str | None) -> Path:
    """Return the local folder of a repository on the hub, downloaded unless it is cached."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not _HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist; give a folder, a file of weights or a hub id")
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_DOWNLOADED)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"{name} is not a folder here, and the hub returned no repository of that name "
            f"({type(error).__name__}: {reason}); check the name or the connection"
        ) from None
    return Path(folder)


def _from_file(path: Path, classes: int | None, into: DiffusionModel) -> DiffusionModel:
    if classes not in (None, into.classes):
        raise InputError(f"classes is {classes}, but the model given has {into.classes}")
    state = read_state_dict(path)
    owner = into if state.keys() <= into.state_dict().keys() else into.network
    owner.load_state_dict(fitting_state(owner, state, path))
    return into.eval()


def save_diffusion(model: DiffusionModel, folder: Path | str) -> None:
    """Write a model to a folder that `load_diffusion` reads.

    Args:
        model: Diffusion model over a UNet2DModel, from `unet_diffusion` or `load_diffusion`, or a
            model of OpenAI or EDM.
        folder: Output folder. It gets ``unet`` and ``scheduler`` of diffusers; for a model of
            OpenAI or EDM, config.json and weights in safetensors.

    Raises:
        InputError: The network is of no such kind, a UNet2DModel has another preconditioning than
            EDM, or the null class is not the number of classes.

    Example:
        >>> import tempfile
        >>> model = unet_diffusion(1, 8, classes=10, widths=(8, 16)).eval()
        >>> x, y = torch.rand(2, 1, 8, 8), torch.tensor([3, 10])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_diffusion(model, folder)
        ...     bool(torch.equal(load_diffusion(folder, classes=10)(x, 0.5, y), model(x, 0.5, y)))
        True
    """
    if isinstance(model.network, PUBLISHED_NETWORKS):
        save_published(model, Path(folder))
    else:
        _save_unet(model, Path(folder))


def _save_unet(model: DiffusionModel, folder: Path) -> None:
    from diffusers import EDMEulerScheduler

    edm = model.preconditioning
    if not isinstance(model.network, UNetNetwork) or not isinstance(edm, EDM):
        raise InputError(
            f"the model is {type(model.network).__name__} with {type(edm).__name__}; give a "
            "UNet2DModel with EDM, or save the state dict of others with safetensors"
        )
    if model.null_class not in (None, model.classes):
        raise InputError(
            f"null_class is {model.null_class}, which the format cannot hold; give it the index "
            f"{model.classes}"
        )
    scheduler = EDMEulerScheduler(
        sigma_data=edm.sigma_data, sigma_min=edm.sigma_min, sigma_max=edm.sigma_max
    )
    model.network.unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    extra = {"patch": model.network.patch, "image_range": list(model.image_range)}
    (folder / _EXTRA).write_text(json.dumps(extra) + "\n")


def _read_extra(folder: Path) -> tuple[int, tuple[float, float]]:
    """Return the patch and the image range that `save_diffusion` wrote beside the U-Net."""
    path = folder / _EXTRA
    extra: dict[str, Any] = {}
    try:
        if path.is_file():
            extra = json.loads(path.read_text())
        low, high = map(float, extra.get("image_range", (-1, 1)))
        return checks.count("patch", extra.get("patch", 1)), (low, high)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _refuse_latents(folder: Path) -> None:
    """Refuse models whose images are the codes of an autoencoder, or that are no U-Net."""
    names = {path.name for path in folder.iterdir()}
    for path in (folder / "unet", folder):
        kind = read_config(path / "config.json").get("_class_name", "UNet2DModel")
        if kind != "UNet2DModel":
            names.add(str(kind))
    if "transformer" in names or {name for name in names if "Transformer2DModel" in name}:
        raise InputError(
            f"{folder} holds a diffusion transformer (DiT), which works on the codes of an "
            "autoencoder and also returns variances; give a UNet2DModel of pixels, or wrap it "
            "with its encoder in a DiffusionModel of your own"
        )
    pipeline = read_config(folder / "model_index.json").get("_class_name")
    if {"vae", "vqvae"} & names or pipeline == "LDMPipeline":
        raise InputError(
            f"{folder} holds a latent diffusion model, whose images are the codes of an "
            "autoencoder; give a model of pixels"
        )


def read_unet(folder: Path) -> Any:
    """Load a UNet2DModel (config.json and safetensors) in its own dtype, in eval mode."""
    from diffusers import UNet2DModel

    weights = folder / WEIGHTS
    if not weights.is_file() and list(folder.glob("diffusion_pytorch_model*.bin")):
        raise InputError(
            f"{folder} holds its weights as a pickle (.bin), which can run any code and is not "
            "read; if you trust it, convert it with unet.save_pretrained(folder)"
        )
    for file in (folder / "config.json", weights):
        if not file.is_file():
            raise InputError(
                f"{folder} is not the folder of a diffusers UNet2DModel with safetensors: it holds "
                f"no {file.name}; write it with unet.save_pretrained(folder)"
            )
    try:
        unet, report = UNet2DModel.from_pretrained(
            folder,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            torch_dtype=_dtype(weights),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = one_line(error)
        raise InputError(f"{folder} is not the folder of a diffusers UNet2DModel: {why}") from None
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


def is_published(path: Path, openai: object) -> bool:
    """Whether it is a model of OpenAI or EDM: it names its network, or ``openai`` does."""
    if path.is_dir():
        return read_config(path / "config.json").get("_class_name") in _BUILDERS
    return path.suffix == ".pkl" or openai is not None or published_name(path.stem) is not None


def load_published(
    path: Path, classes: int | None, openai: str | Mapping[str, Any] | None
) -> DiffusionModel:
    """Load a file of OpenAI or EDM, or a folder of `save_published`, in float32 and eval mode.

    If a file of OpenAI embeds one class more than ``classes``, that is the null class. ``openai``
    is a name of a published model or flags; None: by the name of the file.
    """
    if path.is_dir():
        config, state = read_config(path / "config.json"), read_state_dict(path / WEIGHTS)
        build = _BUILDERS[config.pop("_class_name")]
    elif path.suffix == ".pkl":
        if openai is not None:
            raise InputError(f"{path} is a pickle, as EDM writes them; leave out openai")
        (config, state), build = read_edm_pickle(path), edm_diffusion
    else:
        state, build = read_state_dict(path), openai_diffusion
        named = published_name(path.stem) or ""
        config = _openai_config(path, state, classes, named if openai is None else openai)
    try:
        with torch.device("meta"):  # no weights are drawn, and no memory is taken
            model = build(**config)
    except TypeError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if classes not in (None, model.classes):
        known = "no classes" if model.classes is None else f"{model.classes} classes"
        raise InputError(f"classes is {classes}, but the model in {path} has {known}")
    model.network.load_state_dict(fitting_state(model.network, state, path), assign=True)
    return model.float().eval()


def _openai_config(
    path: Path, state: dict[str, Tensor], classes: int | None, openai: str | Mapping[str, Any]
) -> dict[str, Any]:
    check_flags(openai_flags(openai), state, path)
    if "label_emb.weight" not in state:
        return {"openai": openai}
    embedded = len(state["label_emb.weight"])
    if classes not in (None, embedded, embedded - 1):
        raise InputError(
            f"classes is {classes}, but {path} embeds {embedded}; give that number, or one less if "
            "the last is a null class"
        )
    null_class = classes if classes == embedded - 1 else None
    return {"openai": openai, "classes": classes or embedded, "null_class": null_class}


def save_published(model: DiffusionModel, folder: Path) -> None:
    """Write a model of OpenAI or EDM as config.json and safetensors."""
    network = model.network
    if isinstance(network, OpenAIUNet):
        config = {"_class_name": "OpenAIUNet", "openai": msgspec.to_builtins(network.flags)}
        config |= {"classes": model.classes, "null_class": model.null_class}
    else:
        assert isinstance(network, SongUNet | DhariwalUNet)
        config = {"_class_name": "EDM", **msgspec.to_builtins(network.config)}
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """Return a configuration; empty if it is missing or damaged, which is reported elsewhere."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def find_scheduler(folder: Path) -> Path | None:
    """Return the scheduler_config.json of a pipeline or of a single folder, if there is one."""
    places = (folder / "scheduler", folder)
    return next((p for place in places if (p := place / _SCHEDULER_CONFIG).is_file()), None)


def read_preconditioning(folder: Path) -> Preconditioning:
    """Return the preconditioning that a folder's scheduler_config.json describes.

    Clipping of samples to [-1, 1] (``clip_sample``) is not applied: the result stays differentiable
    and `OneShotDenoiser` clips anyway.
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
    try:
        return _preconditioning(path, name, config)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {one_line(error)}") from None


def _preconditioning(path: Path, name: str, config: dict[str, Any]) -> Preconditioning:
    if name in _CONSISTENCY:
        raise InputError(
            f"{path} is of a consistency model ({name}), which jumps to one possible image and not "
            "to the mean of all; give a diffusion model"
        )
    if name not in (*VARIANCE_PRESERVING, *FLOW_MATCHING, *VARIANCE_EXPLODING):
        raise InputError(
            f"{path} is of {name or 'an unnamed scheduler'}, which is not supported; give a "
            "DDPM-like scheduler with betas, EDM or flow matching"
        )
    _refuse_other_estimates(path, name, config)
    if name in FLOW_MATCHING:
        return Flow(time_scale=float(config.get("num_train_timesteps", 1000)))
    if name in VARIANCE_EXPLODING:
        _prediction(path, config, ("epsilon",))
        names = ("sigma_data", "sigma_min", "sigma_max")
        return EDM(**{n: float(config[n]) for n in names if n in config})
    prediction = _prediction(path, config, get_args(Prediction))
    return DDPM(_alphas_cumprod(path, name, config), prediction=prediction)


def _refuse_other_estimates(path: Path, name: str, config: dict[str, Any]) -> None:
    """Refuse keys under which the scheduler's x0 is not the one of the four coefficients."""
    clips = config.get("clip_sample", name.startswith(("DDIM", "DDPM", "RePaint")))
    clip = float(config.get("clip_sample_range", 1.0))
    reasons = {
        "clip_sample_range": clips and clip != 1 and "which is no clip to [-1, 1]; give 1",
        "invert_sigmas": config.get("invert_sigmas") and "which reverses time; give false",
        "thresholding": config.get("thresholding") and "which rescales x0; give false",
        "timestep_type": config.get("timestep_type", "discrete") != "discrete"
        and "which tells the network other times; give 'discrete'",
        "use_flow_sigmas": config.get("use_flow_sigmas")
        and "which is flow matching; give FlowMatchEulerDiscreteScheduler",
    }
    unknown = {
        key: "which is not known here; remove it if the network was trained without it"
        for key, value in config.items()
        if not key.startswith("_") and key not in KNOWN_KEYS and value
    }
    for key, reason in {**reasons, **unknown}.items():
        if reason:
            raise InputError(f"{path}: {key} is {config[key]!r}, {reason}")


def _prediction(path: Path, config: dict[str, Any], known: tuple[str, ...]) -> Any:
    old = config.get("predict_epsilon")  # the key of diffusers before 0.10
    meant = "epsilon" if old is None or old else "sample"
    prediction = config.get("prediction_type", meant)
    if old is not None and prediction != meant:
        raise InputError(
            f"{path}: predict_epsilon is {old!r} but prediction_type is {prediction!r}; remove the "
            "wrong one"
        )
    if prediction not in known:
        raise InputError(
            f"{path}: prediction_type is {prediction!r}, which is not supported; give one of "
            f"{', '.join(known)}"
        )
    return prediction


def _alphas_cumprod(path: Path, name: str, config: dict[str, Any]) -> tuple[float, ...]:
    """Return the noise schedule as the scheduler itself computes it."""
    import diffusers

    given = {key: config[key] for key in _SCHEDULE if key in config}
    try:
        with warnings.catch_warnings():  # of numpy 2 about its own conversions in diffusers
            warnings.simplefilter("ignore")
            abar = getattr(diffusers, name)(**given).alphas_cumprod
    except NotImplementedError:
        raise InputError(
            f"{path}: beta_schedule is {config.get('beta_schedule')!r}, which {name} of diffusers "
            "does not know; give linear, scaled_linear or squaredcos_cap_v2"
        ) from None
    except ImportError as error:
        raise InputError(
            f"{path} is of {name}: {one_line(error)}; or give a DDPMScheduler"
        ) from None
    # A last step of pure noise (zero terminal SNR) has no finite sigma.
    return tuple(abar[abar > 1e-9].tolist())
