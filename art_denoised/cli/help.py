"""What a help page looks like: short, with the options that few runs need named at its end."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

ALL = "--help-all"
_MORE = "More: "
_WIDEST = 26  # of the left column; a longer label has a line of its own


def folded(title: str, order: int) -> Group:
    """Return a group of options that few runs need: ``--help-all`` explains them."""
    return Group(f"{_MORE}{title}", sort_key=50 + order)


def more(group: Group) -> Parameter:
    """Return the mark of an option of this group that few runs need."""
    return Parameter(group=folded(group.name, group.sort_key))


@dataclass(frozen=True)
class Page:
    """Prints groups of options or commands; a help formatter of cyclopts.

    Attributes:
        everything: Whether options that few runs need are explained; else they are only named.
    """

    everything: bool

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print one group."""
        from rich.text import Text

        title, width = str(panel.title), console.width
        if title.startswith(_MORE) and not self.everything:
            console.print(Text(_named(title.removeprefix(_MORE), panel.entries, width)))
        elif panel.entries:
            console.print(Text(f"{title}:", style="bold"))
            console.print(Text(_explained(panel.entries, width)))


def _named(title: str, entries: list[HelpEntry], width: int) -> str:
    """Return the names of options, behind the name of their group."""
    names = " ".join(name for entry in entries for name in entry.names)
    return textwrap.fill(
        names,
        width,
        initial_indent=f"  {title:<9} ",
        subsequent_indent=" " * 12,
        break_on_hyphens=False,
    )


def _explained(entries: list[HelpEntry], width: int) -> str:
    """Return labels and explanations in two columns, required options first."""
    entries = sorted(entries, key=lambda entry: not entry.required)
    labels = [", ".join(entry.display_labels_with_metavar) for entry in entries]
    left = 4 + min(max(map(len, labels)), _WIDEST)
    rows = []
    for label, entry in zip(labels, entries, strict=True):
        lines = textwrap.wrap(_explanation(entry), max(20, width - left))
        if len(label) <= _WIDEST and lines:
            label = f"{label:<{left - 2}}{lines.pop(0)}"
        rows += [f"  {label}", *(" " * left + line for line in lines)]
    return "\n".join([*rows, ""])


def _explanation(entry: HelpEntry) -> str:
    """Return the text of the docstring on one line, followed by choices and default."""
    text = entry.description.primary_renderable.plain if entry.description else ""
    if entry.choices:
        text += f" ({', '.join(entry.choices)})"
    if entry.required:
        text += " [required]"
    elif entry.default not in (None, "None", "False", "()"):
        text += f" [default: {entry.default}]"
    return " ".join(text.split())
