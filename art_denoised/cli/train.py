"""Commands that train denoisers and diffusion models, and the options of all trainings."""

# No `from __future__ import annotations`: cyclopts reads the types of inherited fields in the
# module of the subclass, which need not know their names.
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import CycloptsError, Parameter

from art_denoised.cli.help import more
from art_denoised.cli.options import (
    DATA,
    MODEL,
    PLAIN_NETWORK,
    TRAINING,
    DeviceOptions,
    Model,
    NetworkOptions,
    Number,
    Numbers,
    RunOptions,
    Widths,
    notice,
    print_result,
)
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.data import ImageData
    from art_denoised.models.classifiers import EvalTransform
    from art_denoised.training.config import TrainingConfig
    from art_denoised.training.denoiser import Objective
    from art_denoised.training.loop import EpochRow

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "one-cycle", "step", "milestones", "sat-milestones", "constant"]
Augmentation = Literal["crop+flip", "crop", "none"]


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Which images are trained on.

    Attributes:
        data: Training images: digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR.
    """

    data: Annotated[str, Parameter(metavar="DATA")]

    def load(self, transform: "EvalTransform | None" = None) -> "ImageData":
        """Return the training images, photographs as the classifier takes them."""
        from art_denoised.data import load_data

        return load_data(
            self.data, train=True, classes=self._names, transform=self._of_photographs(transform)
        )

    @property
    def _names(self) -> "Sequence[str] | None":
        return None

    def _of_photographs(self, transform: "EvalTransform | None") -> "EvalTransform | None":
        photographs = self.data.startswith(("imagefolder:", "torchvision:ImageNet:"))
        return transform if photographs else None


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class ValidatedData(TrainingData):
    """Which images are trained on, and which are not.

    Attributes:
        validation: Validation images, evaluated after each epoch and not trained on.
        validation_max: Largest number of validation images, evenly spaced in the data set.
        classes: File with the names of an image folder's classes, as that of certify.
    """

    validation: Annotated[str | None, Parameter(metavar="DATA")] = None
    validation_max: Annotated[int, more(DATA), Parameter(metavar="M")] = 500
    classes: Annotated[Path | None, more(DATA), Parameter(metavar="FILE")] = None

    @property
    def _names(self) -> "Sequence[str] | None":
        from art_denoised.data import read_classes

        return None if self.classes is None else read_classes(self.classes)

    def load_validation(self, transform: "EvalTransform | None" = None) -> list[Any] | None:
        """Return pairs of image and label."""
        from art_denoised import checks
        from art_denoised.data import load_data

        most = checks.count("--validation-max", self.validation_max)
        if self.validation is None:
            return None
        data = load_data(
            self.validation, classes=self._names, transform=self._of_photographs(transform)
        )
        step = max(1, len(data) // most)  # all classes, where they are sorted
        return [data[i] for i in range(0, len(data), step)[:most]]


@Parameter(name="*", group=TRAINING)
@dataclass(frozen=True, kw_only=True)
class TrainingOptions(DeviceOptions):
    """How a network is trained.

    Attributes:
        epochs: Number of passes over the data.
        batch_size: Number of images in each step.
        optimizer: Optimizer.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        clip: Largest norm of the gradient; 0 disables clipping.
        schedule: Schedule of the learning rate.
        average: Decay of the moving average of the weights; 0 disables it.
        augment: Random augmentation of the training images.
        seed: Seed of all random choices.
        bf16: Mixed precision with bfloat16; auto uses it where the hardware supports it.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Annotated[Optimizer, more(TRAINING)] = "adam"
    lr: Number = 1e-3
    momentum: Annotated[float, more(TRAINING)] = 0.9
    weight_decay: Annotated[float, more(TRAINING)] = 1e-4
    clip: Annotated[float, more(TRAINING)] = 1.0
    schedule: Annotated[Schedule, more(TRAINING)] = "cosine"
    average: Annotated[float, more(TRAINING)] = 0.999
    augment: Augmentation = "crop+flip"
    seed: int = 0
    bf16: Annotated[Literal["auto", "on", "off"], more(TRAINING)] = "auto"

    def config(self) -> "TrainingConfig":
        """Return them as the library takes them, checked."""
        from art_denoised.training.config import TrainingConfig

        options = {field.name: getattr(self, field.name) for field in fields(TrainingOptions)}
        del options["device"]
        options["bf16"] = {"auto": None, "on": True, "off": False}[self.bf16]
        return TrainingConfig(**options)


