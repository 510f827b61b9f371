"""Numbers in words, for people."""

from __future__ import annotations


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
