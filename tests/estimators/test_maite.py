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


X = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
METADATA = [{"id": 0}, {"id": 1}]


def attacked(targets, images=X):
    attack = MaiteAttack(PGD(0.1, steps=1), digits_classifier(), "pgd")
    return np.stack(attack((list(images), targets, METADATA))[0])


def dataset(image=X[0], label=3):
    return MaiteDataset([(image, label)], "one", 10)[0]


def answers(batch, **options):
    return MaiteModel(digits_classifier(), "digits", **options)(batch)


ONE_HOT = np.eye(10, dtype=np.float32)
MASKED = np.ma.masked_less(X[0], 0.5)
BITS = (X[0] > 0.5).astype(np.uint8)


@pytest.mark.parametrize(
    "targets",
    [[3, 8], np.array([3, 8]), [np.array([3]), np.array([8])], torch.eye(10)[[3, 8]],
     [torch.eye(10)[3].requires_grad_(), torch.eye(10)[8]], [0.9 * ONE_HOT[3], 0.9 * ONE_HOT[8]]],
)  # fmt: skip
def test_targets_of_every_form_are_the_classes_that_they_name(targets):
    """Indices of shape (1,) were attacked as class 0."""
    np.testing.assert_array_equal(attacked(targets), attacked([ONE_HOT[3], ONE_HOT[8]]))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([ONE_HOT[3] * np.nan, ONE_HOT[8]], "NaN"),
        ([ONE_HOT[3] * 0, ONE_HOT[8]], "zero"),
        ([np.full(10, 0.1), ONE_HOT[8]], "likeliest"),
        ([-ONE_HOT[3], ONE_HOT[8]], "negative"),
        ([np.eye(5)[3], np.eye(5)[4]], r"\(2, 5\)"),
        ([10, 3], "label 10"),
        ([ONE_HOT[3]], "2 images and 1 targets"),
        ([ONE_HOT[3], np.eye(5)[3]], "labels"),
        (None, "None"),
        ("38", "'38'"),
    ],
)
def test_targets_that_name_no_class_are_refused(targets, words):
    """They were attacked as class 0, and the model looked robust."""
    with pytest.raises(InputError, match=words):
        attacked(targets)


def test_a_network_that_is_put_into_training_mode_later_is_refused():
    network = digits_classifier()
    model, attack = MaiteModel(network, "a"), MaiteAttack(PGD(0.1, steps=1), network, "b")
    network.train()
    for use in (lambda: model([X[0]]), lambda: attack(([X[0]], [3], METADATA[:1]))):
        with pytest.raises(InputError, match="training mode"):
            use()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (X[0] * 255, "255"),
        (X[0] - 1, "rescale"),
        (X[0] * np.nan, "NaN"),
        (BITS, "uint8"),
        (MASKED, "masked"),
        (X[0, 0], "channels"),
        (None, "NoneType|object"),
        ("image", "str"),
    ],
)
def test_images_that_are_none_are_refused_by_all(image, words):
    for use in (
        lambda: dataset(image),
        lambda: answers([image]),
        lambda: answers([X[0], image]),
        lambda: attacked([3, 8], [image, image]),
    ):
        with pytest.raises(InputError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (2.7, "float"),
        ("3", "str"),
        (True, "bool"),
        (10, "label 10"),
        (-1, "label -1"),
        (ONE_HOT[3], r"\(1, 10\)"),
    ],
)
def test_labels_of_data_are_whole_numbers(label, words):
    """2.7 was class 2, and True was class 1."""
    with pytest.raises(InputError, match=words):
        dataset(label=label)


def test_a_data_set_is_a_sequence():
    data = MaiteDataset([(X[0], 3), (X[1], 8)], "two", 10)
    assert [metadata["id"] for _, _, metadata in data] == [0, 1]  # it ends by an IndexError
    image, target, metadata = data[-1]
    assert (target.argmax(), metadata) == (8, {"id": 1})
    np.testing.assert_array_equal(image, X[1])
    for index in (-3, 0.5, True, "0"):
        with pytest.raises(InputError, match=f"index is {index!r}"):
            data[index]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: answers(None), "batch is None"),
        (lambda: answers("ab"), "batch is 'ab'"),
        (lambda: answers([X[0], X[0, :, :4]]), r"\(1, 4, 8\)"),
        (lambda: answers([X[0].transpose(1, 2, 0)]), r"\(channels, height, width\)"),
        (lambda: answers([[[0.5], [0.5, 0.5]]]), "array"),
        (lambda: answers([X[0]], classes=["a", "b", "c"]), "3 names .* 10 logits"),
        (lambda: MaiteAttack(PGD(0.1), digits_classifier(), "a")(None), "batch is None"),
        (lambda: MaiteAttack(PGD(0.1), digits_classifier(), "a")(([], [])), "2 sequences"),
        (lambda: attacked([3], X[:1]), "1 images and 2 metadata"),
        (lambda: MaiteModel(None, "a"), "model is a NoneType"),
        (lambda: MaiteAttack(None, digits_classifier(), "a"), "attack is None"),
        (lambda: MaiteAttack(PGD(0.1), len, "a"), "builtin_function"),
        (lambda: MaiteDataset([(X[0], 3, {})], "triples", 10)[0], "3 values"),
        (lambda: MaiteDataset(None, "none", 10), "NoneType"),
        (lambda: MaiteModel(digits_classifier().train(), "training"), "training mode"),
        (lambda: MaiteDataset([(X[0], 4)], "few classes", 3)[0], "label 4"),
        (lambda: MaiteDataset([], "one class", 1), "classes is 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_an_attack_that_returns_something_else_is_refused():
    for wrong in (lambda model, x, y: x[:1], lambda model, x, y: (x, y)):
        with pytest.raises(InputError, match="the attack returned"):
            MaiteAttack(wrong, digits_classifier(), "a")((list(X), [3, 8], METADATA))


def test_no_images_give_no_answers():
    assert answers([]) == []
    attack = MaiteAttack(PGD(0.1, steps=1), digits_classifier(), "pgd")
    assert attack(([], [], [])) == ([], [], [])


def test_tensors_with_gradients_are_images():
    """They were a RuntimeError."""
    x = torch.from_numpy(X).requires_grad_()
    np.testing.assert_array_equal(np.stack(answers(list(x))), np.stack(answers(list(X))))
    np.testing.assert_array_equal(attacked([3, 8], list(x)), attacked([3, 8]))
    np.testing.assert_array_equal(dataset(x[0])[0], X[0])
