"""HTML that nothing from a log can break out of: text is escaped unless it is `Markup`."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from art_denoised.evaluation.attack_report.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VOID = {"img", "meta", "link", "br"}
# The browser is told too: nothing is loaded, nothing is run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LARGEST = 128  # pixels of a picture's side


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def render(content: Any) -> Markup:
    """Return content as HTML: `Markup` as it is, several joined, nothing for None, else escaped.

    Example:
        >>> render(["<b>", Markup("<br>"), None, 1])
        '&lt;b&gt;<br>1'
    """
    if content is None:
        return Markup()
    if isinstance(content, Markup):
        return content
    if isinstance(content, Iterable) and not isinstance(content, str):
        return Markup("".join(render(part) for part in content))
    return Markup(html.escape(plain(str(content)), quote=True))


def tag(name: str, *content: Any, **attributes: Any) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        content: Rendered by `render`.
        attributes: Values are escaped; None leaves one out. ``class_`` and ``data_label`` are
            ``class`` and ``data-label``.

    Example:
        >>> tag("p", "a < b", class_="note")
        '<p class="note">a &lt; b</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{render(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{render(content)}</{name}>")


def table(heads: list[str], rows: list[list[Any]], caption: str, class_: str = "") -> Markup:
    """Return a table with a caption, heads for columns, and the first cell of a row as its head.

    On narrow screens each row becomes a card, where cells carry their column's name.

    Example:
        >>> table(["attack", "left"], [["pgd", "3"]], "Attacks").count("<tr")
        2
    """
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", role="rowheader"),
            [
                tag("td", tag("span", cell), data_label=head, role="cell")
                for head, cell in zip(heads[1:], row[1:], strict=True)
            ],
            role="row",
        )
        for row in rows
    ]
    columns = [tag("th", head, scope="col", role="columnheader") for head in heads]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", columns, role="row"), role="rowgroup"),
        tag("tbody", body, role="rowgroup"),
        role="table",  # said again, for browsers forget it where style makes cards of the rows
        class_=class_ or None,
    )


def svg(figure: Figure, name: str, description: str) -> Markup:
    """Return a figure of matplotlib as an inline picture that says what it shows.

    Args:
        figure: With text that is ours: names from logs belong into the page around it.
        name: Short, of letters and digits; makes identifiers unique on the page.
        description: For those who do not see it.

    Example:
        >>> from matplotlib.figure import Figure
        >>> svg(Figure(figsize=(1, 1)), "f1", "nothing")[:42]
        '<svg role="img" aria-label="nothing" viewB'
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    metadata = _no("Creator", "Date", "Format", "Type")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    view = re.search(r'viewBox="[\d. ]+"', text)
    assert view is not None  # matplotlib writes one
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(?:xlink:)?href="#', 'href="#', text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    label = render(description)
    head = f'<svg role="img" aria-label="{label}" {view[0]}>'
    return Markup(head + text[text.index(">") + 1 :].strip())


def picture(pixels: np.ndarray, alt: str) -> Markup:
    """Return an image as an element that carries its pixels.

    Args:
        pixels: Bytes (channels, height, width); the first three channels, or the first, are shown.
            Large ones are averaged down.
        alt: What it shows.

    Example:
        >>> picture(np.zeros((1, 8, 8), np.uint8), "black")[:31]
        '<img src="data:image/png;base64'
    """
    from matplotlib.image import imsave

    channels = pixels[: 3 if len(pixels) >= 3 else 1].astype(np.float64)
    k = -(-max(channels.shape[1:]) // _LARGEST)
    height, width = (max(side // k, 1) for side in channels.shape[1:])
    if k > 1:
        cropped = channels[:, : height * k, : width * k]
        channels = cropped.reshape(len(channels), height, -1, width, cropped.shape[2] // width)
        channels = channels.mean(axis=(2, 4))
    shown = np.rint(channels).astype(np.uint8).transpose(1, 2, 0)
    shown = np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(shown), format="png", metadata=_no("Software"))
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return tag("img", src=source, alt=alt, width=width, height=height)


def document(title: str, style: str, body: Any) -> str:
    """Return a whole page that loads nothing and runs nothing.

    Args:
        title: Of the page.
        style: Style sheet, ours.
        body: Rendered by `render`.

    Example:
        >>> document("t", "", tag("h1", "t")).endswith("<h1>t</h1></body></html>")
        True
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en")


def _no(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)
