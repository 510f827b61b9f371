"""What every command must do with any input: its work, or one line and exit code 2."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from art_denoised.cli import main

# `make fuzz` asks for thousands of new examples; by default the same few are drawn each time.
_ASKED = os.environ.get("FUZZ_EXAMPLES")
fuzzed = settings(
    max_examples=int(_ASKED or 6),
    derandomize=_ASKED is None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

GOLDEN = Path(__file__).parent.parent / "golden" / "logs"


def outcome(words: Sequence[object]) -> int:
    """Run a command, and return its exit code once what it said is known to be in order."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])  # an exception of its own is a failure
    said = [line for line in err.getvalue().splitlines() if not line.startswith("notice: ")]
    if code == 2:
        assert len(said) == 1, err.getvalue()
        assert said[0].startswith("art-denoised: error: "), err.getvalue()
        assert len(said[0]) < 2_000, err.getvalue()
    else:
        assert code in (0, 1), (code, err.getvalue())
        assert "Traceback" not in err.getvalue()
    return code


@st.composite
def damaged(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """The bytes of a file after a few accidents: bits, runs, a cut, a repeat, other bytes."""
    held = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        if not held:
            break
        start = draw(st.integers(0, len(held) - 1))
        stop = min(len(held), start + draw(st.integers(1, 40)))
        match draw(st.sampled_from(["flip", "drop", "cut", "repeat", "replace"])):
            case "flip":
                held[start] ^= draw(st.integers(1, 255))
            case "drop":
                del held[start:stop]
            case "cut":
                del held[start:]
            case "repeat":
                held[stop:stop] = held[start:stop]
            case "replace":
                held[start:stop] = draw(st.binary(max_size=40))
    return bytes(held)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from(
        [-1, 0, 1, 2, 2**31, 2**63, 0.25, 1e-320, 1e308, "0.25", "3", "", "NaN", "é\n"]
    ),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def rewritten(draw: st.DrawFn, value: object, most: int = 3) -> object:
    """A JSON value in which a few places hold something else, are gone, or were added."""
    for _ in range(draw(st.integers(1, most))):
        value = _edited(draw, value)
    return value


def _edited(draw: st.DrawFn, value: object) -> object:
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.integers(0, 7)):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, draw(st.text(max_size=5)): draw(VALUES)}
            case _:
                return {**value, key: _edited(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _edited(draw, value[at]), *value[at + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and draw(st.booleans()):
        return value * draw(st.sampled_from([-1, 0, 2, 1.5, 10**6])) + draw(st.integers(-1, 1))
    return draw(VALUES)
