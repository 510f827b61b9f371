"""Commands that train networks: denoisers, diffusion models and robust classifiers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import CycloptsError, Group, Parameter

from art_denoised.cli.options import DATA, MODEL, TRAINING, RunOptions, notice
from art_denoised.cli.words import Factory, NoiseLevels, Number, Widths, choice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.data import ImageData
    from art_denoised.training.plan import Plan
    from art_denoised.training.recipes import Adversarial, Trades

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "one-cycle", "step", "milestones", "constant"]
Augmentation = Literal["crop+flip", "crop", "none"]
Precision = Literal["auto", "on", "off"]
Objective = Literal["mse", "stability", "classification", "hybrid"]
Norm = Literal["linf", "l2"]


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Which images are trained on.

    Attributes:
        data: Training images: digits, imagefolder:DIR, npz:FILE or torchvision:NAME:DIR.
    """

    data: Annotated[str, Parameter(metavar="DATA")]

    def load(self) -> ImageData:
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
    optimizer: Annotated[Optimizer, choice(Optimizer)] = "adam"
    lr: Annotated[Number, Parameter(name=("--lr", "--rate"))] = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    schedule: Annotated[Schedule, choice(Schedule)] = "cosine"
    average: float = 0.999
    augment: Annotated[Augmentation, choice(Augmentation)] = "crop+flip"
    seed: int = 0
    bf16: Annotated[Precision, choice(Precision)] = "auto"
    device: str = "auto"

    def plan(self) -> Plan:
        """Return them as the library takes them, checked."""
        from art_denoised.training.plan import Plan

        names = ("epochs", "batch_size", "optimizer", "momentum", "weight_decay", "clip")
        names += ("schedule", "average", "augment", "seed")
        bf16 = {"auto": None, "on": True, "off": False}[self.bf16]
        return Plan(rate=self.lr, bf16=bf16, **{name: getattr(self, name) for name in names})

    def find_device(self) -> torch.device:
        """Return the device."""
        from art_denoised.models.loading import find_device

        return find_device(self.device)


@dataclass(frozen=True, kw_only=True)
class RobustTrainingOptions(TrainingOptions):
    """How a classifier is trained: other defaults."""

    optimizer: Annotated[Optimizer, choice(Optimizer)] = "sgd"
    lr: Annotated[Number, Parameter(name=("--lr", "--rate"))] = 0.1
    weight_decay: float = 5e-4
    clip: float = 0.0
    schedule: Annotated[Schedule, choice(Schedule)] = "one-cycle"
    average: float = 0.995


@dataclass(frozen=True, kw_only=True)
class TrainingRun(RunOptions):
    """Where a training is written.

    Attributes:
        tensorboard: Also write scalars for TensorBoard.
    """

    tensorboard: bool = False

    def options(self, **identity: Any) -> dict[str, Any]:
        """Return them as the trainers take them; ``identity`` is compared on --resume."""
        return {
            "out": self.out,
            "resume": self.resume,
            "identity": identity,
            "tensorboard": self.tensorboard,
            "progress": not self.quiet,
        }


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

    objective: Annotated[Objective, choice(Objective)]
    classifier: Factory | None = None
    surrogate: Annotated[list[str], Parameter(metavar="FACTORY")] | None = None
    sigma: NoiseLevels
    architecture: Annotated[str, Parameter(metavar="NAME")] = "dncnn"
    fine_epochs: int | None = None

    def load_classifiers(self, device: torch.device) -> tuple[nn.Module | None, list[nn.Module]]:
        """Return the classifier to defend, and those to train with."""
        from art_denoised.models.loading import load_module

        target = None
        if self.classifier is not None:
            target = load_module("--classifier", self.classifier).to(device)
        surrogates = [load_module("--surrogate", name).to(device) for name in self.surrogate or ()]
        return target, surrogates

    def build(self, channels: int) -> nn.Module:
        """Return the denoiser to start from."""
        from art_denoised.checks import InputError
        from art_denoised.denoisers.dncnn import DnCNN
        from art_denoised.denoisers.memnet import MemNet
        from art_denoised.models.loading import load_denoiser_option

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
        return load_denoiser_option(self.architecture, "--architecture")


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
        from art_denoised.diffusion.loading import load_diffusion
        from art_denoised.diffusion.unet import unet_diffusion

        if self.init is not None:
            return load_diffusion(self.init, classes=self.classes).float()
        shape = {"widths": self.widths, "layers": self.layers, "patch": self.patch}
        return unet_diffusion(channels, size, classes=self.classes, **shape)


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """Which classifier is trained.

    Attributes:
        model: Function that returns the classifier, as package.module:function; its random weights
            are drawn from --seed.
        feature_denoising: Operation of denoising blocks to put into the network: gaussian,
            dot_product, mean, median, ...
        where: Places of the blocks: stages (after the last block of each), all, or names of modules
            or globs, joined by commas. By default stages.
        activation: Activation that replaces ReLU: silu, gelu, elu, celu, softplus (a = 10) or
            smoothrelu.
    """

    model: Factory
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

    def build(self, shape: Sequence[int]) -> nn.Module:
        """Return the network, changed, for images of this shape."""
        from art_denoised.models.loading import change_network, load_module
        from art_denoised.networks.surgery import added_cost

        changes = {**self.changes, "input_shape": shape}
        model = load_module("--model", self.model)
        smooth = change_network(model, {**changes, "feature_denoising": None})
        changed = change_network(smooth, {**changes, "activation": None})
        if self.feature_denoising:
            notice(f"denoising blocks: {added_cost(smooth, changed, tuple(shape))}")
        return changed


