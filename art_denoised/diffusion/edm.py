"""The networks of EDM: DDPM++ and NCSN++ (SongUNet) and ADM (DhariwalUNet).

Sources: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (NeurIPS
2022, arXiv 2206.00364), appendix F.2 and table 7; Song et al., "Score-Based Generative Modeling
through Stochastic Differential Equations" (ICLR 2021, arXiv 2011.13456), appendix H; Dhariwal and
Nichol (NeurIPS 2021, arXiv 2105.05233). Modules are named as in the published files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.diffusion.model import DiffusionModel, attention, check_images, sinusoids
from art_denoised.diffusion.preconditioning import EDM

if TYPE_CHECKING:
    from art_denoised.types import Images, Labels

_Count = Annotated[int, Meta(ge=1, le=8192)]
_Counts = Annotated[tuple[_Count, ...], Meta(min_length=1, max_length=16)]
_Share = Annotated[float, Meta(ge=0, lt=1)]


class EDMConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The arguments of EDM's own constructors, with their names."""

    img_resolution: _Count
    img_channels: _Count
    label_dim: Annotated[int, Meta(ge=0, le=100_000)] = 0
    sigma_min: Annotated[float, Meta(ge=0)] = 0.0
    sigma_max: Annotated[float, Meta(gt=0)] = math.inf
    sigma_data: Annotated[float, Meta(gt=0)] = 0.5
    use_fp16: bool = False  # float16 on a GPU; here the caller chooses
    augment_dim: Annotated[int, Meta(ge=0, le=8192)] = 0
    channel_mult_emb: _Count = 4
    dropout: _Share = 0.1
    label_dropout: _Share = 0.0

    def __post_init__(self) -> None:
        halvings = len(self.channel_mult) - 1  # type: ignore[attr-defined]
        if self.img_resolution % 2**halvings:
            raise ValueError(f"img_resolution {self.img_resolution} is not halved {halvings} times")


class SongConfig(EDMConfig, frozen=True, tag_field="model_type", tag="SongUNet"):
    """Arguments of SongUNet, with EDM's defaults."""

    model_channels: _Count = 128
    channel_mult: _Counts = (1, 2, 2, 2)
    num_blocks: Annotated[int, Meta(ge=1, le=256)] = 4
    attn_resolutions: tuple[int, ...] = (16,)
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: _Count = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: _Counts = (1, 1)


class DhariwalConfig(EDMConfig, frozen=True, tag_field="model_type", tag="DhariwalUNet"):
    """Arguments of DhariwalUNet, with EDM's defaults."""

    model_channels: _Count = 192
    channel_mult: _Counts = (1, 2, 3, 4)
    num_blocks: Annotated[int, Meta(ge=1, le=256)] = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)


def edm_diffusion(**config: Any) -> DiffusionModel:
    """Build an untrained network of EDM as a diffusion model of images in [-1, 1].

    With label_dim it is class-conditional. It has a null class if label_dropout is above 0, because
    otherwise its training never left out the class.

    Args:
        **config: Arguments of EDM's EDMPrecond and of its network, under their names:
            img_resolution, img_channels, label_dim, model_type ("SongUNet" or "DhariwalUNet"),
            model_channels, channel_mult and so on. Missing ones have EDM's defaults.

    Raises:
        InputError: An argument is missing, unknown or out of range.

    Example:
        >>> model = edm_diffusion(
        ...     img_resolution=16, img_channels=3, label_dim=10, model_type="SongUNet",
        ...     model_channels=16, channel_mult=[1, 2], num_blocks=1,
        ... )
        >>> model(torch.rand(2, 3, 16, 16), 0.5, torch.tensor([3, 7])).shape
        torch.Size([2, 3, 16, 16])
    """
    try:
        found = msgspec.convert(
            {"model_type": "DhariwalUNet", **config}, SongConfig | DhariwalConfig
        )
    except (TypeError, ValueError) as error:
        reason = checks.one_line(error)[:160]
        raise InputError(
            f"arguments of EDM are wrong: {reason}; give those of its training"
        ) from None
    network = SongUNet(found) if isinstance(found, SongConfig) else DhariwalUNet(found)
    classes = found.label_dim or None
    return DiffusionModel(
        network,
        EDM(found.sigma_data, found.sigma_min, found.sigma_max),
        classes=classes,
        null_class=classes if found.label_dropout else None,
    )


