"""A report as blocks for the terminal: one after another, or models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from art_denoised.evaluation.rows import Log
from art_denoised.reports.certified import (
    LOWER_BOUND,
    certified_table,
    default_radii,
    is_lower_bound,
)
from art_denoised.reports.compare import conflicts, differences
from art_denoised.reports.results import Ball, Model
from art_denoised.reports.survival import Share
from art_denoised.reports.terminal import Block, Cell, Column, Lines, Table
from art_denoised.reports.words import (
    SHARES,
    agreement_words,
    difference_words,
    interval,
    percent,
    shouts,
    trust_words,
    verdict_words,
)

_LEGEND = (
    "Accuracy in percent, below it the 95% interval over images. counted: by the attack itself;",
    "fresh: on fresh noise, averaged; worst: right in every evaluation. Quote `fresh` of all "
    "attacks.",
)


def report_blocks(models: Sequence[Model], notices: Sequence[str] = ()) -> list[Block]:
    """Return the report with one table for each model and ball."""
    width = max((len(r.attack) for model in models for r in model.results), default=0)
    blocks: list[Block] = [_alarm(models)]
    for model in models:
        blocks += _model_blocks(model, width)
    blocks.append(_notices(models, notices))
    if any(model.results for model in models):
        blocks.append(Lines(_LEGEND))
    return _filled(blocks)


def comparison_blocks(models: Sequence[Model], notices: Sequence[str] = ()) -> list[Block]:
    """Return the report with one column for each model: accuracy on fresh noise, all attacks."""
    verdicts = [_mark(model) + verdict_words(model) if model.columns else "" for model in models]
    names = tuple(Column(model.name, width=16) for model in models)
    shown = certified_radii(models)
    bounds = [any(is_lower_bound(radius, model.asked) for radius in shown) for model in models]
    note = (LOWER_BOUND,) if any(bounds) else ()
    table = Table(
        (Column("", left=True), *names), (*_comparison_rows(models), ("", *verdicts)), note=note
    )
    changes = Lines(tuple(map(difference_words, differences(models))))
    return _filled([_alarm(models), table, changes, _notices(models, notices)])


def certified_radii(models: Sequence[Model]) -> list[float]:
    """Return the radii at which certified accuracy of these models is shown."""
    logs = [_certify_log(model) for model in models if model.certified]
    return default_radii(logs) if logs else []


def _alarm(models: Sequence[Model]) -> Lines:
    return Lines(tuple(shouts(models)), style="bold red")


def _notices(models: Sequence[Model], notices: Sequence[str]) -> Lines:
    return Lines(tuple(f"notice: {words}" for words in [*conflicts(models), *notices]))


def _model_blocks(model: Model, width: int) -> Iterator[Block]:
    words = trust_words(model) if model.columns else "no attack was made"
    yield Lines((f"{model.name}: {words}",), style="bold")
    for ball in model.columns:
        yield _ball_table(model, ball, width)
    if model.certified:
        yield replace(certified_table({model.name: _certify_log(model)}).block(), note=())
    yield Lines(tuple(agreement_words(one) for one in model.agreements if not one.inverted))


def _ball_table(model: Model, ball: Ball, width: int) -> Table:
    flag = verdict_words(model) if model.trusted is False or model.incomplete else ""
    columns = [Column(str(ball), left=True, width=width), Column("gradient", left=True)]
    columns += [Column(head, width=7) for head in ("images", *SHARES, "s/image")]
    columns += [Column("", left=True)] * bool(flag)
    rows = [
        (
            result.attack,
            result.gradient,
            str(result.images),
            *(_share_cell(getattr(result, name)) for name in SHARES),
            f"{result.seconds:.2g}",
            *[flag] * bool(flag),
        )
        for result in model.results
        if result.ball == ball
    ]
    return Table(tuple(columns), tuple(rows))


def _comparison_rows(models: Sequence[Model]) -> Iterator[tuple[Cell, ...]]:
    if any(model.clean for model in models):
        yield ("clean", *(_share_cell(model.clean) for model in models))
    for ball in sorted({ball for model in models for ball in model.columns}):
        found = [{r.ball: r.fresh for r in model.headlines}.get(ball) for model in models]
        yield (str(ball), *map(_share_cell, found, map(_mark, models)))
    for radius in certified_radii(models):
        found = [model.certified_share(radius) for model in models]
        marks = [">=" * is_lower_bound(radius, model.asked) for model in models]
        yield (f"certified, l2 r={radius:g}", *map(_share_cell, found, marks))


def _mark(model: Model) -> str:
    return "! " * (model.trusted is False)


def _share_cell(share: Share | None, mark: str = "") -> Cell:
    return (mark + percent(share), interval(share)) if share else "-"


def _certify_log(model: Model) -> Log:
    return Log("certify", {"radii": model.asked}, model.certified)


def _filled(blocks: Sequence[Block]) -> list[Block]:
    return [block for block in blocks if isinstance(block, Table) or block.lines]
