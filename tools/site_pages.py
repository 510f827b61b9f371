"""Pages of the site that are made from the sources: reference, gallery and project files.

A hook of MkDocs (mkdocs.yml). The reference has a page for each public name, read from the stubs
`__init__.pyi`; the gallery shows the committed notebooks with their outputs. Nothing is imported
or run, so the site is built without torch.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "art_denoised"
HIDDEN = InclusionLevel.NOT_IN_NAV
# Pages are read in a clone, too, so they link files of the clone. These have a page on the site.
SHOWN = {
    r"\.\./\.\./examples/(\w+)\.ipynb": r"../gallery/\1.md",
    r"\.\./\.\./(CHANGELOG|CONTRIBUTING)\.md": lambda match: f"../project/{match[1].lower()}.md",
}
BEST = {"certify_a_pretrained_classifier": 1}  # picture of a notebook in the gallery; others: 0


class ExampleSections(griffe.Extension):
    """Google style calls the section of one example "Example", griffe calls it "Examples"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Name(NamedTuple):
    """A public name and the room that lists it."""

    name: str
    room: str
    file: str
    top: bool

    @property
    def page(self) -> str:
        return f"reference/api/{self.room}.{self.name}.md"

    @property
    def module(self) -> str:
        return "art_denoised" if self.top else f"art_denoised.{self.room}"


def listed(stub: Path) -> list[tuple[str, str]]:
    """Module and name of each line of a stub."""
    line = re.compile(r"^from \.(\w+) import (\w+) as \2$", re.MULTILINE)
    return line.findall(stub.read_text(encoding="utf-8"))


@cache
def rooms() -> dict[str, list[Name]]:
    """Names by room, in alphabetical order."""
    top = {name for _, name in listed(PACKAGE / "__init__.pyi")}
    found = {}
    for stub in sorted(PACKAGE.glob("*/__init__.pyi")):
        names = [Name(name, stub.parent.name, file, name in top) for file, name in listed(stub)]
        found[stub.parent.name] = sorted(names, key=lambda name: name.name.lower())
    return found


@cache
def linked() -> dict[str, str]:
    """Page of each name that is unmistakable: `certify` is also a command, `Smoother` is not."""
    found = [name for names in rooms().values() for name in names]
    unmistakable = re.compile(r"[A-Z]|_")
    return {name.name: name.page for name in found if unmistakable.search(name.name)}


def summary(room: str) -> str:
    text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    return text.split('"""')[1].split("\n\n")[0].replace("\n", " ")


def name_page(name: Name) -> str:
    return (
        f"---\ntitle: {name.name}\n---\n\n"
        f"[Reference](../index.md) / [`art_denoised.{name.room}`](../index.md#{name.room}) · "
        f"`from {name.module} import {name.name}`\n\n"
        f"::: art_denoised.{name.room}.{name.file}.{name.name}\n"
    )


def name_lists() -> str:
    """Every name with a link, for the first page of the reference."""
    parts = []
    for room, names in rooms().items():
        links = " · ".join(
            f"[{'**' if n.top else ''}`{n.name}`{'**' if n.top else ''}](api/{Path(n.page).name})"
            for n in names
        )
        parts.append(f"## `art_denoised.{room}` {{#{room}}}\n\n{summary(room)}\n\n{links}\n")
    return "\n".join(parts)


def cells(path: Path) -> Iterator[str | bytes]:
    """Text of a notebook as Markdown, and its pictures."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield re.sub(r"\]\(\.\./docs/", "](../", source)
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                yield base64.b64decode("".join(data["image/png"]))
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                yield f"```text\n{text.rstrip()}\n```"


def notebook(config: MkDocsConfig, path: Path) -> Iterator[File]:
    parts, pictures = [], 0
    for part in cells(path):
        if isinstance(part, bytes):
            name = f"{path.stem}-{pictures}.png"
            parts.append(f"![Picture {pictures + 1} of this notebook]({name})")
            pictures += 1
            yield File.generated(config, f"gallery/{name}", content=part, inclusion=HIDDEN)
        else:
            parts.append(part)
    source = f"\n\nSource: `examples/{path.name}`, committed with these outputs.\n"
    text = "\n\n".join(parts) + source
    yield File.generated(config, f"gallery/{path.stem}.md", content=text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for names in rooms().values():
        for name in names:
            content = name_page(name)
            files.append(File.generated(config, name.page, content=content, inclusion=HIDDEN))
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        for file in notebook(config, path):
            files.append(file)
    for path in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / path).read_text(encoding="utf-8")
        text = re.sub(r"\]\(docs/", "](../", text)
        files.append(File.generated(config, f"project/{path.lower()}", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the lists of names where a page asks for them, and link pages instead of files."""

    def card(match: re.Match[str]) -> str:
        name, words = match[2], match[3]
        picture = f"[![{words}]({name}-{BEST.get(name, 0)}.png)]({name}.md)"
        return f"-   {picture}\n\n    [**{match[1]}**]({name}.md)"

    card_of = r"-   \[\*\*(.+)\*\*\]\(\.\./\.\./examples/(\w+)\.ipynb \"(.+)\"\)"
    markdown = re.sub(card_of, card, markdown)
    for file, shown in SHOWN.items():
        markdown = re.sub(rf"(?<=\]\(){file}(?=[)#])", shown, markdown)
    return markdown.replace("<!-- names of all rooms -->", name_lists())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link names of the package, and the pages that docstrings mention by path."""

    def to(target: str) -> str | None:
        file = files.get_file_from_path(target)
        return file.url_relative_to(page.file) if file else None

    def name(match: re.Match[str]) -> str:
        target = linked().get(match[1])
        if target is None or target == page.file.src_uri:
            return match[0]
        return f'<a href="{to(target)}">{match[0]}</a>'

    def path(match: re.Match[str]) -> str:
        file = files.get_file_from_path(match[1])
        title = file.page.title if file and file.page else None
        return f'<a href="{to(match[1])}">{title}</a>' if title else match[0]

    pieces = re.split(r"(<a\b.*?</a>|<h\d.*?</h\d>|<pre.*?</pre>)", html, flags=re.DOTALL)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"<code>(?:ad\.)?(\w+)</code>", name, pieces[i])
        pieces[i] = re.sub(r"docs/((?:[\w-]+/)+[\w-]+\.md)", path, pieces[i])
    return "".join(pieces)
