"""Arrays, photographs, checkpoints and command lines that no program wrote on purpose."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.torch import save

from art_denoised.demo import digits_denoiser
from tests.cli.command import MODEL
from tests.fuzz.held import damaged, fuzzed, outcome

CERTIFY = [
    "certify",
    "--quiet",
    "--model",
    MODEL,
    "--sigma",
    "0.25",
    "--n",
    "8",
    "--batch-size",
    "8",
]


def certify(folder: str, *words: object) -> int:
    return outcome([*CERTIFY, "--max", "2", "--out", f"{folder}/run", *words])


def written(**members: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


def picture(size: tuple[int, int] = (8, 8), mode: str = "L", form: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


DTYPES = st.one_of(
    arrays.integer_dtypes(),
    arrays.floating_dtypes(),
    arrays.boolean_dtypes(),
    arrays.unicode_string_dtypes(max_len=3),
    arrays.datetime64_dtypes(),
    arrays.complex_number_dtypes(),
)
SHAPES = st.one_of(
    st.sampled_from([(3, 8, 8), (3, 8, 8, 1), (3, 1, 8, 8), (3, 3, 8, 8), (3,), ()]),
    arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)


@fuzzed
@given(images=arrays.arrays(DTYPES, SHAPES), labels=arrays.arrays(DTYPES, SHAPES | st.just((3,))))
def test_any_two_arrays(images, labels):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        path.write_bytes(written(images=images, labels=labels))
        certify(folder, "--data", f"npz:{path}")


@fuzzed
@given(st.data())
def test_a_damaged_npz(data):
    x = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
    content = data.draw(damaged(written(images=x, labels=np.array([1, 2]))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        path.write_bytes(content)
        certify(folder, "--data", f"npz:{path}")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
@fuzzed
@given(data=st.data())
def test_a_damaged_photograph(form, data):
    content = data.draw(damaged(picture(form=form)) | st.just(picture((8, 9), form=form)))
    with tempfile.TemporaryDirectory() as folder:
        for name, held in (("0", picture()), ("1", content)):
            (Path(folder) / "images" / name).mkdir(parents=True)
            (Path(folder) / "images" / name / f"x.{form.lower()}").write_bytes(held)
        certify(folder, "--data", f"imagefolder:{folder}/images")


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, bytes]:
    state = {name: value.contiguous() for name, value in digits_denoiser().state_dict().items()}
    zipped = io.BytesIO()
    torch.save(state, zipped)
    return {".safetensors": save(state), ".pth": zipped.getvalue()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@fuzzed
@given(data=st.data())
def test_a_damaged_checkpoint(checkpoints, suffix, data):
    whole = checkpoints[suffix]
    content = data.draw(damaged(whole[:3000]).map(lambda head: head + whole[3000:]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"denoiser{suffix}"
        path.write_bytes(content)
        certify(folder, "--data", "digits", "--denoiser", path)


NUMBERS = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["0x10", "1e3", "1_0", "auto", "8/255", "0,0.25", ",", "0.1,0.1", "nan", "٣", "1e400"]
    ),
)
WORDS = NUMBERS | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6
)
_NAMES = """
    sigma n n0 alpha radii deadline max skip seed batch-size noise dtype device denoiser model data
    classes tsv resume eps attacks
"""
OPTIONS = st.sampled_from([f"--{name}" for name in _NAMES.split()])


@fuzzed
@given(
    command=st.sampled_from(["certify", "predict"]),
    extra=st.lists(st.tuples(OPTIONS, WORDS), max_size=3),
)
def test_any_options_of_certify(command, extra):
    """Values are small, so that what is accepted is finished in a moment."""
    small = [word for pair in extra for word in pair]
    with tempfile.TemporaryDirectory() as folder:
        outcome(
            [
                command,
                *CERTIFY[1:],
                "--data",
                "digits",
                *small,
                "--max",
                "1",
                "--out",
                f"{folder}/run",
            ]
        )


@fuzzed
@given(st.lists(st.tuples(OPTIONS, WORDS), max_size=3))
def test_any_options_of_attack(extra):
    words = ["attack", "--quiet", "--model", MODEL, "--data", "digits", "--eps", "0.1"]
    small = [word for pair in extra for word in pair]
    with tempfile.TemporaryDirectory() as folder:
        last = ["--attacks", "pgd:steps=1", "--max", "1", "--no-checks", "--out", f"{folder}/run"]
        outcome([*words, *small, *last])


@fuzzed
@given(
    st.lists(
        WORDS | OPTIONS | st.sampled_from(["table", "plot", "report", "verify", "demo", "-o"]),
        max_size=4,
    )
)
def test_any_words(words):
    if words[:1] != ["demo"]:
        outcome(words)
