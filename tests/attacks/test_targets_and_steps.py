"""What PGD aims at, and how far it steps, on a model whose logits are three of its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from art_denoised import PGD


class FirstPixels(nn.Module):
    """The logits are the first three pixels, times ten. It keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        return 10 * x.flatten(1)[:, :3]


def test_every_wrong_class_is_a_target():
    """Each step goes where the target says. Of 90 draws a class has 45: fewer than 25 in 1e-5."""
    x = torch.full((90, 1, 2, 2), 0.5)
    attack = PGD(0.2, steps=1, random_start=False, targeted="random")
    for label in range(3):
        y = torch.full((90,), label)
        found = FirstPixels()(attack(FirstPixels(), x, y)).argmax(1)
        counts = torch.bincount(found, minlength=3)
        assert counts[label] == 0
        assert all(counts[(label + shift) % 3] >= 25 for shift in (1, 2))


def test_random_targets_are_drawn_for_each_image_by_its_key():
    """Seed, restart and index; the class is shifted by 1 or 2."""
    y, seed = torch.zeros(12, dtype=torch.long), 4
    x = torch.full((12, 1, 2, 2), 0.5)
    options = {"steps": 1, "random_start": False, "targeted": "random", "seed": seed}
    found = FirstPixels()(PGD(0.2, **options)(FirstPixels(), x, y)).argmax(1)
    for index, label in enumerate(found.tolist()):
        state = np.random.SeedSequence((seed, 0, index)).generate_state(1, np.uint64)
        draw = torch.Generator().manual_seed(int(state[0]))
        assert label == int(torch.randint(1, 3, (1,), generator=draw))


def moves(model, x, y, **options):
    """Return the change of the three pixels at each input that an attack tries, from the image."""
    PGD(0.1, loss="margin", random_start=False, **options)(model, x, y)
    return [(seen - x).flatten(1)[0, :3].tolist() for seen in model.seen]


IMAGE = torch.tensor([0.5, 0.3, 0.4, 0.5]).reshape(1, 1, 2, 2)  # class 0, then 2, then 1


@pytest.mark.parametrize(
    ("targeted", "aims"),
    [("likeliest", [2, 1, 2]), ("least_likely", [1, 1, 1]), (False, [2, 2, 2])],
)
def test_where_each_restart_aims(targeted, aims):
    model = FirstPixels()
    moved = moves(model, IMAGE, torch.tensor([0]), targeted=targeted, steps=1, restarts=3)
    last = moved[len(moved) - 5 :: 2]  # each restart looks at the image, and at where it came to
    for aim, change in zip(aims, last, strict=True):
        expected = [0.1 if i == aim else -0.1 if i == 0 else 0 for i in range(3)]
        assert change == pytest.approx(expected, abs=1e-6)


def test_the_likeliest_class_of_a_random_model_is_so_on_average():
    """Class 1 has the highest probability of one draw, class 2 that of both (log-probabilities)."""

    class Alternating(FirstPixels):
        def forward(self, x):
            logits = super().forward(x)
            unlucky = len(self.seen) % 2 == 0
            return logits + torch.tensor([0.0, -50.0 if unlucky else 2.0, 0.0])

    model = Alternating()
    x = torch.full((1, 1, 2, 2), 0.5)
    moved = moves(model, x, torch.tensor([0]), targeted="likeliest", steps=1, eot=2)
    assert moved[-1] == pytest.approx([-0.1, 0, 0.1], abs=1e-6)


class Scheduled(FirstPixels):
    """Its draws are scheduled: each adds to the logits of class 0, and scales all of them."""

    def __init__(self, *draws):
        super().__init__()
        self.draws = [(0, 1), *draws]  # the first call says how many classes there are

    def forward(self, x):
        ahead, scale = self.draws[len(self.seen)]
        return scale * (super().forward(x) + torch.tensor([ahead, 0.0, 0.0]))


def test_gradients_are_summed_over_draws():
    """The first draw's is nine times the second's, and points the other way."""
    model = Scheduled((0, 9), (0, -1), (0, 1), (0, 1))
    x = torch.tensor([0.5, 0.6, 0.4, 0.5]).reshape(1, 1, 2, 2)
    moved = moves(model, x, torch.tensor([0]), steps=1, eot=2)[-1]
    assert moved == pytest.approx([-0.1, 0.1, -0.1])


@pytest.mark.parametrize(
    ("draws", "moved"),
    [
        ([(-9, 1), (9, 1), (5, 1), (5, 1)], False),  # fooled once at the image, never beside it
        ([(5, 1), (5, 1), (-9, 1), (9, 1)], True),
        ([(8, 1), (5, 1), (4, 1), (5, 1)], True),  # never fooled: the higher loss
        ([(4, 1), (5, 1), (12, 1), (5, 1)], False),
    ],
)
def test_the_point_that_is_kept_is_the_worst_over_all_draws(draws, moved):
    attack = PGD(0.01, loss="margin", random_start=False, steps=1, eot=2)
    x_adv = attack(Scheduled(*draws), IMAGE, torch.tensor([0]))
    assert torch.equal(x_adv, IMAGE) is not moved


@pytest.mark.parametrize(("step_size", "length"), [(None, 2.5 * 0.1 / 5), (0.02, 0.02)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_has_the_stated_length(norm, step_size, length):
    """The gradient is (-10, 0, 10): one step moves two pixels, by 1 / sqrt(2) each in l2."""
    model, options = FirstPixels(), {"steps": 5, "step_size": step_size, "norm": norm}
    moved = moves(model, IMAGE, torch.tensor([0]), **options)
    first = length if norm == "linf" else length / 2**0.5
    assert moved[-5] == pytest.approx([-first, 0, first], abs=1e-6)
    assert moved[-6] == [0, 0, 0]


def test_it_counts_its_forward_passes_beforehand():
    """One more says how many classes there are."""
    for options in ({"steps": 4}, {"steps": 3, "restarts": 2, "eot": 5}):
        model = FirstPixels()
        moves(model, IMAGE, torch.tensor([0]), **options)
        assert len(model.seen) == PGD(0.1, **options).nfe + 1
