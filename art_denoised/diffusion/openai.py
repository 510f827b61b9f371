"""U-Nets of OpenAI, by the flags of improved-diffusion and guided-diffusion.

Sources: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (ICML 2021, arXiv
2102.09672); Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (NeurIPS 2021,
arXiv 2105.05233). Modules are named as in the published files.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.model import (
    DiffusionModel,
    attention,
    check_images,
    sinusoids,
)
from art_denoised.diffusion.preconditioning import DDPM

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels

_Count = Annotated[int, Meta(ge=1, le=8192)]
_MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


class Flags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flags of both repositories, with their names and defaults.

    The last ones change training or sampling only; they are accepted and change nothing here.
    """

    image_size: _Count = 64
    num_channels: _Count = 128
    num_res_blocks: _Count = 2
    num_heads: _Count = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str = "16,8"
    channel_mult: str = ""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    class_cond: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    diffusion_steps: _Count = 1000
    noise_schedule: Literal["linear", "cosine"] = "linear"
    rescale_timesteps: bool | None = None
    predict_xstart: bool = False
    timestep_respacing: str = ""
    use_kl: bool = False
    rescale_learned_sigmas: bool = False
    sigma_small: bool = False
    use_checkpoint: bool = False
    use_fp16: bool = False

    def __post_init__(self) -> None:
        if self.rescale_timesteps is None and self.diffusion_steps != 1000:
            raise ValueError(
                f"rescale_timesteps is missing, and at diffusion_steps {self.diffusion_steps} it "
                "matters; the default is True in improved-diffusion, False in guided-diffusion"
            )
        if not self.channel_mult and self.image_size not in _MULTIPLIERS:
            raise ValueError(
                f"channel_mult is missing, and image_size {self.image_size} has no default; give "
                "for example '1,2,2'"
            )
        if not all(width > 0 for width in self.widths):
            raise ValueError(f"channel_mult is {self.channel_mult!r}; give positive numbers")
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.attention_resolutions):
            raise ValueError(
                f"attention_resolutions is {self.attention_resolutions!r}; give numbers like '16,8'"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels at each level, the full resolution first."""
        given = tuple(float(m) for m in self.channel_mult.split(",") if m)
        factors = given or _MULTIPLIERS[self.image_size]
        return tuple(int(factor * self.num_channels) for factor in factors)

    @property
    def attention_levels(self) -> set[int]:
        """Factors of downsampling at which there is attention."""
        return {self.image_size // int(side) for side in self.attention_resolutions.split(",")}

    @property
    def time_scale(self) -> float:
        """Factor on a step in what the network is told."""
        return 1000 / self.diffusion_steps if self.rescale_timesteps else 1.0


class Published(NamedTuple):
    """A published file, the short name of its model, and its flags beside the defaults."""

    name: str
    file: str
    flags: Mapping[str, Any]


_IMPROVED: dict[str, Any] = {
    "num_res_blocks": 3,
    "learn_sigma": True,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}
_CIFAR10 = {**_IMPROVED, "image_size": 32, "dropout": 0.3}
_COND = {**_IMPROVED, "num_channels": 192, "class_cond": True, "rescale_timesteps": False}
_BEDROOM: dict[str, Any] = {
    "image_size": 256,
    "num_heads": 1,
    "learn_sigma": True,
    "use_scale_shift_norm": False,
    "attention_resolutions": "16",
}
_GUIDED: dict[str, Any] = {
    "image_size": 256,
    "num_channels": 256,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "learn_sigma": True,
    "resblock_updown": True,
}
_GUIDED64 = {
    **_GUIDED,
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "dropout": 0.1,
    "noise_schedule": "cosine",
    "use_new_attention_order": True,
}
_GUIDED128 = {**_GUIDED, "image_size": 128, "num_head_channels": -1}
_UNCOND = {**_GUIDED, "class_cond": False}
_LSUN = {**_UNCOND, "dropout": 0.1}
# Flags: the README of each repository.
PUBLISHED = (
    Published("cifar10-uncond", "cifar10_uncond_50M_500K", _CIFAR10),
    Published("cifar10-uncond-vlb", "cifar10_uncond_vlb_50M_500K", _CIFAR10),
    Published("imagenet64-uncond", "imagenet64_uncond_100M_1500K", _IMPROVED),
    Published("imagenet64-uncond-vlb", "imagenet64_uncond_vlb_100M_1500K", _IMPROVED),
    Published("imagenet64-cond-improved", "imagenet64_cond_270M_250K", _COND),
    Published("lsun-bedroom-improved", "lsun_uncond_100M_1200K_bs128", _BEDROOM),
    Published("lsun-bedroom-improved-2400k", "lsun_uncond_100M_2400K_bs64", _BEDROOM),
    Published("imagenet64-cond", "64x64_diffusion", _GUIDED64),
    Published("imagenet128-cond", "128x128_diffusion", _GUIDED128),
    Published("imagenet256-cond", "256x256_diffusion", _GUIDED),
    Published("imagenet256-uncond", "256x256_diffusion_uncond", _UNCOND),
    Published("imagenet512-cond", "512x512_diffusion", {**_GUIDED, "image_size": 512}),
    Published("lsun-bedroom", "lsun_bedroom", _LSUN),
    Published("lsun-cat", "lsun_cat", _LSUN),
    Published("lsun-horse", "lsun_horse", _LSUN),
    Published("lsun-horse-nodropout", "lsun_horse_nodropout", _UNCOND),
)


def openai_flags(given: str | Mapping[str, Any]) -> Flags:
    """Return flags, checked, by the name of a published model or as a mapping."""
    if isinstance(given, str):
        models = {model.name: model.flags for model in PUBLISHED}
        given = models[checks.choice("model of OpenAI", given, models)]
    try:
        return msgspec.convert(dict(given), Flags)
    except (TypeError, ValueError) as error:
        reason = checks.one_line(error)[:200]
        raise InputError(
            f"flags of OpenAI are wrong: {reason}; give those of the training"
        ) from None


def published_name(stem: str) -> str | None:
    """Return the name of the published model whose file has this name, without its extension."""
    return next((model.name for model in PUBLISHED if model.file == stem), None)


def openai_diffusion(
    openai: str | Mapping[str, Any], *, classes: int | None = None, null_class: int | None = None
) -> DiffusionModel:
    """Build an untrained U-Net of OpenAI as a diffusion model of images in [-1, 1].

    Args:
        openai: Name of a published model, such as "imagenet256-uncond", or flags of
            improved-diffusion or guided-diffusion under their names. Missing flags have their
            defaults. rescale_timesteps, where the repositories differ, must be given unless
            diffusion_steps is 1000.
        classes: Number of classes if class_cond is set; None: 1000, as in both repositories.
        null_class: Class that stands for no class: ``classes``, for which the network has one more
            embedding. None: there is none, as in the published models.

    Raises:
        InputError: There is no such model or flag, or flags do not fit together.

    Example:
        >>> flags = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2"}
        >>> model = openai_diffusion(flags)
        >>> model(torch.rand(2, 3, 16, 16), 0.5).shape
        torch.Size([2, 3, 16, 16])
    """
    flags = openai_flags(openai)
    if flags.class_cond:
        classes = 1000 if classes is None else classes
    elif classes is not None:
        raise InputError(f"classes is {classes} but class_cond is False; leave out classes")
    embedded = None if classes is None else classes + (null_class is not None)
    prediction: Literal["sample", "epsilon"] = "sample" if flags.predict_xstart else "epsilon"
    ddpm = DDPM(_alphas_cumprod(flags), prediction=prediction)
    network = OpenAIUNet(flags, embedded)
    return DiffusionModel(network, ddpm, classes=classes, null_class=null_class)


def _alphas_cumprod(flags: Flags) -> tuple[float, ...]:
    """Return the noise schedule (Nichol and Dhariwal, section 3.2)."""
    steps = flags.diffusion_steps
    if flags.noise_schedule == "linear":
        betas = np.linspace(0.1, 20, steps) / steps
    else:
        t = np.arange(steps + 1) / steps
        abar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    return tuple(np.cumprod(1 - betas).tolist())


class OpenAIUNet(nn.Module):
    """The U-Net of both repositories: noise or image prediction, without the learned variance.

    ``embedded`` is the number of class embeddings; None: unconditional.
    """

    def __init__(self, flags: Flags, embedded: int | None = None) -> None:
        super().__init__()
        self.flags, self.image_size, time = flags, flags.image_size, 4 * flags.num_channels
        self.time_embed = nn.Sequential(
            nn.Linear(flags.num_channels, time), nn.SiLU(), nn.Linear(time, time)
        )
        self.label_emb = None if embedded is None else nn.Embedding(embedded, time)
        heads_up = flags.num_heads if flags.num_heads_upsample == -1 else flags.num_heads_upsample
        widths, blocks = flags.widths, flags.num_res_blocks
        channels = widths[0]
        skips = [channels]
        self.input_blocks = nn.ModuleList([_Stage(nn.Conv2d(3, channels, 3, padding=1))])
        for level, width in enumerate(widths):
            for _ in range(blocks):
                stage: list[nn.Module] = [_ResBlock(channels, width, flags)]
                stage += _attention_at(level, width, flags, flags.num_heads)
                self.input_blocks.append(_Stage(*stage))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(_Stage(_down(channels, flags)))
                skips.append(channels)
        self.middle_block = _Stage(
            _ResBlock(channels, channels, flags),
            _Attention(channels, flags.num_heads, flags),
            _ResBlock(channels, channels, flags),
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(blocks + 1):
                stage = [_ResBlock(channels + skips.pop(), width, flags)]
                stage += _attention_at(level, width, flags, heads_up)
                stage += [_up(width, flags)] if level and block == blocks else []
                self.output_blocks.append(_Stage(*stage))
                channels = width
        answer = nn.Conv2d(channels, 6 if flags.learn_sigma else 3, 3, padding=1)
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), answer)

    def forward(self, x: Images, step: Tensor, y: Labels | None) -> Images:
        """Return the prediction for images in [-1, 1] at steps of the training, (batch,)."""
        check_images(x, 3, self.image_size)
        time = sinusoids(
            step.float() * self.flags.time_scale, self.flags.num_channels, endpoint=False
        )
        embedding = self.time_embed(time.to(checks.model_dtype(self.time_embed, time.dtype)))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(y)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        answer: Tensor = self.out(x)
        return answer[:, :3]


class _Stage(nn.Sequential):
    """Layers in turn; residual blocks are told the time and the class."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, _ResBlock) else layer(x)
        return x


class _ResBlock(nn.Module):
    def __init__(
        self, inside: int, outside: int, flags: Flags, resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.scales = flags.use_scale_shift_norm
        self.resize = nn.Identity() if resize is None else resize
        self.in_layers = nn.Sequential(
            _norm(inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * flags.num_channels, outside * (1 + self.scales))
        )
        self.out_layers = nn.Sequential(
            _norm(outside),
            nn.SiLU(),
            nn.Dropout(flags.dropout),
            nn.Conv2d(outside, outside, 3, padding=1),
        )
        same = inside == outside
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers[2](self.resize(self.in_layers[:2](x)))
        told = self.emb_layers(embedding)[:, :, None, None]
        if self.scales:
            scale, shift = told.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + told)
        return self.skip_connection(self.resize(x)) + h


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int, flags: Flags) -> None:
        super().__init__()
        if flags.num_head_channels != -1:
            heads, rest = divmod(channels, flags.num_head_channels)
        else:
            rest = channels % heads
        if rest:
            raise InputError(
                f"num_heads {flags.num_heads} or num_head_channels {flags.num_head_channels} does "
                f"not divide {channels} channels; give a divisor"
            )
        # The rows of qkv: q, k and v of each head in turn, or the heads of q, of k and of v.
        self.axis = 1 if flags.use_new_attention_order else 2
        self.split = (3, heads, -1) if flags.use_new_attention_order else (heads, 3, -1)
        self.norm, self.qkv = _norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        qkv = self.qkv(self.norm(tokens)).unflatten(1, self.split)
        q, k, v = qkv.unbind(self.axis)
        return (tokens + self.proj_out(attention(q, k, v).flatten(1, 2))).reshape(x.shape)


