"""The command line: parse, call, and turn errors into one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from art_denoised import __version__
from art_denoised.checks import InputError

if TYPE_CHECKING:
    from art_denoised.evaluation.records import Log

_DESCRIPTION = """\
Certify pretrained image classifiers by denoised randomized smoothing.

  art-denoised demo                 see the whole job on handwritten digits, in about a minute
  art-denoised certify ...          certify a data set: one label and l2 radius an image
  art-denoised predict ...          predict with the smoothed classifier, abstaining where unsure
  art-denoised table LOG...         certified accuracy at chosen radii
  art-denoised plot LOG... -o FILE  certified accuracy against radius, as a picture

Each command explains itself: art-denoised certify --help
"""

_CERTIFY_DESCRIPTION = """\
Certify images one by one (Cohen et al. 2019; with a denoiser, Salman et al. 2020).

For each image, n0 noisy copies select a class and n fresh ones bound its probability. The result
is a label and an l2 radius within which the smoothed classifier provably keeps it, wrong with
probability at most alpha; or an abstention, -1. Rows go to OUT/certify.jsonl as they are made.
A run that was interrupted goes on with --resume.
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

  your own network: a function without arguments that returns the module, in eval mode, taking
  images in [0, 1] (normalisation inside), found from the current folder:
    art-denoised certify --model mynets:resnet20 --denoiser dncnn.pth.tar \\
        --data torchvision:CIFAR10:data --sigma 0.25 --skip 20 --out runs/cifar10

cost: n passes of the network an image. A batch size does not change results, only speed.
"""


_LOG_HELP = "certify.jsonl, or a TSV with columns idx label predict radius correct time"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 on success, 2 with one line on standard error for input that cannot be used or a file
        that cannot be written, 130 when interrupted.

    Example:
        >>> main(["table", "missing.jsonl"])
        2
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as in `... | head`
        return 0
    except (InputError, OSError) as error:
        from art_denoised.loading import one_line

        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"{parser.prog}: interrupted; rows so far are kept, --resume goes on", file=sys.stderr
        )
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Example:
        >>> build_parser().parse_args(["demo", "--images", "200"]).images
        200
    """
    parser = _Parser(
        prog="art-denoised",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"art-denoised {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_certify(commands)
    _add_predict(commands)
    _add_table(commands)
    _add_plot(commands)
    _add_demo(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, brief: str, **texts: str) -> _Parser:
    command: _Parser = commands.add_parser(
        name, help=brief, formatter_class=argparse.RawDescriptionHelpFormatter, **texts
    )
    command.set_defaults(run=run)
    return command


def _add_certify(commands: Any) -> None:
    command = _add_command(
        commands,
        "certify",
        _certify,
        "certify a data set",
        description=_CERTIFY_DESCRIPTION,
        epilog=_CERTIFY_EPILOG,
    )
    _add_run_options(command, default_n=10_000)
    command.add_argument(
        "--n0", type=int, default=100, help="samples that select the class (default: %(default)s)"
    )


def _add_predict(commands: Any) -> None:
    command = _add_command(
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
    _add_run_options(command, default_n=1000)


def _add_run_options(command: argparse.ArgumentParser, default_n: int) -> None:
    from art_denoised.evaluation.data import SPECS

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
    add("--n", type=int, default=default_n, help="samples an image (default: %(default)s)")
    add(
        "--alpha",
        type=float,
        default=0.001,
        help="failure probability an image (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    add(
        "--batch-size",
        type=int,
        default=64,
        help="noisy copies classified at once (default: %(default)s)",
    )
    add(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: %(default)s)",
    )
    add(
        "--skip",
        type=int,
        default=1,
        metavar="K",
        help="take every K-th image of the data set (default: %(default)s)",
    )
    add("--max", type=int, metavar="M", help="take at most M images")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the log")
    add("--resume", action="store_true", help="continue the run in DIR")
    add("--tsv", action="store_true", help="also write the field's six-column TSV log")
    add("--quiet", action="store_true", help="no progress bar")


def _add_table(commands: Any) -> None:
    command = _add_command(
        commands,
        "table",
        _table,
        "certified accuracy at chosen radii",
        description=(
            "Print certified accuracy with 95% confidence intervals, from logs of certify or from\n"
            "the TSV logs of other projects (Cohen et al., Salman et al., Carlini et al.).\n"
            "An image counts at r when its certified label is right and its radius at least r."
        ),
        epilog="example:\n    art-denoised table runs/*/certify.jsonl --radii 0,0.25,0.5",
    )
    command.add_argument("logs", nargs="+", type=Path, metavar="LOG", help=_LOG_HELP)
    command.add_argument(
        "--radii", type=_radii, metavar="R,R,...", help="l2 radii (default: a grid up to the last)"
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print a list of {radius, certified_accuracy, low, high}, "
        "and log where there are several",
    )


def _add_plot(commands: Any) -> None:
    command = _add_command(
        commands,
        "plot",
        _plot,
        "certified accuracy against radius",
        description=(
            "Draw certified accuracy against radius, for each log a curve with its 95% confidence\n"
            "band. Logs are those of certify or TSV logs of other projects."
        ),
        epilog="example:\n    art-denoised plot runs/*/certify.jsonl -o accuracy.pdf",
    )
    command.add_argument("logs", nargs="+", type=Path, metavar="LOG", help=_LOG_HELP)
    command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg"
    )
    command.add_argument("--title", help="a title above the plot")


