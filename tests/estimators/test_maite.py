"""MAITE's own tasks evaluate our models on our data, also under our attacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from maite.protocols import image_classification as ic
from maite.tasks import evaluate

from art_denoised.attacks import PGD
from art_denoised.checks import InputError
from art_denoised.data import load_data
from art_denoised.demo import digits_classifier
from art_denoised.estimators import MaiteAttack, MaiteDataset, MaiteModel

NAMES = [f"digit {i}" for i in range(10)]


class Accuracy:
    metadata = {"id": "accuracy"}  # noqa: RUF012

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right: list[bool] = []

    def update(self, predictions, targets, metadata) -> None:
        pairs = zip(predictions, targets, strict=True)
        self.right += [bool(np.argmax(p) == np.argmax(t)) for p, t in pairs]

    def compute(self) -> dict[str, float]:
        return {"accuracy": float(np.mean(self.right))}


@pytest.fixture(scope="module")
def faces():
    data = [load_data("digits")[i] for i in range(20)]
    network = digits_classifier()
    attack = MaiteAttack(PGD(0.2, steps=10), network, "pgd")
    return MaiteModel(network, "digits", NAMES), MaiteDataset(data, "held out", NAMES), attack


def test_they_are_what_the_protocols_ask_for(faces):
    model, data, attack = faces
    assert isinstance(model, ic.Model)
    assert isinstance(data, ic.Dataset)
    assert isinstance(attack, ic.Augmentation)
    assert model.metadata["index2label"][3] == data.metadata["index2label"][3] == "digit 3"


def test_maite_measures_accuracy_and_robust_accuracy(faces):
    model, data, attack = faces
    options = {"model": model, "metric": Accuracy(), "dataset": data, "batch_size": 8}
    clean, _, _ = evaluate(**options)
    attacked, _, _ = evaluate(augmentation=attack, **options)
    assert clean["accuracy"] >= 0.9
    assert attacked["accuracy"] <= 0.3


def test_probabilities_are_those_of_the_module(faces):
    model, data, _ = faces
    x = np.stack([data[i][0] for i in range(3)])
    with torch.no_grad():
        expected = digits_classifier()(torch.from_numpy(x)).softmax(1)
    np.testing.assert_allclose(np.stack(model(list(x))), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MaiteModel(digits_classifier().train(), "training"),
        lambda: MaiteModel(digits_classifier(), "byte")([np.full((1, 8, 8), 255.0)]),
        lambda: MaiteDataset([(torch.zeros(1, 8, 8), 4)], "few classes", 3)[0],
        lambda: MaiteDataset([], "one class", 1),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(InputError):
        wrong()
