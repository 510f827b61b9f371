"""The command that attacks a model: `attack`."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_denoised.checks import InputError
from art_denoised.cli.parser import add_command, add_log_options, fraction

if TYPE_CHECKING:
    from torch import nn

    from art_denoised.data import ImageData

_PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_DETERMINISTIC = "autoattack"
_RANDOMISED = "pgd:eot=20:loss=margin,autoattack-rand,square"

_DESCRIPTION = """\
Attack a model and say what is left of its accuracy, and whether that figure can be believed.

Each attack runs on every image that the model gets right. Randomised models are judged twice: as
the attack itself counted, and in --repeats later evaluations with fresh noise (their mean, and the
worst of them). Then masking checks look for signs that the attacks failed instead of the model
being robust; a failed check marks the result as not reliable (docs/attack.md).

Rows go to OUT/attack.jsonl as they are made. An interrupted run goes on with --resume, to the same
rows. `art-denoised report OUT` makes tables and pages of it.
"""

_EPILOG = """\
attacks, joined by commas; options follow a colon, as in pgd:steps=100:eot=20
  pgd                 PGD with restarts, EOT and losses: steps, step_size, loss (ce, margin, dlr),
                      restarts, eot, targeted
  autoattack          AutoAttack's standard version, for models that are not randomised
  autoattack-rand     its version for randomised models: EOT over 20 draws, no Square
  apgd-ce apgd-dlr apgd-t fab fab-t square
                      its parts: steps, queries, eot
  torchattacks:NAME   any attack of torchattacks, such as torchattacks:PGD:steps=50:alpha=0.01
  art:NAME            any evasion attack of ART, such as art:HopSkipJump:max_iter=10
Default: autoattack; of a randomised model pgd:eot=20:loss=margin,autoattack-rand,square.

examples:
  the packaged digits classifier, in seconds (autoattack, the default, takes minutes):
    art-denoised attack --model art_denoised.demo:digits_classifier --data digits \\
        --eps 0.05,0.1 --attacks pgd,apgd-ce,square:queries=200 --max 50 --out runs/plain
  a defence of your own, beside the classifier it protects:
    art-denoised attack --model mynets:defended --bare mynets:resnet --data torchvision:CIFAR10:data \\
        --eps 8/255 --attacks autoattack-rand,square,art:HopSkipJump --max 500 --out runs/defended