class _Style(NamedTuple):
    """How the blocks of a network differ from those of the other."""

    embedded: int
    dropout: float
    eps: float
    skip_scale: float
    heads: int | None  # None: 64 channels each
    scales: bool  # whether the embedding scales the image, beside shifting it
    project: bool  # whether the shortcut of a resampling block has weights of its own
    taps: tuple[int, ...]


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ (Song et al., appendix H), as in table 7 of Karras et al."""

    def __init__(self, config: SongConfig) -> None:
        super().__init__()
        self.config, self.image_size = config, config.img_resolution
        embedded = config.model_channels * config.channel_mult_emb
        width = config.model_channels * config.channel_mult_noise
        self.map_noise = _Fourier(width) if config.embedding_type == "fourier" else None
        self.map_label = nn.Linear(config.label_dim, width) if config.label_dim else None
        self.map_augment = _augment(config, width)
        self.map_layer0, self.map_layer1 = nn.Linear(width, embedded), nn.Linear(embedded, embedded)
        style = _Style(
            embedded=embedded,
            dropout=config.dropout,
            eps=1e-6,
            skip_scale=math.sqrt(0.5),
            heads=1,
            scales=False,
            project=True,
            taps=config.resample_filter,
        )
        block = partial(_Block, style=style)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._add_decoder(block, self._add_encoder(block))

    def _add_encoder(self, block: Callable[..., nn.Module]) -> list[int]:
        """Add the blocks of the encoder, and return the channels that each of them hands over."""
        config, taps = self.config, self.config.resample_filter
        channels, aux = config.model_channels, config.img_channels
        skips = [channels]
        for level, factor in enumerate(config.channel_mult):
            side = config.img_resolution >> level
            at, outside = f"{side}x{side}", config.model_channels * factor
            if level == 0:
                self.enc[f"{at}_conv"] = _Conv(aux, channels, 3)
            else:
                self.enc[f"{at}_down"] = block(channels, channels, resize="down")
                skips.append(channels)
                if config.encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = _Conv(aux, aux, 0, "down", taps)
                    self.enc[f"{at}_aux_skip"] = _Conv(aux, channels, 1)
                if config.encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = _Conv(aux, channels, 3, "down", taps, True)
                    aux = channels
            for index in range(config.num_blocks):
                attends = side in config.attn_resolutions
                self.enc[f"{at}_block{index}"] = block(channels, outside, attends=attends)
                channels = outside
                skips.append(channels)
        return skips

    def _add_decoder(self, block: Callable[..., nn.Module], skips: list[int]) -> None:
        config, images, channels = self.config, self.config.img_channels, skips[-1]
        skip = config.decoder_type == "skip"
        for level, factor in reversed(list(enumerate(config.channel_mult))):
            side = config.img_resolution >> level
            at, lowest = f"{side}x{side}", level == len(config.channel_mult) - 1
            _enter(self.dec, at, channels, block, lowest)
            for index in range(config.num_blocks + 1):
                attends = index == config.num_blocks and side in config.attn_resolutions
                inside, channels = channels + skips.pop(), config.model_channels * factor
                self.dec[f"{at}_block{index}"] = block(inside, channels, attends=attends)
            if skip and not lowest:
                self.dec[f"{at}_aux_up"] = _Conv(images, images, 0, "up", config.resample_filter)
            if skip or level == 0:
                self.dec[f"{at}_aux_norm"] = _norm(channels, 1e-6)
                self.dec[f"{at}_aux_conv"] = _Conv(channels, images, 3)

    def forward(self, x: Images, c_noise: Tensor, y: Labels | None) -> Images:
        """Return the prediction at noise levels (batch,); the null class is label_dim."""
        check_images(x, self.config.img_channels, self.image_size)
        return self._decode(*self._encode(x, self._embed(c_noise, y)))

    def _embed(self, c_noise: Tensor, y: Labels | None) -> Tensor:
        width = self.map_layer0.in_features
        if self.map_noise is None:
            code = sinusoids(c_noise, width, endpoint=True)
        else:
            code = self.map_noise(c_noise)
        embedding = code.roll(width // 2, dims=1).to(self.map_layer0.weight.dtype)  # sines first
        if self.map_label is not None:
            told = _one_hot(y, self.map_label)
            embedding = embedding + self.map_label(told * math.sqrt(self.map_label.in_features))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

    def _encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        aux = x
        skips: list[Tensor] = []
        for name, part in self.enc.items():
            if "aux_down" in name:
                aux = part(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + part(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + part(aux)) / math.sqrt(2)
            else:
                x = part(x, embedding)
                skips.append(x)
        return x, embedding, skips

    def _decode(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        total = normed = x.new_zeros(())
        for name, part in self.dec.items():
            if "aux_up" in name:
                total = part(total)
            elif "aux_norm" in name:
                normed = part(x)
            elif "aux_conv" in name:
                total = total + part(F.silu(normed))
            else:
                x = part(_joined(x, skips, part), embedding)
        return total


class DhariwalUNet(nn.Module):
    """ADM (Dhariwal and Nichol), as in table 7 of Karras et al."""

    def __init__(self, config: DhariwalConfig) -> None:
        super().__init__()
        self.config, self.image_size = config, config.img_resolution
        width = config.model_channels
        embedded = width * config.channel_mult_emb
        self.map_augment = _augment(config, width)
        self.map_layer0, self.map_layer1 = nn.Linear(width, embedded), nn.Linear(embedded, embedded)
        label = config.label_dim
        self.map_label = nn.Linear(label, embedded, bias=False) if label else None
        style = _Style(
            embedded=embedded,
            dropout=config.dropout,
            eps=1e-5,
            skip_scale=1.0,
            heads=None,
            scales=True,
            project=False,
            taps=(1, 1),
        )
        block = partial(_Block, style=style)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels = self._add_blocks(block, [width * factor for factor in config.channel_mult])
        self.out_norm = _norm(channels, style.eps)
        self.out_conv = _Conv(channels, config.img_channels, 3)

    def _add_blocks(self, block: Callable[..., nn.Module], widths: list[int]) -> int:
        """Add encoder and decoder, and return the channels of the last block."""
        config, channels = self.config, widths[0]
        skips = [channels]
        sides = [config.img_resolution >> level for level in range(len(widths))]
        for side, outside in zip(sides, widths, strict=True):
            at, attends = f"{side}x{side}", side in config.attn_resolutions
            if side == sides[0]:
                self.enc[f"{at}_conv"] = _Conv(config.img_channels, channels, 3)
            else:
                self.enc[f"{at}_down"] = block(channels, channels, resize="down")
                skips.append(channels)
            for index in range(config.num_blocks):
                self.enc[f"{at}_block{index}"] = block(channels, outside, attends=attends)
                channels = outside
                skips.append(channels)
        for side, outside in zip(sides[::-1], widths[::-1], strict=True):
            at, attends = f"{side}x{side}", side in config.attn_resolutions
            _enter(self.dec, at, channels, block, side == sides[-1])
            for index in range(config.num_blocks + 1):
                inside, channels = channels + skips.pop(), outside
                self.dec[f"{at}_block{index}"] = block(inside, channels, attends=attends)
        return channels

    def forward(self, x: Images, c_noise: Tensor, y: Labels | None) -> Images:
        """Return the prediction at noise levels (batch,); the null class is label_dim."""
        check_images(x, self.config.img_channels, self.image_size)
        code = sinusoids(c_noise, self.map_layer0.in_features, endpoint=False).to(
            self.map_layer0.weight.dtype
        )
        embedding = self.map_layer1(F.silu(self.map_layer0(code)))
        if self.map_label is not None:
            embedding = embedding + self.map_label(_one_hot(y, self.map_label))
        embedding = F.silu(embedding)
        skips = []
        for part in self.enc.values():
            x = part(x, embedding)
            skips.append(x)
        for part in self.dec.values():
            x = part(_joined(x, skips, part), embedding)
        return self.out_conv(F.silu(self.out_norm(x)))


class _Block(nn.Module):
    """Residual block of both networks, with optional resampling and attention."""

    def __init__(
        self,
        inside: int,
        outside: int,
        *,
        style: _Style,
        resize: Literal["up", "down"] | None = None,
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.inside, self.style = inside, style
        self.norm0 = _norm(inside, style.eps)
        self.conv0 = _Conv(inside, outside, 3, resize, style.taps)
        self.affine = nn.Linear(style.embedded, outside * (1 + style.scales))
        self.norm1 = _norm(outside, style.eps)
        self.conv1 = _Conv(outside, outside, 3)
        weights = inside != outside or (style.project and resize is not None)
        self.skip: nn.Module = nn.Identity()
        if weights or resize:
            self.skip = _Conv(inside, outside, int(weights), resize, style.taps)
        self.heads = 0
        if attends:
            self.heads = outside // 64 if style.heads is None else style.heads
        if self.heads:
            self.norm2 = _norm(outside, style.eps)
            self.qkv = _Conv(outside, 3 * outside, 1)
            self.proj = _Conv(outside, outside, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(embedding)[:, :, None, None]
        if self.style.scales:
            scale, shift = told.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = F.silu(self.norm1(h + told))
        h = self.conv1(F.dropout(h, self.style.dropout, self.training))
        x = (self.skip(x) + h) * self.style.skip_scale
        if not self.heads:
            return x
        # The rows of qkv: q, k and v of each channel in turn, heads outermost.
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.heads, -1, 3))
        attended = attention(*qkv.unbind(3)).reshape(x.shape)
        return (x + self.proj(attended)) * self.style.skip_scale


class _Conv(nn.Module):
    """A convolution, none if ``kernel`` is 0, of an image that is doubled or halved first.

    With ``last`` the convolution comes first and widens the image by the margin of the filter.
    """

    resample_filter: Tensor

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int,
        resize: Literal["up", "down"] | None = None,
        taps: tuple[int, ...] = (1, 1),
        last: bool = False,
    ) -> None:
        super().__init__()
        self.resize, self.last = resize, last
        if kernel:
            conv = nn.Conv2d(inside, outside, kernel)
            self.weight, self.bias = conv.weight, conv.bias
        if resize:
            row = torch.tensor(taps, dtype=torch.float32) / sum(taps)
            self.register_buffer("resample_filter", row.outer(row)[None, None])
        self.margin = (len(taps) - 1) // 2 if resize else 0
        self.padding = (kernel - 1) // 2 if kernel else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        if self.last and self.padding is not None:
            x = F.conv2d(x, self.weight, self.bias, padding=self.padding + self.margin)
            return self._resized(x, 0)
        if self.resize:
            x = self._resized(x, self.margin)
        if self.padding is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def _resized(self, x: Tensor, padding: int) -> Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.resize == "up":
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)


class _Fourier(nn.Module):
    """Cosines, then sines, of a noise level at random frequencies (Song et al., appendix H)."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[:, None].float() * (2 * math.pi * self.freqs.float())
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def _enter(blocks: nn.ModuleDict, at: str, channels: int, block: Any, lowest: bool) -> None:
    """Add the blocks with which the decoder enters a resolution."""
    if lowest:
        blocks[f"{at}_in0"] = block(channels, channels, attends=True)
        blocks[f"{at}_in1"] = block(channels, channels)
    else:
        blocks[f"{at}_up"] = block(channels, channels, resize="up")


def _joined(x: Tensor, skips: list[Tensor], part: Any) -> Tensor:
    """Return the input of a block of the decoder: blocks that are wider take a skip too."""
    return x if x.shape[1] == part.inside else torch.cat([x, skips.pop()], dim=1)


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise InputError(
            f"a level has {channels} channels, which do not form groups; give other model_channels"
        )
    return nn.GroupNorm(groups, channels, eps)


def _augment(config: EDMConfig, width: int) -> nn.Linear | None:
    """The weights for augmented images; they belong to the file, but clean images do not use them.

    Source: Karras et al., appendix F.2.
    """
    return nn.Linear(config.augment_dim, width, bias=False) if config.augment_dim else None


def _one_hot(y: Labels | None, layer: nn.Linear) -> Tensor:
    """Return one-hot classes; the row of the null class, one above the last, is 0."""
    if y is None:
        raise InputError("the network needs a class for each image; give labels")
    return F.one_hot(y, layer.in_features + 1)[:, :-1].to(layer.weight.dtype)
