"""Commands that run networks: certify, predict and demo."""

from __future__ import annotations

import argparse
import copy
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.cli.parser import add_command, add_log_options, batch_size, duration, radii
from art_denoised.cli.read import summary

if TYPE_CHECKING:
    from torch import nn

    from art_denoised.data import ImageData

_CERTIFY_DESCRIPTION = """\
Certify images one by one (Cohen et al. 2019; with a denoiser, Salman et al. 2020).

For each image, n0 noisy copies select a class and n fresh ones bound its probability. The result
is a label and an l2 radius within which the smoothed classifier provably keeps it, wrong with
probability at most alpha; or an abstention, -1. Rows go to OUT/certify.jsonl as they are made.
A run that was interrupted goes on with --resume.

How much to sample:
  --n N                 N samples for every image: its full radius
  --radii R,R,...       only until each of these radii is proved or out of reach, N at most:
                        the table of certified accuracy from about a tenth of the samples
  --at-radius R         the same for a single radius
  --deadline TIME       as much as the time allows; --resume goes on and tightens the radii
All of them are sound at the same alpha (docs/sequential.md).
"""

_CERTIFY_EPILOG = """\
examples:
  the packaged digits classifier, first without and then with its denoiser:
    art-denoised certify --model art_denoised.demo:digits_classifier --data digits \\
        --sigma 0.25 --n 1000 --max 100 --out runs/plain
    art-denoised certify --model art_denoised.demo:digits_classifier \\
        --denoiser art_denoised.demo:digits_denoiser --data digits \\
        --sigma 0.25 --n 1000 --max 100 --out runs/denoised
    art-denoised table runs/plain/certify.jsonl runs/denoised/certify.jsonl

  the same statement as from 100,000 samples an image, at three radii, at a tenth of the cost:
    art-denoised certify --model art_denoised.demo:digits_classifier --data digits \\
        --sigma 0.25 --radii 0,0.25,0.5 --out runs/table

  your own network: a function without arguments that returns the module, in eval mode, taking
  images in [0, 1] (normalisation inside), found from the current folder:
    art-denoised certify --model mynets:resnet20 --denoiser dncnn.pth.tar \\
        --data torchvision:CIFAR10:data --sigma 0.25 --skip 20 --out runs/cifar10

cost: a pass of the network a sample; --preview estimates it. No result depends on the batch size.
"""


def add_certify(commands: Any) -> None:
    """Add `certify`."""
    command = add_command(
        commands,
        "certify",
        _certify,
        "certify a data set",
        description=_CERTIFY_DESCRIPTION,
        epilog=_CERTIFY_EPILOG,
    )
    _add_run_options(
        command, "samples an image (default: 10000; with --radii or --deadline at most 100000)"
    )
    add = command.add_argument
    add("--n0", type=int, default=100, help="samples that select the class (default: %(default)s)")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--radii", type=radii, metavar="R,R,...", help="stop at these l2 radii")
    how.add_argument("--at-radius", type=float, metavar="R", help="stop at this l2 radius")
    how.add_argument("--deadline", type=duration, metavar="TIME", help="such as 90s, 10m or 2h")
    add(
        "--all-images",
        action="store_true",
        help="with --radii or --deadline, go on with images whose selected class is wrong; "
        "without it they are left as abstentions, since they count as wrong anyway",
    )
    add(
        "--preview",
        action="store_true",
        help="only estimate samples, time and cost, from a pilot of a few images",
    )
    add(
        "--cost-per-sample",
        type=float,
        default=0.0,
        metavar="C",
        help="of networks that are paid by the query, for --preview",
    )


def add_predict(commands: Any) -> None:
    """Add `predict`."""
    command = add_command(
        commands,
        "predict",
        _predict,
        "predict with the smoothed classifier",
        description=(
            "Predict by the vote of n noisy copies, abstaining (-1) where the two leading classes\n"
            "cannot be told apart at level alpha (Cohen et al. 2019, Predict).\n"
            "Rows go to OUT/predict.jsonl."
        ),
    )
    _add_run_options(command, "samples an image (default: 1000)")


def _add_run_options(command: argparse.ArgumentParser, n_help: str) -> None:
    from art_denoised.data import SPECS

    add = command.add_argument
    add(
        "--model",
        required=True,
        metavar="PACKAGE.MODULE:FACTORY",
        help="function that returns the classifier: images in [0, 1] to logits, in eval mode",
    )
    add(
        "--denoiser",
        metavar="FACTORY|CHECKPOINT",
        help="function that returns a denoiser(x_noisy, sigma), or a checkpoint of DnCNN, MemNet "
        "or a U-Net (.safetensors, .pth, .tar, diffusers folder); none: plain smoothing",
    )
    add("--data", required=True, metavar="DATA", help=SPECS)
    add(
        "--sigma",
        type=float,
        required=True,
        help="standard deviation of the noise, in units of images in [0, 1]",
    )
    add("--n", type=int, help=n_help)
    add(
        "--alpha",
        type=float,
        default=0.001,
        help="failure probability an image (default: %(default)s)",
    )
    add(
        "--noise",
        default="gaussian",
        help="gaussian; or quantised, for 8-bit images: certificates that also hold in "
        "floating-point arithmetic (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add(
        "--batch-size",
        type=batch_size,
        default="auto",
        metavar="N|auto",
        help="noisy copies classified at once; auto measures what is fastest and remembers it",
    )
    add(
        "--dtype",
        help="type the network computes in: float32, bfloat16, or auto, the faster of the two "
        "here; a certificate is one of the network in this type (default: as the network comes)",
    )
    add("--tsv", action="store_true", help="also write a TSV log in the field's columns")
    add_log_options(add)


