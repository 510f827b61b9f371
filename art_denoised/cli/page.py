"""How a help page looks: two columns, bold headings on a terminal, plain text in a pipe."""

from __future__ import annotations

import textwrap

from cyclopts.help import HelpEntry, HelpPanel
from rich.console import Console, ConsoleOptions
from rich.text import Text

_WIDEST = 26  # of the left column; a longer label has a line of its own


def show_group(console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
    """Print a group of options or commands; a help formatter of cyclopts."""
    if not panel.entries:
        return
    console.print(Text(f"{panel.title}:", style="bold"))
    labels = [", ".join(entry.display_labels_with_metavar) for entry in panel.entries]
    left = 4 + min(max(map(len, labels)), _WIDEST)
    for label, entry in zip(labels, panel.entries, strict=True):
        lines = textwrap.wrap(_explanation(entry), max(20, console.width - left))
        if len(label) <= _WIDEST and lines:
            label = f"{label:<{left - 2}}{lines.pop(0)}"
        console.print(Text(f"  {label}"), *(Text(" " * left + line) for line in lines), sep="\n")
    console.print()


def _explanation(entry: HelpEntry) -> str:
    """Return the text of the docstring on one line, followed by choices and default."""
    text = entry.description.primary_renderable.plain if entry.description else ""
    if entry.choices:
        text += f" ({', '.join(entry.choices)})"
    if entry.required:
        text += " [required]"
    elif entry.default not in (None, "False", "()"):
        text += f" [default: {entry.default}]"
    return " ".join(text.split())
