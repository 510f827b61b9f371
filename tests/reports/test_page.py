"""The page: nothing from a log breaks out of it, nothing is loaded, and a browser reads it."""

from __future__ import annotations

import base64
import datetime
import io
import itertools
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files

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


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Report:
    """A report of one model that was attacked and certified."""
    return report([write_run(tmp_path_factory.mktemp("page") / "ours", certified=0.3)])


def test_nothing_is_loaded(ours):
    text = Report((*ours.models, hostile_model())).page()
    elements = Elements(text)
    for name, attributes in elements.found:
        for key in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            if attributes.get(key) is not None:
                assert re.match(r"data:|#", attributes[key]), (name, key, attributes[key])
    sheets = "".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"@import|url\((?!#)", sheets)
    policy = [a["content"] for _, a in elements.found if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_identifiers_are_unique(ours):
    linf = Model("linf", (clean_row(0), row(0, True, norm="linf")))
    ids = [
        attributes["id"]
        for _, attributes in Elements(Report((*ours.models, linf)).page()).found
        if "id" in attributes
    ]
    assert len(ids) > 10
    assert "results" in ids  # where the skip link leads
    assert len(ids) == len(set(ids))


def test_accessible_structure(ours):
    found = Elements(Report(ours.models).page()).found
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
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    regions = [a for name, a in found if a.get("role") == "region"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert len(regions) == sum(name == "table" for name, _ in found)


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


@pytest.mark.parametrize("certified", [None, 0.3], ids=["attacked", "both"])
def test_the_first_screen_is_the_title_and_a_sentence_of_each_kind(tmp_path, ours, certified):
    found = ours if certified else report([write_run(tmp_path / "ours")])
    head = found.page().partition("</header>")[0]
    words = " ".join("".join(Elements(head.partition("<header>")[2]).words).split())
    kind = "Robust and certified" if certified else "Robust"
    share = found.models[0].headlines[1].fresh
    assert words.startswith(f"{kind} accuracy of ours At l2 eps 0.5, ours stays right on ")
    low, high = f"{100 * share.low:.0f}", f"{100 * share.high:.0f}"
    assert f"{100 * share.value:.1f}% (95% interval {low}-{high}) of images" in words
    proved = "At l2 radius 0.15, ours is proved right on 100.0% (95% interval 74-100) of images."
    attacked = "; the checks for masked gradients passed."
    assert words.endswith(f"{attacked} {proved}" if certified else attacked)


def test_a_report_of_certificates_alone_says_so(tmp_path):
    folder = write_run(tmp_path / "ours", certified=0.3)
    page = report([folder / "certify.jsonl"]).page()
    assert "<title>Certified accuracy of ours</title>" in page
    assert "ours is proved right on 100.0% (95% interval 74-100) of images." in page
    assert "attack" not in page.partition("<h2>Details</h2>")[0].partition("<body>")[2]


def test_a_failed_check_is_in_the_sentence(tmp_path):
    runs = [write_run(tmp_path / name, name=name, failed=name == "b") for name in "abc"]
    assert "; the result of b is not reliable." in report(runs).page().partition("</header>")[0]


def test_how_it_was_measured_is_in_the_open(tmp_path):
    settings = {"seed": 7, "batch_size": 4}
    page = report([write_run(tmp_path / "ours", settings=settings, certified=0.3)]).page()
    words = " ".join(" ".join(Elements(page.partition("<h2>What was tried</h2>")[2]).words).split())
    for said in ("data digits", "12 attacked, 12 certified", "pgd (steps 20)", "seed 7"):
        assert said in words
    assert "sigma 0.25, gaussian; attacked with fresh noise of sigma 0.25, 4 evaluations" in words
    today = datetime.datetime.now(datetime.UTC).date()
    assert {str(today), str(today - datetime.timedelta(days=1))} & set(words.split())


@pytest.fixture(scope="module")
def browser():
    executable = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of three models, one with text from an attacker, and the page it is written to."""
    folder = tmp_path_factory.mktemp("page")
    ours = write_run(folder / "denoised", name="d", certified=0.3)
    plain = write_run(folder / "plain", name="p", failed=True)
    both = report([ours, plain])
    whole = Report((*both.models, hostile_model()), both.notices)
    whole.write_page(folder / "report.html")
    return whole, (folder / "report.html").as_uri()


@pytest.mark.parametrize("width", [1200, 800, 390])
def test_a_browser_reads_the_page_offline(browser, written, width):
    whole, address = written
    asked: list[str] = []
    complaints: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(address)
    folded = tab.evaluate("document.documentElement.scrollHeight")
    tab.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    headings = tab.locator("h1, h2").all_inner_texts()
    read = "rows => rows.map(r => [...r.querySelectorAll('.value')].map(c => c.innerText))"
    values = tab.eval_on_selector_all("table.figures tbody tr", read)
    verdicts = tab.locator("table.figures td:last-child").all_inner_texts()
    pictures = tab.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)")
    reach = tab.evaluate("document.documentElement.scrollWidth")
    drawings = [box for one in tab.locator("figure svg").all() if (box := one.bounding_box())]
    tab.close()

    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    assert headings[0].startswith("Robust and certified accuracy of denoised, plain and ")
    assert [h.strip() for h in headings[1:]] == [
        *("Read this first", "Accuracy", "Results", "What was tried", "Details")
    ]
    names = ("clean", "counted", "fresh", "majority", "worst")
    figures = [figure for model in whole.to_json()["models"] for figure in model["figures"]]
    expected = [[f"{100 * figure[name]['value']:.1f}" for name in names] for figure in figures]
    assert values == expected
    assert [verdict.split("\n")[-1] for verdict in verdicts[:6]] == ["checks passed"] * 6
    assert {verdict.split("\n")[-1].strip() for verdict in verdicts[6:]} == {"not reliable"}
    assert pictures == [8] * 8
    assert reach <= width
    (drawing,) = drawings  # the wide or the narrow one, across the page
    assert drawing["width"] > 0.85 * width
    assert folded < 8 * 900


def test_the_page_is_used_with_keys_and_printed_whole(browser, written):
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="dark")
    tab.goto(written[1])
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#results"
    tab.locator("summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.querySelector('details').open")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(paper)
    tab.emulate_media(media="print")
    assert (dark, tab.evaluate(paper)) == ("rgb(21, 23, 26)", "rgb(255, 255, 255)")
    closed = tab.locator("details:not([open]) table").first
    assert closed.bounding_box()["height"] > 20
    tab.close()
