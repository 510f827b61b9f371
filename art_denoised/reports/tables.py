"""A report in words and as blocks for the terminal: one model after another, or side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from art_denoised.evaluation.attack_rows import CHECKS
from art_denoised.reports.certified import (
    LOWER_BOUND,
    certified_table,
    default_radii,
    images_apart,
    is_lower_bound,
    other_images,
)
from art_denoised.reports.results import (
    ALL,
    Agreement,
    Ball,
    Difference,
    Model,
    Share,
    model_differences,
)
from art_denoised.reports.terminal import Block, Cell, Column, Lines, Table

SHARES = ("clean", "counted", "fresh", "majority", "worst")
_INCOMPLETE = "? "  # before each share of an attack run that was interrupted
_INTERVALS = "Accuracy in percent, below it the 95% interval over images."
_COUNTED = f"{_INTERVALS} counted: by the attack itself;"
_ON_FRESH_NOISE = (
    _COUNTED,
    "fresh: on fresh noise, averaged; majority: right in more than half of these evaluations; "
    "worst: in",
    "every evaluation. Quote `fresh` of all attacks.",
)
_ONCE_MORE = (
    _COUNTED,
    "fresh, majority: in one more evaluation, because noise was fixed or there is none; worst: in",
    "both. Quote `fresh` of all attacks.",
)


def report_blocks(models: Sequence[Model], notices: Sequence[str] = ()) -> list[Block]:
    """Return the report with one table for each model and ball."""
    width = max((len(r.attack) for model in models for r in model.results), default=0)
    blocks: list[Block] = [_alarm(models)]
    for model in models:
        blocks += _model_blocks(model, width)
    blocks.append(_notices(models, notices))
    if results := [result for model in models for result in model.results]:
        drawn = any(result.draws > 1 for result in results)
        blocks.append(Lines(_ON_FRESH_NOISE if drawn else _ONCE_MORE))
    return _filled(blocks)


def comparison_blocks(models: Sequence[Model], notices: Sequence[str] = ()) -> list[Block]:
    """Return the report with one column for each model: accuracy on fresh noise, all attacks."""
    verdicts = [
        _mark(model) + verdict_words(model) if model.columns or model.incomplete else ""
        for model in models
    ]
    names = tuple(Column(model.name, width=16) for model in models)
    found = list(measures(models))
    note = (LOWER_BOUND,) if any(">=" in measure.marks for measure in found) else ()
    rows = ((measure.name, *measure.cells) for measure in found)
    table = Table((Column("", left=True), *names), (*rows, ("", *verdicts)), note=note)
    changes = Lines(tuple(map(difference_words, model_differences(models))))
    return _filled([_alarm(models), table, changes, _notices(models, notices)])


def certified_radii(models: Sequence[Model]) -> list[float]:
    """Return the radii at which certified accuracy of these models is shown."""
    logs = [model.certify_log for model in models if model.certified]
    return default_radii(logs) if logs else []


def _alarm(models: Sequence[Model]) -> Lines:
    return Lines(tuple(shouts(models)), style="bold red")


def _notices(models: Sequence[Model], notices: Sequence[str]) -> Lines:
    return Lines(tuple(f"notice: {words}" for words in [*conflicts(models), *notices]))


def _model_blocks(model: Model, width: int) -> Iterator[Block]:
    words = trust_words(model) if model.columns or model.incomplete else "no attack was made"
    yield Lines((f"{model.name}: {words}",), style="bold")
    for ball in model.columns:
        yield _ball_table(model, ball, width)
    if model.certified:
        yield replace(certified_table({model.name: model.certify_log}).block(), note=())
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


@dataclass(frozen=True)
class Measure:
    """One quantity of several models, such as "l2 eps 0.5"."""

    name: str
    shares: tuple[Share | None, ...]  # of each model; None where it was not measured
    marks: tuple[str, ...]  # before each share, see `_mark`; ">=" if a lower bound
    certified: bool = False

    @property
    def known(self) -> dict[int, Share]:
        """The share of each model in which it was measured."""
        return {i: share for i, share in enumerate(self.shares) if share is not None}

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The shares with their intervals, as cells of a table."""
        return tuple(map(_share_cell, self.shares, self.marks))


def measures(models: Sequence[Model]) -> Iterator[Measure]:
    """Yield clean accuracy, robust accuracy in each ball and certified accuracy at each radius."""
    if any(model.clean for model in models):
        marks = tuple(_INCOMPLETE * bool(model.incomplete) for model in models)
        yield Measure("clean", tuple(model.clean for model in models), marks)
    for ball in sorted({ball for model in models for ball in model.columns}):
        found = ({r.ball: r.fresh for r in model.headlines}.get(ball) for model in models)
        yield Measure(str(ball), tuple(found), tuple(map(_mark, models)))
    for radius in certified_radii(models):
        shares = tuple(model.certified_share(radius) for model in models)
        marks = tuple(">=" * is_lower_bound(radius, model.asked) for model in models)
        yield Measure(f"certified, l2 r={radius:g}", shares, marks, certified=True)


