"""Factories that the command-line tests name with --model and --denoiser."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from art_denoised import DnCNN
from art_denoised.demo import digits_classifier

SMALL_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


class _Slow(nn.Module):
    """The digits classifier, slow enough to be killed in the middle of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))
        return self.net(x)


def slow() -> nn.Module:
    return _Slow().eval()


class _SinglePrecision(nn.Module):
    """A classifier with a layer that bfloat16 has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("not implemented for 'BFloat16'")
        return self.net(x)


def single_precision() -> nn.Module:
    return _SinglePrecision().eval()


def training() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))


def surrogate() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


class _Plain(nn.Module):
    """A denoiser of a type that no checkpoint is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x_noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.conv(x_noisy)


def plain_denoiser() -> nn.Module:
    return _Plain()


def colour_denoiser() -> nn.Module:
    return DnCNN(3, depth=3, width=4)


def three_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()


def colour() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)).eval()


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x + self.bn(self.conv(x)))


def residual() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), _Residual(16), nn.Conv2d(16, 32, 3, 2, padding=1),
            _Residual(32), nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        )  # fmt: skip


class _Nan(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), 10), float("nan"))


def nan() -> nn.Module:
    return _Nan().eval()


def not_a_module() -> str:
    return "resnet"


def fails() -> nn.Module:
    raise RuntimeError("no such weights")


MODEL = "art_denoised.demo:digits_classifier"


def coin() -> nn.Module:
    from tests.evaluation.defects import Coin

    return Coin().eval()
