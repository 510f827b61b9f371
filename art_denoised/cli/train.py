"""Commands that train networks: train-denoiser and train-diffusion."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.cli.parser import add_command

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.training.config import TrainingConfig
    from art_denoised.training.rows import EpochRow

_DENOISER_DESCRIPTION = """\
Train a denoiser for a pretrained classifier (Salman et al. 2020).

objectives:
  mse             restore the clean image; needs no classifier
  stability       keep the label that the classifier gives the clean image
  classification  reach the true label
  hybrid          mse, then stability at a hundredth of the rate

White box: --classifier is the one to defend, frozen. Black box: repeat --surrogate; the surrogates
are taken in turn, and --classifier, if given, is only evaluated: without it the accuracy that is
printed is that of the first surrogate.

OUT gets denoiser.safetensors (for certify --denoiser), train.jsonl and a checkpoint, from which
--resume goes on exactly. What training costs: about three passes of denoiser and classifier an
image and epoch; the progress bar estimates the time.
"""

_DENOISER_EPILOG = """\
examples:
  a small DnCNN for the packaged digits classifier, in a minute:
    art-denoised train-denoiser --objective stability --data digits --holdout digits \\
        --classifier art_denoised.demo:digits_classifier --sigma 0.25 \\
        --architecture dncnn:6:24 --augment crop --epochs 30 --out runs/denoiser

  for a classifier that can only be queried, with two surrogates and a range of noise:
    art-denoised train-denoiser --objective stability --data imagefolder:train \\
        --surrogate mynets:resnet18 --surrogate mynets:vgg16 --sigma 0.1,0.5 --out runs/denoiser
"""


_DIFFUSION_DESCRIPTION = """\
Train a diffusion model with the loss of EDM (Karras et al. 2022): a U-Net of diffusers, with a null
class if it is conditional.

OUT gets unet/ and scheduler/ (for load_diffusion, or for certify --denoiser where there are no
classes), train.jsonl and a checkpoint, from which --resume goes on exactly.
"""

_DIFFUSION_EPILOG = """\
examples:
  handwritten digits, as a trial:
    art-denoised train-diffusion --data digits --classes 10 --widths 16,32 --augment none \\
        --epochs 20 --out runs/diffusion
