"""The command line: parse, call, and turn errors into one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from art_denoised import __version__
from art_denoised.checks import InputError
from art_denoised.cli import attack, read, run, train, train_robust
from art_denoised.cli.parser import Parser

_DESCRIPTION = """\
Defend image classifiers by denoising, certify them, and attack them honestly.

  art-denoised demo                 see the whole job on handwritten digits, in about a minute
  art-denoised certify ...          certify a data set: one label and l2 radius an image
  art-denoised predict ...          predict with the smoothed classifier, abstaining where unsure
  art-denoised attack ...           attack a model, and check that the figure can be believed
  art-denoised train-denoiser ...   train a denoiser for a classifier, seen or only queried
  art-denoised train-diffusion ...  train a class-conditional diffusion model
  art-denoised train-robust ...     train a classifier adversarially
  art-denoised table LOG...         certified accuracy at chosen radii
  art-denoised plot LOG... -o FILE  certified accuracy against radius, as a picture
  art-denoised report RUN...        what attacks left of each model, beside what is certified
  art-denoised verify LOG...        recompute every row of a log from its votes

Each command explains itself: art-denoised certify --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 on success, 1 where `verify` found rows that do not follow, 2 with one line on standard
        error for input that cannot be used or a file that cannot be written, 130 when interrupted.

    Example:
        >>> main(["table", "missing.jsonl"])
        2
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as in `... | head`
        return 0
    except (InputError, OSError) as error:
        from art_denoised.models.loading import one_line

        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"{parser.prog}: interrupted; what was done is kept, --resume goes on", file=sys.stderr
        )
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Example:
        >>> build_parser().parse_args(["demo", "--images", "200"]).images
        200
    """
    parser = Parser(
        prog="art-denoised",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"art-denoised {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run.add_certify(commands)
    run.add_predict(commands)
    attack.add_attack(commands)
    train.add_train_denoiser(commands)
    train.add_train_diffusion(commands)
    train_robust.add_train_robust(commands)
    read.add_table(commands)
    read.add_plot(commands)
    read.add_report(commands)
    read.add_verify(commands)
    run.add_demo(commands)
    return parser
