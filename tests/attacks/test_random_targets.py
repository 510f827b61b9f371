"""Random targets of PGD are any wrong class, each as often as the others."""

from __future__ import annotations

import torch
from torch import nn

from art_denoised import PGD


class FirstPixels(nn.Module):
    """The logits are the first three pixels."""

    def forward(self, x):
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
