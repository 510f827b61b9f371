"""Commands that train denoisers, diffusion models and robust classifiers, and their options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import CycloptsError, Group, Parameter

from art_denoised.cli.options import (
    DATA,
    MODEL,
    PLAIN_NETWORK,
    TRAINING,
    DeviceOptions,
    Model,
    NetworkOptions,
    Norm,
    Number,
    Numbers,
    RunOptions,
    Widths,
    more,
    notice,
    notices,
    print_result,
)
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.data import ImageData
    from art_denoised.models.loading import EvalTransform
    from art_denoised.training.config import TrainingConfig
    from art_denoised.training.denoising import Objective
    from art_denoised.training.loop import EpochRow
    from art_denoised.training.robust import Adversarial, Trades, Validation

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "one-cycle", "step", "milestones", "sat-milestones", "constant"]
Augmentation = Literal["crop+flip", "crop", "none"]
RECIPE = Group("Recipe", sort_key=3)


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Which images are trained on.

    Attributes:
        data: Training images: digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR.
    """

    data: Annotated[str, Parameter(metavar="DATA")]

    def load(self, transform: EvalTransform | None = None) -> ImageData:
        """Return the training images, photographs as the classifier takes them."""
        from art_denoised.data import load_data

        return load_data(
            self.data, train=True, classes=self._names, transform=self._of_photographs(transform)
        )

    @property
    def _names(self) -> Sequence[str] | None:
        return None

    def _of_photographs(self, transform: EvalTransform | None) -> EvalTransform | None:
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
    def _names(self) -> Sequence[str] | None:
        from art_denoised.data import read_classes

        return None if self.classes is None else read_classes(self.classes)

    def load_validation(self, transform: EvalTransform | None = None) -> list[Any] | None:
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

    def config(self) -> TrainingConfig:
        """Return them as the library takes them, checked."""
        from art_denoised.training.config import TrainingConfig

        options = {field.name: getattr(self, field.name) for field in fields(TrainingOptions)}
        del options["device"]
        options["bf16"] = {"auto": None, "on": True, "off": False}[self.bf16]
        return TrainingConfig(**options)


def print_trained(what: str, path: Path, row: EpochRow, *, json: bool) -> None:
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

    def load(self, device: torch.device) -> Objective:
        """Return the objective, with its classifiers on the device."""
        from art_denoised.models.loading import load_classifier
        from art_denoised.training.denoising import Objective

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

    def build(self, channels: int) -> nn.Module:
        """Return the denoiser to start from."""
        from art_denoised.denoisers.denoisers import DnCNN, MemNet, load_denoiser

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
        from art_denoised.denoisers.denoisers import check_saveable, save_denoiser
        from art_denoised.models.loading import eval_transform
        from art_denoised.training.config import seeded
        from art_denoised.training.denoising import train_denoiser

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
        from art_denoised.training.config import seeded
        from art_denoised.training.denoising import EDMLoss, train_diffusion

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


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """Which classifier is trained.

    Attributes:
        model: Classifier, trained from --weights or from random weights that --seed draws:
            timm:NAME, torchvision:NAME, hf:OWNER/NAME or your function package.module:function.
        network: Its weights, and what it expects.
        feature_denoising: Operation of denoising blocks to put into the network: gaussian,
            dot_product, mean, median, ...
        where: Places of the blocks: stages (after the last block of each), all, or names of modules
            or globs, joined by commas. By default stages.
        activation: Activation that replaces ReLU: silu, gelu, elu, celu, mish, softplus (a = 10)
            or smoothrelu.
    """

    model: Model
    network: NetworkOptions = PLAIN_NETWORK
    feature_denoising: Annotated[str | None, Parameter(metavar="OPERATION")] = None
    where: Annotated[str | None, Parameter(metavar="PLACES")] = None
    activation: Annotated[str | None, Parameter(metavar="NAME")] = None

    def __post_init__(self) -> None:
        """Refuse places without blocks."""
        if self.where and not self.feature_denoising:
            raise CycloptsError(msg="--where places blocks; give --feature-denoising as well")

    @property
    def changes(self) -> dict[str, str | None]:
        """What is changed in the network."""
        names = ("feature_denoising", "where", "activation")
        return {name: getattr(self, name) for name in names}

    def load(self) -> nn.Module:
        """Return the network as it is before its changes."""
        return self.network.build(self.model, pretrained=False)

    def change(
        self, network: nn.Module, shape: tuple[int, int, int]
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the network, changed, for images of this shape, and what its file notes."""
        from art_denoised.networks.surgery import added_cost, change_network

        made = self._made()
        changes = {**self.changes, "input_shape": shape}
        smooth = change_network(network, {**changes, "feature_denoising": None})
        changed = change_network(smooth, {**changes, "activation": None})
        if self.feature_denoising:
            notice(f"denoising blocks: {added_cost(smooth, changed, shape)}")
        return changed, {"model": self.model, **changes, **made}

    def _made(self) -> dict[str, Any]:
        """Return the changes that the network of --weights has had."""
        from art_denoised.checks import InputError
        from art_denoised.networks.surgery import noted_changes

        weights = self.network.weights
        made = {} if weights is None else noted_changes(weights)
        if made and any(self.changes.values()):
            raise InputError(
                f"the network of {weights} is changed already; leave out "
                "--feature-denoising, --where and --activation"
            )
        return made


@Parameter(name="*", group=RECIPE)
@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Against which attack a classifier is trained.

    Attributes:
        recipe: Recipe, see above: pgd, trades, sat, sat-release, feature-denoising or clean.
        eps: Radius of the ball, such as 8/255; pixels are in [0, 1]. By default the recipe's.
        norm: Norm of the ball. By default linf.
        steps: Number of steps of the attack. By default the recipe's.
        step_size: Step size as a share of eps. By default the recipe's.
        judge_steps: Number of steps of the attack on the validation images.
        best: Keep the weights of the epoch that is most robust on the validation images.
        stop: Stop at catastrophic overfitting.
    """

    recipe: Annotated[str, Parameter(metavar="NAME")]
    eps: Number | None = None
    norm: Norm | None = None
    steps: int | None = None
    step_size: Number | None = None
    judge_steps: Annotated[int, more(RECIPE)] = 10
    best: bool = False
    stop: Annotated[bool, more(RECIPE)] = False

    def build(self) -> Adversarial | Trades:
        """Return the recipe with these values."""
        from art_denoised.training.robust import RECIPES

        if self.recipe not in RECIPES:
            known = ", ".join(sorted(RECIPES))
            raise CycloptsError(msg=f"--recipe is {self.recipe!r}; give one of {known}")
        given: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "steps": self.steps}
        given["relative_step_size"] = self.step_size
        changes = {name: value for name, value in given.items() if value is not None}
        if self.recipe == "clean" and changes:
            option = min(changes).removeprefix("relative_").replace("_", "-")
            raise CycloptsError(msg=f"--recipe clean has no attack; leave --{option} out")
        return replace(RECIPES[self.recipe], **changes)

    def validation(self, pairs: Any) -> Validation | None:
        """Return what is measured on pairs that are not trained on."""
        from art_denoised.training.robust import Validation

        if pairs is not None:
            return Validation(pairs, self.judge_steps, self.best, self.stop)
        if self.best or self.stop:
            option = "--best" if self.best else "--stop"
            raise CycloptsError(msg=f"{option} needs validation images; give --validation")
        return None


