"""A report in words and as blocks for the terminal: one model after another, or side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from art_denoised.evaluation.attack_rows import CHECKS
from art_denoised.evaluation.rows import Log
from art_denoised.reports.certified import (
    LOWER_BOUND,
    certified_table,
    default_radii,
    is_lower_bound,
)
from art_denoised.reports.results import (
    ALL,
    Agreement,
    Ball,
    Difference,
    Model,
    Share,
    differences,
)
from art_denoised.reports.terminal import Block, Cell, Column, Lines, Table

SHARES = ("clean", "counted", "fresh", "majority", "worst")
_LEGEND = (
    "Accuracy in percent, below it the 95% interval over images. counted: by the attack itself;",
    "fresh: on fresh noise, averaged; majority: right in more than half of these evaluations; "
    "worst: in",
    "every evaluation. Quote `fresh` of all attacks.",
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


def shouts(models: Iterable[Model]) -> Iterator[str]:
    """Yield what must be read before any result."""
    for model in models:
        for agreement in model.inversions:
            yield f"INVERSION in {model.name}: {agreement_words(agreement)}"
        named: dict[str, list[str]] = {}
        for check in model.failed:
            named.setdefault(check.finding, []).append(f"'{check.name}'")
        for finding, names in named.items():
            which = f"check{'s' * (len(names) > 1)} {', '.join(names)}"
            yield f"NOT RELIABLE: {model.name} failed the {which}: {finding}"


def agreement_words(agreement: Agreement) -> str:
    """Return in words how certified and robust accuracy agree at a radius.

    Example:
        >>> low, high = Share(0.1, 0.0, 0.3), Share(0.9, 0.7, 1.0)
        >>> agreement_words(Agreement(0.5, low, False, high, 9, (), 8, 1.0))
        'certified accuracy 10.0% is at most robust accuracy 90.0% at l2 radius 0.5, as it must be'
    """
    shares = (
        f"certified accuracy {100 * agreement.certified.value:.1f}% {{}} robust accuracy "
        f"{100 * agreement.robust.value:.1f}% at l2 radius {agreement.radius:g}"
    )
    if agreement.inverted:
        words = shares.format("is above") + ", which cannot be"
        if agreement.p_value is not None:
            words += f" (p = {agreement.p_value:.2g})"
        words += "; check the certificates, and that the attacked model is the certified one"
    elif agreement.certified.value > agreement.robust.value:
        words = shares.format("is above") + ", within what chance explains"
    else:
        words = shares.format("is at most") + ", as it must be"
    if agreement.at_least:
        words += "; certified accuracy is at least this, because the run stopped at other radii"
    if agreement.broken:
        some = ", ".join(map(str, agreement.broken[:8])) + (", ..." * (len(agreement.broken) > 8))
        words += (
            f"; {len(agreement.broken)} of {agreement.paired} images are certified there and yet "
            f"broken ({some}): check whether the attacked model averages fewer draws than were "
            "certified"
        )
    return words


def trust_words(model: Model) -> str:
    """Return in words whether a model's robust accuracy is reliable, and whether it is complete."""
    incomplete = f"incomplete: {model.incomplete}; " if model.incomplete else ""
    return incomplete + _trust_words(model)


def _trust_words(model: Model) -> str:
    if model.trusted is None:
        known = {c.name: c.finding for c in model.checks if "error" in c.numbers}
        lacking = [
            f"{name} ({known[name].removeprefix('not made: ')})" if name in known else name
            for name in model.unmade
        ]
        more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
        some = f"; not made of every run: {', '.join(lacking[:2])}{more}" if model.checks else ""
        return f"not checked for masking{some}"
    if not model.trusted:
        names = ", ".join(check.name for check in model.failed)
        reasons = [f"failed: {names}"] if names else []
        reasons += ["certified accuracy is above it"] * bool(model.inversions)
        return f"NOT RELIABLE, {'; '.join(reasons)}"
    passed = sum(check.passed is True for check in model.checks)
    missing = sum(check.passed is None and check.name in CHECKS for check in model.checks)
    more = f", {missing} could not be made" if missing else ""
    return f"{passed} checks for masking passed{more}"


def verdict_words(model: Model) -> str:
    """Return the verdict that stands beside every result."""
    if model.trusted is False:
        return "not reliable"
    if model.incomplete:
        return "incomplete"
    return "checks passed" if model.trusted else "not checked"