def _attention_at(level: int, width: int, flags: Flags, heads: int) -> list[nn.Module]:
    return [_Attention(width, heads, flags)] if 2**level in flags.attention_levels else []


def _down(channels: int, flags: Flags) -> nn.Module:
    if flags.resblock_updown:
        return _ResBlock(channels, channels, flags, nn.AvgPool2d(2))
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def _up(channels: int, flags: Flags) -> nn.Module:
    double = nn.Upsample(scale_factor=2.0)
    if flags.resblock_updown:
        return _ResBlock(channels, channels, flags, double)
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(upsample=double, conv=conv))


def _norm(channels: int) -> nn.GroupNorm:
    if channels % 32:
        raise InputError(
            f"a level has {channels} channels, no multiple of the 32 groups of the normalisation; "
            "give other num_channels or channel_mult"
        )
    return nn.GroupNorm(32, channels)


def check_flags(flags: Flags, state: Mapping[str, Tensor], source: object) -> None:
    """Check flags against what the shapes of a state dict say."""
    try:
        read = _read_shapes(state)
    except (LookupError, ValueError, ZeroDivisionError):
        raise InputError(
            f"{source} is not a U-Net of OpenAI; give a file of improved-diffusion or "
            "guided-diffusion"
        ) from None
    levels = {2**level for level in range(len(flags.widths))}
    said = {
        "in_channels": 3,  # more: an upsampler, which also takes a small image
        "num_channels": flags.num_channels,
        "channel_mult": [width / flags.num_channels for width in flags.widths],
        "num_res_blocks": flags.num_res_blocks,
        "attention at downsampling": sorted(flags.attention_levels & levels),
        "class_cond": flags.class_cond,
        "learn_sigma": flags.learn_sigma,
        "use_scale_shift_norm": flags.use_scale_shift_norm,
        "resblock_updown": flags.resblock_updown,
    }
    for name, value in said.items():
        if read[name] not in (value, None):
            raise InputError(
                f"{name} is {value}, but {read[name]} in {source}; give the flags of its training"
            )


