"""Read the built site as a visitor would, and list what is wrong with it.

Links and anchors lead somewhere, nothing is loaded from another host, every page is at most two
clicks from the first one, and every public name has a page with a text. `make docs` runs it.

    python tools/check_site.py site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from site_pages import rooms

CLICKS = 2
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src"}


class Reader(HTMLParser):
    """Links, anchors, loaded files and visible words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag refers to."""
        known = {key: value or "" for key, value in attrs}
        self.anchors.update(known[key] for key in ("id", "name") if key in known)
        if tag == "a" and "href" in known:
            self.links.append(known["href"])
        elif tag in LOADED and known.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(known.get(LOADED[tag], ""))


def target(page: Path, link: str) -> tuple[Path, str]:
    """File and anchor that a link of `page` leads to."""
    path, anchor = urldefrag(link)
    return (page.parent / unquote(path)).resolve() if path else page, unquote(anchor)


def outside(link: str) -> bool:
    return link.startswith(("http:", "https:", "//"))


def wrong_links(pages: dict[Path, Reader]) -> list[str]:
    found = []
    for page, reader in pages.items():
        found += [f"{page.name} loads {link}" for link in reader.loaded if outside(link)]
        for link in [*reader.links, *reader.loaded]:
            if not link or outside(link) or link.startswith(("mailto:", "data:", "javascript:")):
                continue
            file, anchor = target(page, link)
            missing = not file.exists()
            if missing or (anchor and file in pages and anchor not in pages[file].anchors):
                found.append(f"{page} -> {link}")
    return found


def far_pages(pages: dict[Path, Reader], first: Path) -> list[str]:
    """Pages that need more than two clicks from the first one."""
    near = {first}
    for _ in range(CLICKS):
        links = [(page, link) for page in near for link in pages[page].links]
        reached = {target(page, link)[0] for page, link in links if not outside(link)}
        near |= {page for page in reached if page in pages}
    return [f"{page} is more than {CLICKS} clicks away" for page in pages if page not in near]


def bare_names(site: Path) -> list[str]:
    """Public names whose page is missing or says nothing about them."""
    found = []
    for name in (name for names in rooms().values() for name in names):
        page = (site / name.page).with_suffix(".html")
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        described = text.partition("doc-contents first")[2].partition("<p>")[2][:1]
        if not described:
            found.append(f"{name.module}.{name.name} has no description")
    return found


def main(site: Path) -> int:
    """Print what is wrong, and return the number of faults."""
    site = site.resolve()
    files = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    pages = {page: Reader(page.read_text(encoding="utf-8")) for page in files}
    wrong = [*wrong_links(pages), *far_pages(pages, site / "index.html"), *bare_names(site)]
    print(*wrong, f"{len(pages)} pages, {len(wrong)} faults", sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1])), 1))
