"""What every defence must hold to, so that attacks and tools work on it unchanged.

One check a test, each run on every row of `DEFENCES`. Two are elsewhere, as they concern no row or
one alone: models of coins are judged fairly (tests/evaluation/test_attack.py); noise has one
scale in fit, predict and certify (tests/estimators/test_smoothing.py).
"""

from __future__ import annotations

import copy
import logging
import pickle
from contextlib import contextmanager

import art.attacks.evasion as evasion
import art.config
import numpy as np
import pytest
import torch
from art.defences.trainer import (
    AdversarialTrainer,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerTRADESPyTorch,
)
from art.estimators.classification import PyTorchClassifier
from art.utils import is_probability_array
from torch import nn
from torch.nn import functional as F

from art_denoised.estimators import MaiteModel
from art_denoised.estimators.defended import DefendedClassifier
from tests.conformance.defences import DEFENCES

ONE_HOT = np.eye(10, dtype=np.float32)


@pytest.mark.parametrize(
    "family",
    [
        evasion.AutoAttack,
        evasion.AutoConjugateGradient,
        evasion.AutoProjectedGradientDescent,
        evasion.BoundaryAttack,
        evasion.CarliniL2Method,
        evasion.DeepFool,
        evasion.ElasticNet,
        evasion.FastGradientMethod,
        evasion.HopSkipJump,
        evasion.NewtonFool,
        evasion.ProjectedGradientDescent,
        evasion.SaliencyMapMethod,
        evasion.ShadowAttack,
        evasion.SignOPTAttack,
        evasion.SpatialTransformation,
        evasion.SquareAttack,
        evasion.Wasserstein,
        evasion.ZooAttack,
        AdversarialTrainer,
        AdversarialTrainerMadryPGD,
        AdversarialTrainerTRADESPyTorch,
    ],
)
def test_the_gate_of_every_family_of_attacks_lets_it_through(defence, family):
    mro = type(defence.make()).__mro__
    for alternatives in getattr(family, "_estimator_requirements", (PyTorchClassifier,)):
        options = alternatives if isinstance(alternatives, tuple) else (alternatives,)
        assert any(option in mro for option in options), alternatives


def test_predictions_are_one_float32_row_an_image_whatever_the_batches(defence, x):
    estimator = defence.make()
    predictions = estimator.predict(x)
    assert predictions.shape == (len(x), 10)
    assert predictions.dtype == np.float32
    for batch_size in (1, 4, 1000):  # 4 leaves a ragged last batch
        again = estimator.predict(x.astype(np.float64), batch_size=batch_size)
        assert again.dtype == np.float32
        np.testing.assert_allclose(again, predictions, rtol=1e-4, atol=1e-4)


def test_labels_in_every_form_give_the_same_gradients(defence, x, y):
    estimator = defence.make()
    reference = estimator.loss_gradient(x, ONE_HOT[y])
    assert reference.shape == x.shape
    scale = np.abs(reference).max()
    np.testing.assert_allclose(estimator.loss_gradient(x, y), reference, atol=1e-4 * scale)
    tensors = estimator.loss_gradient(torch.from_numpy(x), torch.from_numpy(ONE_HOT[y]))
    np.testing.assert_allclose(tensors.numpy(), reference, atol=1e-4 * scale)
    soft = estimator.loss_gradient(x, 0.9 * ONE_HOT[y] + 0.01)
    assert np.abs(soft - reference).max() > 1e-3 * scale


def test_class_gradients_in_every_form(defence, x, y):
    estimator, x, y = defence.make(), x[:3], y[:3]
    every = estimator.class_gradient(x)
    assert every.shape == (3, 10, *x.shape[1:])
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(every).max()}
    np.testing.assert_allclose(estimator.class_gradient(x, 3)[:, 0], every[:, 3], **close)
    np.testing.assert_allclose(estimator.class_gradient(x, y)[:, 0], every[range(3), y], **close)


def test_losses_in_three_reductions(defence, x, y):
    estimator = defence.make()
    expected = F.cross_entropy(
        torch.from_numpy(estimator.predict(x)), torch.from_numpy(y), reduction="none"
    ).numpy()
    for labels in (y, ONE_HOT[y]):
        losses = estimator.compute_loss(x, labels, reduction="none")
        np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=1e-4)
    for reduction in ("mean", "sum"):
        value = estimator.compute_loss(x, y, reduction=reduction)
        assert value == pytest.approx(getattr(expected, reduction)(), rel=1e-3, abs=1e-4)


def test_gradients_are_those_of_finite_differences(defence, x, y):
    """Fixed noise, double precision; a step so small that few kinks of ReLU lie in it."""
    estimator = defence.make()
    estimator.model.double()
    images, labels = torch.from_numpy(x).double(), torch.from_numpy(y)
    gradient = torch.from_numpy(estimator.loss_gradient(x.astype(np.float64), y))
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).double()

    def loss(step: float) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(estimator.model(images + step * direction), labels))

    numeric = (loss(1e-7) - loss(-1e-7)) / 2e-7
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-3)