def _read_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what shapes say: all but sizes of images and heads, attention order and schedule."""
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    channels, inputs = shape["time_embed.0.weight"][1], shape["input_blocks.0.0.weight"][1]
    # The last block of a level but the first ends in a layer that doubles the resolution.
    doubles = re.compile(r"output_blocks\.(\d+)\.\d\.conv\.|output_blocks\.(\d+)\.[12]\.in_layers")
    found = [match for name in shape if (match := doubles.match(name))]
    stages = 1 + max(int(name.split(".")[1]) for name in shape if name.startswith("input_blocks."))
    per_level = min((int(m[1] or m[2]) + 1 for m in found), default=stages)
    starts = range(1, stages + 1, per_level)
    out_widths = [shape[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in starts]
    emb, out = shape["input_blocks.1.0.emb_layers.1.weight"][0], shape["out.2.weight"][0]
    return {
        "in_channels": inputs,
        "num_channels": channels,
        "channel_mult": [width / channels for width in out_widths],
        "num_res_blocks": per_level - 1,
        "attention at downsampling": [
            2**level for level, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in shape
        ],
        "class_cond": "label_emb.weight" in shape,
        "learn_sigma": out == 6,
        "use_scale_shift_norm": emb == 2 * out_widths[0],
        # A layer that is no block halves the resolution. None: there is one level.
        "resblock_updown": not any(".op." in name for name in shape) if found else None,
    }
