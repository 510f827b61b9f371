"""Numbers in words."""

from __future__ import annotations

from art_denoised.checks.values import counted, duration, memory, operations


def test_units_are_the_largest_that_fit():
    assert [duration(seconds) for seconds in (0.42, 42, 110, 600, 9e4)] == [
        "0.42 s",
        "42 s",
        "110 s",
        "10 min",
        "25 h",
    ]
    assert [operations(n) for n in (12, 2.5e6, 3e18)] == ["12 FLOP", "2.5 MFLOP", "3 EFLOP"]
    assert "2,048 MiB" in memory(2**31)


def test_one_is_singular():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
