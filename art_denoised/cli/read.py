"""Commands that read logs: table, plot, report and merge."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import CycloptsError, Parameter

from art_denoised.cli.options import Radii, notice, print_json
from art_denoised.reports.terminal import escaped
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    from art_denoised.evaluation.rows import Log

Logs = Annotated[Path, Parameter(name="LOG", required=True)]


def table(*logs: Logs, radii: Radii | None = None, json: bool = False) -> None:
    """Print certified accuracy at chosen radii.

    An image counts at radius r if its certified label is right and its radius
    is at least r. Intervals have 95% confidence.

    For example:
      art-denoised table runs/plain runs/denoised --radii 0,0.25,0.5

    Args:
        logs: Folder of a certify run, its certify.jsonl, or a TSV log with the columns idx, label,
            predict, radius, correct and time (Cohen et al., Salman et al., Carlini et al.).
        radii: l2 radii. By default those that the logs were made for, or a grid.
        json: Print a JSON list of {radius, certified_accuracy, low, high, at_least}, with log if
            there are several. at_least: a lower bound, because the run stopped at other radii.
    """
    from art_denoised.reports.certified import certified_table

    found = certified_table(_read_all(logs), radii)
    if json:
        print_json(found.to_json())
    else:
        found.show()


def plot(
    *logs: Logs,
    out: Annotated[Path, Parameter(alias="-o", metavar="FILE")],
    title: str | None = None,
) -> None:
    """Plot certified accuracy against radius.

    Each log is a curve with its 95% confidence band.

    For example:
      art-denoised plot runs/plain runs/denoised -o accuracy.pdf

    Args:
        logs: Folder or log of a certify run, as the table command takes it.
        out: Picture to write: .png, .pdf or .svg.
        title: Title above the plot.
    """
    from art_denoised.reports.plots import plot_certified

    plot_certified(_read_all(logs), out, title)
    print(escaped(f"plot: {out}"))


def report(
    *runs: Annotated[str, Parameter(name="RUN", required=True)],
    html: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    compare: bool = False,
    json: bool = False,
    tsv: bool = False,
) -> None:
    """Report robust accuracy under attack beside certified accuracy.

    Robust accuracy has 95% confidence intervals and is given as each attack
    counted it and on fresh noise, for each attack and for all together.
    Certified accuracy stands beside it and must not be larger. A result whose
    masking checks failed is marked as not reliable. Several models are compared
    on the images they share. docs/how-to/report.md explains every result.

    Two models side by side, and a page to send:
      art-denoised report runs/plain runs/denoised --compare --html report.html

    Two runs of one model, such as other attacks or other images:
      art-denoised report ours=runs/pgd ours=runs/square

    Args:
        runs: Folder with attack.jsonl, certify.jsonl or both, or such a file. NAME=FOLDER names the
            model; runs of one name are one model.
        html: Page to write; it needs no network and no script.
        compare: Print one column for each model, all attacks together.
        json: Print everything as JSON, with the keys of RobustBench.
        tsv: Print one line for each result.
    """
    from art_denoised.reports.report import report

    if json and tsv:
        raise CycloptsError(msg="--json excludes --tsv; give one of them")
    found = report(runs)
    if html is not None:
        found.write_page(html)
        print(escaped(f"page: {html}"), file=sys.stderr)
    if json:
        print_json(found.to_json())
    elif tsv:
        print(found.to_tsv(), end="")
    elif compare:
        found.show_comparison()
    else:
        found.show()


def merge(
    out: Annotated[Path, Parameter(metavar="OUT")],
    *runs: Annotated[Path, Parameter(name="RUN", required=True)],
    partial: bool = False,
    tsv: bool = False,
    json: bool = False,
) -> None:
    """Join shards of certify, predict or attack into one log.

    The log is the one that a single machine would have written, but for times
    and, where images stop early, the order of rows. Shards of other settings,
    shards that are given twice and missing shards or rows are refused. Masking
    checks of an attack need all images: repeat its command without --shard, with
    --resume and --out OUT. It finds all rows and makes the checks alone.

    Eight shards, each certified with --shard I/8 --out runs/parts/I:
      art-denoised merge runs/all runs/parts/*
      art-denoised table runs/all

    Args:
        out: Folder of the merged run.
        runs: Folders of the shards.
        partial: Accept missing shards and rows, and name them.
        tsv: Also write a TSV log with the columns of Cohen et al.
        json: Print a JSON list of {log, rows}.
    """
    from art_denoised.evaluation import ATTACK, AttackLog, write_tsv
    from art_denoised.evaluation.attack_rows import unmade
    from art_denoised.evaluation.merge import merge

    with waiting("joining the rows of all shards"):
        merged = merge(out, runs, partial=partial)
    for path, log in merged.items():
        _show_notices(path, log.notices)
        if isinstance(log, AttackLog):
            if unmade(log.checks):
                notice(
                    f"{path}: the masking checks are not made; repeat the {ATTACK.name} command "
                    f"without --shard, with --resume --out {out}"
                )
        elif tsv:
            write_tsv(log, path.with_suffix(".tsv"))
        if not json:
            print(escaped(f"log: {path}, {len(log.rows)} rows"))
    if json:
        print_json([{"log": str(path), "rows": len(log.rows)} for path, log in merged.items()])


def _read(path: Path) -> Log:
    from art_denoised.evaluation.rows import read_log

    log = read_log(path)
    _show_notices(path, log.notices)
    return log


def _show_notices(path: Path, notices: Sequence[str]) -> None:
    for text in notices:
        notice(f"{path}: {text}")


def _read_all(paths: Sequence[Path]) -> dict[str, Log]:
    from art_denoised.checks import InputError

    logs = {str(path): _read(path) for path in paths}
    for name, log in logs.items():
        if log.kind != "certify":
            raise InputError(f"{name} is a log of {log.kind}; give a log of certify, with radii")
    return logs
