"""Commands that read logs: table, plot, report and verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import CycloptsError, Parameter

from art_denoised.cli.options import notice
from art_denoised.cli.words import Radii

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
        json: Print a JSON list of {radius, certified_accuracy, low, high}, with log if there are
            several.
    """
    from art_denoised.evaluation.report import accuracy_table, format_table, to_json

    found = _read_all(logs)
    at = radii or _radii(list(found.values()))
    _tell_lower_bounds(found, at)
    if not json:
        print(format_table({name: log.rows for name, log in found.items()}, at))
        return
    entries = []
    for name, log in found.items():
        which = {"log": name} if len(found) > 1 else {}
        entries += [which | entry for entry in to_json(accuracy_table(log.rows, at))]
    _print_json(entries)


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
        logs: Folder or log of a certify run, as for table.
        out: Picture to write: .png, .pdf or .svg.
        title: Title above the plot.
    """
    from art_denoised.evaluation.report import plot_accuracy

    found = _read_all(logs)
    _tell_lower_bounds(found, None)
    plot_accuracy({name: log.rows for name, log in found.items()}, out, title=title)
    print(f"plot: {out}")


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
    on the images they share. docs/report.md explains every figure.

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
        tsv: Print one line for each figure.
    """
    from art_denoised.evaluation.attack_report import export, text
    from art_denoised.evaluation.attack_report.runs import read_models

    if json and tsv:
        raise CycloptsError(msg="--json excludes --tsv; give one of them")
    models, notices = read_models(runs)
    if html is not None:
        from art_denoised.evaluation.attack_report.page import page
        from art_denoised.runs.files import write_whole

        write_whole(html, page(models, notices).encode())
        print(f"page: {html}", file=sys.stderr)
    if json:
        _print_json(export.to_json(models, notices))
    elif tsv:
        print(export.to_tsv(models), end="")
    elif compare:
        print(text.format_comparison(models, notices))
    else:
        print(text.format_report(models, notices))


def verify(
    *logs: Annotated[Path, Parameter(name="LOG", required=True)],
    family_alpha: Annotated[float | None, Parameter(metavar="A")] = None,
    family_images: Annotated[int | None, Parameter(metavar="M")] = None,
) -> int:
    """Recompute every row of a log from its votes.

    Label, bound and radius of each row are recomputed from its votes, alpha,
    sigma and mode. Exit code 0: all rows are consistent with their votes; 1:
    some are not. A log cannot show that the votes are those of the network.

    To also print a table whose certificates hold all together:
      art-denoised verify runs/denoised --family-alpha 0.05

    Args:
        logs: Folder of a run, certify.jsonl or predict.jsonl.
        family_alpha: Also print the table at alpha = A / images, where all certificates of a log
            hold together with probability 1 - A. Needs a log whose rows are all consistent.
        family_images: Number of images that the run was planned for, if the log has fewer. It must
            be fixed before the votes are seen. By default the number in the log.
    """
    from art_denoised.evaluation.report import format_table
    from art_denoised.evaluation.verify import family_wise, verify

    if family_images is not None and family_alpha is None:
        raise CycloptsError(msg="--family-images needs --family-alpha; give both")
    wrong = 0
    for path in logs:
        log = _read(path)
        findings = verify(log)
        for finding in findings:
            where = "" if finding.index is None else f"image {finding.index}: "
            print(f"{path}: {where}{finding.problem}")
        bad = len({finding.index for finding in findings})
        wrong += bad
        print(f"{path}: {len(log.rows) - bad} of {len(log.rows)} rows follow from their votes")
        if family_alpha is not None and not findings:
            together = family_wise(log, family_alpha, images=family_images)
            named = {"each": log.rows, f"all together, {1 - family_alpha:g}": together.rows}
            print(format_table(named, _radii([log])))
    return 1 if wrong else 0


def summary(log: Log, path: Path) -> None:
    """Print what a finished certify run found and what it cost."""
    from art_denoised.evaluation.report import format_table

    if log.rows:
        print(format_table({path.parent.name or "run": log.rows}, _radii([log])))
    print(f"log: {path}")
    samples = sum(row.n0 + row.drawn for row in log.rows)
    print(f"{samples:,} samples for {len(log.rows)} images")


def _tell_lower_bounds(logs: Mapping[str, Log], at: Sequence[float] | None) -> None:
    """Say which logs are of runs that stopped at other radii than ``at``; None: all radii."""
    for name, log in logs.items():
        asked = (log.settings or {}).get("radii")
        if asked and (at is None or not set(at) <= set(asked)):
            made_for = ", ".join(f"{radius:g}" for radius in asked)
            notice(f"{name} was made for radii {made_for}; at others it gives lower bounds")


def _radii(logs: Sequence[Log]) -> list[float]:
    """Return the radii that all these logs were made for, if they agree, else a grid."""
    from art_denoised.evaluation.report import default_radii

    asked = [(log.settings or {}).get("radii") for log in logs]
    if asked[0] and all(radii == asked[0] for radii in asked):
        return list(asked[0])
    return default_radii([row for log in logs for row in log.rows])


def _read(path: Path) -> Log:
    from art_denoised.evaluation.rows import read_log

    log = read_log(path)
    for text in log.notices:
        notice(f"{path}: {text}")
    return log


def _read_all(paths: Sequence[Path]) -> dict[str, Log]:
    from art_denoised.checks import InputError

    logs = {str(path): _read(path) for path in paths}
    for name, log in logs.items():
        if log.kind != "certify":
            raise InputError(f"{name} is a log of {log.kind}; give a log of certify, with radii")
    return logs


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
