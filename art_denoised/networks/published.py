"""The ImageNet networks that Xie et al. released as npz files of TensorFlow, as torch modules.

Source: Xie et al., "Feature Denoising for Improving Adversarial Robustness" (CVPR 2019) and the
names in its code, which builds on tensorpack. The files are CC-BY-NC, so this package has none of
them. Needs torchvision.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.networks.feature_denoising import FeatureDenoising, Operation

if TYPE_CHECKING:
    from art_denoised.types import Images


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network of the release.

    Args:
        depths: Number of residual blocks in each of the four stages.
        groups: Number of groups of the 3x3 convolutions.
        width_per_group: Width of a group of the 3x3 convolutions in the first stage.
        after: Residual blocks that a denoising block follows: none, the last one of each stage,
            or every one.
        operation: Operation of the denoising blocks, see `FeatureDenoising`.
        embedding: Whether the denoising blocks have embeddings.
    """

    depths: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64
    after: Literal["none", "stage", "block"] = "stage"
    operation: Operation = "gaussian"
    embedding: bool = True


ARCHITECTURES = {
    "resnet152": Architecture((3, 8, 36, 3), after="none"),
    "resnet152_denoise": Architecture((3, 8, 36, 3)),
    "resnext101_denoise_all": Architecture((3, 4, 23, 3), 32, 8, "block", "dot_product", False),
}


def load_published(
    path: Path | str, architecture: str | Architecture = "resnet152_denoise"
) -> nn.Module:
    """Load a released npz file as a classifier in eval mode.

    The classifier takes RGB images in [0, 1], NCHW, of any size (224 in the release), and returns
    logits. It converts to the conventions of the file: pixels become 2x - 1 (x / 127.5 - 1 of 8
    bits), the first convolution is turned from BGR to RGB at loading, and padding is TensorFlow's
    SAME, which depends on the parity of the size. Names are torchvision's; a residual block with a
    denoising block after it is ``.block``, and the denoising block ``.denoise``.

    Args:
        path: The .npz file. Nothing in it is executed.
        architecture: "resnet152", "resnet152_denoise", "resnext101_denoise_all", or an
            `Architecture` for a network of your own with the names of the release.

    Raises:
        InputError: An unreadable file, an unknown architecture, or names or shapes that do not fit.

    Example:
        >>> load_published("R152.npz")
        Traceback (most recent call last):
        ...
        art_denoised.checks.values.InputError: weights R152.npz do not exist; give an .npz file
    """
    if isinstance(architecture, str):
        architecture = ARCHITECTURES[checks.choice("architecture", architecture, ARCHITECTURES)]
    arrays = _read(Path(path))
    classes = np.size(arrays.get("linear/b", 0))  # a file without is refused by its names
    with torch.device("meta"):  # shapes alone: nothing is drawn or allocated to be replaced
        network = build(architecture, classes)
    counters = {n for n in network.state_dict() if n.endswith("num_batches_tracked")}
    shapes = {n: t.shape for n, t in network.state_dict().items() if n not in counters}
    names = {name: array_name(name, architecture) for name in shapes}
    _check_names(path, set(names.values()), arrays.keys())
    state = dict.fromkeys(counters, torch.tensor(0))
    for name, shape in shapes.items():
        state[name] = _as_torch(path, names[name], arrays[names[name]], tuple(shape))
    state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR to RGB
    network.load_state_dict(state, assign=True)
    return nn.Sequential(OrderedDict(normalise=_ToMinusOneOne(), network=network)).eval()


class _ToMinusOneOne(nn.Module):
    def forward(self, x: Images) -> Images:
        return 2 * x - 1


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_pad(input, self.kernel_size[0], self.stride[0]))


