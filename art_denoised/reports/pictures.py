"""Pictures of the page: images before and after attack, and drawings, each inline."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from art_denoised.evaluation.attack_rows import AttackRow, ImageRow
from art_denoised.reports.results import Model, eps_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST = 128  # pixels of a picture's side


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
    kept = {
        (row.index, row.attack, row.gradient, row.eps, row.stage): row for row in model.pictures
    }
    alone = {(row.index, row.stage): row for row in model.pictures}
    results = {(row.index, *row.column): row for row in model.rows}
    attacked = [row for row in model.pictures if row.stage == "attacked"]
    found = []
    for row in attacked[:most]:
        column = (row.index, row.attack, row.gradient, row.eps)
        result, before = results.get(column), alone.get((row.index, "clean"))
        stages = {
            "before": _array(before),
            "denoised": _array(alone.get((row.index, "denoised"))),
            "attacked": row.array,
            "attacked, denoised": _array(kept.get((*column, "attacked and denoised"))),
            "change": _change(before, row),
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
    """Return a figure of matplotlib as an inline drawing that says what it shows.

    Args:
        figure: Figure whose text is ours. Names from logs belong into the page around it.
        name: Short name of letters and digits that makes identifiers unique on the page.
        description: Text for those who do not see the drawing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> svg(Figure(figsize=(1, 1)), "f1", "nothing")[:42]
        Markup('<svg role="img" aria-label="nothing" viewB')
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


def _array(row: ImageRow | None) -> np.ndarray | None:
    return None if row is None else row.array


def _change(before: ImageRow | None, after: ImageRow) -> np.ndarray | None:
    if before is None or before.shape != after.shape:
        return None
    change = after.array.astype(int) - before.array
    stretched = 127.5 + 127.5 * change / max(abs(change).max(), 1)
    return np.rint(stretched).astype(np.uint8)


def _outcome(row: AttackRow | None) -> str:
    if row is None:
        return ""
    if not row.clean:
        return "wrong before, not attacked"
    return f"right in {sum(row.fresh)} of {len(row.fresh)}"
