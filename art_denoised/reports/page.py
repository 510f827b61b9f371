"""The report as one HTML page that loads nothing and needs no script.

``templates/report.html`` holds the page and ``templates/report.css`` its style. The template
escapes every value; here are the values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from art_denoised.reports import words
from art_denoised.reports.certified import is_lower_bound
from art_denoised.reports.compare import conflicts, differences
from art_denoised.reports.pictures import picture_rows, svg
from art_denoised.reports.plots import look, robust_figure
from art_denoised.reports.results import ALL, Model, eps_name
from art_denoised.reports.tables import certified_radii
from art_denoised.reports.terminal import escaped

_GLOSSARY = {
    "clean": "accuracy on the same images without attack, on fresh noise",
    "counted": "robust accuracy by the attack's own count, which includes its luck with noise",
    "fresh": "robust accuracy on fresh noise, averaged over evaluations. The result to quote",
    "worst": "robust accuracy if an image counts only when it is right in every evaluation, "
    "including the attack's own",
    ALL: "each image counts by the attack that harms it most",
    "95% interval": "Clopper and Pearson's, over images drawn like these",
    "certified": "share of images with the right label and a proved l2 radius at least this large",
    "not reliable": "a check found that the attacks were hindered by something else than "
    "robustness: robust accuracy may be far lower",
}


def page(models: Sequence[Model], notices: Sequence[str] = ()) -> str:
    """Return the page of one model or more, with remarks on the logs."""
    return (
        _environment()
        .get_template("report.html")
        .render(
            style=Markup(_source("report.css")),
            models=models,
            images=sorted({result.images for model in models for result in model.headlines}),
            alarms=list(words.shouts(models)),
            notices=[*conflicts(models), *notices],
            differences=differences(models),
            drawings=list(_drawings(models)),
            radii=(radii := certified_radii(models)),
            bounds=list(filter(None, map(words.lower_bound_words, models))),
            radius_heads=[f"r = {radius:g}" for radius in radii],
            glossary=_GLOSSARY,
        )
    )


@dataclass(frozen=True)
class Drawing:
    """The accuracy of all models in one norm."""

    norm: str
    certified: bool  # whether certified accuracy is in it
    words: str  # what it shows
    svg: Markup
    seen: tuple[int, ...]  # numbers of the models in it


def _drawings(models: Sequence[Model]) -> Iterator[Drawing]:
    norms = {ball.norm for model in models for ball in model.columns}
    any_certified = any(model.certified for model in models)
    for i, norm in enumerate(sorted(norms | {"l2"} if any_certified else norms)):
        certified = norm == "l2" and any_certified
        kinds = ["robust accuracy against eps (points, bars)"] * (norm in norms)
        kinds += ["certified accuracy against radius (dashed steps, bands)"] * certified
        shown = " and ".join(kinds)
        drawn = svg(robust_figure(models, norm), f"figure{i}", f"{norm}: {shown}; in tables below")
        seen = tuple(
            j
            for j, model in enumerate(models)
            if any(ball.norm == norm for ball in model.columns) or (certified and model.certified)
        )
        yield Drawing(norm, certified, shown[0].upper() + shown[1:], drawn, seen)


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if name == "attacks" and isinstance(value, list) and not before:
            yield from ((f"attack {i}", _words(one)) for i, one in enumerate(value, start=1))
        elif isinstance(value, Mapping) and value and not before:
            yield from _flat(value, f"{name}: ")
        else:
            yield f"{before}{name}", _words(value)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> Any:
    """Return a value as the template shows it: control characters become escapes, None nothing."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else escaped(str(value))


def _source(name: str) -> str:
    return files("art_denoised.reports").joinpath("templates", name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "agreement": words.agreement_words,
        "brief": words.brief_words,
        "eps": eps_name,
        "flat": _flat,
        "interval": words.interval,
        "percent": words.percent,
        "pictures": picture_rows,
        "trust": words.trust_words,
        "verdict": words.verdict_words,
    }
    environment.globals |= {
        "ALL": ALL,
        "SHARES": words.SHARES,
        "is_lower_bound": is_lower_bound,
        "look": look,
    }
    return environment