def test_gradients_over_fresh_noise_converge_to_those_of_the_expected_logit(noisy, x, y):
    """The mean over 32 fixed seeds stands for the expectation; 16 fresh draws come close.

    Of directions, image by image: the exact gradient of likelihood maximization by Adam is
    heavy-tailed. The cosines here are 0.88 and above; single draws have 0.5 to 0.88.
    """
    fixed, x, y = noisy.make(**noisy.light), x[:3], y[:3]

    def direction(estimator: DefendedClassifier) -> np.ndarray:
        gradient = estimator.class_gradient(x, y).reshape(len(x), -1)
        return gradient / np.linalg.norm(gradient, axis=1, keepdims=True)

    reference = 0.0
    for seed in range(32):
        fixed.set_params(seed=seed)
        reference = reference + direction(fixed)
    fresh = noisy.make(**noisy.light, seed=None)
    draws = [direction(fresh) for _ in range(16)]

    def cosine(found: np.ndarray) -> float:
        return float((found * reference).sum()) / (
            np.linalg.norm(found) * np.linalg.norm(reference)
        )

    assert cosine(sum(draws)) > 0.75
    assert cosine(sum(draws)) > np.mean([cosine(draw) for draw in draws])


def test_a_classifier_rebuilt_around_its_model_is_the_same(defence, x, y):
    """As ART's APGD and BrendelBethge do: they judge or attack the rebuilt one."""
    estimator = defence.make()
    plain = PyTorchClassifier(
        estimator.model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0)
    )
    np.testing.assert_array_equal(plain.predict(x), estimator.predict(x))
    np.testing.assert_allclose(
        plain.loss_gradient(x, ONE_HOT[y]), estimator.loss_gradient(x, y), rtol=1e-4, atol=1e-6
    )


def test_outputs_pass_for_logits(defence, x):
    """Probabilities would be refused by losses on differences of logits."""
    predictions = defence.make().predict(x)
    assert not is_probability_array(predictions)
    assert not any(is_probability_array(row) for row in predictions)


def test_no_image_has_a_zero_gradient(defence, x, y):
    gradients = np.abs(defence.make().loss_gradient(x, y)).reshape(len(x), -1)
    assert (gradients.max(1) > 0).all()


@pytest.mark.filterwarnings("ignore")  # the attacks' own
@pytest.mark.parametrize("name", [name for name, row in DEFENCES.items() if row.bpda])
def test_the_approximate_gradient_is_no_weaker_than_none(name, x, y):
    """Square takes no gradients; what BPDA cannot do better than that is no attack."""
    row = DEFENCES[name]
    judged, approximate = row.make(), row.make(**row.bpda)
    pgd = evasion.ProjectedGradientDescent(
        approximate, eps=row.eps, eps_step=row.eps / 5, max_iter=10, verbose=False
    )
    square = evasion.SquareAttack(judged, eps=row.eps, max_iter=50, verbose=False)
    left = [
        (judged.predict(attack.generate(x, y)).argmax(1) == y).mean() for attack in (pgd, square)
    ]
    assert left[0] <= left[1]


def test_copies_are_complete_and_independent(defence, x):
    estimator = defence.make()
    predictions = estimator.predict(x)
    for twin in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        np.testing.assert_array_equal(twin.predict(x), predictions)
        own = {id(parameter) for parameter in twin.model.parameters()}
        assert own.isdisjoint(id(parameter) for parameter in estimator.model.parameters())


def test_parameters_come_back_as_they_were_given(defence, x):
    estimator = defence.make()
    predictions = estimator.predict(x)
    estimator.set_params(**estimator.get_params())
    np.testing.assert_array_equal(estimator.predict(x), predictions)


def test_clones_start_from_other_weights(defence, x):
    estimator = defence.make()
    estimator._optimizer = torch.optim.Adam(estimator.model.parameters(), lr=0.01)
    clone = estimator.clone_for_refitting()
    assert not np.allclose(clone.predict(x), estimator.predict(x))
    own = {id(parameter) for parameter in clone.model.parameters()}
    assert {id(p) for p in clone.optimizer.param_groups[0]["params"]} == own
    assert clone.optimizer.defaults["lr"] == 0.01


def test_copies_leave_no_files_behind(defence, tmp_path, monkeypatch):
    """ART's own pickles keep their weights in a file of its data folder, one more each time."""
    monkeypatch.setattr(art.config, "ART_DATA_PATH", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    estimator = defence.make()
    copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))
    estimator.clone_for_refitting()
    assert not list(tmp_path.iterdir())


def test_noise_is_active_in_eval_mode(noisy, x):
    fresh = noisy.make(seed=None)
    fresh.model.eval()
    assert not np.array_equal(fresh.predict(x), fresh.predict(x))
    fresh.set_params(seed=4)
    np.testing.assert_array_equal(fresh.predict(x), noisy.make(seed=4).predict(x))