cost: AutoAttack takes up to 7,000 passes an image, and PGD with eot 20 takes 1,000. Try --max 20.
"""  # noqa: E501


def add_attack(commands: Any) -> None:
    """Add `attack`."""
    from art_denoised.data import SPECS

    command = add_command(
        commands,
        "attack",
        _attack,
        "attack a model, and check that the figure can be believed",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = command.add_argument
    add(
        "--model",
        required=True,
        metavar="PACKAGE.MODULE:FACTORY",
        help="function that returns the defended model: images in [0, 1] to logits, in eval mode",
    )
    add("--data", required=True, metavar="DATA", help=SPECS)
    add(
        "--eps",
        type=_eps,
        required=True,
        metavar="E,E,...",
        help="radii of the balls, in units of images in [0, 1], such as 8/255 or 0.5,1",
    )
    add("--norm", default="linf", choices=("linf", "l2"), help="(default: %(default)s)")
    add("--attacks", metavar="A,A,...", help="see below")
    add(
        "--noise",
        choices=("fixed", "fresh"),
        help="of our modules: fixed, which the attacker knows, or fresh in every call; with fresh "
        "any model is judged as randomised (default: as the model comes)",
    )
    add(
        "--gradients",
        metavar="G,G",
        help="exact, bpda or both, for models with likelihood maximization (default: both)",
    )
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights for that network, such as the model.safetensors of train-robust, whose "
        "denoising blocks and activations are then put in as well",
    )
    add(
        "--bare",
        metavar="PACKAGE.MODULE:FACTORY",
        help="the classifier without its defence: attacks on it must not transfer",
    )
    add(
        "--repeats",
        type=int,
        default=10,
        metavar="N",
        help="evaluations with fresh noise, of randomised models (default: %(default)s)",
    )
    add("--no-checks", action="store_true", help="leave out the masking checks")
    add("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    add(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="images attacked at once; determines the random starts (default: %(default)s)",
    )
    add_log_options(add)


def parse_attacks(text: str, eps: list[float], norm: str) -> list[tuple[str, Any]]:
    """Return (name, attack) for each attack of a list and each eps.

    Raises:
        InputError: An unknown attack, or an option it does not have.

    Example:
        >>> [(name, attack.eps) for name, attack in parse_attacks("square", [0.1, 0.2], "linf")]
        [('square', 0.1), ('square', 0.2)]
    """
    specs = [spec.strip() for spec in text.split(",") if spec.strip()]
    if not specs:
        raise InputError("--attacks is empty; give for example pgd,square")
    return [(spec, _parse(spec, radius, norm)) for spec in specs for radius in eps]


def _parse(spec: str, eps: float, norm: Any) -> Any:
    from art_denoised.attacks.pgd import PGD
    from art_denoised.attacks.suites import AutoAttack, TorchAttack

    head, *rest = spec.split(":")
    kind = rest.pop(0) if head in ("torchattacks", "art") and rest else ""
    options = dict(_option(spec, text) for text in rest)
    if head in ("torchattacks", "art") and not kind:
        raise InputError(f"attack {spec!r} names no class; give for example {head}:SquareAttack")
    try:
        if head == "pgd":
            return PGD(eps, norm=norm, **options)
        if head in _PARTS:
            return AutoAttack(eps, norm=norm, parts=(head,), **options)
        if head in ("autoattack", "autoattack-rand"):
            version: Any = "rand" if head.endswith("rand") else "standard"
            return AutoAttack(eps, norm=norm, version=version, **options)
        if head == "torchattacks":
            return TorchAttack(eps, norm=norm, kind=kind, options=options)
        if head == "art":
            from art_denoised.estimators.attacks import ARTAttack

            return ARTAttack(eps, norm=norm, kind=kind, options=options)
    except TypeError as error:
        raise InputError(f"attack {spec!r} cannot be made: {error}") from None
    known = ", ".join(("pgd", "autoattack", "autoattack-rand", *_PARTS))
    raise InputError(f"there is no attack {head!r}; give {known}, torchattacks:NAME or art:NAME")


def _option(spec: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise InputError(f"attack {spec!r} has the option {text!r}; give name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _eps(text: str) -> list[float]:
    try:
        numbers = [fraction(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        numbers = []
    if not numbers or not all(number > 0 for number in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of radii; give numbers > 0 joined by commas, as in 8/255 or 0.5,1"
        )
    return numbers


def _attack(arguments: argparse.Namespace) -> None:
    from art_denoised import checks
    from art_denoised.data import load_data, select
    from art_denoised.evaluation.attacked.run import evaluate
    from art_denoised.models.loading import find_device, load_module, load_trained
    from art_denoised.reports.report import report

    # Found wanting before anything is loaded, also an eps of the default attacks.
    checks.count("seed", arguments.seed, 0)
    checks.count("batch_size", arguments.batch_size)
    parse_attacks(arguments.attacks or _DETERMINISTIC, arguments.eps, arguments.norm)
    device = find_device(arguments.device)
    model = (
        load_trained("--model", arguments.model, arguments.weights)
        if arguments.weights
        else load_module("--model", arguments.model)
    ).to(device)
    bare = load_module("--bare", arguments.bare).to(device) if arguments.bare else None
    data = load_data(arguments.data)
    indices = select(data, arguments.skip, arguments.max)
    text = arguments.attacks or _default_attacks(model, data, indices, arguments)
    log = evaluate(
        model,
        data,
        parse_attacks(text, arguments.eps, arguments.norm),
        out=arguments.out,
        repeats=arguments.repeats,
        noise=arguments.noise,
        gradients=arguments.gradients.split(",") if arguments.gradients else None,
        bare=bare,
        masking_checks=not arguments.no_checks,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        indices=indices,
        identity=_identity(arguments),
        resume=arguments.resume,
        progress=not arguments.quiet,
    )
    if log.rows:
        report([arguments.out]).show()
    print(f"log: {arguments.out / 'attack.jsonl'}")


def _identity(arguments: argparse.Namespace) -> Mapping[str, Any]:
    weights = str(arguments.weights) if arguments.weights else None
    named = {name: getattr(arguments, name) for name in ("model", "bare", "data", "skip")}
    return {**named, "weights": weights}


def _default_attacks(
    model: nn.Module, data: ImageData, indices: Sequence[int], arguments: argparse.Namespace
) -> str:
    from art_denoised.evaluation.attacked.run import stack_images
    from art_denoised.evaluation.attacked.target import LOOKED, Target

    x, _ = stack_images(data, indices[:LOOKED])
    target = Target(
        model,
        x,
        noise=arguments.noise,
        repeats=1,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    return _RANDOMISED if target.randomised else _DETERMINISTIC
