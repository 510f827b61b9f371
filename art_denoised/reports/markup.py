"""A table as text for papers and pages: LaTeX with booktabs, or Markdown."""

from __future__ import annotations

from art_denoised.reports.terminal import Cell, Table, escaped

_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
}
_MARKDOWN = {sign: f"\\{sign}" for sign in "\\|*_`<>[]"}


def latex(table: Table) -> str:
    r"""Return a tabular of LaTeX; its preamble needs \usepackage{booktabs}.

    Title and notes are comments. An interval stands in small print after its share.
    """
    align = "".join("l" if column.left else "r" for column in table.columns)
    heads = " & ".join(_tex(column.head) for column in table.columns)
    rows = [" & ".join(map(_tex_cell, row)) + r" \\" for row in table.rows]
    comments = [f"% {escaped(line)}" for line in (table.title, *table.note) if line]
    body = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", heads + r" \\", r"\midrule", *rows]
    return "\n".join([*comments, *body, r"\bottomrule", r"\end{tabular}"])


def markdown(table: Table) -> str:
    """Return a table of Markdown, with title and notes as lines around it."""
    lines = [[_plain(column.head) for column in table.columns]]
    lines.append([":--" if column.left else "--:" for column in table.columns])
    lines += [[_plain_cell(cell) for cell in row] for row in table.rows]
    body = [f"| {' | '.join(line)} |" for line in lines]
    title = [_plain(table.title), ""] if table.title else []
    return "\n".join([*title, *body, *(f"\n{_plain(line)}" for line in table.note)])


def _tex_cell(cell: Cell) -> str:
    value, *more = (cell,) if isinstance(cell, str) else cell
    return _tex(value) + "".join(
        rf" {{\scriptsize {_tex(line)}}}".replace("-", "--") for line in more
    )


def _tex(words: str) -> str:
    words = "".join(_LATEX.get(sign, sign) for sign in escaped(words))
    return words.replace("$>$=", r"$\geq$")


def _plain_cell(cell: Cell) -> str:
    value, *more = (cell,) if isinstance(cell, str) else cell
    return _plain(value) + "".join(f" ({_plain(line)})" for line in more)


def _plain(words: str) -> str:
    return "".join(_MARKDOWN.get(sign, sign) for sign in escaped(words))
