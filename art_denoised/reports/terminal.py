"""Tables and lines: styled on a terminal, plain where they are piped; LaTeX, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Cell: TypeAlias = str | tuple[str, ...]
# Rich drops columns that do not fit, such as the verdict; a terminal wraps them.
_WIDE = 100_000
_LATEX = {ord(sign): f"\\{sign}" for sign in "&%$#_{}"} | {
    ord("\\"): r"\textbackslash{}",
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
    ord("<"): r"$<$",
    ord(">"): r"$>$",
}
# Where a backslash is shown as it is by a renderer of Markdown, an entity is not.
_MARKDOWN = {ord(c): f"\\{c}" for c in "|`*_[]{}#"} | {ord(c): f"&#{ord(c)};" for c in "\\&<>~$"}


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, its alignment and the least number of characters."""

    head: str
    left: bool = False
    width: int = 0


@dataclass(frozen=True)
class Table:
    """A table with a title above and notes below it. A cell is a line or a tuple of lines."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    note: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lines:
    """Lines of text, with a style of rich for terminals, such as "bold red"."""

    lines: tuple[str, ...]
    style: str = ""


Block: TypeAlias = Table | Lines


def text(blocks: Sequence[Block]) -> str:
    """Return blocks as plain text, with a blank line between them."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(
        file=file, width=_WIDE, color_system=None, force_terminal=False, force_jupyter=False
    )
    _print(console, blocks, styled=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def show(blocks: Sequence[Block]) -> None:
    """Print blocks to standard output: styled if it is a terminal, else as `text` returns them."""
    if not sys.stdout.isatty():
        print(text(blocks))
        return
    from rich.console import Console

    _print(Console(width=_WIDE, highlight=False, force_jupyter=False), blocks, styled=True)


class Shown:
    """Something that is shown as blocks; ``str`` is the plain text."""

    def blocks(self) -> list[Block]:
        """Return what is shown."""
        raise NotImplementedError

    def __str__(self) -> str:
        return text(self.blocks())

    def show(self) -> None:
        """Print it: styled on a terminal, plain elsewhere."""
        show(self.blocks())


def latex(table: Table) -> str:
    """Return a tabular of LaTeX for the package booktabs, with title and notes as comments."""

    def quote(words: str) -> str:
        return escaped(words).translate(_LATEX).replace("$>$=", r"$\geq$")

    def small(words: str) -> str:
        return rf" {{\scriptsize {quote(words)}}}".replace("-", "--")

    align = "".join("l" if column.left else "r" for column in table.columns)
    lines = [[quote(column.head) for column in table.columns], *_quoted(table, quote, small)]
    heads, *rows = [" & ".join(line) + r" \\" for line in lines]
    comments = [f"% {escaped(line)}" for line in (table.title, *table.note) if line]
    body = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", heads, r"\midrule", *rows]
    return "\n".join([*comments, *body, r"\bottomrule", r"\end{tabular}"])


def markdown(table: Table) -> str:
    """Return a table of Markdown, with title and notes as lines around it."""
    lines = [[plain_markdown(column.head) for column in table.columns]]
    lines.append([":--" if column.left else "--:" for column in table.columns])
    lines += _quoted(table, plain_markdown, lambda words: f" ({plain_markdown(words)})")
    body = [f"| {' | '.join(line)} |" for line in lines]
    title = [plain_markdown(table.title), ""] if table.title else []
    return "\n".join([*title, *body, *(f"\n{plain_markdown(line)}" for line in table.note)])


def plain_markdown(words: str) -> str:
    """Return text that Markdown shows as it is, also in the cell of a table."""
    return escaped(words).translate(_MARKDOWN)


def _quoted(
    table: Table, quote: Callable[[str], str], small: Callable[[str], str]
) -> list[list[str]]:
    """Return the rows with cells of one line: the first is quoted, others are made small."""
    rows = [[(cell,) if isinstance(cell, str) else cell for cell in row] for row in table.rows]
    return [[quote(cell[0]) + "".join(map(small, cell[1:])) for cell in row] for row in rows]


def separated(lines: Iterable[Iterable[Any]], delimiter: str = ",") -> str:
    """Return lines of cells for programs, without control characters."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    for line in lines:
        writer.writerow([escaped(cell) if isinstance(cell, str) else cell for cell in line])
    return file.getvalue()


def escaped(words: str) -> str:
    """Return text from a log so that a terminal shows it: control characters become escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words
    )


def _print(console: Console, blocks: Sequence[Block], *, styled: bool) -> None:
    for i, block in enumerate(blocks):
        if i:
            console.print()
        for part in _parts(block, styled=styled):
            console.print(part, soft_wrap=isinstance(block, Lines))


def _parts(block: Block, *, styled: bool) -> list[RenderableType]:
    # Text, never a string: what comes from a log must not be read as rich's markup.
    from rich.text import Text

    if isinstance(block, Lines):
        return [Text(escaped(line), style=block.style) for line in block.lines]
    return [_rich(block, styled=styled), *(Text(escaped(line)) for line in block.note)]


def _rich(table: Table, *, styled: bool) -> RenderableType:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        title=Text(escaped(table.title)) if table.title else None,
        box=box.SIMPLE_HEAD if styled else None,
        padding=(0, 0, 0, 2),
        pad_edge=False,
        show_edge=False,
    )
    for column in table.columns:
        made.add_column(
            Text(escaped(column.head)),
            justify="left" if column.left else "right",
            min_width=column.width or None,
            no_wrap=True,
        )
    for row in table.rows:
        cells = ((cell,) if isinstance(cell, str) else cell for cell in row)
        made.add_row(*(Text("\n".join(map(escaped, lines))) for lines in cells))
    return made
