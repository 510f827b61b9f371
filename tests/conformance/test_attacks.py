"""Attacks of ART, torchattacks and AutoAttack run on every defence unchanged, and do attack it.

One table of attacks, with budgets of seconds; `rand` and `EOT` attack fresh noise. An attack counts
as working where it stays in its ball and leaves fewer than half of the images standing.
"""

from __future__ import annotations

import art.attacks.evasion as evasion
import pytest
import torch

import art_denoised
from art_denoised.estimators.defended import DefendedClassifier
from tests.conformance.defences import DEFENCES


def _apgd(estimator, eps, loss):
    return evasion.AutoProjectedGradientDescent(
        estimator, eps=eps, eps_step=eps / 3, max_iter=8, nb_random_init=1, loss_type=loss,
        verbose=False,
    )  # fmt: skip


def _art_autoattack(estimator, eps):
    square = evasion.SquareAttack(estimator, eps=eps, max_iter=20, verbose=False)
    attacks = [_apgd(estimator, eps, "cross_entropy"), square]
    return evasion.AutoAttack(estimator, eps=eps, eps_step=eps / 3, attacks=attacks)


def _hop_skip_jump(estimator, eps):
    return evasion.HopSkipJump(estimator, max_iter=2, max_eval=30, init_eval=5, verbose=False)


def _carlini(estimator, eps):
    return evasion.CarliniL2Method(
        estimator, max_iter=8, binary_search_steps=1, initial_const=10.0, learning_rate=0.1,
        batch_size=6, verbose=False,
    )  # fmt: skip


def _pgd(estimator, eps):
    return evasion.ProjectedGradientDescent(
        estimator, eps=eps, eps_step=eps / 4, max_iter=8, verbose=False
    )


def _art(build):
    return lambda estimator, eps, x, y: torch.from_numpy(
        build(estimator, eps).generate(x.numpy(), y.numpy())
    )


def _torchattacks(name, **options):
    def attack(estimator, eps, x, y):
        import torchattacks

        sizes = {"alpha": eps / 4} if "PGD" in name and name != "APGD" else {}
        return getattr(torchattacks, name)(estimator.model, eps=eps, **sizes, **options)(x, y)

    return attack


def _torchattacks_autoattack(estimator, eps, x, y):
    import torchattacks

    attack = torchattacks.AutoAttack(estimator.model, eps=eps, n_classes=4, seed=0)
    for part in attack._autoattack.attacks:
        part.steps, part.n_queries = 3, 20
    return attack(x, y)


def _autoattack(version):
    def attack(estimator, eps, x, y):
        from pyautoattack import AutoAttack

        suite = AutoAttack(estimator.model, norm="Linf", eps=eps, version=version, seed=0)
        suite.apgd.n_iter, suite.apgd_targeted.n_iter = (5 if version == "rand" else 10), 3
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 3
        suite.fab.n_iter, suite.square.n_queries = 2, 10
        suite.apgd.eot_iter = min(suite.apgd.eot_iter, 3)
        return suite.run_standard_evaluation(x, y)[0]

    return attack


UNBOUNDED = {"ART HopSkipJump", "ART CarliniL2"}  # they look for the nearest, not within a ball
FRESH = {"torchattacks EOTPGD", "AutoAttack rand"}
ATTACKS = {
    "ART PGD": _art(_pgd),
    "ART APGD": _art(lambda estimator, eps: _apgd(estimator, eps, "cross_entropy")),
    "ART APGD DLR": _art(
        lambda estimator, eps: _apgd(estimator, eps, "difference_logits_ratio")
    ),
    "ART Square": _art(
        lambda estimator, eps: evasion.SquareAttack(
            estimator, eps=eps, max_iter=50, verbose=False
        )
    ),
    "ART HopSkipJump": _art(_hop_skip_jump),
    "ART CarliniL2": _art(_carlini),
    "ART AutoAttack": _art(_art_autoattack),
    "torchattacks PGD": _torchattacks("PGD", steps=8),
    "torchattacks APGD": _torchattacks("APGD", steps=8, seed=0),
    "torchattacks EOTPGD": _torchattacks("EOTPGD", steps=8, eot_iter=2),
    "torchattacks Square": _torchattacks("Square", n_queries=50, seed=0),
    "torchattacks AutoAttack": _torchattacks_autoattack,
    "AutoAttack standard": _autoattack("standard"),
    "AutoAttack rand": _autoattack("rand"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the attacks' own: divisions, deprecations
@pytest.mark.parametrize("attack", ATTACKS)
def test_it_runs_unchanged_and_attacks(defence, attack, x, y):
    fresh = defence.noisy and attack in FRESH
    estimator = defence.make(**defence.light, **({"seed": None} if fresh else {}))
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    x_adv = ATTACKS[attack](estimator, defence.eps, images, labels)
    assert x_adv.shape == images.shape
    assert bool(torch.isfinite(x_adv).all())
    assert float(x_adv.min()) >= -1e-6
    assert float(x_adv.max()) <= 1 + 1e-6
    if attack not in UNBOUNDED:
        assert float((x_adv - images).abs().max()) <= defence.eps + 1e-5
    left = (estimator.predict(x_adv.detach().numpy()).argmax(1) == y).mean()
    assert (estimator.predict(x).argmax(1) == y).mean() >= 0.8
    assert left <= 0.5


def test_every_estimator_of_the_library_is_in_the_table():
    public = [getattr(art_denoised, name) for name in art_denoised.__all__]
    kinds = {
        thing
        for thing in public
        if isinstance(thing, type) and issubclass(thing, DefendedClassifier)
    }
    assert {type(row.make()) for row in DEFENCES.values()} >= kinds
