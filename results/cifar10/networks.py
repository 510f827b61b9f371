"""Networks of these results with their weights, by the names that ``--model`` takes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from art_denoised import UNetDenoiser

HERE = Path(__file__).parent
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.stride, self.grow = stride, outside - inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        return F.relu(y + skip)


class _Normalized(nn.Module):
    """Images in [0, 1] on the scale of CIFAR-10's mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2023, 0.1994, 0.2010]).reshape(1, 3, 1, 1))


class ResNet(_Normalized):
    """Residual network for 32x32 images in [0, 1] (He et al. 2016, section 4.2).

    Depth 20 has 0.27 M parameters, depth 14 has 0.17 M.

    Args:
        depth: 6 n + 2, for n blocks a stage.
        width: Channels of the first stage; doubled in each of the two after it.
        stride: Stride of the stem. 2 halves the image and quarters the cost of the rest.
    """

    def __init__(self, depth: int = 20, *, width: int = 16, stride: int = 1) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.stem = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = (width, *(n * (width,)), *(n * (2 * width,)), *(n * (4 * width,)))
        self.blocks = nn.Sequential(
            *(_Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths))
        )
        self.head = nn.Linear(4 * width, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem((x - self.mean) / self.std)))
        return self.head(self.blocks(x).mean((2, 3)))


class PlainNet(_Normalized):
    """Six 3x3 convolutions with batch norm, pooled twice: no skips, 0.15 M parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in pairwise((3, 16, 16, 48, 48, 96, 96)):
            layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outside), nn.ReLU()]
            if inside == outside != 96:
                layers += [nn.MaxPool2d(2)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(96, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers((x - self.mean) / self.std).mean((2, 3)))


ARCHITECTURES = {"resnet20": ResNet, "resnet14": lambda: ResNet(14), "plain": PlainNet}


def _trained(architecture: str, name: str) -> nn.Module:
    network = ARCHITECTURES[architecture]()
    network.load_state_dict(load_file(HERE / f"{name}.safetensors"))
    return network.eval()


def classifier() -> nn.Module:
    """Return the classifier to defend: ResNet-20 trained on clean images by train_classifier.py."""
    return _trained("resnet20", "classifier")


def surrogate_resnet14() -> nn.Module:
    """Return a ResNet-14 to train denoisers for a classifier that can only be queried."""
    return _trained("resnet14", "surrogate-resnet14")


def surrogate_plain() -> nn.Module:
    """Return a plain convolutional network for the same use."""
    return _trained("plain", "surrogate-plain")


def small() -> nn.Module:
    """Return an untrained ResNet-8 whose stem halves the image: 8 MFLOP, to train robustly."""
    return ResNet(8, stride=2)


def unet() -> nn.Module:
    """Return an untrained U-Net of 0.58 M parameters, most of whose work is at half resolution.

    It costs a fifth of a DnCNN with 17 layers of 64 channels.
    """
    return UNetDenoiser.from_config(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        add_attention=False,
    )