def add_demo(commands: Any) -> None:
    """Add `demo`."""
    command = add_command(
        commands,
        "demo",
        _demo,
        "the whole job on handwritten digits",
        description=(
            "Certify held-out handwritten digits (scikit-learn's, no download) at two noise\n"
            "levels, with and without a denoiser in front of a plain pretrained classifier."
        ),
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for logs, table and plot (default: %(default)s)",
    )
    command.add_argument(
        "--images", type=int, default=200, help="held-out images, up to 500 (default: %(default)s)"
    )
    command.add_argument(
        "--n", type=int, default=1000, help="samples an image (default: %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    command.add_argument("--resume", action="store_true", help="continue an interrupted demo")


def _certify(arguments: argparse.Namespace) -> None:
    if arguments.preview:
        return _preview(arguments)
    options = _run_options(arguments)
    if arguments.deadline:
        from art_denoised.evaluation.deadline import certify_data_until

        del options["radii"]
        log = certify_data_until(seconds=arguments.deadline, **options)
        missing = len({*options["indices"]} - {row.idx for row in log.rows})
        if missing:
            print(f"{missing} images were not reached; go on with --resume")
    else:
        from art_denoised.evaluation.run import certify_data

        log = certify_data(**options)
    if log.rows:
        summary(log, arguments.out / "certify.jsonl")
    drawn = sum(row.certificate.n0 + row.certificate.drawn for row in log.rows)
    print(f"{drawn:,} samples for {len(log.rows)} images")
    return None


def _preview(arguments: argparse.Namespace) -> None:
    from art_denoised.evaluation.preview import preview
    from art_denoised.evaluation.run import certifying_procedure
    from art_denoised.evaluation.runner import Runner

    if arguments.deadline:
        raise InputError("--preview goes with --n, --radii or --at-radius; a deadline needs none")
    options = _run_options(arguments)
    names = ("base", "data", "sigma", "noise", "seed", "batch_size", "indices")
    run = Runner(**{name: options[name] for name in names})
    plan = ("n0", "n", "alpha", "radii", "use_labels")
    procedure = certifying_procedure(**{name: options[name] for name in plan})
    most = options["n0"] + options["n"]
    print(preview(run, procedure, most=most, cost_per_sample=arguments.cost_per_sample))


def _predict(arguments: argparse.Namespace) -> None:
    from art_denoised.evaluation.run import predict_data

    arguments.n = 1000 if arguments.n is None else arguments.n
    log = predict_data(**_common_options(arguments))
    correct = sum(row.correct for row in log.rows)
    abstained = sum(row.predict == -1 for row in log.rows)
    print(f"{correct} of {len(log.rows)} images correct, {abstained} abstentions")
    print(f"log: {arguments.out / 'predict.jsonl'}")


def _run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    at = arguments.radii or ([] if arguments.at_radius is None else [arguments.at_radius])
    early = bool(at or arguments.deadline)
    if arguments.n is None:
        arguments.n = 100_000 if early else 10_000
    own = {"n0": arguments.n0, "radii": at, "use_labels": not arguments.all_images}
    return {**_common_options(arguments), **own}


def _common_options(arguments: argparse.Namespace) -> dict[str, Any]:
    from art_denoised.checks import sigma
    from art_denoised.data import load_data, select
    from art_denoised.models.loading import find_device, load_denoiser_option, load_module
    from art_denoised.smoothing.modules import DenoisedClassifier

    sigma(arguments.sigma)
    device = find_device(arguments.device)
    base = load_module("--model", arguments.model)
    if arguments.denoiser:
        denoiser = load_denoiser_option(arguments.denoiser)
        base = DenoisedClassifier(base, denoiser, sigma=arguments.sigma)
    data = load_data(arguments.data)
    indices = select(data, arguments.skip, arguments.max)
    names = ("model", "denoiser", "data", "skip")
    return {
        "base": _in_dtype(base.to(device), arguments.dtype, data),
        "data": data,
        "out": arguments.out,
        "sigma": arguments.sigma,
        "n": arguments.n,
        "alpha": arguments.alpha,
        "noise": arguments.noise,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "indices": indices,
        "identity": {name: getattr(arguments, name) for name in names},
        "resume": arguments.resume,
        "tsv": arguments.tsv,
        "progress": not arguments.quiet,
    }


def _in_dtype(base: nn.Module, name: str | None, data: ImageData) -> nn.Module:
    """Return the network in the type asked for, or for "auto" in the faster one here."""
    import torch

    from art_denoised.evaluation.tuning import tune
    from art_denoised.smoothing.noise import model_device

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name is None:
        return base
    if name in dtypes:
        return base.to(dtypes[name])
    if name != "auto":
        raise InputError(f"--dtype is {name!r}; give float32, bfloat16 or auto")
    x = checks.images(data[0][0][None])[0]
    checks.eval_mode(base)
    networks = [copy.deepcopy(base).to(dtype) for dtype in dtypes.values()]
    able = [networks[0]]
    checks.class_count(networks[0], x[None].to(model_device(base), torch.float32))
    with suppress(InputError):  # not every layer computes in bfloat16
        checks.class_count(networks[1], x[None].to(model_device(base), torch.bfloat16))
        able.append(networks[1])
    return max(able, key=lambda network: tune(network, x).rate)


def _demo(arguments: argparse.Namespace) -> None:
    from art_denoised.demo.run import run_demo

    run_demo(
        arguments.out,
        images=arguments.images,
        n=arguments.n,
        seed=arguments.seed,
        resume=arguments.resume,
    )