def _add_demo(commands: Any) -> None:
    command = _add_command(
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
    from art_denoised.evaluation.run import certify_data

    log = certify_data(n0=arguments.n0, **_run_options(arguments))
    _print_summary(log, arguments.out / "certify.jsonl")


def _predict(arguments: argparse.Namespace) -> None:
    from art_denoised.evaluation.run import predict_data

    log = predict_data(**_run_options(arguments))
    correct = sum(row.correct for row in log.rows)
    abstained = sum(row.predict == -1 for row in log.rows)
    print(f"{correct} of {len(log.rows)} images correct, {abstained} abstentions")
    print(f"log: {arguments.out / 'predict.jsonl'}")


def _run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    from art_denoised.checks import sigma
    from art_denoised.evaluation.data import load_data, select
    from art_denoised.loading import find_device, load_denoiser_option, load_module
    from art_denoised.smoothing.modules import DenoisedClassifier

    sigma(arguments.sigma)
    device = find_device(arguments.device)
    base = load_module("--model", arguments.model)
    if arguments.denoiser:
        denoiser = load_denoiser_option(arguments.denoiser)
        base = DenoisedClassifier(base, denoiser, sigma=arguments.sigma)
    data = load_data(arguments.data)
    names = ("model", "denoiser", "data", "skip")
    return {
        "base": base.to(device),
        "data": data,
        "out": arguments.out,
        "sigma": arguments.sigma,
        "n": arguments.n,
        "alpha": arguments.alpha,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "indices": select(data, arguments.skip, arguments.max),
        "identity": {name: getattr(arguments, name) for name in names},
        "resume": arguments.resume,
        "tsv": arguments.tsv,
        "progress": not arguments.quiet,
    }


def _table(arguments: argparse.Namespace) -> None:
    from art_denoised.evaluation.report import (
        accuracy_table,
        default_radii,
        format_table,
        to_json,
    )

    named = _read_logs(arguments.logs)
    radii = arguments.radii or default_radii([row for rows in named.values() for row in rows])
    if not arguments.json:
        print(format_table(named, radii))
        return
    entries = []
    for name, rows in named.items():
        which = {"log": name} if len(named) > 1 else {}
        entries += [which | entry for entry in to_json(accuracy_table(rows, radii))]
    print(json.dumps(entries, indent=2))


def _plot(arguments: argparse.Namespace) -> None:
    from art_denoised.evaluation.report import plot_accuracy

    plot_accuracy(_read_logs(arguments.logs), arguments.out, title=arguments.title)
    print(f"plot: {arguments.out}")


def _demo(arguments: argparse.Namespace) -> None:
    from art_denoised.demo.run import run_demo

    run_demo(
        arguments.out,
        images=arguments.images,
        n=arguments.n,
        seed=arguments.seed,
        resume=arguments.resume,
    )


def _print_summary(log: Log, path: Path) -> None:
    from art_denoised.evaluation.report import default_radii, format_table

    print(format_table({path.parent.name or "run": log.rows}, default_radii(log.rows)))
    print(f"log: {path}")


def _read_logs(paths: Sequence[Path]) -> dict[str, Any]:
    from art_denoised.evaluation.logs import read_log

    named = {}
    for path in paths:
        log = read_log(path)
        for notice in log.notices:
            print(f"notice: {path}: {notice}", file=sys.stderr)
        if log.kind != "certify":
            raise InputError(f"{path} is a log of {log.kind}; give a log of certify, with radii")
        named[str(path)] = log.rows
    return named


def _radii(text: str) -> list[float]:
    try:
        radii = [float(part) for part in text.split(",")]
    except ValueError:
        radii = []
    if not radii or not all(0 <= radius < float("inf") for radius in radii):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of radii; give numbers >= 0 joined by commas, as in 0.25,0.5"
        )
    return radii


if __name__ == "__main__":
    sys.exit(main())