"""


def add_train_denoiser(commands: Any) -> None:
    """Add `train-denoiser`."""
    from art_denoised.data import SPECS

    command = add_command(
        commands,
        "train-denoiser",
        _train_denoiser,
        "train a denoiser for a classifier",
        description=_DENOISER_DESCRIPTION,
        epilog=_DENOISER_EPILOG,
    )
    add = command.add_argument
    add("--objective", required=True, help="mse, stability, classification or hybrid")
    add(
        "--classifier",
        metavar="FACTORY",
        help="package.module:factory of the classifier to defend, in eval mode",
    )
    add(
        "--surrogate",
        action="append",
        default=[],
        metavar="FACTORY",
        help="classifier to train with in its place; repeat for several",
    )
    add("--data", required=True, metavar="DATA", help=f"training images: {SPECS}")
    add_holdout_options(command, "evaluated")
    add(
        "--sigma",
        type=_sigmas,
        required=True,
        metavar="S|LOW,HIGH",
        help="noise level in units of images in [0, 1], or a range of levels",
    )
    add(
        "--architecture",
        default="dncnn",
        metavar="NAME",
        help="dncnn, dncnn:DEPTH:WIDTH or memnet, built here; or the FACTORY or CHECKPOINT of a "
        "denoiser to go on from (default: %(default)s, 17 layers of 64 channels)",
    )
    add_config_options(command)
    add("--fine-epochs", type=int, help="of the second part of hybrid (default: 2/9 of --epochs)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for weights and log")


def add_train_diffusion(commands: Any) -> None:
    """Add `train-diffusion`."""
    from art_denoised.data import SPECS
    from art_denoised.diffusion.levels import P_MEAN, P_STD

    command = add_command(
        commands,
        "train-diffusion",
        _train_diffusion,
        "train a class-conditional diffusion model",
        description=_DIFFUSION_DESCRIPTION,
        epilog=_DIFFUSION_EPILOG,
    )
    add = command.add_argument
    add("--data", required=True, metavar="DATA", help=f"training images: {SPECS}")
    add("--classes", type=int, help="number of classes; without it the model is unconditional")
    add(
        "--init",
        metavar="MODEL",
        help="go on from this model (folder or hub id, family EDM), whose U-Net then is trained",
    )
    add(
        "--widths",
        type=_whole_numbers,
        default=(32, 64, 64),
        metavar="W,W,...",
        help="channels of the U-Net at each resolution, multiples of 8 (default: 32,64,64)",
    )
    add("--layers", type=int, default=1, help="blocks at each resolution (default: %(default)s)")
    add(
        "--patch",
        type=int,
        default=1,
        help="fold squares of PATCH x PATCH pixels into channels: 1 / PATCH^2 of the compute "
        "(default: %(default)s)",
    )
    add(
        "--drop",
        type=float,
        default=0.1,
        help="share of images shown without their class (default: %(default)s)",
    )
    add(
        "--p-mean",
        type=float,
        default=P_MEAN,
        help="mean of ln(sigma), sigma in the units of the network (default: %(default)s); higher "
        "for images whose classes are told apart by large shapes",
    )
    add("--p-std", type=float, default=P_STD, help="deviation of ln(sigma) (default: %(default)s)")
    add_config_options(command)
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the model and log")


def add_config_options(
    command: argparse.ArgumentParser, config: TrainingConfig | None = None
) -> None:
    """Add the options of `TrainingConfig`, with the defaults of this one, and those of a run."""
    from art_denoised.training.config import TrainingConfig

    config = TrainingConfig() if config is None else config
    add = command.add_argument
    for name, text in {
        "epochs": "passes over the data",
        "batch_size": "images a step",
        "optimizer": "adam or sgd",
        "lr": "peak learning rate",
        "momentum": "of sgd",
        "weight_decay": "of the optimizer",
        "clip": "largest norm of the gradient, 0 for none",
        "schedule": "of the learning rate: cosine, one-cycle, step, milestones, sat-milestones or "
        "constant",
        "average": "decay of the moving average of the weights, 0 for none",
        "augment": "crop+flip, crop or none",
        "seed": "of everything random",
    }.items():
        default = getattr(config, name)
        add(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{text} (default: %(default)s)",
        )
    add(
        "--bf16",
        type=_switch,
        default="auto",
        metavar="auto|on|off",
        help="autocast to bfloat16; auto: where the machine computes in it (default: %(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    add("--resume", action="store_true", help="go on from the checkpoint in OUT")
    add("--quiet", action="store_true", help="no progress bar")


def add_holdout_options(command: argparse.ArgumentParser, what: str) -> None:
    """Add the options that `read_holdout` reads."""
    add = command.add_argument
    add(
        "--holdout",
        metavar="DATA",
        help=f"images that are not trained on, {what} after each epoch; the same forms as --data",
    )
    add("--holdout-max", type=int, default=500, metavar="M", help="of them (default: %(default)s)")


def read_holdout(arguments: argparse.Namespace) -> list[Any] | None:
    """Return pairs of image and label, evenly from all of the data."""
    from art_denoised.data import load_data, select

    most = checks.count("--holdout-max", arguments.holdout_max)
    if not arguments.holdout:
        return None
    data = load_data(arguments.holdout)
    step = max(1, len(data) // most)  # all classes, where they are sorted
    return [data[i] for i in select(data, step, most)]


def read_config(arguments: argparse.Namespace) -> TrainingConfig:
    """Return the `TrainingConfig` of the options."""
    from art_denoised.training.config import TrainingConfig

    names = [field.name for field in fields(TrainingConfig) if hasattr(arguments, field.name)]
    return TrainingConfig(**{name: getattr(arguments, name) for name in names})


def _train_denoiser(arguments: argparse.Namespace) -> None:
    from art_denoised.data import load_data
    from art_denoised.denoisers.checkpoints import check_saveable, save_denoiser
    from art_denoised.models.loading import find_device, load_module
    from art_denoised.training.denoiser import Objective, train_denoiser

    config, device = read_config(arguments), find_device(arguments.device)
    path = arguments.out / "denoiser.safetensors"
    if path.exists() and not arguments.resume:
        raise InputError(
            f"{path} already exists; pass --resume to go on with its training or choose another "
            "folder"
        )
    classifier = None
    if arguments.classifier:
        classifier = load_module("--classifier", arguments.classifier).to(device)
    if arguments.surrogate and arguments.holdout and classifier is None:
        print(
            "notice: without --classifier the accuracy is that of the first surrogate, which the "
            "denoiser is trained through",
            file=sys.stderr,
        )
    objective = Objective(
        arguments.objective,
        sigma=arguments.sigma,
        classifier=classifier,
        surrogates=[load_module("--surrogate", name).to(device) for name in arguments.surrogate],
        fine_epochs=arguments.fine_epochs,
    )
    data = load_data(arguments.data, train=True)
    denoiser = _build(arguments.architecture, len(data[0][0]), arguments.seed, device)
    check_saveable(denoiser)
    denoiser = denoiser.float().to(device)  # a checkpoint may be in half precision
    rows = train_denoiser(
        denoiser,
        data,
        objective,
        config,
        validation=read_holdout(arguments),
        run=arguments.out,
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    save_denoiser(denoiser.cpu(), path)
    print(summary(rows[-1]))
    print(f"denoiser: {path}")


def _train_diffusion(arguments: argparse.Namespace) -> None:
    from art_denoised.data import load_data
    from art_denoised.diffusion.folders import load_diffusion, save_diffusion
    from art_denoised.diffusion.unet import unet_diffusion
    from art_denoised.models.loading import find_device
    from art_denoised.training.diffusion import EDMLoss, train_diffusion
    from art_denoised.training.seeds import seeded

    config, device = read_config(arguments), find_device(arguments.device)
    data = load_data(arguments.data, train=True)
    channels, size, width = data[0][0].shape
    if size != width:
        raise InputError(f"the images are {size} x {width}; the U-Net takes square ones")
    with seeded(arguments.seed, device):
        if arguments.init:
            model = load_diffusion(arguments.init, classes=arguments.classes).float()
        else:
            model = unet_diffusion(
                channels,
                size,
                classes=arguments.classes,
                widths=arguments.widths,
                layers=arguments.layers,
                patch=arguments.patch,
            )
    rows = train_diffusion(
        model.to(device),
        data,
        EDMLoss(p_mean=arguments.p_mean, p_std=arguments.p_std, drop=arguments.drop),
        config,
        run=arguments.out,
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    save_diffusion(model.cpu(), arguments.out)
    print(summary(rows[-1]))
    print(f"diffusion model: {arguments.out}")


def summary(row: EpochRow) -> str:
    """Return the figures of an epoch in one line."""
    figures = {"epoch": row.epoch, "loss": row.loss, **row.figures}
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.items())


def _switch(text: str) -> bool | None:
    switches = {"auto": None, "on": True, "off": False}
    if text not in switches:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; give auto, on or off")
    return switches[text]


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers; join them by commas, as in 32,64"
        ) from None


def _build(name: str, channels: int, seed: int, device: torch.device) -> nn.Module:
    """Return the denoiser named, freshly drawn from the seed or loaded."""
    from art_denoised.denoisers.architectures import DnCNN, MemNet
    from art_denoised.models.loading import load_denoiser_option
    from art_denoised.training.seeds import seeded

    kind, *sizes = name.split(":")
    with seeded(seed, device):
        if kind == "dncnn" and len(sizes) in (0, 2):
            try:
                depth, width = map(int, sizes) if sizes else (17, 64)
                return DnCNN(channels, depth=depth, width=width)
            except ValueError as error:
                raise InputError(f"--architecture is {name!r}: {error}") from None
        if name == "memnet":
            return MemNet(channels)
        return load_denoiser_option(name, "--architecture")


def _sigmas(text: str) -> float | tuple[float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise argparse.ArgumentTypeError(
        f"{text!r} is no noise level; give a number, or two joined by a comma, as in 0.1,0.5"
    )
