"""The attacks on purification: the distance along the path, and the choice among draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised import PGD, DiffAttack, DiffHammer, Purification, PurifiedClassifier
from art_denoised.attacks.purification import selected_gradient
from art_denoised.checks import InputError
from tests.rdc.test_classifier import images, small_model

X, Y = images(3, torch.float32), torch.tensor([1, 2, 3])


def purified(seed: int | None = 0, copies: int = 1, **options) -> nn.Module:
    purify = Purification(small_model(torch.float32), sigma=0.3, steps=2, seed=seed, **options)
    torch.manual_seed(0)
    return PurifiedClassifier(purify, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), copies=copies)


def test_diffattack_adds_the_mean_distance_over_all_copies_to_the_loss():
    """In the direction of the sum of both gradients, of which neither drowns the other."""
    model = purified(copies=2)
    options = {"norm": "l2", "steps": 1, "step_size": 0.01, "random_start": False, "keep": "last"}
    x = 0.3 + 0.4 * X  # where nothing is clipped
    leaf = x.clone().requires_grad_()
    with model.purifier.following() as distances:
        loss = nn.functional.cross_entropy(model(leaf), Y, reduction="sum")
    assert len(distances) == 2
    total = loss + (distances[0] + distances[1]).sum() / 2
    (gradient,) = torch.autograd.grad(total, leaf)
    expected = x + 0.01 * nn.functional.normalize(gradient.flatten(1)).reshape(x.shape)
    torch.testing.assert_close(DiffAttack(0.01, **options)(model, x, Y), expected)


def test_diffattack_climbs_the_distance_along_the_path():
    """With a weight that drowns the classification, of single steps from the image."""
    model = purified()
    common = {"steps": 1, "step_size": 0.01, "random_start": False, "keep": "last"}
    x_adv = DiffAttack(0.01, path_weight=1e6, **common)(model, X, Y)
    leaf = X.clone().requires_grad_()
    with model.purifier.following() as distances:
        model(leaf)
    (gradient,) = torch.autograd.grad(distances[0].sum(), leaf)
    expected = (X + 0.01 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected)
    assert not torch.equal(x_adv, PGD(0.01, **common)(model, X, Y))


def test_bpda_has_no_gradient_of_the_path():
    model = purified(gradient="bpda")
    common = {"steps": 3, "loss": "margin", "keep": "last"}
    assert torch.equal(DiffAttack(0.1, **common)(model, X, Y), PGD(0.1, **common)(model, X, Y))


def test_a_model_without_a_path_is_refused():
    with pytest.raises(InputError, match="Sequential can be followed"):
        DiffAttack(0.1, steps=1)(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), X, Y)


def test_the_selected_gradient_leaves_out_the_draw_that_cannot_be_broken():
    """Two draws share a way to be broken; the third is far from it and pulls back, hard."""
    gradients = torch.zeros(3, 1, 1, 1, 2)
    gradients[:2, 0, 0, 0, 0], gradients[2, 0, 0, 0, 0] = 1.0, -3.0
    gradients[:, 0, 0, 0, 1] = torch.tensor([0.1, -0.1, 0.0])
    losses = torch.tensor([[-0.1], [-0.1], [-9.0]])
    assert float(gradients.mean(0)[0, 0, 0, 0]) < 0
    found = selected_gradient(losses, gradients, eps=0.3, norm="linf", sharpness=5, rounds=5)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([1.0, 0.0]), atol=1e-2, rtol=0)


def test_the_selected_gradient_against_its_formulas():
    """Two images and four draws in l2, image by image, with the weights of the paper."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 2, 1, 1, 3, generator=generator, dtype=torch.float64)
    losses = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    eps, sharpness = 0.5, 5.0
    found = selected_gradient(losses, gradients, eps=eps, norm="l2", sharpness=sharpness, rounds=2)
    for image in range(2):
        g, loss = gradients[:, image].reshape(4, 3), losses[:, image]
        rises = [
            sum(float(nn.functional.elu(loss[c] + eps * g[c] @ way)) for c in range(4))
            for way in (g[a] / g[a].norm() for a in range(4))
        ]
        chosen = g[rises.index(max(rises))]
        for _ in range(2):
            weights = 1 / (1 + torch.exp(-sharpness * (loss + eps * g @ chosen / chosen.norm())))
            chosen = sum(w * one for w, one in zip(weights, g, strict=True)) / sum(weights)
        torch.testing.assert_close(found[image].flatten(), chosen)


def test_with_one_draw_diffhammer_is_pgd():
    common = {"steps": 3, "loss": "margin", "eot": 1}
    model = purified()
    assert torch.equal(DiffHammer(0.1, **common)(model, X, Y), PGD(0.1, **common)(model, X, Y))


def test_the_last_point_is_kept_if_asked():
    """Steps from 0.5 to 0.65 and back around a peak at 0.6."""

    class Ridge(nn.Module):
        def forward(self, x):
            middle = x.flatten(1).mean(1)
            return torch.stack([-(middle - 0.6).square(), 0 * middle], 1)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([1])
    found = {}
    for keep in ("worst", "last"):
        attack = PGD(0.2, steps=4, step_size=0.15, random_start=False, keep=keep)
        found[keep] = attack(Ridge(), x, y)
    assert {keep: round(float(x.mean()), 4) for keep, x in found.items()} == {
        "worst": 0.65,
        "last": 0.5,
    }
    with pytest.raises(InputError, match="'best'"):
        PGD(0.1, keep="best")


@pytest.mark.parametrize("options", [{"sharpness": 0}, {"rounds": 0}], ids=str)
def test_bad_input(options):
    with pytest.raises(InputError, match="is 0"):
        DiffHammer(0.1, **options)
    with pytest.raises(InputError, match="path_weight"):
        DiffAttack(0.1, path_weight=-1)


def test_diffhammer_begins_with_documented_values():
    attack = DiffHammer(0.1)
    assert (attack.eot, attack.sharpness, attack.rounds, attack.loss) == (10, 5.0, 5, "margin")
