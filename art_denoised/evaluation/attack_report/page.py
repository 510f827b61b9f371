"""The report on attacked models as one HTML page that loads nothing and needs no script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from art_denoised.evaluation.attack_report.compare import conflicts, differences
from art_denoised.evaluation.attack_report.curves import look, robust_figure
from art_denoised.evaluation.attack_report.html import Markup, document, render, svg, table, tag
from art_denoised.evaluation.attack_report.model import ALL, Figure, Model, ball_name
from art_denoised.evaluation.attack_report.pictures import pictures
from art_denoised.evaluation.attack_report.style import STYLE
from art_denoised.evaluation.attack_report.survival import Share
from art_denoised.evaluation.attack_report.text import (
    SHARES,
    agreement_words,
    brief_words,
    certified_share,
    interval,
    percent,
    shouts,
    trust_words,
)
from art_denoised.evaluation.report import default_radii

_GLOSSARY = {
    "clean": "accuracy on the same images unattacked, on fresh noise",
    "counted": "robust accuracy as the attack itself counted it: its luck with noise included",
    "fresh": "robust accuracy on fresh noise, averaged over evaluations. The figure to quote",
    "worst": "an image counts only if it is right in every evaluation, the attack's own included",
    ALL: "an image counts by the attack that harms it most",
    "95% interval": "Clopper and Pearson's, over images drawn like these",
    "certified": "share of images with the right label and an l2 radius proved at least this large",
    "not to be trusted": "a check found that the attacks were hindered rather than withstood: "
    "robust accuracy may be far lower",
}


def page(models: Sequence[Model], notices: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        models: At least one.
        notices: What the user should know of the logs.

    Example:
        >>> from art_denoised.evaluation.attack_rows import AttackRow
        >>> row = AttackRow(0, 1, "pgd", "exact", "l2", 0.5, True, True, (True,), 0, 0, 0.1)
        >>> "<h1>Robustness report</h1>" in page([Model("ours", (row,))])
        True
    """
    body = [
        tag("header", tag("h1", "Robustness report"), tag("p", _opening(models), class_="lead")),
        tag("main", _warnings(models, notices), _short(models), _curves(models), _details(models)),
    ]
    return document("Robustness report", STYLE, body)


def _opening(models: Sequence[Model]) -> str:
    images = {figure.images for model in models for figure in model.headlines}
    count = f"{len(models)} models" if len(models) > 1 else models[0].name
    over = f", over {' or '.join(f'{n:,}' for n in sorted(images))} images" if images else ""
    return f"What attacks left of {count}{over}. Images have pixels in [0, 1]; so has eps."


def _warnings(models: Sequence[Model], notices: Sequence[str]) -> Iterator[Markup]:
    loud = list(shouts(models))
    if loud:
        title = tag("h2", "Read this first")
        yield tag("section", title, _list(loud), class_="alarm", role="alert")
    quiet = [*conflicts(models), *notices]
    if quiet:
        yield tag("section", tag("h2", "Notices"), _list(quiet), class_="notice")


def _short(models: Sequence[Model]) -> Markup:
    rows = []
    for i, model in enumerate(models):
        name = [_swatch(i), model.name]
        for figure in model.headlines:
            shares = [_cell(figure.clean), [_cell(figure.fresh), _flag(model)]]
            rows.append([name, ball_name(figure.ball), *shares, brief_words(model)])
        if not model.headlines:
            rows.append([name, "-", _cell(model.clean), "-", "no attack was made"])
    heads = ["model", "attacked in", "clean", "robust, all attacks", "checks"]
    caption = "Accuracy in percent with 95% intervals; robust: on fresh noise, all attacks together"
    return _section("In short", table(heads, rows, caption), _differences(models))


def _differences(models: Sequence[Model]) -> Markup | None:
    rows = [
        [
            f"{entry.second} - {entry.first}",
            ball_name(entry.ball),
            [f"{100 * entry.gain:+.1f}", _distrust(entry.trusted)],
            str(entry.images),
            str(entry.only_second),
            str(entry.only_first),
            f"{entry.p_value:.2g}",
        ]
        for entry in differences(models)
    ]
    if not rows:
        return None
    heads = ["difference", "attacked in", "points", "images", "gained", "lost", "p"]
    caption = (
        "Images kept under all attacks, in at least half of the evaluations, less those that the "
        "first model keeps, of images both were attacked on; p: exact sign test"
    )
    return table(heads, rows, caption)


def _curves(models: Sequence[Model]) -> Iterator[Markup]:
    norms = sorted({ball.norm for model in models for ball in model.columns})
    if any(model.certified for model in models) and "l2" not in norms:
        norms.append("l2")
    for i, norm in enumerate(norms):
        seen = [
            (j, model)
            for j, model in enumerate(models)
            if any(ball.norm == norm for ball in model.columns)
            or (norm == "l2" and model.certified)
        ]
        legend = [tag("li", _swatch(j), model.name, _flag(model)) for j, model in seen]
        certified = norm == "l2" and any(model.certified for model in models)
        attacked = any(ball.norm == norm for model in models for ball in model.columns)
        kinds = ["robust accuracy against eps (points, bars)"] * attacked
        kinds += ["certified accuracy against radius (dashed steps, bands)"] * certified
        words = " and ".join(kinds)
        drawn = svg(robust_figure(models, norm), f"figure{i}", f"{norm}: {words}; in tables below")
        note = tag("figcaption", f"{words[0].upper()}{words[1:]}; 95% intervals.")
        parts: list[Any] = [tag("ul", legend, class_="legend"), tag("figure", drawn, note)]
        if certified:
            parts += _certified(models)
        yield _section(f"Accuracy in {norm}", *parts)


