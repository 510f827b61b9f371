"""The images of a run: checked where they enter, and told from any others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from art_denoised.checks import InputError
from art_denoised.data import Chosen, index_range

GREY = torch.full((1, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ((torch.zeros(1, 5, 5), 0), "5, 5"),
        ((GREY, 0, "id"), "3 values"),
        ((Image.new("L", (4, 4)), 0), "Image"),
        ((GREY.byte(), 0), "uint8"),
        ((GREY * 255, 0), "127"),
        ((GREY / 0, 0), "infinite"),
        ((GREY[0], 0), "shape"),
        ((GREY, 1.5), "float"),
        ((GREY, "cat"), "cat|label"),
        ((GREY, True), "bool"),
        ((GREY, -1), "-1"),
        ((GREY, 3), "3"),
        (GREY, "Tensor"),
    ],
)
def test_what_cannot_be_used_is_named(entry, word):
    images = Chosen([(GREY, 0), entry], classes=3)
    with pytest.raises(InputError, match=f"(?s)image 1: .*({word})") as error:
        list(images)
    assert "\n" not in str(error.value)


def test_arrays_and_integers_of_every_kind_are_taken():
    entries = [(GREY.numpy(), np.int64(2)), (GREY.double(), torch.tensor(1)), [GREY, 0]]
    assert [label for _, _, label in Chosen(entries, classes=3)] == [2, 1, 0]
    assert all(x.dtype == torch.float32 for _, x, _ in Chosen(entries))


@pytest.mark.parametrize(
    ("indices", "header"),
    [
        (range(0, 9, 4), "0:9:4"),
        ([5], "5:6:1"),
        ([3, 1], [3, 1]),
        ([0, 1, 3], [0, 1, 3]),
        ([], []),
    ],
)
def test_indices_survive_a_header(indices, header):
    settings = Chosen([(GREY, 0)] * 10, indices).settings()
    assert settings["indices"] == header
    assert list(index_range(header)) == list(indices)


def test_settings_tell_images_labels_and_choice_apart():
    data = [(GREY, 0), (GREY + 0.1, 1)]
    others = {
        "pixels": ([data[0], (GREY + 0.11, 1)], None),
        "labels": ([data[0], (GREY + 0.1, 0)], None),
        "indices": (data, [1, 0]),
        "images": (data, [0]),
    }
    for name, (other, indices) in others.items():
        assert Chosen(other, indices).settings()[name] != Chosen(data).settings()[name]
    assert Chosen(list(data)).settings() == Chosen(data).settings()


@pytest.mark.parametrize("classes", [10, np.arange(3), torch.arange(3), lambda: 3, [1, 2], None])
def test_only_names_of_classes_are_recorded(classes):
    class Named(list):
        pass

    data = Named([(torch.zeros(1, 2, 2), 0)])
    data.classes = classes
    assert "classes" not in Chosen(data).settings()
