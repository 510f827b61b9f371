"""The command line: parse, call one function of the library, and say on one line what is wrong."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    Token,
    convert,
)

from art_denoised import __version__
from art_denoised.cli.config import read_config, write_config
from art_denoised.cli.options import MORE, folded
from art_denoised.reports.terminal import escaped

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

INTERRUPTED = 130  # exit code, that of a program which a shell saw end by Ctrl-C
ALL = "--help-all"
_PROGRAM = "art-denoised"
_WIDEST = 26  # of the left column of help; a longer label has a line of its own
# Errors are printed here, as one line.
_RUN: Mapping[str, Any] = {
    "exit_on_error": False,
    "print_error": False,
    "result_action": "return_value",
}
_HELP = ("--help", ALL, "-h")
_SHARED = re.compile(r"-h$|--$|--(help|version|install|config|save)", re.IGNORECASE)
_OPTIONS = Group("Options", sort_key=100)
_FILE = Parameter(group=folded("Config", 100), metavar="FILE")
_COMMANDS = {  # of each group, with their modules
    "Start here": {"demo": "certify", "models": "tools", "doctor": "tools"},
    "Evaluate": {"certify": "certify", "predict": "certify", "attack": "attack"},
    "Train": {
        "train-denoiser": "train",
        "train-diffusion": "train",
        "train-robust": "train",
    },
    "Convert": {"convert": "tools"},
    "Read results": {
        "table": "read",
        "plot": "read",
        "pictures": "read",
        "report": "read",
        "merge": "read",
    },
    "Check and share": {
        "verify": "leaderboard",
        "submit": "leaderboard",
        "leaderboard": "leaderboard",
    },
}
_EPILOGUE = "art-denoised COMMAND --help-all also explains the options of the last lines."
_FIRST_STEPS = """\
First steps, with the packaged digits classifier; each takes a minute or less:

  art-denoised demo
  art-denoised attack --model art_denoised.demo:digits_classifier \\
      --data digits --eps 0.1 --attacks pgd --max 20 --out runs/first
  art-denoised report runs/first

Your own network is named by its class, or by a function that returns it:

  art-denoised certify --model mynets:ResNet20 --weights resnet20.pth \\
      --data imagefolder:val --sigma 0.25 --max 100 --out runs/mine

All commands: art-denoised --help. What is installed: art-denoised doctor."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Words after the name of the program; None: those of the process.

    Returns:
        0 on success, 1 where `verify` found wrong rows, 2 with one line on standard error for input
        that cannot be used or a file that cannot be written, 130 when interrupted.

    Example:
        >>> main(["table", "missing.jsonl"])
        2
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(_FIRST_STEPS)
        return 0
    app = build_app(everything=ALL in words, summaries=words[0] in _HELP)
    try:
        _refuse_variables(words)
        # app.meta knows the options that all commands share, but it parses every word twice.
        entry = app.meta if any(_SHARED.match(word) for word in words) else app
        return entry(words, **_RUN) or 0
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as in `... | head`
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted; completed rows are kept: pass --resume to continue", INTERRUPTED)
    except CycloptsError as error:
        command = " ".join([_PROGRAM, *(word for word in words[:1] if word in app)])
        return _fail(f"{_said(error)} (see {command} --help)")
    except OSError as error:
        where = error.filename and f"{error.filename} cannot be used ({error.strerror})"
        return _fail(f"{where}; choose another file or folder" if where else error)
    except ValueError as error:
        from art_denoised.checks import InputError  # imports numpy

        if not isinstance(error, InputError):
            raise
        return _fail(f"{error}{_remedy(error.remedy)}")


def build_app(*, everything: bool = False, summaries: bool = False) -> App:
    """Return the application; the module of a command is imported when it is needed.

    With ``everything``, help pages explain options that few runs need, too. With ``summaries``,
    each command is shown with the first line of its docstring.
    """
    app = App(
        name=_PROGRAM,
        help="Defend image classifiers by denoising, certify them, and attack them honestly.",
        help_flags=_HELP,
        help_epilogue=None if everything else _EPILOGUE,
        version=f"{_PROGRAM} {__version__}",
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
        help_formatter=Page(everything),
        group_parameters=_OPTIONS,
        # The last one counts where an option is repeated, as in `wrapper --sigma 0.5 "$@"`.
        default_parameter=Parameter(
            negative=(), allow_repeating=True, show_env_var=False, converter=_whole
        ),
    )
    for order, (title, commands) in enumerate(_COMMANDS.items()):
        group = Group(title, sort_key=order)
        for place, (name, module) in enumerate(commands.items()):
            function = name.replace("-", "_")
            path, text = f"art_denoised.cli.{module}", None
            if summaries:  # cyclopts does not import a command to say what it does
                docstring = getattr(import_module(path), function).__doc__
                text = docstring.partition("\n")[0]
            app.command(f"{path}:{function}", name=name, group=group, sort_key=place, help=text)
    app.meta.suppress_keyboard_interrupt = False  # not inherited
    app.register_install_completion_command(help="Install completion for your shell, and exit.")
    for flag in ("--help", "--version", "--install-completion"):
        app[flag].group = _OPTIONS

    @app.meta.default
    def run(
        *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, _FILE] = None,
        save_config: Annotated[Path | None, _FILE] = None,
    ) -> int | None:
        """Run a command.

        Args:
            words: Words of the command line.
            config: YAML file with options; those on the command line replace them.
            save_config: YAML file to write with all options of this run; then run it.
        """
        if config is not None:
            words = tuple(read_config(config, app, words))
            _refuse_variables(words)
        if save_config is not None:
            app.parse_args(words, exit_on_error=False, print_error=False)
            write_config(save_config, app, words)
        return app(words, **_RUN)

    return app


def _whole(type_: Any, tokens: Sequence[Token]) -> Any:
    """Convert tokens as cyclopts does, but refuse fractions, which it rounds."""
    for word in (token.value for token in tokens):
        if (type_ is int or int in get_args(type_)) and _is_fraction(word):
            raise ValueError(f"{word!r} is not a whole number")
    return convert(type_, tokens)


def _is_fraction(word: str) -> bool:
    try:
        return not float(word).is_integer()
    except ValueError:
        return False


def _refuse_variables(words: Sequence[str]) -> None:
    """Refuse what a variable of the shell becomes, and no option can mean.

    An unset one is an empty word, and zsh passes several options as one word.
    """
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            option = name or (before if before.startswith("-") else "an argument")
            raise CycloptsError(msg=f"{option} is empty; give a value or leave it out")
        if re.match(r"--[a-z][a-z-]* ", word):
            raise CycloptsError(msg=f"{word!r} is one word; leave out the quotes or the variable")


def _said(error: CycloptsError) -> str:
    """Return the message; an option that was left out is called missing."""
    left_out = isinstance(error, MissingArgumentError) and error.keyword is None
    if left_out and error.argument and not error.unused_tokens:  # of those one may be meant
        return f"{error.argument.name} is missing; give it"
    return str(error).rstrip(".")


def _remedy(arguments: Mapping[str, Any]) -> str:
    """Return the options for these arguments of the library, such as ``resume=True``."""
    words = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in arguments.items()
    ]
    return f" (pass {' '.join(words)})" if words else ""


def _fail(message: object, code: int = 2) -> int:
    line = " ".join(str(message).split()) or type(message).__name__
    print(escaped(f"{_PROGRAM}: error: {line}"), file=sys.stderr)
    return code


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
        if title.startswith(MORE) and not self.everything:
            console.print(Text(_named(title.removeprefix(MORE), panel.entries, width)))
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