def test_global_random_states_and_modes_are_left_alone(defence, x, y):
    estimator = defence.make(**({"seed": None} if defence.noisy else {}))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    modes = [module.training for module in estimator.model.modules()]
    estimator.predict(x)
    estimator.loss_gradient(x, y)
    estimator.class_gradient(x[:2], 3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert [module.training for module in estimator.model.modules()] == modes
    assert not any(modes)


@pytest.mark.parametrize("name", [name for name, row in DEFENCES.items() if row.chunked])
def test_pieces_change_nothing_and_bound_the_memory(name, x, y):
    """No tensor kept for a backward pass grows with the noise, where it comes in pieces."""
    row, largest = DEFENCES[name], []
    for options in row.chunked:
        pieces, whole = row.make(**options), row.make(**{**options, "max_batch": 10_000})
        results = []
        for estimator in (pieces, whole):
            with _largest_kept(estimator.model) as kept:
                results.append((estimator.predict(x[:2]), estimator.loss_gradient(x[:2], y[:2])))
            largest.append(kept[0])
        for found, expected in zip(*results, strict=True):
            close = {"rtol": 1e-2, "atol": 1e-4 * np.abs(expected).max()}
            np.testing.assert_allclose(found, expected, **close)
    small, small_whole, large, large_whole = largest
    assert large <= 1.1 * small
    assert large_whole >= 2 * small_whole


@contextmanager
def _largest_kept(model: nn.Module):
    """Yield a list whose one entry becomes the size of the largest tensor kept, but weights."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    largest = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            largest[0] = max(largest[0], tensor.nelement())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield largest


@pytest.mark.filterwarnings("ignore")
def test_one_step_of_art_and_torchattacks_is_that_of_the_module(defence, x, y):
    import torchattacks

    estimator = defence.make()
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    leaf = images.clone().requires_grad_()
    F.cross_entropy(estimator.model(leaf), labels).backward()
    expected = (images + 0.1 * leaf.grad.sign()).clamp(0, 1)
    by_art = evasion.FastGradientMethod(estimator, eps=0.1).generate(x, y)
    by_torchattacks = torchattacks.FGSM(estimator.model, eps=0.1)(images, labels)
    sizes = leaf.grad.abs()
    sure = sizes > 1e-4 * sizes.amax((1, 2, 3), keepdim=True)  # smaller signs are by rounding
    assert float(sure.float().mean()) > 0.7
    for found in (torch.as_tensor(by_art), by_torchattacks):
        torch.testing.assert_close(found[sure], expected[sure], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_autoattack_says_of_it_what_is_expected_and_nothing_else(defence, x, y, caplog):
    """Its standard version, called as RobustBench does, with fewer iterations."""
    from pyautoattack import AutoAttack, checks

    phrases = (
        *("randomized defense", "probability distribution", "zero gradient"),
        *("Square Attack has decreased", "dynamic defense", "not possible", "more target classes"),
    )
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # counters that it never resets
    attack = AutoAttack(
        defence.make().model, norm="Linf", eps=defence.eps, version="standard", seed=0
    )
    attack.apgd.n_iter, attack.apgd_targeted.n_iter = 10, 3
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 3
    attack.fab.n_iter, attack.square.n_queries = 2, 10
    with caplog.at_level(logging.WARNING, "auto-attack"):
        x_adv, _ = attack.run_standard_evaluation(torch.from_numpy(x), torch.from_numpy(y))
    assert {phrase for phrase in phrases if phrase in caplog.text} == defence.flags
    assert (defence.make().predict(x_adv.numpy()).argmax(1) == y).mean() <= 0.5


def test_certificates_are_those_of_cohen(x):
    """The votes, through the functions that the code of Cohen et al. calls."""
    from scipy.stats import norm
    from statsmodels.stats.proportion import proportion_confint

    smoothed = DEFENCES["denoised smoothing"].make()
    certificates = smoothed.certificates(x, n=500)
    for certificate in certificates:
        selected = max(certificate.selection_counts, key=certificate.selection_counts.get)
        votes = certificate.counts.get(selected, 0)
        bound = proportion_confint(votes, 500, alpha=2 * 0.001, method="beta")[0]
        radius = 0.25 * norm.ppf(bound) if bound > 0.5 else 0.0
        assert certificate.label == (selected if bound > 0.5 else -1)
        assert certificate.radius == pytest.approx(radius, abs=1e-6)
        assert certificate.radius <= radius
    assert sum(certificate.label >= 0 for certificate in certificates) >= 3


@pytest.mark.filterwarnings("ignore")
def test_foolbox_attacks_it(defence, x, y):
    import foolbox

    model = foolbox.PyTorchModel(defence.make().model, bounds=(0, 1), device="cpu")
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    assert foolbox.accuracy(model, images, labels) >= 0.8
    attack = foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.25)
    _, x_adv, found = attack(model, images, labels, epsilons=defence.eps)
    assert float((x_adv - images).abs().max()) <= defence.eps + 1e-5
    assert found.float().mean() >= 0.5


def test_it_is_a_maite_model(defence, x):
    from maite.protocols.image_classification import Model

    estimator = defence.make()
    model = MaiteModel(estimator.model, "a defended classifier")
    assert isinstance(model, Model)
    expected = torch.from_numpy(estimator.predict(x)).softmax(1)
    np.testing.assert_allclose(np.stack(model(list(x))), expected, rtol=1e-3, atol=1e-4)