def brief_words(model: Model) -> str:
    """Return the verdict for a narrow column."""
    incomplete = [f"incomplete: {model.incomplete}"] * bool(model.incomplete)
    if model.trusted is None:
        return ", ".join(incomplete) or "not checked"
    counts = [
        f"{sum(check.passed is passed for check in model.checks)} {word}"
        for passed, word in ((True, "passed"), (False, "failed"), (None, "no verdict"))
        if any(check.passed is passed for check in model.checks)
    ]
    return ", ".join(incomplete + counts + ["certified above robust"] * bool(model.inversions))


def lower_bound_words(model: Model) -> str:
    """Return the notice on a model whose certify run stopped at some radii; empty for others."""
    if not model.asked:
        return ""
    radii = ", ".join(f"{radius:g}" for radius in model.asked)
    return (
        f"{model.name} was certified at radii {radii}; at others certified accuracy is a lower "
        "bound"
    )


def difference_words(entry: Difference) -> str:
    """Return in words how a model differs from the first on the same images."""
    return (
        f"{entry.second} against {entry.first}, {entry.ball}: {100 * entry.gain:+.1f} points on "
        f"{entry.images} images that both were attacked on ({entry.only_second} kept only by it, "
        f"{entry.only_first} only by the other; p = {entry.p_value:.2g})"
        + "  not reliable"
        * (entry.trusted is False)
    )


def percent(share: Share | None) -> str:
    """Return a share for a table."""
    return f"{100 * share.value:.1f}" if share else "-"


def interval(share: Share | None) -> str:
    """Return an interval for a table."""
    return f"{100 * share.low:.0f}-{100 * share.high:.0f}" if share else ""


def conflicts(models: Sequence[Model]) -> list[str]:
    """Return in words where results that stand beside each other do not compare like with like.

    Models are compared with the first: if all equal it, they equal each other.

    Example:
        >>> from art_denoised.evaluation.attack_rows import AttackRow
        >>> rows = [
        ...     AttackRow(i, 1, "pgd", "exact", "l2", 0.5, True, True, (True,), 0, 0, 0)
        ...     for i in range(2)
        ... ]
        >>> conflicts([Model("a", (rows[0],)), Model("b", (rows[1],))])
        ['a and b: other images were attacked (1 and 1, 0 in common) in l2 eps 0.5']
    """
    found = [words for model in models for words in _within(model)]
    attacked = [model for model in models if model.columns]
    for second in attacked[1:]:
        where: dict[str, list[str]] = {}
        for words, ball in _between(attacked[0], second):
            where.setdefault(words, []).extend([str(ball)] if ball else [])
        names = f"{attacked[0].name} and {second.name}"
        for words, balls in where.items():
            found.append(f"{names}: {words}" + (f" in {', '.join(balls)}" if balls else ""))
    return found


def _within(model: Model) -> Iterator[str]:
    for ball, attacks in model.columns.items():
        sizes = {name: set(rows) for name, rows in attacks.items()}
        common = set.intersection(*sizes.values())
        if any(indices != common for indices in sizes.values()):
            counts = ", ".join(f"{name} {len(indices)}" for (name, _), indices in sizes.items())
            yield (
                f"{model.name}: attacks in {ball} tried other images ({counts}); "
                f"'{ALL}' is over the {len(common)} in common"
            )
    if model.certified and model.unlike:
        yield f"{model.name}: {model.unlike}, so they are not compared"
    if model.certified and not model.same_images:
        yield f"{model.name}: attacks and certificates are of other data, so nothing is paired"


def _between(first: Model, second: Model) -> Iterator[tuple[str, Ball | None]]:
    data = [{str(s["data"]) for _, s in model.settings if "data" in s} for model in (first, second)]
    if all(data) and data[0] != data[1]:
        yield f"other data ({' and '.join('; '.join(sorted(names)) for names in data)})", None
    pixels = [
        {str(s["indices"]): s["pixels"] for _, s in model.settings if {"indices", "pixels"} <= {*s}}
        for model in (first, second)
    ]
    if any(pixels[1].get(choice, found) != found for choice, found in pixels[0].items()):
        yield "other pixels under the same indices", None
    for ball in sorted({*first.columns, *second.columns}):
        attacks = [model.columns.get(ball, {}) for model in (first, second)]
        if not all(attacks):
            yield f"only {(first if attacks[0] else second).name} was attacked", ball
            continue
        for name, mine, other in zip(
            (first.name, second.name), attacks, reversed(attacks), strict=True
        ):
            lone = [f"{attack} ({gradient})" for attack, gradient in sorted(set(mine) - set(other))]
            if lone:
                yield f"only {name} was attacked with {', '.join(lone)}", ball
        images = [set(model.survivals[ball]) for model in (first, second)]
        if images[0] != images[1]:
            common = len(images[0] & images[1])
            counts = f"{len(images[0])} and {len(images[1])}, {common} in common"
            yield f"other images were attacked ({counts})", ball
