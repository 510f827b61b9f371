"""The report as one HTML page that loads nothing and needs no script.

``templates/report.html`` holds the page and ``templates/report.css`` its style. The template
escapes every value; here are the values.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec
import numpy as np
from markupsafe import Markup

from art_denoised.evaluation.attack_rows import AttackRow
from art_denoised.reports import tables
from art_denoised.reports.certified import is_lower_bound
from art_denoised.reports.plots import look, robust_figure
from art_denoised.reports.results import ALL, Model, differences, eps_name
from art_denoised.reports.terminal import escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST = 128  # pixels of a picture's side


def page(models: Sequence[Model], notices: Sequence[str] = ()) -> str:
    """Return the page of one model or more, with remarks on the logs."""
    return (
        _environment()
        .get_template("report.html")
        .render(
            style=Markup(_source("report.css")),
            models=models,
            images=sorted({result.images for model in models for result in model.headlines}),
            alarms=list(tables.shouts(models)),
            notices=[*tables.conflicts(models), *notices],
            differences=differences(models),
            drawings=list(_drawings(models)),
            radii=(radii := tables.certified_radii(models)),
            bounds=list(filter(None, map(tables.lower_bound_words, models))),
            radius_heads=[f"r = {radius:g}" for radius in radii],
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


@dataclass(frozen=True)
class Picture:
    """An image for the page, with its size in pixels."""

    source: str  # a "data:" address that carries the pixels
    width: int
    height: int

    @classmethod
    def of(cls, pixels: np.ndarray) -> Picture:
        """Return the picture of bytes (channels, height, width).

        The first three channels are shown, or the first. Large images are averaged down.
        """
        from PIL import Image

        shown = pixels[:3].transpose(1, 2, 0) if len(pixels) >= 3 else pixels[0]
        image = Image.fromarray(np.ascontiguousarray(shown))
        image = image.reduce(-(-max(image.size) // _LARGEST))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        return cls(f"data:image/png;base64,{encoded}", *image.size)


@dataclass(frozen=True)
class PictureRow:
    """One attacked image beside what it was made of."""

    image: str
    attack: str
    outcome: str
    pictures: Mapping[str, Picture]  # by stage, those that the run kept

    @property
    def denoised(self) -> bool:
        """Whether the run kept a denoised picture."""
        return any("denoised" in stage for stage in self.pictures)


def picture_rows(model: Model, most: int = 10) -> list[PictureRow]:
    """Return the first attacked images that a run kept pictures of, ``most`` at most."""
    kept = {row.key: row.array for row in model.pictures}
    alone = {(row.index, row.stage): row.array for row in model.pictures}
    results = {(row.index, *row.column): row for row in model.rows}
    attacked = [row for row in model.pictures if row.stage == "attacked"]
    found = []
    for row in attacked[:most]:
        result = results.get((row.index, row.attack, row.gradient, row.eps))
        before = alone.get((row.index, "clean"))
        denoised = msgspec.structs.replace(row, stage="attacked and denoised")
        stages = {
            "before": before,
            "denoised": alone.get((row.index, "denoised")),
            "attacked": row.array,
            "attacked, denoised": kept.get(denoised.key),
            "change": _change(before, row.array),
        }
        found.append(
            PictureRow(
                f"image {row.index}" + (f", class {result.label}" if result else ""),
                f"{row.attack} {row.gradient} eps {eps_name(row.eps)}",
                _outcome(result),
                {name: Picture.of(one) for name, one in stages.items() if one is not None},
            )
        )
    return found


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


def _change(before: np.ndarray | None, after: np.ndarray) -> np.ndarray | None:
    if before is None or before.shape != after.shape:
        return None
    change = after.astype(int) - before
    stretched = 127.5 + 127.5 * change / max(abs(change).max(), 1)
    return np.rint(stretched).astype(np.uint8)


def _outcome(row: AttackRow | None) -> str:
    if row is None:
        return ""
    if not row.clean:
        return "wrong before, not attacked"
    return f"right in {sum(row.fresh)} of {len(row.fresh)}"


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
        "agreement": tables.agreement_words,
        "brief": tables.brief_words,
        "flat": _flat,
        "interval": tables.interval,
        "percent": tables.percent,
        "pictures": picture_rows,
        "trust": tables.trust_words,
        "verdict": tables.verdict_words,
    }
    environment.globals |= {
        "ALL": ALL,
        "SHARES": tables.SHARES,
        "is_lower_bound": is_lower_bound,
        "look": look,
    }
    return environment
