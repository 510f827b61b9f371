"""What a word on the command line means: numbers, lists, durations and names of factories."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias, get_args

from cyclopts import Parameter, Token


def reads(parse: Callable[[str], Any], metavar: str) -> Parameter:
    """Return how cyclopts reads an option whose single word ``parse`` turns into a value.

    Args:
        parse: Function of the word; its ValueError becomes the message.
        metavar: Name of the word in help pages.
    """

    def convert(type_: Any, tokens: Sequence[Token]) -> Any:
        return parse(tokens[-1].value)

    def show(default: Any) -> str:
        return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)

    return Parameter(
        converter=convert, n_tokens=1, accepts_keys=False, metavar=metavar, show_default=show
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


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(","))


def radii(text: str) -> tuple[float, ...]:
    """Parse certified radii.

    Example:
        >>> radii("0,0.25")
        (0.0, 0.25)
    """
    values = _numbers(text)
    if min(values) < 0:
        raise ValueError(f"{text!r} holds a negative radius; give numbers >= 0")
    return values


def ball_sizes(text: str) -> tuple[float, ...]:
    """Parse the eps of attacks.

    Example:
        >>> ball_sizes("51/255,0.5")
        (0.2, 0.5)
    """
    values = _numbers(text)
    if min(values) <= 0:
        raise ValueError(f"{text!r} holds an eps that is not positive; give numbers > 0")
    return values


def noise_levels(text: str) -> float | tuple[float, float]:
    """Parse a noise level, or a range of them.

    Example:
        >>> noise_levels("0.25"), noise_levels("0.1,0.5")
        (0.25, (0.1, 0.5))
    """
    low, *more = _numbers(text)
    if len(more) > 1:
        raise ValueError(f"{text!r} has {len(more) + 1} numbers; give one noise level or two")
    return (low, more[0]) if more else low


def whole_numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers.

    Example:
        >>> whole_numbers("32,64")
        (32, 64)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of whole numbers, as in 32,64") from None


def names(text: str) -> tuple[str, ...]:
    """Parse names.

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


def batch_size(text: str) -> int | None:
    """Parse a batch size; ``auto`` is None.

    Example:
        >>> batch_size("auto"), batch_size("64")
        (None, 64)
    """
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a batch size; give a whole number or auto") from None


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
        raise ValueError(f"{text!r} is outside the current folder; give package.module:factory")
    return f"{'.'.join(parts)}:{name}"


def choice(literal: Any) -> Parameter:
    """Return how cyclopts reads one of these words in any spelling: ``Linf`` and ``L_inf`` too."""
    known = {_plain(word): word for word in get_args(literal)}

    def parse(text: str) -> str:
        if _plain(text) not in known:
            raise ValueError(f"{text!r} is none of {', '.join(known.values())}")
        return known[_plain(text)]

    return reads(parse, "NAME")


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def not_negative(type_: Any, value: Any) -> None:
    """Refuse a number that is negative or not finite; a validator of cyclopts."""
    if value is not None and not 0 <= value < math.inf:
        raise ValueError("Give a number >= 0.")


Number: TypeAlias = Annotated[float, reads(number, "X")]
Radii: TypeAlias = Annotated[tuple[float, ...], reads(radii, "R,R,...")]
BallSizes: TypeAlias = Annotated[tuple[float, ...], reads(ball_sizes, "E,E,...")]
NoiseLevels: TypeAlias = Annotated[float | tuple[float, float], reads(noise_levels, "S|LOW,HIGH")]
Widths: TypeAlias = Annotated[tuple[int, ...], reads(whole_numbers, "W,W,...")]
Names: TypeAlias = Annotated[tuple[str, ...], reads(names, "A,A,...")]
Duration: TypeAlias = Annotated[float, reads(duration, "TIME")]
BatchSize: TypeAlias = Annotated[int | None, reads(batch_size, "N|auto")]
Factory: TypeAlias = Annotated[str, reads(factory, "FACTORY")]
