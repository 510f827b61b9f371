"""What all our ART classifiers share: layers, parameters, warnings, a short repr."""

from __future__ import annotations

import copy

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
    DiffusionPurification,
    DnCNN,
    FeatureDenoisingClassifier,
    Purification,
    RobustDiffusionClassifier,
    RobustTrainer,
    evaluate,
)
from art_denoised.attacks import PGD
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier, digits_diffusion, digits_network
from art_denoised.diffusion import noise_levels
from art_denoised.estimators import ArtAttack

SHAPE = {"input_shape": (1, 8, 8), "device_type": "cpu"}
CLASSES = {**SHAPE, "nb_classes": 10}


def feature_denoising(**options: object) -> FeatureDenoisingClassifier:
    optimizer = torch.optim.SGD(digits_network().parameters(), lr=0.1)
    defaults = {**CLASSES, "operation": None, "optimizer": optimizer}
    return FeatureDenoisingClassifier(digits_network(), **{**defaults, **options})


def rdc(**options: object) -> RobustDiffusionClassifier:
    defaults = {**SHAPE, "steps": 1, "levels": noise_levels(4), "seed": 0}
    return RobustDiffusionClassifier(digits_diffusion(), **{**defaults, **options})


def purification(**options: object) -> DiffusionPurification:
    purify = Purification(digits_diffusion(), t=0.05, steps=1, sampler="ddim", seed=0)
    return DiffusionPurification(purify, digits_classifier(), **{**CLASSES, **options})


def smoothing(**options: object) -> DenoisedSmoothing:
    defaults = {**CLASSES, "sigma": 0.25, "seed": 0, "samples": 4}
    denoiser = DnCNN(1, depth=3, width=4).eval()
    return DenoisedSmoothing(digits_classifier(), denoiser, **{**defaults, **options})


ALL = [feature_denoising, rdc, purification, smoothing]
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


ARRAYS = (np.zeros((1, 8, 8)), np.ones((1, 8, 8)))


@pytest.mark.parametrize("make", [feature_denoising, rdc, purification])
@pytest.mark.parametrize(
    ("clip", "words"),
    [((0, 255), "255"), ((-1, 1), "-1"), ((ARRAYS[0], 2 * ARRAYS[1]), r"\(0, 2\)")],
    ids=["bytes", "signed", "arrays"],
)
def test_defences_of_images_in_the_unit_range_have_no_other(make, clip, words):
    """Attacks in other units moved nothing, and the defence looked robust."""
    with pytest.raises(InputError, match=words):
        make(clip_values=clip)


@pytest.mark.parametrize("make", ALL)
def test_the_range_of_a_defence_is_not_changed(make):
    """The classifier behind it would still take the old one."""
    defence = make()
    for clip in ((0, 255), (-1, 1), None, (1, 0)):
        with pytest.raises(InputError, match="clip_values are"):
            defence.set_params(clip_values=clip)
    assert defence.clip_values.tolist() == [0, 1]
    defence.set_params(clip_values=(0, 1))
    assert make(clip_values=ARRAYS).predict(X).shape == (4, 10)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ((1, 0), r"\(1, 0\)"),
        (5, "5"),
        ((0, 1, 2), "2"),
        (("a", "b"), "'a'"),
        (("0", "1"), "'0'"),
        ((np.zeros(3), np.ones(3)), r"\(3,\)"),
        ((-np.inf, np.inf), "inf"),
        ((ARRAYS[1], ARRAYS[0]), "array"),
    ],
)
def test_ranges_that_are_none_are_refused_in_one_line(make, clip, words):
    for use in (make, make().set_params):
        with pytest.raises(InputError, match=f"clip_values.*{words}") as caught:
            use(clip_values=clip)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [digits_classifier(), nn.Sequential(digits_classifier()), 3])
def test_a_sequence_is_not_yet_a_diffusion_classifier(model):
    """Both are an nn.Sequential, and the defence was gone."""
    defence = rdc()
    with pytest.raises(InputError, match="LikelihoodMaximization, DiffusionClassifier"):
        defence.set_params(model=model)
    defence.set_params(model=rdc().model)


@pytest.mark.parametrize("model", [None, 3, len])
def test_a_model_is_a_module(model):
    with pytest.raises(InputError, match="model is"):
        feature_denoising().set_params(model=model)


