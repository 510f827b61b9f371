"""Attacks of ART, torchattacks and AutoAttack run on the defence unchanged, and do attack it."""

from __future__ import annotations

import art.attacks.evasion as evasion
import numpy as np
import pytest
import torch
from art.defences.trainer import AdversarialTrainer, AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier

EPS = 0.3
BUDGET = {"eps": EPS, "eps_step": 0.08, "max_iter": 8, "verbose": False}
IMAGES = 10

ATTACKS = {
    "FGM": lambda s: evasion.FastGradientMethod(s, eps=EPS),
    "PGD": lambda s: evasion.ProjectedGradientDescent(s, **BUDGET),
    "PGD numpy": lambda s: evasion.ProjectedGradientDescentNumpy(s, **BUDGET),
    "APGD": lambda s: evasion.AutoProjectedGradientDescent(
        s, eps=EPS, eps_step=0.1, max_iter=8, nb_random_init=1, loss_type="cross_entropy",
        verbose=False,
    ),
    "APGD DLR": lambda s: evasion.AutoProjectedGradientDescent(
        s, eps=EPS, eps_step=0.1, max_iter=8, nb_random_init=1,
        loss_type="difference_logits_ratio", verbose=False,
    ),
    "Square": lambda s: evasion.SquareAttack(s, eps=EPS, max_iter=100, verbose=False),
    "AutoAttack": lambda s: evasion.AutoAttack(
        s,
        eps=EPS,
        eps_step=0.1,
        attacks=[
            evasion.AutoProjectedGradientDescent(
                s, eps=EPS, eps_step=0.1, max_iter=5, nb_random_init=1,
                loss_type="cross_entropy", verbose=False,
            ),
            evasion.SquareAttack(s, eps=EPS, max_iter=20, verbose=False),
        ],
    ),
    "HopSkipJump": lambda s: evasion.HopSkipJump(
        s, max_iter=2, max_eval=60, init_eval=5, verbose=False
    ),
    "DeepFool": lambda s: evasion.DeepFool(s, max_iter=10, verbose=False),
    "Carlini": lambda s: evasion.CarliniL2Method(
        s, max_iter=10, binary_search_steps=3, initial_const=1.0, verbose=False
    ),
}  # fmt: skip
BOUNDED = ["FGM", "PGD", "PGD numpy", "APGD", "APGD DLR", "Square", "AutoAttack"]


@pytest.fixture(scope="module")
def data(digits):
    return digits[0][:IMAGES].numpy(), digits[1][:IMAGES].numpy()


@pytest.fixture(autouse=True)
def _seeded():
    """The attacks draw from the global generators; the defence does not."""
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "attack",
    [
        evasion.AutoConjugateGradient,
        evasion.BoundaryAttack,
        evasion.ElasticNet,
        evasion.NewtonFool,
        evasion.SaliencyMapMethod,
        evasion.ShadowAttack,
        evasion.SignOPTAttack,
        evasion.SpatialTransformation,
        evasion.Wasserstein,
        evasion.ZooAttack,
        AdversarialTrainer,
        AdversarialTrainerMadryPGD,
    ],
)
def test_arts_gates_let_it_through(make, attack):
    """The checks of type that each family of attacks makes; the ones that follow also run."""
    required = getattr(attack, "_estimator_requirements", (PyTorchClassifier,))
    mro = type(make()).__mro__
    for alternatives in required:
        options = alternatives if isinstance(alternatives, tuple) else (alternatives,)
        assert any(option in mro for option in options), alternatives
    if attack is AdversarialTrainer:
        attack(make(), evasion.FastGradientMethod(make()))


@pytest.mark.filterwarnings("ignore")  # the attacks' own: divisions, deprecations
@pytest.mark.parametrize("name", ATTACKS)
def test_art_attacks_run_unchanged(make, data, name):
    x, y = data
    smoothed = make()
    x_adv = ATTACKS[name](smoothed).generate(x, y)
    assert x_adv.shape == x.shape
    assert np.isfinite(x_adv).all()
    assert x_adv.min() >= -1e-6
    assert x_adv.max() <= 1 + 1e-6
    if name in BOUNDED:
        assert np.abs(x_adv - x).max() <= EPS + 1e-5
    accuracy = [(smoothed.predict(images).argmax(1) == y).mean() for images in (x, x_adv)]
    assert accuracy[0] >= 0.9
    assert accuracy[1] <= accuracy[0] - 0.3


def test_torchattacks_run_unchanged(make, data):
    import torchattacks

    model = make().model
    x, y = (torch.from_numpy(array) for array in data)
    x_adv = torchattacks.PGD(model, eps=EPS, alpha=0.08, steps=8)(x, y)
    assert float((x_adv - x).abs().max()) <= EPS + 1e-5
    with torch.no_grad():
        assert (model(x_adv).argmax(1) == y).float().mean() <= 0.6


@pytest.mark.filterwarnings("ignore")
def test_autoattack_runs_unchanged_and_sees_a_deterministic_model(make, data, caplog):
    from pyautoattack import AutoAttack

    model = make(samples=2).model
    x, y = (torch.from_numpy(array) for array in data)
    attack = AutoAttack(
        model, norm="Linf", eps=EPS, attacks=["apgd-ce"], version="custom", device="cpu", seed=0
    )
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=IMAGES)
    with torch.no_grad():
        assert (model(x_adv).argmax(1) == y).float().mean() <= 0.3
    assert "randomized" not in caplog.text
    assert "probability" not in caplog.text
