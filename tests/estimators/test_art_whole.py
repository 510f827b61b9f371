"""What comes from ART to our estimators and back: pixel ranges, trainers, detectors, attacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from art.attacks.evasion import NewtonFool, ProjectedGradientDescent, UniversalPerturbation
from art.defences.detector.poison import ActivationDefence, SpectralSignatureDefense
from art.defences.postprocessor import ReverseSigmoid
from art.defences.trainer import AdversarialTrainer, AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std import StandardisationMeanStdPyTorch
from torch import nn

from art_denoised import FeatureDenoisingClassifier, RobustDiffusionClassifier, evaluate
from art_denoised.attacks import PGD
from art_denoised.checks import InputError
from art_denoised.demo import (
    digits_classifier,
    digits_diffusion,
    digits_network,
)
from art_denoised.diffusion import noise_levels


class Bytes(nn.Module):
    """The digits classifier for pixels in [0, 255]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_classifier()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x / 255)


def of_bytes() -> PyTorchClassifier:
    return PyTorchClassifier(
        Bytes().eval(), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 255),
        device_type="cpu",
    )  # fmt: skip


def feature_denoising(**options: object) -> FeatureDenoisingClassifier:
    return FeatureDenoisingClassifier(
        digits_network(), input_shape=(1, 8, 8), nb_classes=10, operation=None, device_type="cpu",
        **options,
    )  # fmt: skip


def rdc(**options: object) -> RobustDiffusionClassifier:
    return RobustDiffusionClassifier(
        digits_diffusion(), input_shape=(1, 8, 8), steps=1, levels=noise_levels(4), seed=0,
        device_type="cpu", **options,
    )  # fmt: skip


@pytest.fixture
def data(digits):
    return digits[0][:60].numpy(), digits[1][:60].numpy()


def test_the_pixel_range_of_an_art_classifier_is_taken_over(make, data):
    x, y = data
    units = make(denoiser=None)
    smoothed = make(classifier=of_bytes(), denoiser=None, sigma=0.25 * 255)
    assert [float(v) for v in smoothed.clip_values] == [0, 255]
    np.testing.assert_allclose(smoothed.predict(x * 255), units.predict(x), rtol=1e-3, atol=1e-3)
    labels, radii = smoothed.certify(x * 255, n=100)
    ours = units.certify(x, n=100)
    np.testing.assert_array_equal(labels, ours[0])
    np.testing.assert_allclose(radii, 255 * ours[1], atol=3e-4)  # both rounded down
    assert (labels == y).mean() > 0.5


def test_another_pixel_range_than_that_of_the_art_classifier_is_refused(make):
    with pytest.raises(InputError, match="255"):
        make(classifier=of_bytes(), denoiser=None, clip_values=(0, 1))
    make(classifier=of_bytes(), denoiser=None, clip_values=(0, 255), sigma=64)


def test_evaluation_refuses_another_pixel_range(data):
    x, y = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    with pytest.raises(InputError, match="255"):
        evaluate(of_bytes(), torch.utils.data.TensorDataset(x, y), [PGD(0.1)])


@pytest.mark.parametrize(
    "options",
    [
        {"preprocessing_defences": [StandardisationMeanStdPyTorch(0.5, 2.0)]},
        {"postprocessing_defences": [ReverseSigmoid()]},
        {"preprocessing": (0.5, 2.0)},
    ],
)
def test_constructors_refuse_processing_with_the_remedy(make, options):
    for build in (make, feature_denoising, rdc):
        with pytest.raises(InputError, match=f"{next(iter(options))}.*PyTorchClassifier"):
            build(**options)


@pytest.mark.parametrize("kind", ["fit", "MadryPGD", "AdversarialTrainer"])
def test_training_uses_the_labels(make, data, kind):
    x, y = data
    weights = []
    for labels in (y, (y + 3) % 10):
        np.random.seed(0)
        torch.manual_seed(0)
        smoothed = make(samples=2, device_type="cpu")
        one_hot = np.eye(10, dtype=np.float32)[labels]
        if kind == "fit":
            smoothed.fit(x, one_hot, nb_epochs=1)
        elif kind == "MadryPGD":
            AdversarialTrainerMadryPGD(
                smoothed, nb_epochs=1, batch_size=20, eps=0.1, eps_step=0.05, max_iter=1
            ).fit(x, one_hot)
        else:
            attack = ProjectedGradientDescent(
                smoothed, eps=0.1, eps_step=0.05, max_iter=1, verbose=False
            )
            AdversarialTrainer(smoothed, attack).fit(x, one_hot, batch_size=20, nb_epochs=1)
        denoiser = smoothed.model.base.denoiser
        weights.append(torch.cat([p.detach().flatten() for p in denoiser.parameters()]))
    assert not torch.equal(*weights)


def test_a_clone_keeps_the_classifier_and_resets_the_denoiser(make):
    smoothed = make(device_type="cpu")
    clone = smoothed.clone_for_refitting()
    ours, theirs = smoothed.model.base, clone.model.base
    pairs = [zip(a.parameters(), b.parameters(), strict=True) for a, b in
             [(ours.classifier, theirs.classifier), (ours.denoiser, theirs.denoiser)]]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in pairs[0])
    assert not all(torch.equal(a, b) for a, b in pairs[1])


def test_detectors_run_on_networks_and_are_refused_on_copies(make, data):
    x, one_hot = data[0], np.eye(10, dtype=np.float32)[data[1]]
    network = feature_denoising()
    _, good = SpectralSignatureDefense(network, x, one_hot).detect_poison()
    assert len(good) == len(x)
    assert ActivationDefence(network, x, one_hot).detect_poison(nb_clusters=2, nb_dims=2)
    for defence in (make(), rdc()):
        with pytest.raises(InputError, match=type(defence).__name__):
            SpectralSignatureDefense(defence, x, one_hot).detect_poison()


@pytest.mark.filterwarnings("ignore")
def test_attacks_that_clip_at_the_end_run(make, data):
    x = data[0][:3]
    for attack in (
        NewtonFool(make(), max_iter=2, verbose=False),
        UniversalPerturbation(make(), attacker="fgsm", max_iter=1, verbose=False),
    ):
        x_adv = attack.generate(x)
        assert x_adv.shape == x.shape
        assert np.isfinite(x_adv).all()


def test_denoised_smoothing_prints_its_settings_in_a_line(make):
    text = repr(make(device_type="cpu"))
    assert len(text.splitlines()) == 1
    for part in ("sigma=0.25", "seed=0", "samples=8", "nb_classes=10", "(0, 1)", "cpu"):
        assert part in text


def test_no_images_give_no_rows(make):
    for defence in (make(), feature_denoising(), rdc()):
        assert defence.predict(np.zeros((0, 1, 8, 8), np.float32)).shape == (0, 10)
        with pytest.raises(InputError):
            defence.predict(np.zeros((0, 3, 8, 8), np.float32))
