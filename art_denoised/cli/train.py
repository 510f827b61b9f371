"""Commands that train denoisers and diffusion models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from art_denoised.cli.options import MODEL, RunOptions, notice
from art_denoised.cli.training import (
    TrainingData,
    TrainingOptions,
    ValidatedData,
    print_row,
)
from art_denoised.cli.words import Factory, Numbers, Widths

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.training.denoiser import Objective


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class DenoiserOptions:
    """Which denoiser is trained, and for which classifier.

    Attributes:
        objective: What is learnt.
        classifier: Function that returns the classifier to defend, as package.module:function; in
            eval mode.
        surrogate: Classifier to train with in its place; repeat it for several.
        sigma: Noise level, or a range of levels; pixels are in [0, 1].
        architecture: dncnn (17 layers of 64 channels), dncnn:DEPTH:WIDTH or memnet; or the factory
            or checkpoint of a denoiser to continue from.
        fine_epochs: Number of epochs of the second part of hybrid. By default 2/9 of --epochs.
    """

    objective: Literal["mse", "stability", "classification", "hybrid"]
    classifier: Factory | None = None
    surrogate: Annotated[list[str], Parameter(metavar="FACTORY")] | None = None
    sigma: Annotated[Numbers, Parameter(metavar="S|LOW,HIGH")]
    architecture: Annotated[str, Parameter(metavar="NAME")] = "dncnn"
    fine_epochs: int | None = None

    @property
    def levels(self) -> Any:
        """The noise level, or the lowest and the highest."""
        return self.sigma[0] if len(self.sigma) == 1 else self.sigma

    def load(self, device: torch.device) -> Objective:
        """Return the objective, with its classifiers on the device."""
        from art_denoised.models.loading import load_module
        from art_denoised.training.denoiser import Objective

        classifier = None
        if self.classifier is not None:
            classifier = load_module(self.classifier).to(device)
        return Objective(
            self.objective,
            sigma=self.levels,
            classifier=classifier,
            surrogates=[load_module(n).to(device) for n in self.surrogate or ()],
            fine_epochs=self.fine_epochs,
        )

    def build(self, channels: int) -> nn.Module:
        """Return the denoiser to start from."""
        from art_denoised.checks import InputError
        from art_denoised.denoisers.architectures import DnCNN, MemNet
        from art_denoised.denoisers.checkpoints import load_denoiser

        kind, *sizes = self.architecture.split(":")
        if kind == "dncnn" and len(sizes) in (0, 2):
            try:
                depth, width = map(int, sizes) if sizes else (17, 64)
                return DnCNN(channels, depth=depth, width=width)
            except ValueError as error:
                message = f"--architecture is {self.architecture!r}: {error}"
                raise InputError(message) from None
        if kind == "memnet":
            return MemNet(channels)
        return load_denoiser(self.architecture)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    """Which diffusion model is trained.

    Attributes:
        classes: Number of classes; without it the model is unconditional.
        init: Model to continue from: a folder or hub id, of the EDM preconditioning.
        widths: Numbers of channels of the U-Net at each resolution, multiples of 8.
        layers: Number of blocks at each resolution.
        patch: Side of the squares of pixels that are folded into channels: compute falls with its
            square.
        drop: Share of images shown without their class.
        p_mean: Mean of ln(sigma), in the units of the network. Take it higher for images whose
            classes are told apart by large shapes.
        p_std: Standard deviation of ln(sigma).
    """

    classes: int | None = None
    init: Annotated[str | None, Parameter(metavar="MODEL")] = None
    widths: Widths = (32, 64, 64)
    layers: int = 1
    patch: int = 1
    drop: float = 0.1
    p_mean: float = -1.2
    p_std: float = 1.2

    def build(self, channels: int, size: int) -> Any:
        """Return the model to start from."""
        from art_denoised.diffusion.folders import load_diffusion, unet_diffusion

        if self.init is not None:
            return load_diffusion(self.init, classes=self.classes).float()
        return unet_diffusion(
            channels,
            size,
            classes=self.classes,
            widths=self.widths,
            layers=self.layers,
            patch=self.patch,
        )


_TRAINING, _DIFFUSION = TrainingOptions(), DiffusionOptions()


def train_denoiser(
    *,
    denoiser: DenoiserOptions,
    data: ValidatedData,
    training: TrainingOptions = _TRAINING,
    run: RunOptions,
) -> None:
    r"""Train a denoiser for a pretrained classifier.

    Salman et al. 2020. With access to the classifier, --classifier is the one
    to defend; it is not changed. If it can only be queried, repeat --surrogate:
    the surrogates are used in turn, and --classifier, if given, is only
    evaluated.

    Objectives:
      mse              restore the clean image; needs no classifier
      stability        keep the label that the classifier gives the clean image
      classification   reach the true label
      hybrid           mse, then stability at a hundredth of the learning rate

    DIR gets denoiser.safetensors (for certify --denoiser), train.jsonl and a
    checkpoint, from which --resume continues exactly.

    A small DnCNN for the packaged digits classifier, in a minute:
      art-denoised train-denoiser --objective stability --data digits \
          --classifier art_denoised.demo:digits_classifier --sigma 0.25 \
          --architecture dncnn:6:24 --augment crop --out runs/denoiser

    For a classifier that can only be queried, with a range of noise:
      art-denoised train-denoiser --objective stability --data imagefolder:train \
          --surrogate mynets:resnet18 --surrogate mynets:vgg16 --sigma 0.1,0.5 \
          --out runs/denoiser
    """
    from art_denoised.checks import InputError
    from art_denoised.denoisers.checkpoints import check_saveable, save_denoiser
    from art_denoised.training.batches import seeded
    from art_denoised.training.denoiser import train_denoiser

    config, device = training.config(), training.find_device()
    path = run.out / "denoiser.safetensors"
    if path.exists() and not run.resume:
        raise InputError(f"{path} already exists; choose another folder", resume=True)
    if denoiser.surrogate and data.validation and denoiser.classifier is None:
        notice("without --classifier, the accuracy is that of the first surrogate")
    objective, images = denoiser.load(device), data.load()
    with seeded(training.seed, device):
        network = denoiser.build(len(images[0][0]))
    check_saveable(network)
    network = network.float().to(device)  # a checkpoint may be in half precision
    rows = train_denoiser(
        network,
        images,
        objective,
        config,
        validation=data.load_validation(),
        run=run.out,
        resume=run.resume,
        progress=not run.quiet,
    )
    save_denoiser(network.cpu(), path, sigma=objective.levels)
    print_row(rows[-1])
    print(f"denoiser: {path}")


def train_diffusion(
    *,
    diffusion: DiffusionOptions = _DIFFUSION,
    data: TrainingData,
    training: TrainingOptions = _TRAINING,
    run: RunOptions,
) -> None:
    r"""Train a class-conditional diffusion model.

    A U-Net of diffusers is trained with the loss of EDM (Karras et al. 2022).
    DIR gets unet/ and scheduler/ (for load_diffusion, or for certify --denoiser
    if there are no classes), train.jsonl and a checkpoint, from which --resume
    continues exactly.

    Handwritten digits, as a trial:
      art-denoised train-diffusion --data digits --classes 10 --widths 16,32 \
          --augment none --epochs 20 --out runs/diffusion
    """
    from art_denoised.checks import InputError
    from art_denoised.diffusion.folders import save_diffusion
    from art_denoised.training.batches import seeded
    from art_denoised.training.diffusion import EDMLoss, train_diffusion

    config, device, images = training.config(), training.find_device(), data.load()
    channels, size, width = images[0][0].shape
    if size != width:
        raise InputError(f"the images are {size} x {width}; the U-Net takes square ones")
    with seeded(training.seed, device):
        model = diffusion.build(channels, size)
    rows = train_diffusion(
        model.to(device),
        images,
        EDMLoss(p_mean=diffusion.p_mean, p_std=diffusion.p_std, drop=diffusion.drop),
        config,
        run=run.out,
        resume=run.resume,
        progress=not run.quiet,
    )
    save_diffusion(model.cpu(), run.out)
    print_row(rows[-1])
    print(f"diffusion model: {run.out}")
