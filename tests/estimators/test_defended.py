"""What all our ART classifiers share: layers, parameters, warnings, a short repr."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from art.attacks.evasion import FeatureAdversariesNumpy
from art.defences.detector.poison import ActivationDefence, SpectralSignatureDefense
from art.defences.postprocessor import ReverseSigmoid
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std import StandardisationMeanStdPyTorch
from torch import nn
from torch.utils.data import TensorDataset

from art_denoised import (
    DenoisedSmoothing,
    DnCNN,
    FeatureDenoisingClassifier,
    RobustDiffusionClassifier,
    RobustTrainer,
    evaluate,
)
from art_denoised.attacks import PGD
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier, digits_diffusion, digits_network
from art_denoised.diffusion import noise_levels


def feature_denoising(**options: object) -> FeatureDenoisingClassifier:
    return FeatureDenoisingClassifier(
        digits_network(), input_shape=(1, 8, 8), nb_classes=10, operation=None, device_type="cpu",
        optimizer=torch.optim.SGD(digits_network().parameters(), lr=0.1), **options,
    )  # fmt: skip


def rdc(**options: object) -> RobustDiffusionClassifier:
    return RobustDiffusionClassifier(
        digits_diffusion(), input_shape=(1, 8, 8), steps=1, levels=noise_levels(4), seed=0,
        device_type="cpu", **options,
    )  # fmt: skip


MAKERS = {"feature denoising": feature_denoising, "rdc": rdc}
X = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)


@pytest.fixture(params=MAKERS)
def defence(request):
    return MAKERS[request.param]()


def test_layers_of_a_network_are_those_that_art_reads():
    ours, plain = feature_denoising(), PyTorchClassifier(
        feature_denoising().model, nn.CrossEntropyLoss(), (1, 8, 8), 10, device_type="cpu"
    )  # fmt: skip
    names = [name for name, _ in ours.model.named_children()]
    assert ours.layer_names == names
    for layer in (names[0], 1, -1):
        found = ours.get_activations(X, layer, batch_size=3)
        module = dict(ours.model.named_children())[names[layer] if layer in (1, -1) else layer]
        seen = []
        module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.detach()))
        ours.model(torch.from_numpy(X))
        np.testing.assert_allclose(found, seen[0].numpy(), rtol=1e-5, atol=1e-6)
    assert type(plain.get_activations(X, names[0])) is type(ours.get_activations(X, names[0]))
    for wrong in ("no such", 99, None):
        with pytest.raises(InputError, match=names[0]):
            ours.get_activations(X, wrong)


def test_attacks_on_features_run():
    ours = feature_denoising()
    attack = FeatureAdversariesNumpy(ours, delta=0.2, layer=len(ours.layer_names) - 2)
    x_adv = attack.generate(X[:1], X[1:2], maxiter=2)
    assert x_adv.shape == (1, 1, 8, 8)
    gradient = ours.custom_loss_gradient(torch.norm, X[:1], X[1:2], ours.layer_names[0])
    assert np.abs(gradient).max() > 0


def test_detectors_of_poison_run_on_networks_and_are_refused_on_copies(digits):
    x, one_hot = digits[0][:60].numpy(), np.eye(10, dtype=np.float32)[digits[1][:60]]
    network = feature_denoising()
    _, good = SpectralSignatureDefense(network, x, one_hot).detect_poison()
    assert len(good) == len(x)
    assert ActivationDefence(network, x, one_hot).detect_poison(nb_clusters=2, nb_dims=2)
    for defence in (smoothing(), rdc()):
        with pytest.raises(InputError, match=type(defence).__name__):
            SpectralSignatureDefense(defence, x, one_hot).detect_poison()


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing_defences": [StandardisationMeanStdPyTorch(0.5, 2.0)]},
        {"postprocessing_defences": [ReverseSigmoid()]},
        {"preprocessing": (0.5, 2.0)},
    ],
)
def test_defences_that_only_some_methods_would_see_are_refused(defence, changes):
    before = defence.predict(X)
    with pytest.raises(InputError, match=next(iter(changes))):
        defence.set_params(**changes)
    np.testing.assert_array_equal(defence.predict(X), before)
    defence.set_params(preprocessing_defences=None, postprocessing_defences=[])


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_first": False},
        {"nb_classes": 12},
        {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 4))},
        {"preprocessing": np.array([0.5, 2.0])},
    ],
    ids=str,
)
def test_parameters_that_no_constructor_takes_are_refused(changes):
    defence = feature_denoising()
    with pytest.raises(InputError, match=r"channels_first|nb_classes|preprocessing"):
        defence.set_params(**changes)
    assert defence.nb_classes == 10
    assert defence.predict(X).shape == (4, 10)


def test_a_defence_with_noise_stays_one():
    """Parameters of ART hold the model: a plain network in its place dropped all noise."""
    smoothed = DenoisedSmoothing(
        digits_classifier(), sigma=0.25, input_shape=(1, 8, 8), nb_classes=10, device_type="cpu"
    )
    with pytest.raises(InputError, match="not the SmoothedClassifier"):
        smoothed.set_params(model=digits_classifier())
    assert smoothed.sigma == 0.25


@pytest.mark.parametrize(
    "options",
    [
        {"preprocessing_defences": [StandardisationMeanStdPyTorch(0.5, 2.0)]},
        {"postprocessing_defences": [ReverseSigmoid()]},
        {"preprocessing": (0.5, 2.0)},
    ],
)
def test_constructors_refuse_processing_with_the_remedy(options):
    for build in (smoothing, feature_denoising, rdc):
        with pytest.raises(InputError, match=f"{next(iter(options))}.*PyTorchClassifier"):
            build(**options)


def test_images_in_other_units_are_classified_with_a_warning(defence):
    with pytest.warns(UserWarning, match="clip_values"):
        assert defence.predict(X * 255).shape == (4, 10)
    with pytest.raises(InputError):
        defence.predict(X * np.nan)


def test_the_warning_comes_once():
    """Or an attack under way would warn at each of its steps."""
    ours = feature_denoising()
    with pytest.warns(UserWarning, match="clip_values"):
        ours.predict(X * 255)
    assert ours.predict(X * 255).shape == (4, 10)


def test_a_defence_prints_as_a_line(defence):
    assert len(repr(defence).splitlines()) == 1
    assert "nb_classes=10" in repr(defence)
    assert "cpu" in repr(defence)


def test_a_trainer_takes_images_in_the_unit_range_only():
    classifier = PyTorchClassifier(
        digits_network(), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 255)
    )
    with pytest.raises(InputError, match="255"):
        RobustTrainer(classifier)


@pytest.mark.parametrize("given", [None, (0, 255)])
def test_the_range_of_an_art_classifier_is_taken_over(digits, given):
    """It was ignored, and accuracy fell from 1.0 to 0.2 without a word."""
    x, y = digits[0][:20].numpy(), digits[1][:20].numpy()
    scaled = nn.Sequential(Scaled(), digits_classifier()).eval()
    art = PyTorchClassifier(scaled, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 255))
    options = {"sigma": 63.75, "input_shape": (1, 8, 8), "nb_classes": 10, "seed": 0}
    smoothed = DenoisedSmoothing(art, clip_values=given, **options)
    labels, radii = smoothed.certify(255 * x, n=100)
    plain = DenoisedSmoothing(digits_classifier(), **{**options, "sigma": 0.25})
    expected, plain_radii = plain.certify(x, n=100)
    assert (labels == expected).mean() > 0.9  # a few votes are rounded otherwise
    assert np.median(radii) == pytest.approx(255 * np.median(plain_radii), rel=0.1)
    assert (labels == y).mean() > 0.5
    with pytest.raises(InputError, match="255"):
        DenoisedSmoothing(art, clip_values=(0, 1), **options)
    with pytest.raises(InputError, match="255"):
        evaluate(art, TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), [PGD(0.1)])


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 255


def smoothing(**options: object) -> DenoisedSmoothing:
    return DenoisedSmoothing(
        digits_classifier(), DnCNN(1, depth=3, width=4).eval(), sigma=0.25, input_shape=(1, 8, 8),
        nb_classes=10, seed=0, samples=4, device_type="cpu", **options,
    )  # fmt: skip


def test_a_clone_keeps_what_fit_does_not_train():
    defence = smoothing()
    before = defence.model.base.classifier.state_dict()
    clone = defence.clone_for_refitting()
    after = clone.model.base.classifier.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    ours, theirs = (list(d.model.base.denoiser.parameters()) for d in (defence, clone))
    assert any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_denoised_smoothing_prints_as_a_line():
    assert len(repr(smoothing()).splitlines()) == 1
    assert "sigma=0.25" in repr(smoothing())
