"""The report as one HTML page that loads nothing and needs no script.

``templates/report.html`` holds the page and ``templates/report.css`` its style. The template
escapes every value; here are the values, among them how a model was measured, in words.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from art_denoised.checks.values import duration
from art_denoised.reports import tables
from art_denoised.reports.certified import is_lower_bound
from art_denoised.reports.pictures import STAGES, Strip, attacked_strips, channels_last
from art_denoised.reports.plots import appearance, page_figure
from art_denoised.reports.results import ALL, Model, model_differences, norms
from art_denoised.reports.terminal import escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTS = {  # with their headings
    "data": "data",
    "images": "images",
    "noise": "noise",
    "samples": "samples of an image",
    "alpha": "alpha",
    "attacks": "attacks",
    "seed": "seed",
    "begun": "date",
    "cost": "time and queries",
}
_OPTIONS = ("steps", "restarts", "eot")
_NOISE = ("gaussian", "quantised")  # earlier logs held the device here
_LARGEST = 128  # pixels of a picture's side


def page(models: Sequence[Model], notices: Sequence[str] = ()) -> str:
    """Return the page of one model or more, with remarks on the logs."""
    found = list(tables.measures(models))
    return (
        _environment()
        .get_template("report.html")
        .render(
            style=Markup(_source("report.css")),
            title=tables.title_words(models),
            summary=tables.summary_words(models),
            models=models,
            alarms=list(tables.shouts(models)),
            notices=[*tables.conflicts(models), *notices],
            chart=_chart(models),
            attacked=[one for one in found if not one.certified],
            certified=[one for one in found if one.certified],
            differences=model_differences(models),
            bounds=list(filter(None, map(tables.lower_bound_words, models))),
            **_facts(models),
        )
    )


@dataclass(frozen=True)
class Chart:
    """The accuracy of all models, for wide and for narrow pages; the words say what it shows."""

    words: str
    wide: Markup
    narrow: Markup


def _chart(models: Sequence[Model]) -> Chart | None:
    if not (shown := norms(models)):
        return None
    kinds = ["robust accuracy against eps (points with bars)"] * any(m.columns for m in models)
    kinds += ["certified accuracy against radius (steps)"] * any(m.certified for m in models)
    words = f"{' and '.join(kinds)}, in {' and '.join(shown)}"
    drawn = (
        svg(page_figure(models, shown, wide=wide), name, f"Chart of {words}; in tables below")
        for name, wide in (("wide", True), ("narrow", False))
    )
    return Chart(words[0].upper() + words[1:], *drawn)


def _facts(models: Sequence[Model]) -> dict[str, Any]:
    """Return how the models were measured: what they have in common, and where they differ."""
    found = [facts(model) for model in models]
    known = [name for name in FACTS if any(one[name] for one in found) or name == "begun"]
    common = {name: found[0][name] for name in known if len({one[name] for one in found}) == 1}
    return {
        "common": {FACTS[name]: value or "not recorded" for name, value in common.items()},
        "differing": [name for name in known if name not in common],
        "facts": found,
    }


def _stages(strips: Sequence[Strip]) -> list[str]:
    """Return the stages that some picture shows."""
    return [stage for stage in STAGES if any(stage in strip.pictures for strip in strips)]


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


@dataclass(frozen=True)
class Picture:
    """An image for the page, with its size in pixels."""

    source: str  # a "data:" address that carries the pixels
    width: int
    height: int

    @classmethod
    def of(cls, pixels: np.ndarray) -> Picture:
        """Return the picture of bytes (channels, height, width); large ones are averaged down."""
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(channels_last(pixels)))
        image = image.reduce(-(-max(image.size) // _LARGEST))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        return cls(f"data:image/png;base64,{encoded}", *image.size)


def svg(figure: Figure, name: str, description: str) -> Markup:
    """Return a figure, whose text is ours, as an inline drawing that says what it shows.

    The name, of letters and digits, makes its identifiers unique on the page.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    view = re.search(r'viewBox="[\d. ]+"', text)
    assert view is not None  # matplotlib writes one
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(?:xlink:)?href="#', 'href="#', text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    head = Markup('<svg role="img" aria-label="{}" ').format(description) + Markup(view[0] + ">")
    return head + Markup(text[text.index(">") + 1 :].strip())


