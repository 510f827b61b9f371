"""Commands that read logs: table, plot, report and merge."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import CycloptsError, Parameter

from art_denoised.cli.options import (
    Factory,
    Names,
    Norm,
    Numbers,
    Radii,
    notice,
    notices,
    print_json,
    print_result,
)
from art_denoised.reports.terminal import escaped
from art_denoised.runs.progress import waiting

if TYPE_CHECKING:
    from art_denoised.data import ImageData
    from art_denoised.evaluation.logs import Log
    from art_denoised.reports.plots import Look
    from art_denoised.reports.report import Report
    from art_denoised.reports.terminal import Table

Logs = Annotated[str, Parameter(name="LOG", required=True)]
Out = Annotated[Path, Parameter(alias="-o", metavar="FILE")]


def table(
    *logs: Logs,
    radii: Radii | None = None,
    json: bool = False,
    csv: bool = False,
    latex: bool = False,
    markdown: bool = False,
) -> None:
    """Print certified accuracy at chosen radii.

    An image counts at radius r if its certified label is right and its radius
    is at least r. Intervals have 95% confidence.

    For example:
      art-denoised table runs/plain runs/denoised --radii 0,0.25,0.5

    For a paper:
      art-denoised table plain=runs/1 ours=runs/2 --latex > table.tex

    Args:
        logs: Folder of a certify run, its certify.jsonl, or a TSV log with the columns idx, label,
            predict, radius, correct and time (Cohen et al., Salman et al., Carlini et al.).
            NAME=FOLDER names it.
        radii: l2 radii. By default those that the logs were made for, or a grid.
        json: Print a JSON list of {radius, certified_accuracy, low, high, at_least}, with log if
            there are several. at_least: a lower bound, because the run stopped at other radii.
        csv: Print one line for each log and radius, as plot --published takes them.
        latex: Print a tabular of LaTeX, for the package booktabs.
        markdown: Print a table of Markdown.
    """
    _only_one(json=json, csv=csv, latex=latex, markdown=markdown)
    with waiting("reading the logs"):
        from art_denoised.reports.certified import certified_table, images_apart

        named = _read_all(logs)
        found = certified_table(named, radii)
    for words in images_apart(named):
        notice(words)
    if json:
        print_json(found.to_json())
    elif csv:
        print(found.to_csv(), end="")
    elif latex or markdown:
        _print_markup(found.block(), latex=latex)
    else:
        found.show()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """What a picture looks like.

    Attributes:
        title: Title above the picture.
        size: Width and height in inches. By default one that suits the picture.
        style: Name of a style of matplotlib, such as seaborn-v0_8-paper, or a style sheet.
    """

    title: str = ""
    size: Numbers | None = None
    style: str | None = None

    def look(self, **labels: Any) -> Look:
        """Return the look that was asked for."""
        from art_denoised.reports.plots import Look

        return Look(self.size, self.style, self.title, **labels)


_PLAIN = LookOptions()


def plot(
    *logs: Logs,
    out: Out,
    names: Names | None = None,
    norm: Norm | None = None,
    published: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    look: LookOptions = _PLAIN,
    json: bool = False,
) -> None:
    r"""Plot certified accuracy against radius and robust accuracy against eps.

    Certified accuracy is a curve with its 95% confidence band. Robust accuracy,
    of attack runs, is points with 95% bars, on the same axis. Where a certify
    run stopped sampling at some radii, its curve has a marker at each of them
    and is a thin lower bound elsewhere.

    For example:
      art-denoised plot runs/plain runs/denoised -o accuracy.pdf

    For a paper, beside curves of other papers:
      art-denoised plot plain=runs/1 ours=runs/2 -o accuracy.pdf --size 3.3,2.5 \
          --published cohen.csv

    Args:
        logs: Folder of a certify or attack run, or its log; a TSV log, as table takes it.
            NAME=FOLDER names it in the legend.
        out: Picture to write: .png, .svg (with text as text) or .pdf (with Type 42 fonts).
        names: Names of the logs in the legend, in their order.
        norm: Norm of the radii, if there are results in both; certificates are in l2.
        published: CSV with the columns name, radius and certified_accuracy (shares in [0, 1]),
            whose curves are drawn as thin lines. table --csv writes such files.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
        look: Size, style and title.
        json: Print the name of the picture as JSON.
    """
    if names is not None:
        if len(names) != len(logs):
            raise CycloptsError(msg=f"--names has {len(names)} names for {len(logs)} logs")
        logs = tuple(f"{name}={log}" for name, log in zip(names, logs, strict=True))
    with waiting("reading the logs"):
        from art_denoised.reports.plots import (
            accuracy_figure,
            has_results,
            read_curves,
            save_figure,
        )
        from art_denoised.reports.tables import conflicts

        curves = [] if published is None else read_curves(published)
        found = _report(logs)
    looked, models = look.look(xlabel=xlabel, ylabel=ylabel), found.models
    if norm is not None and any(has_results(model, norm) for model in models):
        for model in (model for model in models if not has_results(model, norm)):
            notice(f"{model.name} has no results in {norm} and is left out")
        models = tuple(model for model in models if has_results(model, norm))
    for words in conflicts(models):
        notice(words)
    with waiting("drawing the plot"):
        figure = accuracy_figure(models, norm=norm, published=curves, look=looked)
        save_figure(figure, out)
    _print_file("plot", out, json=json)


def pictures(
    run: Annotated[Path, Parameter(name="RUN", required=True)],
    *,
    out: Out,
    max: Annotated[int, Parameter(metavar="M")] = 8,
    data: Annotated[str | None, Parameter(metavar="DATA")] = None,
    resize: Annotated[int | None, Parameter(metavar="PIXELS")] = None,
    crop: Annotated[int | None, Parameter(metavar="PIXELS")] = None,
    denoiser: Annotated[Factory | None, Parameter(metavar="FACTORY|FILE")] = None,
    look: LookOptions = _PLAIN,
    json: bool = False,
) -> None:
    r"""Draw images of a run: clean, noisy, denoised, attacked, and the difference.

    Below each image are the predicted class, what the attacks left of it, and
    its certified radius. An attack run keeps pictures of four images. The
    images of a certify or predict run are read again, and must have the pixels
    that the log tells of.

    For example:
      art-denoised pictures runs/attacked -o images.pdf
      art-denoised pictures runs/denoised -o images.png --max 4 \
          --denoiser art_denoised.demo:digits_denoiser

    Args:
        run: Folder of an attack, certify or predict run, or its log.
        out: Picture to write: .png, .pdf or .svg.
        max: Number of rows at most.
        data: Images of a certify or predict run. By default those that the log names.
        resize: Length of the shorter side that the photographs of the run were resized to.
        crop: Side of the square that was cut from their centre. By default --resize.
        denoiser: Denoiser of a certify or predict run, for denoised images: a function or a
            checkpoint, as certify takes it.
        look: Size, style and title.
        json: Print the name of the picture as JSON.
    """
    with waiting("loading PyTorch"):
        from art_denoised.reports.pictures import attacked_strips, certified_strips
        from art_denoised.reports.plots import picture_figure, save_figure

    if run.name == "attack.jsonl" or (run / "attack.jsonl").exists():
        if any((data, resize, crop, denoiser)):
            raise CycloptsError(
                msg=f"{run} holds pictures of an attack, so data and denoiser would be ignored; "
                "leave them out, or give certify.jsonl"
            )
        with waiting("reading the pictures of the run"):
            found = _report([str(run)])
        strips = [strip for model in found.models for strip in attacked_strips(model, max)]
    else:
        with waiting("comparing the images with those of the log"):
            log = _read(run)
            images = _images(log, data, resize, crop)
            denoise = _denoiser(log, denoiser)
            strips = certified_strips(log, images, denoiser=denoise, most=max)
    with waiting("drawing the pictures"):
        save_figure(picture_figure(strips, look=look.look()), out)
    _print_file("pictures", out, json=json)


def _print_file(what: str, path: Path, *, json: bool) -> None:
    print_result({what: str(path)}, f"{what}: {path}", json=json)


def _report(runs: Sequence[str]) -> Report:
    """Return the report of runs, once its notices are shown."""
    from art_denoised.reports.report import report

    found = report(runs)
    for words in found.notices:
        notice(words)
    return found


def _images(log: Log, data: str | None, resize: int | None, crop: int | None) -> ImageData:
    """Return the data set of a log."""
    from art_denoised.data import load_data
    from art_denoised.models.loading import EvalTransform

    named = data or (log.settings or {}).get("data")
    if not isinstance(named, str):
        raise CycloptsError(msg="the log names no data; give --data")
    sides = [side for side in (resize, crop) if side is not None]
    transform = EvalTransform(sides[0], (sides[-1], sides[-1])) if sides else None
    return load_data(named, transform=transform)


def _denoiser(log: Log, name: str | None) -> Any:
    """Return a denoiser for the noise of a log; None where none is named."""
    from art_denoised.denoisers.denoisers import load_denoiser

    sigma = (log.settings or {}).get("sigma")
    if name is None:
        return None
    if not isinstance(sigma, int | float):
        raise CycloptsError(msg="the log tells no sigma, so nothing can be denoised as in the run")
    with notices(UserWarning):
        return load_denoiser(name, sigma=sigma)


def report(
    *runs: Annotated[str, Parameter(name="RUN", required=True)],
    html: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    compare: bool = False,
    json: bool = False,
    tsv: bool = False,
    latex: bool = False,
    markdown: bool = False,
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
        latex: Print one row for each model as a tabular of LaTeX, for the package booktabs.
        markdown: Print one row for each model as a table of Markdown.
    """
    _only_one(json=json, tsv=tsv, compare=compare, latex=latex, markdown=markdown)
    with waiting("reading the logs"):
        from art_denoised.reports.report import report
        from art_denoised.reports.tables import model_table

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
    elif latex or markdown:
        _print_markup(model_table(found.models), latex=latex)
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
    with waiting("joining the rows of all shards"):
        from art_denoised.evaluation import ATTACK, AttackLog, write_tsv
        from art_denoised.evaluation.attack_rows import unmade
        from art_denoised.evaluation.logs import merge

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
    rows = {str(path): len(log.rows) for path, log in merged.items()}
    lines = [f"log: {path}, {count} rows" for path, count in rows.items()]
    print_result([{"log": log, "rows": count} for log, count in rows.items()], *lines, json=json)