class _SameMaxPool2d(nn.MaxPool2d):
    """Max pooling with TensorFlow's SAME padding, by -inf."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = int(self.kernel_size), int(self.stride)  # type: ignore[arg-type]
        return super().forward(_pad(input, kernel, stride, -torch.inf))


def _pad(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    width, height = (same_padding(size, kernel, stride) for size in (x.shape[3], x.shape[2]))
    return F.pad(x, (*width, *height), value=value)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's SAME padding before and after: for ceil(size / stride) outputs."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def build(architecture: Architecture, classes: int) -> ResNet:
    """Return the network of an architecture, with weights drawn at random."""
    network = ResNet(
        Bottleneck,
        list(architecture.depths),
        num_classes=classes,
        groups=architecture.groups,
        width_per_group=architecture.width_per_group,
    )
    network.conv1 = _same_conv(network.conv1)
    network.maxpool = _SameMaxPool2d(3, 2)
    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    for stage in stages[1:]:
        stage[0].conv2 = _same_conv(stage[0].conv2)
    for stage in stages:
        start = {"none": len(stage), "stage": len(stage) - 1, "block": 0}[architecture.after]
        for number in range(start, len(stage)):
            block = stage[number]
            denoise = FeatureDenoising(
                block.bn3.num_features, architecture.operation, embedding=architecture.embedding
            )
            stage[number] = nn.Sequential(OrderedDict(block=block, denoise=denoise))
    return network


def _same_conv(conv: nn.Conv2d) -> nn.Conv2d:
    size, stride = conv.kernel_size[0], conv.stride[0]
    return _SameConv2d(
        conv.in_channels, conv.out_channels, size, stride, groups=conv.groups, bias=False
    )


_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "mean/EMA",
    "running_var": "variance/EMA",
}


def array_name(name: str, architecture: Architecture) -> str:
    """Return the name in a released file of a tensor of `build`.

    Example:
        >>> array_name("layer2.0.bn3.running_var", ARCHITECTURES["resnet152"])
        'group1/block0/conv3/bn/variance/EMA'
    """
    module, _, kind = name.rpartition(".")
    if place := re.fullmatch(r"layer(\d)\.(\d+)\.(block\.|denoise\.)?(.+)", module):
        stage, block, part, layer = place.groups()
        prefix = f"group{int(stage) - 1}/block{block}/"
        if part == "denoise.":
            per_block = architecture.after == "block"
            prefix = f"{prefix}non_local/" if per_block else f"group{int(stage) - 1}_denoise/"
    else:
        prefix, layer = "", {"conv1": "conv0", "bn1": "bn0"}.get(module, module)
    norm = layer.startswith("bn") or layer == "downsample.1"
    layer = re.sub("^bn", "conv", layer)
    layer = re.sub(r"^downsample\..", "convshortcut", layer).replace("embeddings.", "embedding_")
    layer = "linear" if layer == "fc" else layer
    return f"{prefix}{layer}/" + (
        f"bn/{_NORM[kind]}" if norm else {"weight": "W", "bias": "b"}[kind]
    )


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read named arrays, without the ":0" at the end of TensorFlow's names."""
    if not path.is_file():
        raise InputError(f"weights {path} do not exist; give an .npz file")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name.removesuffix(":0"): file[name] for name in file.files}
    except Exception:  # numpy, zipfile and its decompressors fail in a dozen ways
        raise InputError(
            f"weights {path} are not an intact .npz file of arrays; give the released file"
        ) from None


def _check_names(path: Path | str, wanted: set[str], found: Any) -> None:
    parts = [
        f"{len(names)} {what} (first {min(names)!r})"
        for what, names in (("missing", wanted - found), ("unknown", found - wanted))
        if names
    ]
    if parts:
        raise InputError(
            f"weights {path} do not fit the architecture: arrays {' and '.join(parts)}; "
            f"give the right one of {', '.join(ARCHITECTURES)}"
        )


# Order of the axes in torch of an array of 4, 2 or 1 axes: convolutions are HWIO, matrices (I, O).
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def _as_torch(path: Path | str, name: str, array: Any, shape: tuple[int, ...]) -> Tensor:
    axes = _AXES[len(shape)]
    wanted = tuple(shape[axes.index(axis)] for axis in range(len(shape)))  # in the file
    if array.dtype.kind != "f" or array.shape != wanted:
        raise InputError(
            f"weights {path} do not fit the architecture: {name} is {array.dtype} of shape "
            f"{array.shape}, not floating point of shape {wanted}"
        )
    return torch.from_numpy(np.ascontiguousarray(array.transpose(axes), dtype=np.float32))