def print_trained(what: str, path: Path, row: "EpochRow", *, json: bool) -> None:
    """Print what was written, and the figures of its epoch."""
    figures = {"epoch": row.epoch, "loss": row.loss, **row.figures}
    words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.items())
    named = {what.replace(" ", "_"): str(path), **figures}
    print_result(named, words, f"{what}: {path}", json=json)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class DenoiserOptions:
    """Which denoiser is trained, and for which classifier.

    Attributes:
        objective: Training objective, see above.
        classifier: The classifier to defend: timm:NAME, torchvision:NAME, hf:OWNER/NAME,
            robustbench:NAME:DATASET:THREAT or your function package.module:function; in eval mode.
        network: Weights of --classifier, and what it expects.
        surrogate: Classifier to train with instead of it, named in the same way; repeat the option
            for several.
        sigma: Noise level, or a range of levels; pixels are in [0, 1].
        architecture: Architecture: dncnn (17 layers of 64 channels), dncnn:DEPTH:WIDTH or memnet;
            or the factory or checkpoint of a denoiser to continue from.
        fine_epochs: Number of epochs of the second part of hybrid. By default 2/9 of --epochs.
    """

    objective: Literal["mse", "stability", "classification", "hybrid"]
    classifier: Annotated[Model | None, Parameter(name=("--classifier", "--model"))] = None
    network: NetworkOptions = PLAIN_NETWORK
    surrogate: Annotated[list[str], Parameter(metavar="NAME")] | None = None
    sigma: Annotated[Numbers, Parameter(metavar="S|LOW,HIGH")]
    architecture: Annotated[str, Parameter(metavar="NAME")] = "dncnn"
    fine_epochs: Annotated[int | None, more(MODEL)] = None

    def __post_init__(self) -> None:
        """Refuse what says more of a classifier than its name, without the name."""
        if self.classifier is None and self.network.given:
            raise CycloptsError(msg=f"{self.network.given[0]} is of --classifier; give it as well")

    def load(self, device: "torch.device") -> "Objective":
        """Return the objective, with its classifiers on the device."""
        from art_denoised.models.classifiers import load_classifier
        from art_denoised.training.denoiser import Objective

        sigma: Any = self.sigma
        classifier = None
        if self.classifier is not None:
            classifier = self.network.build(self.classifier).to(device)
        return Objective(
            self.objective,
            sigma=sigma[0] if len(sigma) == 1 else sigma,
            classifier=classifier,
            surrogates=[load_classifier(n).to(device) for n in self.surrogate or ()],
            fine_epochs=self.fine_epochs,
        )

    def build(self, channels: int) -> "nn.Module":
        """Return the denoiser to start from."""
        from art_denoised.denoisers.architectures import DnCNN, MemNet
        from art_denoised.denoisers.checkpoints import load_denoiser

        kind, *sizes = self.architecture.split(":")
        if kind == "dncnn" and len(sizes) in (0, 2):
            try:
                depth, width = map(int, sizes) if sizes else (17, 64)
                return DnCNN(channels, depth=depth, width=width)
            except ValueError as error:
                message = f"--architecture is {self.architecture!r}: {error}"
                raise CycloptsError(msg=message) from None
        if kind == "memnet":
            return MemNet(channels)
        return load_denoiser(self.architecture)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    """Which diffusion model is trained.

    Attributes:
        classes: Number of classes; without it the model is unconditional.
        init: Model to continue from: a folder or hub id, with EDM preconditioning.
        widths: Numbers of channels of the U-Net at each resolution, multiples of 8.
        layers: Number of blocks at each resolution.
        patch: Side of the squares of pixels that are folded into channels; the cost falls with its
            square.
        drop: Share of training images whose class is hidden from the model.
        p_mean: Mean of ln(sigma), in the units of the network. Raise it for images whose classes
            differ in large shapes.
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

    --classifier is the classifier to defend; it is not changed (Salman et al.
    2020). If it can only be queried, give one or more --surrogate: they are
    trained with in turn, and --classifier, if given, is only evaluated.

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
    with waiting("loading PyTorch"):
        from art_denoised.checks import InputError
        from art_denoised.denoisers.checkpoints import check_saveable, save_denoiser
        from art_denoised.models.classifiers import eval_transform
        from art_denoised.training.batches import seeded
        from art_denoised.training.denoiser import train_denoiser

    config, device = training.config(), training.find_device()
    run.check("train")
    path = run.out / "denoiser.safetensors"
    if path.exists() and not run.resume:
        raise InputError(f"{path} already exists; choose another folder", resume=True)
    if denoiser.surrogate and data.validation and denoiser.classifier is None:
        notice("without --classifier, the accuracy is that of the first surrogate")
    with waiting("loading the classifiers and the images"):
        objective = denoiser.load(device)
        transform = next(map(eval_transform, objective.classifiers), None)
        images = data.load(transform)
    with seeded(training.seed, device):
        network = denoiser.build(len(images[0][0]))
    check_saveable(network)
    network = network.float().to(device)  # a checkpoint may be in half precision
    rows = train_denoiser(
        network,
        images,
        objective,
        config,
        validation=data.load_validation(transform),
        **run.arguments,
    )
    save_denoiser(network.cpu(), path, sigma=objective.levels)
    print_trained("denoiser", path, rows[-1], json=run.json)


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

    A small model of handwritten digits:
      art-denoised train-diffusion --data digits --classes 10 --widths 16,32 \
          --augment none --epochs 20 --out runs/diffusion
    """
    with waiting("loading PyTorch"):
        from art_denoised.checks import InputError
        from art_denoised.diffusion.folders import save_diffusion
        from art_denoised.training.batches import seeded
        from art_denoised.training.diffusion import EDMLoss, train_diffusion

    config, device = training.config(), training.find_device()
    run.check("train")
    with waiting("loading the images"):
        images = data.load()
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
        **run.arguments,
    )
    save_diffusion(model.cpu(), run.out)
    print_trained("diffusion model", run.out, rows[-1], json=run.json)
