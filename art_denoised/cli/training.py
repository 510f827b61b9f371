"""Options that all trainings share."""

# No `from __future__ import annotations`: cyclopts reads the types of inherited fields in the
# module of the subclass, which need not know their names.
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from art_denoised.cli.options import DATA, TRAINING
from art_denoised.cli.words import Number

if TYPE_CHECKING:
    import torch

    from art_denoised.data import ImageData
    from art_denoised.training.config import TrainingConfig
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

    def load(self) -> "ImageData":
        """Return the training images."""
        from art_denoised.data import load_data

        return load_data(self.data, train=True)


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class ValidatedData(TrainingData):
    """Which images are trained on, and which are not.

    Attributes:
        validation: Images that are not trained on, evaluated after each epoch.
        validation_max: Number of these images, evenly from all.
    """

    validation: Annotated[
        str | None, Parameter(name=("--validation", "--holdout"), metavar="DATA")
    ] = None
    validation_max: Annotated[
        int, Parameter(name=("--validation-max", "--holdout-max"), metavar="M")
    ] = 500

    def load_validation(self) -> list[Any] | None:
        """Return pairs of image and label."""
        from art_denoised import checks
        from art_denoised.data import load_data

        most = checks.count("--validation-max", self.validation_max)
        if self.validation is None:
            return None
        data = load_data(self.validation)
        step = max(1, len(data) // most)  # all classes, where they are sorted
        return [data[i] for i in range(0, len(data), step)[:most]]


@Parameter(name="*", group=TRAINING)
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a network is trained.

    Attributes:
        epochs: Number of passes over the data.
        batch_size: Number of images of a step.
        optimizer: Optimizer.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        clip: Largest norm of the gradient; 0 disables clipping.
        schedule: Schedule of the learning rate.
        average: Decay of the moving average of the weights; 0 disables it.
        augment: Augmentation of the images.
        seed: Seed of everything random.
        bf16: Autocast to bfloat16; auto does so where the machine computes in it.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Optimizer = "adam"
    lr: Annotated[Number, Parameter(name=("--lr", "--rate"))] = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    schedule: Schedule = "cosine"
    average: float = 0.999
    augment: Augmentation = "crop+flip"
    seed: int = 0
    bf16: Literal["auto", "on", "off"] = "auto"
    device: str = "auto"

    def config(self) -> "TrainingConfig":
        """Return them as the library takes them, checked."""
        from art_denoised.training.config import TrainingConfig

        options = {field.name: getattr(self, field.name) for field in fields(TrainingOptions)}
        del options["device"]
        options["bf16"] = {"auto": None, "on": True, "off": False}[self.bf16]
        return TrainingConfig(**options)

    def find_device(self) -> "torch.device":
        """Return the device."""
        from art_denoised.models.loading import find_device

        return find_device(self.device)


def print_row(row: "EpochRow") -> None:
    """Print the figures of an epoch."""
    figures = {"epoch": row.epoch, "loss": row.loss, **row.figures}
    print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.items()))
