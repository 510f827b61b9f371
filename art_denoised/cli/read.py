"""Commands that read logs: table, plot, report and verify."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from art_denoised.checks import InputError
from art_denoised.cli.parser import add_command, radii

if TYPE_CHECKING:
    from art_denoised.evaluation.records import Log

_LOG_HELP = "certify.jsonl, or a TSV with columns idx label predict radius correct time"


def add_table(commands: Any) -> None:
    """Add `table`."""
    command = add_command(
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
        "--radii",
        type=radii,
        metavar="R,R,...",
        help="l2 radii (default: those that the logs were made for, or a grid up to the last)",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print a list of {radius, certified_accuracy, low, high, at_least}, "
        "and log where there are several",
    )


def add_plot(commands: Any) -> None:
    """Add `plot`."""
    command = add_command(
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


def add_report(commands: Any) -> None:
    """Add `report`."""
    command = add_command(
        commands,
        "report",
        _report,
        "robust accuracy of each model, beside what is certified",
        description=(
            "Put runs of attack and certify into one report: robust accuracy with 95% confidence\n"
            "intervals, as each attack counted it and on fresh noise, under each attack and under\n"
            "all of them; certified accuracy beside it, which must not be larger; what the checks\n"
            "for masked gradients found. Several models are compared on the images they share.\n"
            "\n"
            "A result whose checks failed is marked as not reliable, and certified accuracy\n"
            "above robust accuracy is said at the top. docs/report.md explains every result."
        ),
        epilog=(
            "examples:\n"
            "    art-denoised report runs/denoised\n"
            "  two models side by side, and a page to send:\n"
            "    art-denoised report runs/plain runs/denoised --compare --html report.html\n"
            "  two runs of one model, such as other attacks or other images of it:\n"
            "    art-denoised report ours=runs/pgd ours=runs/square"
        ),
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder with attack.jsonl, certify.jsonl or both (or such a file); NAME=FOLDER names "
        "the model, and runs of one name are one model",
    )
    command.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page that needs no network and no script"
    )
    command.add_argument(
        "--compare", action="store_true", help="print one column a model, all attacks together"
    )
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--json", action="store_true", help="print everything as JSON, RobustBench's keys included"
    )
    how.add_argument("--tsv", action="store_true", help="print one line for each result")


def add_verify(commands: Any) -> None:
    """Add `verify`."""
    command = add_command(
        commands,
        "verify",
        _verify,
        "recompute every row of a log from its votes",
        description=(
            "Recompute label, bound and radius of every row from its votes, alpha, sigma and\n"
            "mode, and say which rows do not follow. Exit code 0: all follow; 1: some do not.\n"
            "That the votes are those of the network cannot be seen from a log."
        ),
        epilog=(
            "examples:\n"
            "    art-denoised verify runs/denoised/certify.jsonl\n"
            "  a table whose certificates hold all together, with probability 0.95:\n"
            "    art-denoised verify runs/denoised/certify.jsonl --family-alpha 0.05"
        ),
    )
    command.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="certify.jsonl or predict.jsonl"
    )
    command.add_argument(
        "--family-alpha",
        type=float,
        metavar="A",
        help="also print the table at alpha = A / images, where all certificates of a log hold "
        "together with probability 1 - A; not for a log with rows that do not follow",
    )
    command.add_argument(
        "--family-images",
        type=int,
        metavar="M",
        help="images that the run was planned for, if the log has fewer: their number must be "
        "fixed before the votes are seen (default: those in the log)",
    )


def summary(log: Log, path: Path) -> None:
    """Print the table of a finished run."""
    from art_denoised.reports.certified import certified_table

    certified_table({path.parent.name or "run": log}).show()
    print(f"log: {path}")


def _table(arguments: argparse.Namespace) -> None:
    from art_denoised.reports.certified import certified_table

    table = certified_table(_read_logs(arguments.logs), arguments.radii)
    if arguments.json:
        _print_json(table.to_json())
    else:
        table.show()


def _plot(arguments: argparse.Namespace) -> None:
    from art_denoised.reports.plots import plot_certified

    plot_certified(_read_logs(arguments.logs), arguments.out, arguments.title)
    print(f"plot: {arguments.out}")


def _report(arguments: argparse.Namespace) -> None:
    from art_denoised.reports.report import report

    found = report(arguments.runs)
    if arguments.html:
        found.write_page(arguments.html)
        print(f"page: {arguments.html}", file=sys.stderr)
    if arguments.json:
        _print_json(found.to_json())
    elif arguments.tsv:
        print(found.to_tsv(), end="")
    elif arguments.compare:
        found.show_comparison()
    else:
        found.show()


def _verify(arguments: argparse.Namespace) -> int:
    from art_denoised.evaluation.verify import family_wise, verify
    from art_denoised.reports.certified import certified_table
    from art_denoised.reports.terminal import escaped

    alpha = arguments.family_alpha
    if arguments.family_images is not None and alpha is None:
        raise InputError("--family-images needs --family-alpha; give both")
    wrong = 0
    for path in arguments.logs:
        log = _read(path)
        findings = verify(log)
        for finding in findings:
            print(escaped(f"{path}: image {finding.idx}: {finding.problem}"))
        bad = len({finding.idx for finding in findings})
        print(
            escaped(
                f"{path}: {len(log.rows) - bad} of {len(log.rows)} rows follow from their votes"
            )
        )
        wrong += bad
        if alpha is not None and not findings:
            together = family_wise(log, alpha, images=arguments.family_images)
            certified_table({"each": log, f"all together, {1 - alpha:g}": together}).show()
    return 1 if wrong else 0


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _read(path: Path) -> Log:
    from art_denoised.evaluation.logs import read_log
    from art_denoised.reports.terminal import escaped

    log = read_log(path)
    for notice in log.notices:
        print(escaped(f"notice: {path}: {notice}"), file=sys.stderr)
    return log


def _read_logs(paths: Sequence[Path]) -> dict[str, Log]:
    logs = {}
    for path in paths:
        log = _read(path)
        if log.kind != "certify":
            raise InputError(f"{path} is a log of {log.kind}; give a log of certify, with radii")
        logs[str(path)] = log
    return logs