def model_table(models: Sequence[Model]) -> Table:
    """Return one row for each model, with balls and radii as columns."""
    found = list(measures(models))
    columns = (Column("model", left=True), *(Column(measure.name) for measure in found))
    cells = zip(*(measure.cells for measure in found), strict=True)
    rows = tuple((model.name, *row) for model, row in zip(models, cells, strict=True))
    marks = {mark for measure in found for mark in measure.marks}
    note = [_INTERVALS]
    note += ["!: not reliable, because a check failed."] * ("! " in marks)
    note += ["?: incomplete, because the run was interrupted."] * (_INCOMPLETE in marks)
    note += [LOWER_BOUND] * (">=" in marks)
    return Table(columns, rows, "accuracy (%) of each model", tuple(note))


def _mark(model: Model) -> str:
    return "! " if model.trusted is False else _INCOMPLETE * bool(model.incomplete)


def _share_cell(share: Share | None, mark: str = "") -> Cell:
    return (mark + percent(share), interval(share)) if share else "-"


def _filled(blocks: Sequence[Block]) -> list[Block]:
    return [block for block in blocks if isinstance(block, Table) or block.lines]


def title_words(models: Sequence[Model]) -> str:
    """Return the title of a report: what was measured, and of which models."""
    kinds = ["robust"] * any(model.rows for model in models)
    kinds += ["certified"] * any(model.certified for model in models)
    what = " and ".join(kinds) or "certified"
    return f"{what.capitalize()} accuracy of {_names([model.name for model in models])}"


def summary_words(models: Sequence[Model]) -> str:
    """Return the results in one sentence about attacks, and one about certificates.

    Each is about the middle eps or radius of those at which most models have a result.
    """
    found = [measure for measure in measures(models) if measure.name != "clean"]
    attacked = [measure for measure in found if not measure.certified]
    certified = [measure for measure in found if measure.certified]
    sentences = []
    if attacked:
        left = _sentence(models, attacked, "stays right on")
        sentences.append(f"{left} under all attacks; {_reliability(models)}.")
    if certified:
        sentences.append(_sentence(models, certified, "is proved right on") + ".")
    return " ".join(sentences) or "No image was attacked or certified."


def _sentence(models: Sequence[Model], found: Sequence[Measure], verb: str) -> str:
    most = max(len(measure.known) for measure in found)
    widest = [measure for measure in found if len(measure.known) == most]
    measure = widest[len(widest) // 2]
    where = measure.name.removeprefix("certified, ").replace("r=", "radius ")
    best = sorted(measure.known, key=lambda i: -measure.known[i].value)
    each = [
        f"{models[i].name} {'on' if i != best[0] else verb} "
        f"{'at least ' * (measure.marks[i] == '>=')}{percent(measure.known[i])}% "
        f"({'95% interval ' * (i == best[0])}{interval(measure.known[i])})"
        for i in best
    ]
    shown = each if len(each) <= 3 else [each[0], f"{len(each) - 2} others on less", each[-1]]
    return f"At {where}, {_listed(shown)} of images"


def _reliability(models: Sequence[Model]) -> str:
    """Return in words which results under attack are reliable."""
    attacked = [model for model in models if model.columns]
    wanted: tuple[tuple[bool | None, str], ...] = (
        (False, "the result of {} is not reliable"),
        (None, "{} not checked for masked gradients"),
    )
    for trusted, words in wanted:
        if names := [model.name for model in attacked if model.trusted is trusted]:
            verb = "" if trusted is False else " was" if len(names) == 1 else " were"
            return words.format(_names(names) + verb)
    return "the checks for masked gradients passed"


def _names(names: Sequence[str]) -> str:
    return _listed(names) if len(names) <= 3 else f"{len(names)} models"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


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
    missing = [
        check.name for check in model.checks if check.passed is None and check.name in CHECKS
    ]
    more = f", without a verdict: {', '.join(missing)}" if missing else ""
    return f"{passed} checks for masking passed{more}"


def verdict_words(model: Model) -> str:
    """Return the verdict that stands beside every result."""
    if model.trusted is False:
        return "not reliable"
    if model.incomplete:
        return "incomplete"
    return "checks passed" if model.trusted else "not checked"


def lower_bound_words(model: Model) -> str:
    """Return the notice on a model whose certify run stopped at some radii; empty for others."""
    if not model.asked:
        return ""
    radii = ", ".join(f"{radius:g}" for radius in model.asked)
    return (
        f"{model.name} was certified at radii {radii}; at others certified accuracy is a lower "
        "bound (≥)"
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
    """Return in words where results that stand beside each other do not compare like with like."""
    found = [words for model in models for words in _within(model)]
    for later, second in enumerate(models):
        told = [(first, _other_images(first, second)) for first in models[:later]]
        found += [f"{first.name} and {second.name}: {words}" for first, words in told if words][:1]
    # Attacks are compared with the first: if all equal it, they equal each other.
    attacked = [model for model in models if model.columns]
    for second in attacked[1:]:
        where: dict[str, list[str]] = {}
        for words, ball in _between(attacked[0], second):
            where.setdefault(words, []).append(str(ball))
        names = f"{attacked[0].name} and {second.name}"
        found += [f"{names}: {words} in {', '.join(balls)}" for words, balls in where.items()]
    logs = {model.name: model.certify_log for model in models if model.certified}
    return found + images_apart(logs) if logs else found


def _other_images(first: Model, second: Model) -> str:
    return other_images(*([log for _, log in model.settings] for model in (first, second)))


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
    if model.certified and not model.same_images:
        yield f"{model.name}: attacks and certificates are of other data, so nothing is paired"


def _between(first: Model, second: Model) -> Iterator[tuple[str, Ball]]:
    """Yield what differs between attacks on two models, and in which ball."""
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
