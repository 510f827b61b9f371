"""Add denoising blocks and smooth activations to a torchvision network, train and attack it.

    python examples/robust_resnet.py [--epochs 6]

Blocks and activations alone do not make a network robust; adversarial training does. An epoch takes
about 15 seconds on one CPU core.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from torch import nn
from torchvision.models import resnet18

from art_denoised import FeatureDenoisingClassifier, RobustTrainer, TrainingConfig, load_data
from art_denoised.training import Adversarial

EPS = 0.1


def arrays(*, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the 8x8 digits as images of 16x16 pixels and three channels."""
    images, labels = zip(*load_data("digits", train=train), strict=True)
    x = nn.functional.interpolate(torch.stack(images), scale_factor=2).expand(-1, 3, -1, -1)
    return x.numpy(), np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1297)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    classifier = FeatureDenoisingClassifier(
        resnet18(num_classes=10),
        input_shape=(3, 16, 16),
        nb_classes=10,
        operation="dot_product",
        activation="silu",
    )
    config = TrainingConfig(epochs=arguments.epochs, batch_size=64, augment="crop", average=0.9)
    recipe = Adversarial(eps=0.15, steps=1, relative_step_size=1.0)
    x, y = arrays(train=True)
    RobustTrainer(classifier, recipe=recipe, config=config).fit(
        x[: arguments.images], y[: arguments.images]
    )

    x, y = (part[:25] for part in arrays(train=False))
    pgd = ProjectedGradientDescent(classifier, eps=EPS, eps_step=0.04, max_iter=5, verbose=False)
    for name, shown in {"clean": x, f"PGD at {EPS}": pgd.generate(x, y)}.items():
        print(f"{name:10} {np.mean(classifier.predict(shown).argmax(1) == y):.0%}")


if __name__ == "__main__":
    main()
