"""The command that trains classifiers adversarially."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import CycloptsError, Group, Parameter

from art_denoised.cli.help import more
from art_denoised.cli.options import (
    MODEL,
    PLAIN_NETWORK,
    TRAINING,
    Model,
    NetworkOptions,
    Norm,
    Number,
    RunOptions,
    notice,
    notices,
)
from art_denoised.cli.train import (
    Optimizer,
    Schedule,
    TrainingOptions,
    ValidatedData,
    print_trained,
)
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    from torch import nn

    from art_denoised.training.robust import Adversarial, Trades, Validation


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


RECIPE = Group("Recipe", sort_key=3)


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
        from dataclasses import replace

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


_TRAINING = RobustTrainingOptions()


def train_robust(
    *,
    classifier: ClassifierOptions,
    data: ValidatedData,
    recipe: RecipeOptions,
    training: RobustTrainingOptions = _TRAINING,
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
        from art_denoised.models.classifiers import eval_transform
        from art_denoised.training.batches import seeded
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
