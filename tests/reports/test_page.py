"""The page: nothing from a log breaks out of it, nothing is loaded, and a browser reads it."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from art_denoised.evaluation.attack_report.export import to_json
from art_denoised.evaluation.attack_report.html import Markup, picture, render, svg, tag
from art_denoised.evaluation.attack_report.model import Model
from art_denoised.evaluation.attack_report.page import page
from art_denoised.evaluation.attack_report.runs import read_models
from art_denoised.evaluation.attack_report.text import format_report, percent
from art_denoised.evaluation.attacked.records import CheckRow
from tests.evaluation.attack_report.rows import certificate, clean_row, row, write_run

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


@settings(max_examples=50)
@given(st.text())
def test_text_cannot_leave_its_place(text):
    elements = Elements(tag("p", text, title=text))
    assert [name for name, _ in elements.found] == ["p"]
    shown = "".join(elements.words)
    assert shown == elements.found[0][1]["title"]
    if text.isprintable():
        assert shown == text


def test_markup_is_kept_and_nothing_is_nothing():
    assert render([Markup("<br>"), None, ("a", (part for part in "<b"))]) == "<br>a&lt;b"


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
    elements = Elements(page([hostile_model()], [HOSTILE]))
    names = {name for name, _ in elements.found}
    assert not names & {"script", "iframe", "object", "embed", "base", "form"}
    assert all(not key.startswith("on") for _, attributes in elements.found for key in attributes)
    assert "alert(1)" in "".join(elements.words)
    assert "\x1b" not in format_report([hostile_model()], [HOSTILE])


def test_nothing_is_loaded(tmp_path):
    folder = write_run(tmp_path / "ours", certified=0.3)
    models, notices = read_models([str(folder)])
    text = page([*models, hostile_model()], notices)
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
    models, _ = read_models([str(write_run(tmp_path / "ours", certified=0.3))])
    linf = Model("linf", (clean_row(0), row(0, True, norm="linf")))
    ids = [
        attributes["id"]
        for _, attributes in Elements(page([*models, linf])).found
        if "id" in attributes
    ]
    assert len(ids) > 10
    assert len(ids) == len(set(ids))


def test_accessible_structure(tmp_path):
    models, _ = read_models([str(write_run(tmp_path / "ours", certified=0.3))])
    found = Elements(page(models)).found
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
    from art_denoised.evaluation.attack_report.style import STYLE

    colours = re.findall(r"--(\w+): (#\w+)", STYLE)
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
    element = Elements(picture(pixels, "alt")).found[0][1]
    raw = base64.b64decode(element["src"].removeprefix("data:image/png;base64,"))
    read = np.rint(255 * imread(io.BytesIO(raw))[..., :3]).astype(int)
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
    models, notices = read_models([str(ours), str(plain)])
    models.append(hostile_model())
    report = to_json(models, notices)
    path = tmp_path / "report.html"
    path.write_text(page(models, notices), encoding="utf-8")

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
    figures = [figure for model in report["models"] for figure in model["figures"]]
    expected = [
        [f"{100 * figure[name]['value']:.1f}" for name in ("clean", "counted", "fresh", "worst")]
        for figure in figures
    ]
    assert values == expected
    assert verdicts[:6] == ["checks passed"] * 6
    assert {verdict.strip() for verdict in verdicts[6:]} == {"not to be trusted"}
    assert pictures == [8] * 6
    assert widths[0] <= 1200
    assert widths[1] <= 400
    assert drawing is not None
    assert drawing["width"] > 300
    assert percent(models[0].clean) == "100.0"