@Parameter(name="*", group=Group("Recipe", sort_key=3))
@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Against which attack a classifier is trained.

    Attributes:
        recipe: pgd, trades, sat, feature-denoising or clean; see above.
        eps: Radius of the attack, such as 8/255; pixels are in [0, 1]. By default the recipe's.
        norm: Norm of the ball. By default linf.
        steps: Number of steps of the attack. By default the recipe's.
        step_size: Step size as a share of eps. By default the recipe's.
        judge_steps: Number of steps of the attack on the validation images.
        best: Keep the weights of the epoch that is most robust on the validation images.
        stop: Stop at catastrophic overfitting.
    """

    recipe: Annotated[str, Parameter(metavar="NAME")]
    eps: Number | None = None
    norm: Annotated[Norm | None, choice(Norm)] = None
    steps: int | None = None
    step_size: Annotated[Number | None, Parameter(name=("--step-size", "--stride"))] = None
    judge_steps: int = 10
    best: bool = False
    stop: bool = False

    def build(self) -> Adversarial | Trades:
        """Return the recipe with these values."""
        from dataclasses import replace

        from art_denoised.checks import InputError
        from art_denoised.training.recipes import RECIPES

        if self.recipe not in RECIPES:
            known = ", ".join(sorted(RECIPES))
            raise InputError(f"--recipe is {self.recipe!r}; give one of {known}")
        given = {"eps": self.eps, "norm": self.norm, "steps": self.steps, "stride": self.step_size}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.recipe == "clean" and changes:
            raise InputError(f"--recipe clean has no attack; leave --{min(changes)} out")
        return replace(RECIPES[self.recipe], **changes)


def train_denoiser(
    *,
    denoiser: DenoiserOptions,
    data: ValidatedData,
    training: TrainingOptions = TrainingOptions(),
    run: TrainingRun,
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
    from art_denoised.training.denoiser import train_denoiser
    from art_denoised.training.seeds import seeded

    plan, device = training.plan(), training.find_device()
    path = run.out / "denoiser.safetensors"
    if path.exists() and not run.resume:
        raise InputError(f"{path} already exists; choose another folder", resume=True)
    target, surrogates = denoiser.load_classifiers(device)
    if surrogates and data.validation and target is None:
        notice("without --classifier the accuracy is that of the first surrogate, a trained-on one")
    images = data.load()
    with seeded(training.seed, device):
        network = denoiser.build(len(images[0][0]))
    check_saveable(network)
    network = network.float().to(device)  # a checkpoint may be in half precision
    rows = train_denoiser(
        network,
        images,
        objective=denoiser.objective,
        classifiers=surrogates or [c for c in (target,) if c is not None],
        target=target if surrogates else None,
        sigma=denoiser.sigma,
        plan=plan,
        fine_epochs=denoiser.fine_epochs,
        holdout=data.load_validation(),
        **run.options(
            classifier=denoiser.classifier,
            surrogate=denoiser.surrogate or [],
            data=data.data,
            architecture=denoiser.architecture,
        ),
    )
    save_denoiser(network.cpu(), path)
    _print_row(rows[-1])
    print(f"denoiser: {path}")


def train_diffusion(
    *,
    diffusion: DiffusionOptions = DiffusionOptions(),
    data: TrainingData,
    training: TrainingOptions = TrainingOptions(),
    run: TrainingRun,
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
    from art_denoised.diffusion.loading import save_diffusion
    from art_denoised.training.diffusion import train_diffusion
    from art_denoised.training.seeds import seeded

    plan, device, images = training.plan(), training.find_device(), data.load()
    channels, size, width = images[0][0].shape
    if size != width:
        raise InputError(f"the images are {size} x {width}; the U-Net takes square ones")
    with seeded(training.seed, device):
        model = diffusion.build(channels, size)
    rows = train_diffusion(
        model.to(device),
        images,
        plan=plan,
        p_mean=diffusion.p_mean,
        p_std=diffusion.p_std,
        drop=diffusion.drop,
        **run.options(data=data.data, classes=diffusion.classes, layers=diffusion.layers),
    )
    save_diffusion(model.cpu(), run.out)
    _print_row(rows[-1])
    print(f"diffusion model: {run.out}")


def train_robust(
    *,
    classifier: ClassifierOptions,
    data: ValidatedData,
    recipe: RecipeOptions,
    training: RobustTrainingOptions = RobustTrainingOptions(),
    run: TrainingRun,
) -> None:
    r"""Train a classifier adversarially.

    Each step uses images that an attack has just changed. The network may be
    changed first: --feature-denoising puts denoising blocks into it, --activation
    replaces its ReLUs. Single-step training can collapse (catastrophic
    overfitting: one step no longer fools the network, many do). With
    --validation this is detected, printed and logged.

    Recipes:                                              default eps  cost
      pgd                PGD training (Madry et al. 2018)       8/255    12
      trades             clean loss + divergence (Zhang 2019)   8/255    13
      sat                one step, random start (Xie 2020)      4/255     3
      feature-denoising  30 steps to random targets, a fifth
                         of batches from the clean image,
                         smoothed labels (Xie et al. 2019)     16/255    32
      clean              no attack: the control                     -     1
    Cost is the approximate time of a training, that of clean being 1.

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
    from art_denoised.training.adversarial import OverfittingWarning, train_robust
    from art_denoised.training.seeds import seeded

    plan, device, attack = training.plan(), training.find_device(), recipe.build()
    images = data.load()
    shape = tuple(images[0][0].shape)
    with seeded(training.seed, device):
        model = classifier.build(shape).to(device)
    with _notices(OverfittingWarning):
        rows = train_robust(
            model,
            images,
            recipe=attack,
            plan=plan,
            holdout=data.load_validation(),
            judge_steps=recipe.judge_steps,
            best=recipe.best,
            stop_on_overfitting=recipe.stop,
            **run.options(model=classifier.model, data=data.data, **classifier.changes),
        )
    path = run.out / "model.safetensors"
    note = {"model": classifier.model, **classifier.changes, "input_shape": shape}
    _save(model, path, {**note, "recipe": recipe.recipe})
    _print_row(max(rows, key=lambda row: row["robust"]) if recipe.best else rows[-1])
    print(f"model: {path}")


def _save(model: nn.Module, path: Path, note: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    from art_denoised.storage import write_whole

    weights = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    # One entry alone: of several the format writes the order at random.
    write_whole(path, save(weights, {"art_denoised": json.dumps(note)}))


def _print_row(row: Mapping[str, float]) -> None:
    figures = {name: value for name, value in row.items() if name not in ("rate", "lr", "seconds")}
    print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.items()))


@contextmanager
def _notices(kind: type[Warning]) -> Iterator[None]:
    """Show warnings of this kind as one line, each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", kind)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, kind):
                notice(str(message))
            else:
                shown(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