@dataclass(frozen=True, kw_only=True)
class RobustTrainingOptions(TrainingOptions):
    """How a classifier is trained: other defaults."""

    optimizer: Annotated[Optimizer, more(TRAINING)] = "sgd"
    lr: Number = 0.1
    weight_decay: Annotated[float, more(TRAINING)] = 5e-4
    clip: Annotated[float, more(TRAINING)] = 0.0
    schedule: Annotated[Schedule, more(TRAINING)] = "one-cycle"
    average: Annotated[float, more(TRAINING)] = 0.995


_ROBUST = RobustTrainingOptions()


def train_robust(
    *,
    classifier: ClassifierOptions,
    data: ValidatedData,
    recipe: RecipeOptions,
    training: RobustTrainingOptions = _ROBUST,
    run: RunOptions,
) -> None:
    r"""Train a classifier adversarially.

    Each step uses images that an attack has just changed. The network may be
    changed first: --feature-denoising puts denoising blocks into it, and
    --activation replaces its ReLUs. Single-step training can collapse
    (catastrophic overfitting: attacks of one step fail, attacks of many steps
    succeed). With --validation this is detected, printed and logged.

    Recipes:                                              default eps  cost
      pgd                PGD training (Madry et al. 2018)       8/255    12
      trades             clean loss + divergence (Zhang 2019)   8/255    13
      sat                one step, random start (Xie 2020)      4/255     3
      sat-release        sat as its release trains: a fifth of
                         batches from the clean image,
                         smoothed labels                        4/255     3
      feature-denoising  30 steps to random targets, a fifth
                         of batches from the clean image,
                         smoothed labels (Xie et al. 2019)     16/255    32
      clean              no attack: the control                     -     1
    Cost is the approximate training time, relative to clean.

    DIR gets model.safetensors (averaged weights), train.jsonl and a checkpoint,
    from which --resume continues exactly.

    Handwritten digits, in seconds:
      art-denoised train-robust --model art_denoised.demo:digits_network \
          --data digits --validation digits --recipe sat --eps 0.15 \
          --epochs 6 --lr 0.2 --augment none --out runs/digits

    A ResNet with denoising blocks and a smooth activation:
      art-denoised train-robust --model mynets:resnet18 \
          --data imagefolder:train --validation imagefolder:val --best \
          --recipe pgd --eps 8/255 --feature-denoising gaussian \
          --activation silu --out runs/resnet18
    """
    with waiting("loading PyTorch"):
        from art_denoised.models.loading import eval_transform
        from art_denoised.training.config import seeded
        from art_denoised.training.robust import OverfittingWarning, train_robust

    config, device, attack = training.config(), training.find_device(), recipe.build()
    run.check("train")
    with waiting("loading the network and the images"), seeded(training.seed, device):
        network = classifier.load()
        transform = eval_transform(network)
        validation = recipe.validation(data.load_validation(transform))
        images = data.load(transform)
        channels, height, width = images[0][0].shape
        model, note = classifier.change(network, (channels, height, width))
    with notices(OverfittingWarning):
        rows = train_robust(
            model.to(device),
            images,
            attack,
            config,
            validation=validation,
            **run.arguments,
        )
    path = run.out / "model.safetensors"
    _save(model, path, {**note, "recipe": recipe.recipe})
    kept = max(rows, key=lambda row: row.figures["robust"]) if recipe.best else rows[-1]
    print_trained("model", path, kept, json=run.json)


def _save(model: nn.Module, path: Path, note: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    from art_denoised.runs.journal import write_whole

    weights = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    # One entry alone: of several the format writes the order at random.
    write_whole(path, save(weights, {"art_denoised": json.dumps(note)}))