def _certified(models: Sequence[Model]) -> Iterator[Markup]:
    radii = default_radii([row for model in models for row in model.certified])
    rows = [
        [
            [_swatch(i), model.name],
            str(len(model.certified)),
            *(_cell(certified_share(model, radius)) for radius in radii),
        ]
        for i, model in enumerate(models)
        if model.certified
    ]
    heads = ["model", "images", *(f"r = {radius:g}" for radius in radii)]
    yield table(heads, rows, "Certified accuracy at l2 radius r, in percent")
    rows = [
        [
            model.name,
            f"{entry.radius:g}",
            _cell(entry.certified),
            [_cell(entry.empirical), _flag(model)],
            str(entry.paired or "none"),
            [
                tag("strong", "INVERTED: ", class_="bad") if entry.inverted else None,
                agreement_words(entry),
            ],
        ]
        for model in models
        for entry in model.agreements
    ]
    if rows:
        heads = ["model", "radius = eps", "certified", "robust", "paired images", "finding"]
        yield table(heads, rows, "Certified accuracy must not exceed robust accuracy")


def _details(models: Sequence[Model]) -> Iterator[Markup]:
    for i, model in enumerate(models):
        parts: list[Any] = []
        for ball in model.columns:
            figures = [figure for figure in model.figures if figure.ball == ball]
            rows = [_figure_row(model, figure) for figure in figures]
            heads = ["attack", "gradient", "images", *SHARES, "s / image", "verdict"]
            parts.append(table(heads, rows, f"{ball_name(ball)}: accuracy in percent", "figures"))
        if model.columns:
            parts.append(_checks(model))
        parts += [pictures(model), *_settings(model)]
        yield tag("section", tag("h2", _swatch(i), model.name), parts)
    terms = [(tag("dt", term), tag("dd", f"{words}.")) for term, words in _GLOSSARY.items()]
    yield _section("What the figures mean", tag("dl", terms))


def _figure_row(model: Model, figure: Figure) -> list[Any]:
    name = tag("strong", figure.attack) if figure.attack == ALL else figure.attack
    shares = [_cell(getattr(figure, share)) for share in SHARES]
    verdict = _flag(model) or ("not checked" if model.trusted is None else "checks passed")
    cost = f"{figure.seconds:.2g}"
    return [name, figure.gradient or "any", str(figure.images), *shares, cost, verdict]


def _checks(model: Model) -> Markup:
    words = {
        True: tag("span", "passed", class_="good"),
        False: tag("strong", "failed", class_="bad"),
        None: "no verdict",
    }
    rows = [[check.name, words[check.passed], check.finding] for check in model.checks]
    verdict = tag("p", trust_words(model), class_="bad" if model.trusted is False else None)
    caption = "Were the attacks hindered by something else than robustness?"
    listed = table(["check", "verdict", "finding"], rows, caption) if rows else None
    return render([verdict, listed])


def _settings(model: Model) -> Iterator[Markup]:
    for path, settings in model.settings:
        rows = [[name, tag("code", _words(value))] for name, value in _flat(settings)]
        if rows:
            listed = table(["setting", "value"], rows, path, "settings")
            yield tag("details", tag("summary", f"Settings and versions of {path}"), listed)


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name == "attacks" and isinstance(value, list) and not before:
            yield from ((f"attack {i}", one) for i, one in enumerate(value, start=1))
        elif isinstance(value, Mapping) and value and not before:
            yield from _flat(value, f"{name}: ")
        else:
            yield f"{before}{name}", value


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _cell(share: Share | None) -> list[Any]:
    limits = tag("small", f" {interval(share)}") if share else None
    return [tag("span", percent(share), class_="value"), limits]


def _flag(model: Model) -> Markup | None:
    return _distrust(model.trusted) if model.columns else None


def _distrust(trusted: bool | None) -> Markup | None:
    return tag("strong", " not to be trusted", class_="bad") if trusted is False else None


def _swatch(i: int) -> Markup:
    colour, marker = look(i)
    shapes = {
        "o": '<circle cx="8" cy="6" r="4"/>',
        "s": '<rect x="4" y="2" width="8" height="8"/>',
        "^": '<path d="M8 1 12.5 10H3.5Z"/>',
        "v": '<path d="M8 11 12.5 2H3.5Z"/>',
        "D": '<path d="M8 1 13 6 8 11 3 6Z"/>',
    }
    return Markup(
        f'<svg class="swatch" aria-hidden="true" width="16" height="12" fill="{colour}">'
        f"{shapes[marker]}</svg>"
    )


def _list(lines: Sequence[str]) -> Markup:
    return tag("ul", [tag("li", line) for line in lines])


def _section(title: str, *content: Any) -> Markup:
    return tag("section", tag("h2", title), content)
