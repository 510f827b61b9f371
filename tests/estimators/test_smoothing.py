"""The ART estimator: one function behind all faces, and the faults of ART's own class absent."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from art.defences.postprocessor import Rounded
from art.defences.preprocessor import SpatialSmoothing
from art.estimators.certification.randomized_smoothing.randomized_smoothing import (
    RandomizedSmoothingMixin,
)
from art.estimators.classification import PyTorchClassifier
from torch import nn

from art_denoised import DenoisedSmoothing, FixedN, Smoother
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier


@pytest.fixture(scope="module")
def x(digits) -> np.ndarray:
    return digits[0][:12].numpy()


@pytest.fixture(scope="module")
def y(digits) -> np.ndarray:
    return digits[1][:12].numpy()


def test_is_both_kinds_of_estimator(make):
    assert isinstance(make(), PyTorchClassifier)
    assert isinstance(make(), RandomizedSmoothingMixin)
    assert make().scale == 0.25


def test_predict_is_the_function_of_the_model(make, x):
    """Several ART attacks rebuild a plain classifier around .model; it must agree."""
    smoothed = make()
    plain = PyTorchClassifier(smoothed.model, nn.CrossEntropyLoss(), (1, 8, 8), 10)
    predictions = smoothed.predict(x)
    assert predictions.dtype == np.float32
    assert np.array_equal(predictions, plain.predict(x))
    with torch.no_grad():
        assert np.allclose(predictions, smoothed.model(torch.from_numpy(x)), atol=1e-6)
    assert np.allclose(np.exp(predictions).sum(1), 1, atol=1e-5)
    assert (predictions < 0).all()
    assert np.allclose(predictions, smoothed.predict(x.astype(np.float64), batch_size=5), atol=1e-5)


def test_certify_returns_arts_pair(make, x):
    smoothed = make(sample_size=50)
    labels, radii = smoothed.certify(x, n=200, batch_size=16)
    assert labels.shape == radii.shape == (12,)
    assert np.issubdtype(labels.dtype, np.integer)
    certificates = smoothed.certificates(x, n=200)
    assert [c.label for c in certificates] == labels.tolist()
    assert certificates[0].n0 == 50
    smoother = Smoother(smoothed.model.base, sigma=0.25, seed=0)
    assert [certificates[3]] == smoother.certify(x[3:4], FixedN(200, n0=50), first_index=3)


def test_certify_table_proves_the_same_from_fewer_samples(make, x, y):
    smoothed = make()
    radii = [0.0, 0.2]
    table, certificates = smoothed.certify_table(x, y, radii, n=1500)
    full = smoothed.certificates(x, n=1500)
    assert [row.radius for row in table] == radii
    for row in table:
        right = [
            c.label == label and c.proves(row.radius) for c, label in zip(full, y, strict=True)
        ]
        assert row.certified_accuracy == pytest.approx(np.mean(right), abs=1.5 / len(x))
        assert row.low <= row.certified_accuracy <= row.high
    assert sum(c.drawn for c in certificates) < 1500 * len(x) / 3
    one_hot = smoothed.certify_table(x, np.eye(10)[y], radii, n=1500, batch_size=5)
    assert one_hot == (table, certificates)  # whatever the batches


def test_certify_table_refuses_what_makes_no_table(make, x, y):
    with pytest.raises(InputError, match="radii is empty"):
        make().certify_table(x, y, [])
    with pytest.raises(InputError, match="labels"):
        make().certify_table(x, y[:-1], [0.2])
    with pytest.raises(InputError, match="radius is -1"):
        make().certify_table(x, y, [-1.0])


def test_quantised_certificates(make, x):
    levels = (x * 255).round() / 255
    (c,) = make().certificates(levels[:1], n=200, noise="quantised")
    assert c.noise == "quantised"
    with pytest.raises(InputError, match="multiples of 1/255"):
        make().certificates(x[:1] + 0.001 * (x[:1] < 0.5), n=200, noise="quantised")


def test_abstention_is_minus_one_and_never_class_0(make, x):
    class Coin(nn.Module):
        """Class 0 or 1 by the sign of one noisy pixel."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sign = x[:, 0, 0, 0]
            return torch.stack([sign, -sign, *[sign * 0 - 9] * 8], dim=1)

    coin = make(classifier=Coin().eval(), denoiser=None)
    labels, radii = coin.certify(x * 0, n=200)
    assert labels.tolist() == [-1] * 12
    assert radii.tolist() == [0.0] * 12
    assert coin.vote(x * 0, n=200).tolist() == [-1] * 12


def test_votes_agree_with_certified_labels(make, x):
    smoothed = make()
    labels, radii = smoothed.certify(x, n=300)
    votes = smoothed.vote(x, n=300)
    sure = (labels != -1) & (radii > 0.1)
    assert sure.sum() > 5
    assert (votes[sure] == labels[sure]).all()