def _shown(value: Any) -> Any:
    """Return a value as the template shows it: control characters become escapes, None nothing."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else escaped(str(value))


def _parted(value: str) -> Markup:
    """Return names such as pgd:steps=10 so that a narrow column breaks them between their parts."""
    return Markup(":<wbr>").join(escaped(value).split(":"))


def _source(name: str) -> str:
    return files("art_denoised.reports").joinpath("templates", name).read_text(encoding="utf-8")


@cache
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
        "agreement": tables.agreement_words,
        "flat": _flat,
        "interval": tables.interval,
        "parted": _parted,
        "percent": tables.percent,
        "heading": FACTS.__getitem__,
        "picture": Picture.of,
        "stages": _stages,
        "strips": attacked_strips,
        "trust": tables.trust_words,
        "verdict": tables.verdict_words,
    }
    environment.globals |= {
        "ALL": ALL,
        "SHARES": tables.SHARES,
        "is_lower_bound": is_lower_bound,
        "STAGES": STAGES,
        "appearance": appearance,
    }
    return environment


def facts(model: Model) -> dict[str, str]:
    """Return how a model was measured, by the names of ``FACTS``; empty: its logs do not tell."""
    logs = [settings for _, settings in model.settings]
    attacks = [settings for settings in logs if "attacks" in settings]
    certificates = [settings for settings in logs if "attacks" not in settings]
    return {
        "data": _joined(logs, "data", "transform"),
        "images": _images(model),
        "noise": "; ".join(filter(None, (_noise(certificates), _evaluations(attacks)))),
        "samples": _samples(certificates),
        "alpha": _joined(certificates, "alpha"),
        "attacks": "; ".join(_attacks(attacks)),
        "seed": _joined(logs, "seed"),
        "begun": ", ".join(dict.fromkeys(time[:10] for time in model.begun)),
        "cost": "; ".join(_cost(model)),
    }


def _images(model: Model) -> str:
    attacked = len({row.index for row in model.rows})
    certified = len(model.certified)
    parts = [f"{attacked:,} attacked"] * bool(attacked)
    return ", ".join(parts + [f"{certified:,} certified"] * bool(certified))


def _noise(certificates: Sequence[Mapping[str, Any]]) -> str:
    sigma, kind = _each(certificates, "sigma", "noise")
    return f"sigma {sigma}" + f", {kind}" * (kind in _NOISE) if sigma else ""


def _evaluations(attacks: Sequence[Mapping[str, Any]]) -> str:
    """Return how attacked images were evaluated."""
    sigmas = [s["smoothed"] for s in attacks if isinstance(s.get("smoothed"), Mapping)]
    sigma, kind, repeats = _joined(sigmas, "sigma"), *_each(attacks, "noise", "repeats")
    if kind in ("", "none"):
        return "attacked without noise" if kind else ""
    words = f"attacked with {kind} noise" + f" of sigma {sigma}" * bool(sigma)
    return words + f", {repeats} evaluations" * (repeats not in ("", "1"))


def _samples(certificates: Sequence[Mapping[str, Any]]) -> str:
    n, n0, radii = _each(certificates, "n", "n0", "radii")
    if not n:
        return ""
    words = f"at most {n}" * bool(radii) or n
    words += f", {n0} more to select the class" * (n0 != "")
    return words + f", until radii {radii.strip('[]')} are decided" * bool(radii)


def _attacks(logs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each attack with those of its options that say how strong it is."""
    seen: dict[str, str] = {}
    for one in (one for settings in logs for one in settings["attacks"] or ()):
        name = str(one.get("name"))
        options = [f"{key} {one[key]}" for key in _OPTIONS if one.get(key) not in (None, "", 1)]
        known = ":" in name or not options  # a name of the command line holds its options
        seen.setdefault(name, name if known else f"{name} ({', '.join(options)})")
    yield from seen.values()


def _cost(model: Model) -> Iterator[str]:
    """Yield the time and the forward passes of attacks, and of certificates."""
    samples = sum(row.n0 + row.drawn for row in model.certified)
    asked = sum(row.queries for row in model.rows)
    attacked, certified = ("attacks", model.rows, asked), ("certify", model.certified, samples)
    for what, rows, queries in (attacked, certified):
        if rows:
            count = f", {queries:,.0f} forward passes" if queries else ""
            yield f"{what}: {duration(sum(row.seconds for row in rows))}{count}"


def _joined(logs: Sequence[Mapping[str, Any]], *names: str) -> str:
    """Return the different values of some settings in words."""
    values = [log[name] for log in logs for name in names if log.get(name) is not None]
    return ", ".join(dict.fromkeys(_value(value) for value in values))


def _each(logs: Sequence[Mapping[str, Any]], *names: str) -> list[str]:
    return [_joined(logs, name) for name in names]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
