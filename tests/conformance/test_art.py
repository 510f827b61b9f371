"""What ART itself asks of classifiers for PyTorch, asked of every defence.

ART's own tests of classifiers, certification and evasion were read for what they assert: shapes,
layers, losses, copies on disk, labels in every form, targets and masks of attacks. Beside these are
its trainers, its detectors, and batches without images.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from art.attacks import evasion
from art.data_generators import PyTorchDataGenerator
from art.defences.detector.evasion import SubsetScanningDetector
from art.defences.trainer import (
    AdversarialTrainer,
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerOAATPyTorch,
    AdversarialTrainerTRADESPyTorch,
)
from art.estimators.classification import PyTorchClassifier
from art.utils import random_targets
from torch import nn

from art_denoised.checks import InputError
from tests.conformance.defences import DEFENCES

ONE_HOT = np.eye(10, dtype=np.float32)
NONE = np.zeros((0, 1, 8, 8), np.float32)
NO_LABELS = np.zeros(0, int)
SEES_IMAGES = ("feature denoising", "smooth activations")  # the layers of these do


def trainable(row, **options):
    estimator = row.make(**row.light, **options)
    estimator._optimizer = torch.optim.SGD(estimator.model.parameters(), lr=0.01)
    return estimator


def weights(estimator) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in estimator.model.parameters()])


def pgd(estimator):
    return evasion.ProjectedGradientDescent(
        estimator, eps=0.1, eps_step=0.05, max_iter=1, verbose=False
    )


def awp(mode):
    return lambda estimator, proxy: AdversarialTrainerAWPPyTorch(
        estimator, proxy(), pgd(estimator), mode=mode, gamma=0.01, beta=6.0, warmup=0
    )


OAAT = {
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "lr_schedule": "cosine",
    "epsilon": 0.1,
    "i_epsilon": 0.1,
    "alternate_iter_eps": 1.0,
    "max_iter": 1,
    "norm": np.inf,
    "alpha": 1.0,
    "beta": 1.0,
    "beta_final": 1.0,
    "mixup_epsilon": 0.1,
    "mixup_alpha": 0.2,
    "awp_warmup": 0,
    "awp_gamma": 0.01,
    "oaat_warmup": 0,
    "swa_save_epoch": 9,
    "lpips_weight": 1.0,
    "i_lpips_weight": 1.0,
    "layer_names_activation": [0],
    "list_swa_epoch": [0],
    "list_swa_tau": [0.9],
    "load_swa_model_tau": 0.9,
    "models_path": None,
}
TRAINERS = {
    "AdversarialTrainer": lambda estimator, _: AdversarialTrainer(estimator, pgd(estimator)),
    "MadryPGD": lambda estimator, _: AdversarialTrainerMadryPGD(
        estimator, nb_epochs=1, batch_size=3, eps=0.1, eps_step=0.05, max_iter=1
    ),
    "TRADES": lambda estimator, _: AdversarialTrainerTRADESPyTorch(estimator, pgd(estimator), 6.0),
    "AWP Madry": awp("PGD"),
    "AWP TRADES": awp("TRADES"),
    "FBF": lambda estimator, _: AdversarialTrainerFBFPyTorch(estimator, eps=0.1),
    "OAAT": lambda estimator, proxy: AdversarialTrainerOAATPyTorch(
        estimator, proxy(), proxy(), [proxy()], pgd(estimator), dict(OAAT)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", DEFENCES)
def test_trainers_use_the_labels_or_refuse(name, trainer, x, y):
    batches = 2 if trainer == "FBF" else 1  # the learning rate of its first step is 0
    row, found, x, y = DEFENCES[name], [], x[: 3 * batches], y[: 3 * batches]
    options = {} if trainer == "MadryPGD" else {"batch_size": 3, "nb_epochs": 1}
    for labels in (y, (y + 3) % 10):
        torch.manual_seed(0)
        np.random.seed(0)
        estimator = trainable(row)
        before = weights(estimator)
        made = TRAINERS[trainer](estimator, lambda: trainable(row))
        if (name, trainer) == ("RDC", "FBF"):  # it trains in eval mode
            with pytest.raises(InputError, match="eval mode"):
                made.fit(x, ONE_HOT[labels], **options)
            return
        made.fit(x, ONE_HOT[labels], **options)
        found.append(weights(estimator))
    assert torch.isfinite(found[0]).all()
    assert not torch.equal(found[0], before)
    assert not torch.equal(*found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ["NewtonFool", "UniversalPerturbation", "foolbox NewtonFool"])
def test_attacks_that_clip_at_the_end_run(defence, attack, x, y):
    import foolbox

    estimator, x, y = defence.make(), x[:3], y[:3]
    if attack == "NewtonFool":
        found = evasion.NewtonFool(estimator, max_iter=2, verbose=False).generate(x)
    elif attack == "UniversalPerturbation":
        found = evasion.UniversalPerturbation(
            estimator, attacker="fgsm", max_iter=1, verbose=False
        ).generate(x)
    else:
        model = foolbox.PyTorchModel(estimator.model, bounds=(0, 1), device="cpu")
        newton = foolbox.attacks.NewtonFoolAttack(steps=2)
        _, found, _ = newton(model, torch.from_numpy(x), torch.from_numpy(y), epsilons=None)
        found = np.nan_to_num(found.detach().numpy())  # it divides by gradients that may be 0
    assert found.shape == x.shape
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # ART's rate of success among none
def test_no_images_give_no_rows(defence):
    estimator = defence.make()
    assert estimator.predict(NONE).shape == (0, 10)
    assert estimator.loss_gradient(NONE, NO_LABELS).shape == NONE.shape
    assert estimator.loss_gradient(torch.tensor(NONE), torch.tensor(NO_LABELS)).shape == NONE.shape
    assert estimator.class_gradient(NONE).shape == (0, 10, 1, 8, 8)
    assert estimator.class_gradient(NONE, 3).shape == (0, 1, 1, 8, 8)
    assert estimator.compute_loss(NONE, NO_LABELS).shape == (0,)
    assert pgd(estimator).generate(NONE, ONE_HOT[NO_LABELS]).shape == NONE.shape
    for refused in (
        lambda: estimator.compute_loss(NONE, NO_LABELS, reduction="mean"),
        lambda: estimator.fit(NONE, NO_LABELS),
        lambda: estimator.predict(np.zeros((0, 3, 8, 8), np.float32)),
    ):
        with pytest.raises(InputError):
            refused()


def test_no_images_have_no_certificates():
    smoothed = DEFENCES["denoised smoothing"].make()
    labels, radii = smoothed.certify(NONE, n=100)
    assert (labels.shape, radii.shape) == ((0,), (0,))
    assert labels.dtype == np.int64
    assert smoothed.certificates(NONE, n=100) == []
    assert smoothed.vote(NONE, n=100).shape == (0,)
    with pytest.raises(InputError, match="no images"):
        smoothed.certify_table(NONE, NO_LABELS, [0.1], n=100)


@pytest.mark.parametrize(
    "labels",
    [[-1], [10], [2.7], ["two"], None, [[0.5, np.nan] * 5], [[1, 0, 0]], [1, 2], [True]],
    ids=str,
)
def test_labels_that_are_none_are_refused(defence, labels, x):
    """ART reads -1 as the last class, and 2.7 as 2."""
    estimator = defence.make()
    for use in (estimator.loss_gradient, estimator.compute_loss, trainable(defence).fit):
        with pytest.raises(InputError, match="label"):
            use(x[:1], labels)


def test_class_gradients_of_no_class_are_refused(defence, x):
    for label in (-1, 10, np.array([-1]), [1, 2], "two"):
        with pytest.raises(InputError, match="label"):
            defence.make().class_gradient(x[:1], label)


@pytest.mark.parametrize("name", DEFENCES)
def test_layers_are_read_by_name_and_number_or_refused(name, x):
    estimator = DEFENCES[name].make()
    if name not in SEES_IMAGES:
        for use in (
            lambda: estimator.get_activations(x, 0),
            lambda: estimator.custom_loss_gradient(torch.norm, x[:1], x[1:2], 0),
            lambda: SubsetScanningDetector(estimator, bgd_data=x, layer=0, verbose=False),
        ):
            with pytest.raises(InputError, match=f"{type(estimator).__name__}.*noisy copies"):
                use()
        return
    for number, layer in enumerate(estimator.layer_names):
        found = estimator.get_activations(x, number, batch_size=4)
        np.testing.assert_array_equal(estimator.get_activations(x, layer, batch_size=4), found)
        assert estimator.get_activations(NONE, number).shape == (0, *found.shape[1:])
    gradient = estimator.custom_loss_gradient(torch.norm, x[:1], x[1:2], 0)
    assert gradient.shape == (1, 1, 8, 8)
    assert np.abs(gradient).max() > 0
    detector = SubsetScanningDetector(estimator, bgd_data=x[:4], layer=0, verbose=False)
    clean, other, power = detector.scan(x[:3], 1 - x[:3])
    assert len(clean) == len(other) == 3
    assert 0 <= power <= 1


def test_the_loss_changes_neither_predictions_nor_class_gradients(defence, x, y):
    reference, x, y = defence.make(), x[:2], y[:2]
    gradients = reference.class_gradient(x, 5)
    for loss in (nn.MultiMarginLoss(), nn.NLLLoss()):
        estimator = defence.make()
        estimator.set_params(loss=loss)
        np.testing.assert_array_equal(estimator.predict(x), reference.predict(x))
        np.testing.assert_allclose(estimator.class_gradient(x, 5), gradients, rtol=1e-5, atol=1e-7)
        expected = loss(torch.from_numpy(reference.predict(x)), torch.from_numpy(y))
        assert estimator.compute_loss(x, y, reduction="mean") == pytest.approx(
            float(expected), rel=1e-3
        )


def test_images_in_double_precision_are_those_in_single(defence, x, y):
    estimator, x, y = defence.make(), x[:2], y[:2]
    for use in (estimator.predict, lambda x: estimator.loss_gradient(x, y)):
        np.testing.assert_array_equal(use(x.astype(np.float64)), use(x))


def test_weights_on_disk_are_those_of_the_model(defence, tmp_path):
    estimator = defence.make()
    estimator.save("weights", path=str(tmp_path))
    state = torch.load(tmp_path / "weights.model", weights_only=True)
    assert state.keys() == estimator.model.state_dict().keys()
    twin = pickle.loads(pickle.dumps(estimator))
    assert twin.channels_first == estimator.channels_first
    assert (twin.input_shape, twin.nb_classes) == ((1, 8, 8), 10)
    np.testing.assert_array_equal(twin.clip_values, estimator.clip_values)


@pytest.mark.parametrize("name", SEES_IMAGES)
@pytest.mark.parametrize("how", ["fit", "fit_generator"])
def test_fitting_learns(name, how, digits):
    images, labels = digits[0][:96], digits[1][:96]
    estimator = trainable(DEFENCES[name])
    estimator = estimator.clone_for_refitting()
    losses = [estimator.compute_loss(images.numpy(), labels.numpy(), reduction="mean")]
    torch.manual_seed(0)
    if how == "fit":
        estimator.fit(images.numpy(), labels.numpy(), batch_size=16, nb_epochs=3)
    else:
        pairs = torch.utils.data.TensorDataset(images, torch.eye(10)[labels])
        loader = torch.utils.data.DataLoader(pairs, batch_size=16)
        estimator.fit_generator(PyTorchDataGenerator(loader, 96, 16), nb_epochs=3)
    losses.append(estimator.compute_loss(images.numpy(), labels.numpy(), reduction="mean"))
    assert losses[1] < losses[0]


def test_a_generator_does_not_train_the_classifier_of_denoised_smoothing():
    with pytest.raises(InputError, match="fit_generator"):
        trainable(DEFENCES["denoised smoothing"]).fit_generator(None)


@pytest.mark.parametrize(("norm", "order"), [(np.inf, np.inf), (2, 2), (1, 1)])
def test_gradient_steps_keep_to_budgets_targets_and_masks(defence, norm, order, x, y):
    estimator, x, y, eps = defence.make(), x[:3].copy(), y[:3], 0.2
    before, targets = x.copy(), random_targets(y, 10)
    attack = evasion.FastGradientMethod(estimator, norm=norm, eps=eps)
    x_adv = attack.generate(x, y)
    change = (x_adv - x).reshape(3, -1)
    assert (np.linalg.norm(change, order, axis=1) <= eps + 1e-5).all()
    assert np.abs(change).max() > 0
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(attack.generate(x, ONE_HOT[y]), x_adv)
    targeted = evasion.FastGradientMethod(estimator, norm=norm, eps=0.02, targeted=True)
    losses = [estimator.compute_loss(i, targets) for i in (x, targeted.generate(x, targets))]
    assert (losses[1] < losses[0]).mean() > 0.5
    mask = np.zeros_like(x)
    mask[:, :, :4] = 1
    masked = attack.generate(x, y, mask=mask)
    np.testing.assert_array_equal(masked[:, :, 4:], x[:, :, 4:])
    assert norm == 1 or (masked[:, :, :4] != x[:, :, :4]).any()  # l1 changes a single pixel


def test_little_noise_leaves_the_classifier_as_it_is(x, y):
    """ART's test of randomized smoothing: noise of 0.01, and attacks beside the classifier's."""
    from art_denoised.demo import digits_classifier

    smoothed = DEFENCES["denoised smoothing"].make(sigma=0.01)
    smoothed.model.base = digits_classifier()
    plain = PyTorchClassifier(
        digits_classifier(), nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip
    np.testing.assert_array_equal(smoothed.predict(x).argmax(1), plain.predict(x).argmax(1))
    targets = random_targets(y, 10)
    found = [
        evasion.FastGradientMethod(estimator, eps=0.3, targeted=True).generate(x, targets)
        for estimator in (plain, smoothed)
    ]
    assert (np.abs(found[0] - found[1]) < 0.75).all()
    labels, radii = smoothed.certify(x, n=250)
    assert labels.shape == radii.shape == (len(x),)
    assert ((labels >= -1) & (labels < 10)).all()
    assert ((radii >= 0) & (radii <= 0.01 * 3)).all()
    assert smoothed.loss_gradient(x=x, y=y, sampling=True).shape == x.shape
    for refused in (
        lambda: smoothed.loss_gradient(x=x, y=y, sampling=False),
        lambda: smoothed.predict(x, is_abstain=True),
    ):
        with pytest.raises(InputError, match="sampling|is_abstain"):
            refused()
