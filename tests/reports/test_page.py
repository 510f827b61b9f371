"""The page: nothing from a log breaks out of it, nothing is loaded, and a browser reads it."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from art_denoised.evaluation import CheckRow
from art_denoised.reports import Model, Report, report
from art_denoised.reports.page import Picture, svg
from art_denoised.reports.terminal import escaped
from tests.reports.rows import certificate, clean_row, row, write_run

HOSTILE = (
    "</style><script>alert(1)</script>\"' onload=x <img src=http://a.example/x> $\\frac{$ \x1b[31m"
)


class Elements(HTMLParser):
    """Collects elements, and the text outside style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@settings(max_examples=10, deadline=None)
@given(st.text(min_size=1))
def test_text_cannot_leave_its_place(text):
    model = Model(text, (row(0, True, attack=text),), settings=((text, {text: text}),))
    names = Counter(name for name, _ in Elements(Report((model,), (text,)).page()).found)
    assert names == plain_names()


@cache
def plain_names() -> Counter[str]:
    plain = Model("m", (row(0, True, attack="a"),), settings=(("p", {"s": "v"}),))
    return Counter(name for name, _ in Elements(Report((plain,), ("n",)).page()).found)


@pytest.mark.parametrize("text", ["<b>", "a\x1b[31mb", "a\u202eb", "caf\u00e9"])
def test_text_is_shown_with_control_characters_escaped(text):
    model = Model(text, (row(0, True),), settings=((text, {"s": {text: text}}),))
    words = "".join(Elements(Report((model,), (text,)).page()).words)
    assert words.count(escaped(text)) >= 6
    assert escaped(text).isprintable()
    if text.isprintable():
        assert escaped(text) == text


def hostile_model() -> Model:
    rows = [clean_row(i) for i in range(3)]
    rows += [row(i, i == 0, attack=HOSTILE) for i in range(3)]
    return Model(
        HOSTILE,
        tuple(rows),
        (CheckRow(HOSTILE, False, HOSTILE, {HOSTILE: 1}),),
        (certificate(0, 0.5),),
        settings=((HOSTILE, {HOSTILE: HOSTILE, "versions": {HOSTILE: [HOSTILE]}}),),
    )


def test_hostile_names_stay_text():
    elements = Elements(Report((hostile_model(),), (HOSTILE,)).page())
    names = {name for name, _ in elements.found}
    assert not names & {"script", "iframe", "object", "embed", "base", "form"}
    assert all(not key.startswith("on") for _, attributes in elements.found for key in attributes)
    assert "alert(1)" in "".join(elements.words)
    assert "\x1b" not in str(Report((hostile_model(),), (HOSTILE,)))


def test_nothing_is_loaded(tmp_path):
    folder = write_run(tmp_path / "ours", certified=0.3)
    text = Report((*report([folder]).models, hostile_model())).page()
    elements = Elements(text)
    for name, attributes in elements.found:
        for key in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            if attributes.get(key) is not None:
                assert re.match(r"data:|#", attributes[key]), (name, key, attributes[key])
    sheets = "".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"@import|url\((?!#)", sheets)
    policy = [a["content"] for _, a in elements.found if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_identifiers_are_unique(tmp_path):
    models = report([write_run(tmp_path / "ours", certified=0.3)]).models
    linf = Model("linf", (clean_row(0), row(0, True, norm="linf")))
    ids = [
        attributes["id"]
        for _, attributes in Elements(Report((*models, linf)).page()).found
        if "id" in attributes
    ]
    assert len(ids) > 10
    assert len(ids) == len(set(ids))


def test_accessible_structure(tmp_path):
    models = report([write_run(tmp_path / "ours", certified=0.3)]).models
    found = Elements(Report(models).page()).found
    assert all(attributes.get("alt") for name, attributes in found if name == "img")
    drawings = [attributes for name, attributes in found if name == "svg"]
    assert all(
        attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in drawings
    )
    assert all(
        attributes.get("scope") in ("row", "col") for name, attributes in found if name == "th"
    )
    assert ("html", {"lang": "en"}) in found
    levels = [int(name[1]) for name, _ in found if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(levels) == 2


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast_of_text(scheme):
    style = files("art_denoised.reports").joinpath("templates", "report.css").read_text("utf-8")
    colours = re.findall(r"--(\w+): (#\w+)", style)
    half = len(colours) // 2
    sheet = dict(colours[scheme * half : (scheme + 1) * half])
    sheet = {k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in sheet.items()}
    for ink in ("ink", "soft", "bad", "good"):
        for paper in ("paper", "quiet", "alarm"):
            pair = sorted(luminance(sheet[name]) for name in (ink, paper))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, paper)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (4, 8, 8), (3, 300, 200), (1, 1, 500)])
def test_pictures_hold_the_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    picture = Picture.of(pixels)
    raw = base64.b64decode(picture.source.removeprefix("data:image/png;base64,"))
    read = np.array(Image.open(io.BytesIO(raw)).convert("RGB"))
    assert read.shape[:2] == (picture.height, picture.width)
    assert max(read.shape[:2]) <= 128
    if max(shape) <= 128:
        shown = pixels[:3] if shape[0] >= 3 else np.repeat(pixels[:1], 3, axis=0)
        np.testing.assert_array_equal(read.transpose(2, 0, 1), shown)


def test_drawings_carry_no_trace_of_the_outside():
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    text = svg(figure, "f", "a < b")
    assert 'aria-label="a &lt; b"' in text
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    assert svg(figure, "f", "a < b") == text


def browser_path() -> str:
    pytest.importorskip("playwright", reason="playwright is not installed")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.skip("no Chromium that runs on this machine: apt-get install chromium")


def test_a_browser_reads_the_page_offline(tmp_path: Path):
    executable = browser_path()
    from playwright.sync_api import sync_playwright

    ours = write_run(tmp_path / "denoised", name="d", certified=0.3)
    plain = write_run(tmp_path / "plain", name="p", failed=True)
    both = report([ours, plain])
    whole = Report((*both.models, hostile_model()), both.notices)
    path = tmp_path / "report.html"
    whole.write_page(path)

    asked: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900}, offline=True)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(path.as_uri())
        headings = tab.locator("h1, h2").all_inner_texts()
        read = "rows => rows.map(r => [...r.querySelectorAll('.value')].map(c => c.innerText))"
        values = tab.eval_on_selector_all("table.figures tbody tr", read)
        verdicts = tab.locator("table.figures td:last-child").all_inner_texts()
        pictures = tab.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)")
        width = "document.documentElement.scrollWidth"
        widths = [tab.evaluate(width)]
        tab.set_viewport_size({"width": 400, "height": 800})
        widths.append(tab.evaluate(width))
        drawing = tab.locator("figure svg").first.bounding_box()
        tab.close()
        browser.close()

    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    assert headings[0] == "Robustness report"
    assert headings[1] == "Read this first"
    assert {"In short", "Accuracy in l2", "denoised", "plain"} <= {h.strip() for h in headings}
    figures = [figure for model in whole.to_json()["models"] for figure in model["figures"]]
    expected = [
        [f"{100 * figure[name]['value']:.1f}" for name in ("clean", "counted", "fresh", "worst")]
        for figure in figures
    ]
    assert values == expected
    assert verdicts[:6] == ["checks passed"] * 6
    assert {verdict.strip() for verdict in verdicts[6:]} == {"not reliable"}
    assert pictures == [8] * 6
    assert widths[0] <= 1200
    assert widths[1] <= 400
    assert drawing is not None
    assert drawing["width"] > 300