def _read(path: Path) -> Log:
    from art_denoised.evaluation.logs import read_log

    log = read_log(path)
    _show_notices(path, log.notices)
    return log


def _show_notices(path: Path, notices: Sequence[str]) -> None:
    for text in notices:
        notice(f"{path}: {text}")


def _read_all(runs: Sequence[str]) -> dict[str, Log]:
    """Return logs of certify by name."""
    from art_denoised.checks import InputError
    from art_denoised.reports.report import named_paths

    logs: dict[str, Log] = {}
    for name, paths in named_paths(runs).items():
        if len(paths) > 1:
            raise InputError(f"{len(paths)} logs are called {name}; give each its own name")
        logs[name] = log = _read(paths[0])
        if log.kind != "certify":
            raise InputError(f"{paths[0]} is a log of {log.kind}; give a log of certify")
    return logs


def _only_one(**forms: bool) -> None:
    """Refuse two forms of one output."""
    given = [f"--{name}" for name, wanted in forms.items() if wanted]
    if given[1:]:
        raise CycloptsError(msg=f"{given[0]} excludes {given[1]}; give one of them")


def _print_markup(table: Table, *, latex: bool) -> None:
    from art_denoised.reports import terminal

    print(terminal.latex(table) if latex else terminal.markdown(table))
