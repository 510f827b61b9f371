"""A smoother that is sampled elsewhere: what is sent, and what a worker answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from art_denoised import Smoother
from art_denoised.smoothing import Draw, Stage
from art_denoised.smoothing.dispatch import Piece
from tests.smoothing.test_voters import IMAGE, class_counts, small_net


class Here:
    """A place without workers, which keeps their plan."""

    allow_mixed = False

    def __init__(self, build=None):
        self.build = build

    def start(self, plan, *, gpu):
        self.plan, self.gpu = plan, gpu
        return SimpleNamespace(size=1, closed=lambda: None)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_worker_answers_as_the_smoother_itself(given, device):
    """Its network is the one that was built there, or else the one that was sent."""
    net = small_net(torch.float32)
    place = Here((lambda: small_net(torch.float32)) if given else None)
    options = {"sigma": 0.5, "seed": 3, "batch_size": 16}
    Smoother(net, **options, workers=place).voter()
    assert place.gpu is False
    worker = place.plan(device)
    draws = [Draw(Stage.ESTIMATION, 0, 20), Draw(Stage.ESTIMATION, 20, 50)]
    found = worker.answer([Piece(5, IMAGE.numpy(), draw) for draw in draws])
    assert [sum(votes.values()) for votes in found] == [20, 30]
    both = {c: sum(votes.get(c, 0) for votes in found) for c in {*found[0], *found[1]}}
    assert both == class_counts(net, IMAGE, 50, seed=3, batch_size=16)


def test_functions_are_not_moved_to_a_device():
    place = Here(lambda: lambda x: x.flatten(1)[:, :3])
    Smoother(nn.Flatten().eval(), sigma=0.5, workers=place).voter()
    (votes,) = place.plan("cpu").answer([Piece(0, IMAGE.numpy(), Draw(Stage.VOTE, 0, 10))])
    assert sum(votes.values()) == 10