def test_seed_fixes_results_and_none_does_not(make, x):
    assert make().certificates(x[:2], n=100) == make().certificates(x[:2], n=100, batch_size=3)
    fresh = make(seed=None)
    first, second = (fresh.certificates(x[:1], n=100)[0] for _ in range(2))
    assert first.seed != second.seed
    assert not np.array_equal(fresh.predict(x), fresh.predict(x))


class Recorder(nn.Module):
    """Keeps what reaches the network behind the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())
        return x.flatten(1)[:, :10] * self.scale


def test_noise_is_in_image_units_everywhere(make, x):
    """With ART preprocessing (x - mean) / std the network sees noise of sigma / std throughout."""
    recorder = Recorder().eval()
    wrapped = PyTorchClassifier(
        recorder, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), preprocessing=(0.5, 0.2)
    )
    smoothed = make(classifier=wrapped, denoiser=None, samples=500, max_batch=10_000)
    grey, label = np.full((1, 1, 8, 8), 0.5, np.float32), np.array([1])
    for use in (
        lambda: smoothed.certify(grey, n=400),
        lambda: smoothed.vote(grey, n=500),
        lambda: smoothed.predict(grey),
        lambda: smoothed.loss_gradient(grey, label),
        lambda: smoothed.class_gradient(grey, label),
    ):
        recorder.seen.clear()
        use()
        noisy = [image for image in torch.cat(recorder.seen) if image.std() > 0]  # not padding
        values = torch.stack(noisy).flatten()
        # 32,000 values: five standard errors of the standard deviation are 2%.
        assert float(values.std()) == pytest.approx(0.25 / 0.2, rel=0.02)


def test_class_gradient(make, x, y):
    smoothed = make()
    every = smoothed.class_gradient(x)
    assert every.shape == (12, 10, 1, 8, 8)
    assert np.allclose(smoothed.class_gradient(x, 3)[:, 0], every[:, 3], atol=1e-6)
    assert np.allclose(smoothed.class_gradient(x, y)[:, 0], every[np.arange(12), y], atol=1e-6)
    one_hot = np.eye(10, dtype=np.float32)[y]
    mean_loss = -every[np.arange(12), y] / 12
    assert np.allclose(smoothed.loss_gradient(x, one_hot), mean_loss, atol=1e-6)


def test_params_reach_every_part(make, x):
    smoothed = make()
    smoothed.set_params(sigma=0.5, seed=4, samples=3, alpha=0.01, sample_size=20)
    assert smoothed.model.sigma == smoothed.model.base.sigma == smoothed.scale == 0.5
    assert (smoothed.model.seed, smoothed.model.samples) == (4, 3)
    assert np.array_equal(smoothed.predict(x), make(sigma=0.5, seed=4, samples=3).predict(x))
    before = smoothed.predict(x)
    smoothed.set_params(**smoothed.get_params())
    assert np.array_equal(smoothed.predict(x), before)
    assert smoothed.get_params()["alpha"] == 0.01
    for change in ({"sigma": -1}, {"alpha": 2}, {"seed": -1}, {"samples": 0}, {"sample_size": 0}):
        with pytest.raises(InputError, match=next(iter(change))):
            smoothed.set_params(**change)
    assert smoothed.alpha == 0.01


def test_copies_and_pickles_are_complete(make, x):
    smoothed = make()
    smoothed._optimizer = torch.optim.SGD(smoothed.model.parameters(), lr=0.1, momentum=0.9)
    for twin in (copy.deepcopy(smoothed), pickle.loads(pickle.dumps(smoothed))):
        assert np.array_equal(twin.predict(x), smoothed.predict(x))
        own = {id(parameter) for parameter in twin.model.parameters()}
        assert {id(p) for p in twin.optimizer.param_groups[0]["params"]} == own
        assert own.isdisjoint(id(p) for p in smoothed.model.parameters())


def test_clone_for_refitting_starts_afresh(make, x):
    smoothed = make(seed=5, samples=6, alpha=0.01)
    smoothed._optimizer = torch.optim.Adam(smoothed.model.parameters(), lr=0.01)
    clone = smoothed.clone_for_refitting()
    assert (clone.sigma, clone.seed, clone.samples, clone.alpha) == (0.25, 5, 6, 0.01)
    assert not np.allclose(clone.predict(x), smoothed.predict(x))
    own = {id(parameter) for parameter in clone.model.parameters()}
    assert {id(p) for p in clone.optimizer.param_groups[0]["params"]} == own
    assert clone.optimizer.defaults["lr"] == 0.01


def test_fit_trains_the_denoiser_and_leaves_the_classifier(make, x, y):
    smoothed = make()
    classifier, denoiser = smoothed.model.base.classifier, smoothed.model.base.denoiser
    before = [[p.clone() for p in part.parameters()] for part in (classifier, denoiser)]
    smoothed.fit(x, np.eye(10)[y] if y.ndim == 1 else y, nb_epochs=2, batch_size=6)
    assert all(map(torch.equal, before[0], classifier.parameters()))
    assert not any(map(torch.equal, before[1], denoiser.parameters()))
    smoothed.certify(x[:1], n=20)  # back in eval mode
    smoothed.fit(x, y, nb_epochs=1, objective="mse")


def test_fit_uses_the_labels(make, x, y):
    found = []
    for labels in (y, np.eye(10)[y], (y + 3) % 10):
        smoothed = make()
        smoothed.fit(x, labels, nb_epochs=1)
        found.append(torch.cat([p.flatten() for p in smoothed.model.base.denoiser.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_fit_adds_the_noise_of_certify(make):
    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.seen = nn.Parameter(torch.ones(1)), []

        def forward(self, x_noisy: torch.Tensor, sigma: object) -> torch.Tensor:
            self.seen.append(x_noisy.detach())
            return x_noisy * self.scale

    denoiser = Identity().eval()
    grey = np.full((100, 1, 8, 8), 0.5, np.float32)
    make(denoiser=denoiser).fit(grey, np.arange(100) % 10, nb_epochs=5, batch_size=100)
    values = torch.cat([batch.flatten() for batch in denoiser.seen if len(batch) == 100])
    assert len(values) == 32_000
    assert float(values.std()) == pytest.approx(0.25, rel=0.02)  # five standard errors
    assert float(values.mean()) == pytest.approx(0.5, abs=0.01)


def test_fit_without_a_denoiser_is_refused(x, y):
    plain = DenoisedSmoothing(digits_classifier(), sigma=0.25, input_shape=(1, 8, 8), nb_classes=10)
    with pytest.raises(InputError, match="no denoiser to train"):
        plain.fit(x, y)


def test_global_random_state_is_untouched(make, x, y):
    smoothed = make(seed=None)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    smoothed.predict(x)
    smoothed.certify(x[:1], n=20)
    smoothed.loss_gradient(x, y)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def art_classifier(**options: object) -> PyTorchClassifier:
    return PyTorchClassifier(
        digits_classifier(), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), **options
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma": 0}, ["sigma is 0"]),
        ({"sigma": 64}, ["64", "image units"]),
        ({"alpha": 1}, ["alpha is 1"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"samples": 0}, ["samples is 0"]),
        ({"sample_size": 0}, ["sample_size is 0"]),
        ({"nb_classes": 1}, ["nb_classes is 1"]),
        ({"nb_classes": 7}, ["nb_classes is 7", "returns 10"]),
        ({"input_shape": (8, 8)}, ["(8, 8)", "channels, height, width"]),
        ({"input_shape": (3, 8, 8)}, ["(3, 8, 8)"]),
        ({"channels_first": False}, ["channels_first"]),
        ({"classifier": "resnet"}, ["str", "nn.Module"]),
        ({"classifier": nn.Sequential(digits_classifier(), nn.Dropout())}, ["training mode"]),
        ({"denoiser": nn.Sequential(nn.Dropout())}, ["training mode"]),
        ({"classifier": art_classifier(postprocessing_defences=Rounded())}, ["postprocessing"]),
        (
            {"classifier": art_classifier(preprocessing_defences=SpatialSmoothing())},
            ["SpatialSmoothing", "torch"],
        ),
    ],
)
def test_bad_construction(make, changes, words):
    with pytest.raises(InputError) as caught:
        make(**changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_bad_images(make, x):
    smoothed = make()
    for use in (
        smoothed.predict,
        lambda images: smoothed.certify(images, n=100),
        lambda images: smoothed.vote(images, n=100),
    ):
        for images, word in (
            (x * np.nan, "NaN"),
            (x[0], r"x\[None\]"),
            (x.transpose(0, 2, 3, 1), "channels-last"),
            ((x * 255).astype(np.uint8), "uint8"),
        ):
            with pytest.raises(InputError, match=word):
                use(images)
    for use in (
        lambda images: smoothed.certify(images, n=100),
        lambda images: smoothed.vote(images, n=100),
    ):
        with pytest.raises(InputError, match="divide by 255"):
            use(x * 255)
    with pytest.warns(UserWarning, match="divide by 255"):  # once: attacks may leave the range
        smoothed.predict(x * 255)
    smoothed.predict(x * 255)
    with pytest.raises(InputError, match="fewer than 10"):
        smoothed.certify(x, n=5)
    with pytest.raises(InputError, match="clip_values"):
        smoothed.certify(x + 0.5, n=100)
    assert smoothed.predict(x + 0.5).shape == (12, 10)  # an attack under way may leave the range


def test_a_model_set_to_training_later_is_not_certified(make, x):
    smoothed = make()
    smoothed.model.train()
    with pytest.raises(InputError, match="training mode"):
        smoothed.certify(x[:1], n=100)
