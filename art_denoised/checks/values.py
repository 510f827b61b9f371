"""Values that a user hands in: what they must be; and numbers in words.

Without torch, so that pages of help are quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set, Sized
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np


class InputError(ValueError):
    """The input cannot be used; the message names the value and the remedy.

    Args:
        message: What is wrong, with the value.
        **remedy: Arguments of the called function that would mend it, such as ``resume=True``; the
            command line names their options.

    Attributes:
        remedy: These arguments and their values.
    """

    def __init__(self, message: str, **remedy: Any) -> None:
        super().__init__(message)
        self.remedy = remedy


def one_line(error: BaseException) -> str:
    r"""Return the message of an error on one line, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(value: object) -> str:
    """Return the repr of a value on one line, shortened where it is long."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 80 else f"{line[:77]}..."


@contextlib.contextmanager
def in_one_line(who: str, remedy: str) -> Iterator[None]:
    """Turn any error of code that is not ours into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise InputError(f"{who} failed: {kind}: {one_line(error)}; {remedy}") from error


def real(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a float; words and truth values are no numbers."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(_no_bool(_plain(value)))
    except (TypeError, ValueError):
        pass
    raise InputError(f"{name} is {value!r}; give a number")


def plain_fields(owner: Any) -> None:
    """Let a dataclass hold Python's own numbers where it was given those of NumPy or torch.

    Checks accept a tensor or an array that holds one number, and a fraction. Code that computes
    with them later does not.
    """
    for field in dataclasses.fields(owner):
        object.__setattr__(owner, field.name, _plain(getattr(owner, field.name)))


def flag(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False: a word such as "no" would count as True."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InputError(f"{name} is {value!r}; give True or False")


def positive(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a positive, finite float."""
    number = real(name, value)
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} is {value}; give a positive number")
    return number


def share(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as a float in (0, 1)."""
    number = real(name, value)
    if not 0 < number < 1:
        raise InputError(f"{name} is {value}; give a number in (0, 1)")
    return number


def sigma(value: SupportsFloat, clip_values: tuple[Any, Any] = (0.0, 1.0)) -> float:
    """Return the noise level as a float in image units.

    One far above the range of the pixels is refused: it was meant in other units, as 0 to 255.
    """
    number = positive("sigma", value)
    low, high = pixel_range(clip_values)
    if number > 10 * (high - low):
        raise InputError(
            f"sigma is {number:g}, more than ten times the range of the images "
            f"[{low:g}, {high:g}]; give it in image units (for example 64/255 = 0.25)"
        )
    return number


def pixel_range(clip_values: tuple[Any, Any]) -> tuple[float, float]:
    """Return the smallest and the largest pixel value of a range, scalars or arrays."""
    smallest, largest = pixel_bounds(clip_values)
    return float(smallest.min()), float(largest.max())


def pixel_bounds(
    clip_values: tuple[Any, Any], image: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of a range of pixels as arrays of one shape: one for all pixels, or each.

    ``image`` is the (channels, height, width) that arrays must fit.
    """
    try:
        bounds = [np.asarray(value) for value in clip_values]
        if len(bounds) == 2 and all(bound.dtype.kind in "iufO" for bound in bounds):
            low, high = np.broadcast_arrays(*(bound.astype(np.float64) for bound in bounds))
            if np.all(np.isfinite(high - low)) and np.all(low < high):
                # A row of three numbers is not one for each channel: it would run along the width.
                if image is None or low.ndim == 0 or low.shape in (image, (image[0], 1, 1)):
                    return low, high
                raise InputError(
                    f"clip_values have shape {low.shape}; give two numbers, or arrays of shape "
                    f"{image}"
                )
    except InputError:
        raise
    except (TypeError, ValueError):
        pass
    raise InputError(f"clip_values are {shown(clip_values)}; give a smaller and a larger number")


def unit_range(who: str, clip_values: tuple[Any, Any] | None) -> None:
    """Check that ``clip_values`` are (0, 1), the range in which ``who`` takes images.

    None, which ART classifiers may have, names no other range.
    """
    if clip_values is None:
        return
    low, high = pixel_bounds(clip_values)
    if np.any(low != 0) or np.any(high != 1):
        raise InputError(
            f"clip_values are ({low.min():g}, {high.max():g}), but {who} takes images in [0, 1]; "
            "give (0, 1), with the scaling as a part of the model"
        )


def eps(value: SupportsFloat, norm: str = "linf") -> float:
    """Return the radius of an attack as a float in image units; 0 is no attack.

    In the l_inf norm it is at most 1, the range of the pixels.
    """
    number = real("eps", value)
    if not 0 <= number < math.inf:
        raise InputError(f"eps is {value}; give a number >= 0")
    if norm == "linf" and number > 1:
        raise InputError(
            f"eps is {number:g}, more than the range of the images; give it in image units, "
            f"{number:g}/255 = {number / 255:.3g}"
        )
    return number


def alpha(value: SupportsFloat) -> float:
    """Return the failure probability of one certificate as a float in (0, 0.5)."""
    number = real("alpha", value)
    if not 0 < number < 0.5:
        raise InputError(f"alpha is {value}; give a failure probability in (0, 0.5), usually 0.001")
    return number


def count(name: str, value: SupportsIndex, minimum: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum``."""
    try:
        number = _no_bool(value).__index__()
    except (AttributeError, TypeError):
        raise InputError(f"{name} is {value!r}; give a whole number >= {minimum}") from None
    if number < minimum:
        raise InputError(f"{name} is {number}; give a whole number >= {minimum}")
    return number


def successes(k: SupportsIndex, n: SupportsIndex) -> tuple[int, int]:
    """Return the numbers of successes and of trials as ints."""
    trials = count("n", n)
    number = count("k", k, 0)
    if number > trials:
        raise InputError(f"k is {number}, but n is {trials}; give the successes among n trials")
    return number, trials


def seed(value: SupportsIndex | None) -> int | None:
    """Return a seed as a non-negative int; None, for fresh noise, stays None."""
    return None if value is None else count("seed", value, 0)


def path(name: str, value: Any) -> Path:
    """Return the path of a folder or a file."""
    if isinstance(value, (str, os.PathLike)) and str(value):
        return Path(value)
    raise InputError(f"{name} is {value!r}; give the path of a folder or a file")


def json_values(name: str, value: Any) -> dict[str, Any]:
    """Return a mapping as JSON keeps it; None is an empty one."""
    try:
        if value is None or isinstance(value, Mapping):
            found: dict[str, Any] = json.loads(json.dumps(dict(value or {}), allow_nan=False))
            return found
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be written as JSON ({error}); give plain values") from None
    raise InputError(f"{name} is {value!r}; give a mapping of names to plain values")


def one_each(images: Sized, others: Sized, name: str = "labels") -> None:
    """Check that there is one label, or one of something else, for each image."""
    if len(images) != len(others):
        raise InputError(
            f"there are {len(images)} images and {len(others)} {name}; give one for each"
        )


def sample_count(n: SupportsIndex, alpha: float) -> int:
    """Return ``n`` if that many samples can certify anything at all at ``alpha``."""
    number, needed = count("n", n), fewest_samples(alpha)
    if number < needed:
        raise InputError(
            f"n is {number}; at alpha = {alpha:g} no image can be certified "
            f"with fewer than {needed} samples"
        )
    return number


def fewest_samples(alpha: float) -> int:
    """Return the number of unanimous samples from which something can be certified.

    The Clopper-Pearson bound is then alpha^(1/n), which must exceed 1/2.
    """
    return math.floor(-math.log2(alpha)) + 1


def radii(values: Sequence[SupportsFloat]) -> tuple[float, ...]:
    """Return l2 radii as floats, ascending and each once."""
    numbers = sorted({real("radius", value) for value in several("radii", values)})
    for number in numbers:
        if not 0 <= number < math.inf:
            raise InputError(f"radius is {number}; give numbers >= 0 in image units")
    return tuple(numbers)


def numbers(name: str, values: Sequence[SupportsFloat]) -> tuple[float, ...]:
    """Return several numbers as floats, in their order."""
    return tuple(real(name, value) for value in several(name, values))


def words(name: str, values: Iterable[str]) -> tuple[str, ...]:
    """Return several words in their order, which a set does not have; one word is no list."""
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Set, Mapping)):
        found = tuple(values)
        if all(isinstance(word, str) for word in found):
            return found
        values = found
    raise InputError(f"{name} is {values!r}; give a list of words")


def shape(name: str, value: Sequence[SupportsIndex]) -> tuple[int, ...]:
    """Return the shape of an image as ints."""
    if isinstance(value, Sized) and not isinstance(value, (str, bytes, Mapping)):
        return tuple(count(name, side) for side in several(name, value))
    raise InputError(f"{name} is {value!r}; give (channels, height, width)")


def indices(values: Sequence[SupportsIndex], images: int) -> list[int]:
    """Return different indices of ``images`` images as ints."""
    numbers = [count("index", value, 0) for value in several("indices", values)]
    for number in numbers:
        if number >= images:
            raise InputError(f"image {number} is not in the data; give indices 0 to {images - 1}")
    if len(set(numbers)) != len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise InputError(f"image {twice} is named twice; give each index once")
    return numbers


def choice(name: str, value: str, known: Collection[str]) -> str:
    """Return a word that must be one of several; the error names the nearest."""
    if value in known:
        return value
    close = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
    listed = ", ".join(sorted(known)[:12]) + (", ..." if len(known) > 12 else "")
    raise InputError(
        f"{name} is {value!r}; "
        + (f"did you mean {close[0]}?" if close else f"give one of {listed}")
    )


def float_name(dtype: Any, known: Collection[str]) -> str:
    """Return the name of a type in which a network computes, which may be given as torch's."""
    return choice("dtype", str(dtype).removeprefix("torch."), known)


class OneOf:
    """Attribute that can only be set to one of the choices that its owner names."""

    def __init__(self, choices: str) -> None:
        self._choices = choices

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type | None = None) -> str:
        value: str = owner.__dict__[self._name]
        return value

    def __set__(self, owner: Any, value: str) -> None:
        # In the owner's own attributes, because these tell one model from another.
        owner.__dict__[self._name] = choice(self._name, value, getattr(owner, self._choices))


def several(name: str, values: Any, content: str = "numbers") -> list[Any]:
    """Return the entries of a sequence; a word, a mapping or a single thing is none."""
    try:
        if not isinstance(values, (str, bytes, Mapping)):
            return list(values)
    except TypeError:
        pass
    example = f", such as [{values}]" if content == "numbers" else ""
    raise InputError(f"{name} is {shown(values)}; give a sequence of {content}{example}")


def _plain(value: Any) -> Any:
    """Return one number as Python's, also within a tuple; anything else as it is."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(_plain, value))
    if isinstance(value, (Fraction, Decimal)):
        return float(value)
    if hasattr(value, "dtype") and hasattr(value, "item") and math.prod(value.shape) == 1:
        return value.item()
    return value


def _no_bool(value: Any) -> Any:
    """Return a value, unless it is a truth value: a mask is not a list of indices."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError
    return value


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Return a time, such as "42 s", "10 min" or "2.5 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def operations(flop: float) -> str:
    """Return a number of floating-point operations, such as "1.5 TFLOP"."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flop >= size:
            return f"{flop / size:.3g} {prefix}FLOP"
    return f"{flop:.0f} FLOP"


def memory(size: float) -> str:
    """Return what is held in memory, such as "about 150 MiB at once"."""
    return f"about {size / 2**20:,.0f} MiB at once"