def test_an_attack_of_art_is_in_the_range_of_the_estimator():
    """It attacked images in [0, 1] with a budget on another scale."""
    scaled = nn.Sequential(Scaled(), digits_classifier()).eval()
    art = PyTorchClassifier(scaled, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 255))
    with pytest.raises(InputError, match=r"\(0, 255\)"):
        ArtAttack(0.1)(art, torch.from_numpy(X), torch.tensor([1, 2, 3, 4]))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "x"}, "loss is 'x'"),
        ({"loss": nn.CrossEntropyLoss}, "loss is .*CrossEntropyLoss"),
        ({"loss": nn.functional.cross_entropy}, "loss is .*cross_entropy"),
        ({"input_shape": 8}, "input_shape is 8"),
        ({"input_shape": None}, "input_shape is None"),
        ({"input_shape": (8, 8)}, r"input_shape is \(8, 8\)"),
        ({"input_shape": (3, 8, 8)}, r"\(3, 8, 8\)"),
        ({"use_amp": True}, "use_amp is True"),
        ({"use_amp": "no"}, "use_amp is 'no'"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"optimizer": torch.optim.Adam}, "optimizer is .*Adam"),
        ({"optimizer": 3}, "optimizer is 3"),
        ({"channels_first": "no"}, "channels_first is 'no'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_art_would_keep_unseen_is_refused_in_one_line(make, options, words):
    for use in (make, make().set_params):
        with pytest.raises(InputError, match=words) as caught:
            use(**options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", ALL)
def test_no_preprocessing_is_none(make):
    names = ("preprocessing", "preprocessing_defences", "postprocessing_defences")
    for empty in ([], ()):
        defence = make(**dict.fromkeys(names, empty))
        before = defence.predict(X)
        defence.set_params(**dict.fromkeys(names, empty))
        np.testing.assert_array_equal(defence.predict(X), before)


def test_no_loss_is_set():
    with pytest.raises(InputError, match="loss is None"):
        feature_denoising().set_params(loss=None)


def test_a_loss_of_the_user_gives_gradients_and_no_reduced_losses():
    class Mine(nn.Module):
        def forward(self, logits, y):
            return -(logits * y).mean()  # ART gives rows to losses that it does not know

    defence, y = feature_denoising(loss=Mine()), np.arange(4)
    assert np.abs(defence.loss_gradient(X, y)).max() > 0
    with pytest.raises(InputError, match="Mine"):
        defence.compute_loss(X, y)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "2.5"),
        ({"nb_epochs": 0}, "0; give a whole number >= 1"),
    ],
    ids=str,
)
def test_fit_trains(make, options, words):
    """No epoch, or none of its batches, trained nothing without a word."""
    defence = make()
    defence._optimizer = torch.optim.SGD(defence.model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=words):
        defence.fit(X, np.arange(4), **options)


@pytest.mark.parametrize("make", [feature_denoising, purification, rdc])
def test_fit_has_a_batch_and_an_optimizer(make):
    defence, y = make(optimizer=None), np.arange(4)
    for use in (
        lambda: defence.fit(X, y, nb_epochs=1),
        lambda: defence.fit_generator(None, nb_epochs=1),
    ):
        with pytest.raises(InputError, match="optimizer is None"):
            use()
    defence._optimizer = torch.optim.SGD(defence.model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="batch_size is 5, but there are 4"):
        defence.fit(X, y, batch_size=5, drop_last=True)
    defence._optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(InputError, match="SGD over parameters of another"):
        defence.fit(X, y, nb_epochs=1)
    with pytest.raises(InputError, match="nb_epochs is 0"):
        defence.fit_generator(None, nb_epochs=0)


@pytest.mark.parametrize("make", ALL)
def test_tensors_with_gradients_are_images(make):
    """ART made arrays of them, which torch refuses."""
    defence, x, y = make(), torch.from_numpy(X).requires_grad_(), np.arange(4)
    np.testing.assert_array_equal(defence.predict(x), defence.predict(X))
    np.testing.assert_array_equal(defence.class_gradient(x, y), defence.class_gradient(X, y))
    weights = []
    defence._optimizer = torch.optim.SGD(defence.model.parameters(), lr=0.1)
    for images in (x, X):
        twin = copy.deepcopy(defence)
        torch.manual_seed(0)
        twin.fit(images, torch.from_numpy(y), batch_size=4, nb_epochs=1)
        weights.append(torch.cat([p.detach().flatten() for p in twin.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("labels", [[[1, 2], [3]], None, "1234"], ids=str)
def test_labels_in_no_order_are_refused_in_one_line(labels):
    with pytest.raises(InputError, match="labels must be") as caught:
        feature_denoising().loss_gradient(X, labels)
    assert "\n" not in str(caught.value)
