"""A run as one file: words of the command line from YAML, and YAML from such words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError
from cyclopts.argument import Argument

from art_denoised import __version__

if TYPE_CHECKING:
    import yaml

_ARGUMENTS = "arguments"  # key of words that belong to no option
_NOTHING = ("", "null", "~")


def read_config(path: Path, app: App, words: Sequence[str]) -> list[str]:
    """Return the words of a command line: those of the file, then the given ones.

    An option among the given words replaces that of the file. Values are read as they would be
    typed: `010`, `no` and `1:30` are not changed into other values.
    """
    options, words = _read(path), list(words)
    commands = options.pop("command", [""])
    if len(commands) > 1:
        raise CycloptsError(msg=f"{path} names {len(commands)} commands; give one")
    command = commands[0]
    if words and not words[0].startswith("-"):
        if command not in ("", words[0]):
            raise CycloptsError(msg=f"{path} is a config of {command}; give it to that command")
        command, *words = words
    if not command:
        raise CycloptsError(msg=f"{path} names no command; add a line such as command: certify")
    if command.startswith("-") or command not in app:
        raise CycloptsError(msg=f"{path} is a config of {command!r}; give a command that exists")
    known = {name: option for option in _options(app, command) for name in option.names}
    given = {word.partition("=")[0] for word in words}
    found = (
        [] if any(not word.startswith("-") for word in words[:1]) else options.pop(_ARGUMENTS, [])
    )
    options.pop(_ARGUMENTS, None)
    for key, values in options.items():
        name = f"--{key.replace('_', '-')}"
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0][2:]}?" if close else f"see {command} --help"
            raise CycloptsError(msg=f"{path}: {command} has no option {key!r}; {hint}")
        if not given.intersection(known[name].names):
            found += _words(path, known[name], name, values)
    return [command, *found, *words]


def write_config(path: Path, app: App, words: Sequence[str]) -> None:
    """Write a command line as YAML, defaults included, so that later versions run the same."""
    import yaml

    command, *rest = words
    options = _options(app, command)
    known = {name: option for option in options for name in option.names}
    given: dict[str, list[str]] = {_ARGUMENTS: []}
    todo = iter(rest)
    for word in todo:
        name, equals, value = word.partition("=")
        if name not in known:
            given[_ARGUMENTS].append(word)
            continue
        values = given.setdefault(known[name].name, [])
        if not _repeats(known[name]):
            values.clear()
        values.append("true" if known[name].hint is bool else value if equals else next(todo))
    lines = {"command": [command], _ARGUMENTS: given[_ARGUMENTS]}
    for option in options:
        lines[option.name[2:]] = given.get(option.name) or _default(option)
    pairs = [(_node(key), _node(*values)) for key, values in lines.items() if values]
    text = yaml.serialize(yaml.MappingNode("tag:yaml.org,2002:map", pairs), allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# art-denoised {__version__}: art-denoised --config {path.name}\n"
    path.write_text(head + text, encoding="utf-8")


def _options(app: App, command: str) -> list[Argument]:
    collection = app[command].assemble_argument_collection(parse_docstring=True)
    return [o for o in collection.filter_by(show=True) if o.name.startswith("-")]


def _default(option: Argument) -> list[str]:
    default, show = option.field_info.default, option.parameter.show_default
    if any(default is nothing for nothing in (None, False, Parameter.empty)):
        return []
    return [str(show(default)) if callable(show) else str(default)]


def _repeats(option: Argument) -> bool:
    """Return whether an option may be given several times, each with one value."""
    return "list" in str(option.hint)


def _words(path: Path, option: Argument, name: str, values: list[str]) -> Iterator[str]:
    if option.hint is bool:
        if values not in (["true"], ["false"]):
            raise CycloptsError(msg=f"{path}: {name[2:]} is {values[-1]!r}; give true or false")
        yield from [name] if values == ["true"] else []
    elif _repeats(option):
        for value in values:
            yield f"{name}={value}"
    else:
        yield f"{name}={','.join(values)}"


def _read(path: Path) -> dict[str, list[str]]:
    """Return the values of each key as they are written, without those that say nothing."""
    import yaml

    try:
        # Nodes alone: nothing is constructed, and a number stays the text that it is.
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CycloptsError(msg=f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise CycloptsError(msg=f"{path} holds no options; give lines such as sigma: 0.25")
    found: dict[str, list[str]] = {}
    for key, value in root.value:
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(node, yaml.ScalarNode) for node in (key, *parts)):
            raise CycloptsError(
                msg=f"{path}: line {key.start_mark.line + 1} is neither a value nor a list"
            )
        name = key.value.replace("-", "_")
        if name in found:
            raise CycloptsError(msg=f"{path}: {key.value} is there twice; give it once")
        plain = [p.value for p in parts if p.style or p.value.lower() not in _NOTHING]
        found[name] = plain
    return {name: values for name, values in found.items() if values}


def _node(*values: str) -> yaml.Node:
    """Return text so that it is written without quotes where YAML allows it."""
    import yaml

    nodes = [
        yaml.ScalarNode(yaml.resolver.Resolver().resolve(yaml.ScalarNode, v, (True, False)), v)
        for v in values
    ]
    return nodes[0] if len(nodes) == 1 else yaml.SequenceNode("tag:yaml.org,2002:seq", nodes)
