"""The command that trains classifiers adversarially: train-robust."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_denoised.checks import InputError
from art_denoised.cli.parser import add_command, fraction
from art_denoised.cli.train import (
    add_config_options,
    add_holdout_options,
    read_config,
    read_holdout,
    summary,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from art_denoised.training.recipes import Adversarial, Trades

_DESCRIPTION = """\
Train a classifier to be robust: at each step on images that an attack has just changed.

recipes:                                                        default eps   cost
  pgd                PGD training (Madry et al. 2018)                 8/255   12
  trades             clean loss + divergence (Zhang et al. 2019)      8/255   13
  sat                a single step, random start (Xie et al. 2020)    4/255    3
  sat-release        sat as its release trains: a fifth of batches
                     from the clean image, smoothed labels            4/255    3
  feature-denoising  30 steps to random targets, a fifth of batches
                     from the clean image, smoothed labels
                     (Xie et al. 2019)                               16/255   32
  clean              no attack: the control                               -    1

cost: time of a training, about, with that of clean as 1, at the recipe's steps.

The network may be changed first: --feature-denoising puts denoising blocks into it, --activation
replaces its ReLUs. Single-step training can collapse (catastrophic overfitting: one step no longer
fools the network, many do). With --holdout this is seen, said and logged.

OUT gets model.safetensors (averaged weights), train.jsonl and a checkpoint, from which --resume
goes on exactly.
"""

_EPILOG = """\
examples:
  handwritten digits, in seconds:
    art-denoised train-robust --model art_denoised.demo:digits_network --data digits \\
        --recipe sat --eps 0.15 --epochs 6 --lr 0.2 --augment none --holdout digits \\
        --out runs/digits

  a ResNet with four denoising blocks and a smooth activation, on a folder of images:
    art-denoised train-robust --model mynets:resnet18 --data imagefolder:train \\
        --holdout imagefolder:val --recipe pgd --eps 8/255 --feature-denoising gaussian \\
        --activation silu --best --out runs/resnet18
"""


def add_train_robust(commands: Any) -> None:
    """Add `train-robust`."""
    from art_denoised.data import SPECS
    from art_denoised.training.robust import ROBUST_CONFIG

    command = add_command(
        commands,
        "train-robust",
        _train_robust,
        "train a classifier adversarially",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = command.add_argument
    add(
        "--model",
        required=True,
        metavar="FACTORY",
        help="package.module:factory of the classifier, of images in [0, 1]; what is random in it "
        "is drawn from --seed",
    )
    add("--data", required=True, metavar="DATA", help=f"training images: {SPECS}")
    add("--recipe", required=True, help="pgd, trades, sat, sat-release, feature-denoising or clean")
    add(
        "--eps",
        type=fraction,
        metavar="E",
        help="radius of the attack in units of images in [0, 1], such as 8/255",
    )
    add("--norm", help="linf or l2 (default: linf)")
    add("--steps", type=int, metavar="K", help="of the attack (default: the recipe's)")
    add(
        "--stride",
        type=fraction,
        metavar="S",
        help="length of its steps as a share of eps (default: the recipe's; of feature-denoising "
        "max(1/255, eps / steps))",
    )
    add(
        "--feature-denoising",
        metavar="OPERATION",
        help="put denoising blocks of this operation into the network: gaussian, dot_product, "
        "mean, median, ...",
    )
    add(
        "--where",
        metavar="PLACES",
        help="where: stages, all, or names of modules or globs, joined by commas "
        "(default: stages, after the last block of each)",
    )
    add(
        "--activation",
        metavar="NAME",
        help="replace ReLU by silu, gelu, elu, celu, mish, softplus (a = 10) or smoothrelu",
    )
    add_holdout_options(command, "attacked")
    add("--judge-steps", type=int, default=10, help="of that attack (default: %(default)s)")
    add("--best", action="store_true", help="keep the weights of the epoch most robust on them")
    add("--stop", action="store_true", help="end at catastrophic overfitting")
    add_config_options(command, ROBUST_CONFIG)
    add("--out", type=Path, required=True, metavar="DIR", help="folder for weights and log")


def _train_robust(arguments: argparse.Namespace) -> None:
    from safetensors.torch import save

    from art_denoised.data import load_data
    from art_denoised.models.loading import find_device
    from art_denoised.runs import write_whole
    from art_denoised.training.robust import OverfittingWarning, Validation, train_robust

    config, device, recipe = (
        read_config(arguments),
        find_device(arguments.device),
        _recipe(arguments),
    )
    data = load_data(arguments.data, train=True)
    changes = {n: getattr(arguments, n) for n in ("feature_denoising", "where", "activation")}
    shape = tuple(data[0][0].shape)
    model = _build(arguments, {**changes, "input_shape": shape}, device).to(device)
    pairs = read_holdout(arguments)
    if pairs is None and (arguments.best or arguments.stop):
        option = "--best" if arguments.best else "--stop"
        raise InputError(f"{option} needs a validation set to judge epochs on; give --holdout")
    with _notices(OverfittingWarning):
        rows = train_robust(
            model,
            data,
            recipe,
            config,
            validation=None
            if pairs is None
            else Validation(pairs, arguments.judge_steps, arguments.best, arguments.stop),
            run=arguments.out,
            resume=arguments.resume,
            progress=not arguments.quiet,
        )
    path = arguments.out / "model.safetensors"
    weights = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    note = {"model": arguments.model, **changes, "input_shape": shape, "recipe": arguments.recipe}
    # One entry alone: of several the format writes the order at random.
    write_whole(path, save(weights, {"art_denoised": json.dumps(note)}))
    print(summary(max(rows, key=lambda row: row.figures["robust"]) if arguments.best else rows[-1]))
    print(f"model: {path}")


def _recipe(arguments: argparse.Namespace) -> Adversarial | Trades:
    from dataclasses import replace

    from art_denoised.training.recipes import RECIPES

    if arguments.recipe not in RECIPES:
        raise InputError(
            f"--recipe is {arguments.recipe!r}; give one of {', '.join(sorted(RECIPES))}"
        )
    given = {n: getattr(arguments, n) for n in ("eps", "norm", "steps")}
    given["relative_step_size"] = arguments.stride
    changes = {name: value for name, value in given.items() if value is not None}
    if arguments.recipe == "clean" and changes:
        option = min(changes).replace("relative_step_size", "stride")
        raise InputError(f"--recipe clean has no attack; leave --{option} out")
    return replace(RECIPES[arguments.recipe], **changes)


def _build(
    arguments: argparse.Namespace, changes: Mapping[str, Any], device: torch.device
) -> nn.Module:
    """Return the network named, changed as asked, its random parts drawn from the seed."""
    from art_denoised.models.loading import load_module
    from art_denoised.networks.cost import added_cost
    from art_denoised.networks.trained import change_network
    from art_denoised.training.seeds import seeded

    if changes["where"] and not changes["feature_denoising"]:
        raise InputError("--where says where blocks go; give --feature-denoising as well")
    with seeded(arguments.seed, device):
        model = load_module("--model", arguments.model)
        smooth = change_network(model, {**changes, "feature_denoising": None})
        changed = change_network(smooth, {**changes, "activation": None})
    if changes["feature_denoising"]:
        cost = added_cost(smooth, changed, changes["input_shape"])
        print(f"the denoising blocks: {cost}", file=sys.stderr)
    return changed


@contextmanager
def _notices(kind: type[Warning]) -> Iterator[None]:
    """Show warnings of this kind as one line, each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", kind)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, kind):
                print(f"notice: {message}", file=sys.stderr)
            else:
                shown(message, category, *place)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
