"""What a word on the command line means: numbers, lists, durations and names of factories."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter, Token
from cyclopts.validators import Number as InRange


def reads(parse: Callable[[str], Any], metavar: str, **options: Any) -> Parameter:
    """Return how cyclopts reads an option whose single word ``parse`` turns into a value.

    Args:
        parse: Function of the word; its ValueError becomes the message.
        metavar: Name of the word in help pages.
        **options: Other options of `Parameter`.
    """

    def convert(type_: Any, tokens: Sequence[Token]) -> Any:
        return parse(tokens[-1].value)

    def show(default: Any) -> str:
        return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)

    return Parameter(
        converter=convert,
        n_tokens=1,
        accepts_keys=False,
        metavar=metavar,
        show_default=show,
        **options,
    )


def number(text: str) -> float:
    """Parse a number or a fraction.

    Example:
        >>> number("0.5"), number("51/255")
        (0.5, 0.2)
    """
    above, slash, below = text.partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a number; give one, or a fraction such as 8/255")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers joined by commas.

    Example:
        >>> numbers("0,0.25")
        (0.0, 0.25)
    """
    return tuple(number(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Parse names joined by commas.

    Example:
        >>> names("exact, bpda")
        ('exact', 'bpda')
    """
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise ValueError(f"{text!r} holds no name; join names by commas")
    return found


def duration(text: str) -> float:
    """Parse a duration into seconds.

    Example:
        >>> duration("90"), duration("10m"), duration("1.5h")
        (90.0, 600.0, 5400.0)
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise ValueError(f"{text!r} is not a duration; give seconds, or 90s, 10m or 2h")
    return seconds


def factory(text: str) -> str:
    """Parse the name of a factory; a path to a Python file stands for its module.

    Example:
        >>> factory("mynets:resnet20"), factory("mynets/small.py:resnet20")
        ('mynets:resnet20', 'mynets.small:resnet20')
    """
    module, colon, name = text.partition(":")
    if not colon or not module.endswith(".py"):
        return text
    parts = module.removesuffix(".py").removeprefix("./").split("/")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{text!r} is outside the current folder; give package.module:function")
    return f"{'.'.join(parts)}:{name}"


def norm(text: str) -> str:
    """Parse a norm in any spelling.

    Example:
        >>> norm("Linf"), norm("L_2")
        ('linf', 'l2')
    """
    plain = text.lower().replace("_", "")
    if plain not in ("linf", "l2"):
        raise ValueError(f"{text!r} is not a norm; give linf or l2")
    return plain


Number: TypeAlias = Annotated[float, reads(number, "X")]
Numbers: TypeAlias = Annotated[tuple[float, ...], reads(numbers, "X,X,...")]
Radii: TypeAlias = Annotated[tuple[float, ...], reads(numbers, "R,R,...", validator=InRange(gte=0))]
BallSizes: TypeAlias = Annotated[
    tuple[float, ...], reads(numbers, "E,E,...", validator=InRange(gt=0))
]
Widths: TypeAlias = Annotated[
    tuple[int, ...], reads(lambda text: tuple(map(int, text.split(","))), "W,W,...")
]
Names: TypeAlias = Annotated[tuple[str, ...], reads(names, "A,A,...")]
Duration: TypeAlias = Annotated[float, reads(duration, "TIME")]
Factory: TypeAlias = Annotated[str, reads(factory, "FACTORY")]
Norm: TypeAlias = Annotated[Literal["linf", "l2"], reads(norm, "NORM")]
