"""Train the packaged diffusion model of the digits, and measure how well it classifies.

    python examples/train_digits_diffusion.py --out art_denoised/demo

A class-conditional EDM on 1,297 images of 8x8 pixels. This takes some minutes on one CPU core; with
--quick, seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from art_denoised import (
    DiffusionClassifier,
    EDMLoss,
    TrainingConfig,
    noise_levels,
    train_diffusion,
)
from art_denoised.data import digits
from art_denoised.demo import digits_diffusion_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("art_denoised/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # weights depend on the number of threads, through rounding
    torch.manual_seed(arguments.seed)
    model = digits_diffusion_network()
    config = TrainingConfig(
        epochs=2 if arguments.quick else 800,
        batch_size=256,
        lr=2e-3,
        weight_decay=0.0,
        average=0.995,
        augment="none",
        bf16=False,
        seed=arguments.seed,
    )
    train_diffusion(model, digits(train=True), EDMLoss(p_mean=-0.8), config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), arguments.out / "digits_diffusion.safetensors")

    x, y = zip(*digits(train=False), strict=True)
    images, labels = torch.stack(x), torch.tensor(y)
    for count in (2,) if arguments.quick else (2, 8, 32):
        classifier = DiffusionClassifier(model, levels=noise_levels(count), seed=0)
        with torch.no_grad():
            correct = (classifier(images).argmax(1) == labels).float().mean()
        print(f"{count} noise levels: {correct:.1%} of {len(labels)} held-out digits")


if __name__ == "__main__":
    main()
