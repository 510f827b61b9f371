"""Voting over purified copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from art_denoised import LikelihoodMaximization, Purification, PurifiedClassifier
from art_denoised.checks import InputError
from art_denoised.diffusion import preview_cost
from tests.rdc.test_classifier import images, small_model


class Linear(nn.Module):
    def forward(self, x):
        return 20 * x.flatten(1)[:, :4]


def purified(seed: int | None = 0) -> Purification:
    return Purification(small_model(), sigma=0.3, steps=2, seed=seed)


def test_one_copy_is_the_classifier_on_purified_images():
    x, purify = images(), purified()
    expected = Linear()(purify(x)).log_softmax(1)
    torch.testing.assert_close(PurifiedClassifier(purify, Linear())(x), expected)
    assert torch.equal(PurifiedClassifier(purify, Linear()).purify(x), purify(x))


@pytest.mark.parametrize(
    "purifier", [purified, lambda: LikelihoodMaximization(small_model(), seed=0)]
)
def test_copies_have_noise_of_their_own_and_vote(purifier):
    x, seen = images(4), []

    def classifier(x):
        seen.append(x)
        return Linear()(x)

    purify = purifier()
    mean = PurifiedClassifier(purify, classifier, copies=5)(x)
    assert purify.seed == 0
    torch.testing.assert_close(seen[0], purify(x))
    assert len({tuple(one.flatten().tolist()) for one in seen}) == 5
    probabilities = torch.stack([Linear()(one).softmax(1) for one in seen])
    torch.testing.assert_close(mean.exp(), probabilities.mean(0))
    majority = PurifiedClassifier(purify, Linear(), copies=5, vote="majority")(x)
    votes = nn.functional.one_hot(probabilities.argmax(2), 4).sum(0)
    torch.testing.assert_close(majority.exp(), (votes + probabilities.mean(0)) / 6)
    torch.testing.assert_close(majority.exp().sum(1), torch.ones(4, dtype=x.dtype))


def test_the_noise_of_a_copy_is_that_of_its_seed():
    """Spelled out: what a seed gives must outlive a version."""
    x, seen = images(1), []
    PurifiedClassifier(purified(5), lambda x: seen.append(x) or Linear()(x), copies=2)(x)
    state = np.random.SeedSequence(5, spawn_key=(3, 1)).generate_state(1, np.uint64)
    assert torch.equal(seen[0], purified(5)(x))
    assert torch.equal(seen[1], purified(int(state[0]) >> 1)(x))


def test_the_preview_adds_the_classifier_of_every_copy():
    """A linear layer: 640 MACs, again in its gradient, for which it keeps its input."""
    network, images, copies = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 3, 2
    defence = PurifiedClassifier(purified(), network, copies=copies)
    cost = preview_cost(defence, (1, 8, 8), images=images)
    alone = preview_cost(purified(), (1, 8, 8), images=images * copies, batch=images)
    assert cost.nfe == alone.nfe == images * copies * 2
    assert cost.flop - alone.flop == images * copies * 2 * 640
    assert cost.gradient_flop - alone.gradient_flop == images * copies * 2 * 2 * 640
    assert cost.memory - alone.memory == 4 * 650 + images * copies * 1.5 * 4 * 64


def test_logits_of_a_majority_are_finite_where_a_class_is_out_of_reach():
    """With -inf among them, the DLR loss and its gradient would be 0."""

    class Far(nn.Module):
        def forward(self, x):
            return (1000 * x.flatten(1)[:, :4]).half()

    model = PurifiedClassifier(purified(), Far(), copies=3, vote="majority")
    assert bool(model(images()).isfinite().all())


def test_copies_of_a_function_are_refused():
    """Its noise would be the same in all of them."""
    with pytest.raises(InputError, match="4 copies"):
        PurifiedClassifier(purified().purify, Linear(), copies=4)


def test_the_gradient_of_a_majority_is_that_of_the_mean():
    gradients = []
    for vote in ("mean", "majority"):
        x = images().requires_grad_()
        model = PurifiedClassifier(purified(), Linear(), copies=3, vote=vote)
        gradients.append(torch.autograd.grad(model(x)[:, 1].sum(), x)[0])
    assert torch.equal(*gradients)


def test_images_are_resized_to_the_input_of_the_classifier():
    classifier = Linear()
    classifier.input_size = (16, 16)
    shapes = []
    classifier.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[-2:]))
    PurifiedClassifier(purified(), classifier)(images())
    assert shapes == [(16, 16)]


def test_bad_input():
    with pytest.raises(InputError, match="majority"):
        PurifiedClassifier(purified(), Linear(), vote="majority")
    with pytest.raises(InputError, match="plurality"):
        PurifiedClassifier(purified(), Linear(), copies=2, vote="plurality")
    with pytest.raises(InputError, match="function"):
        preview_cost(PurifiedClassifier(lambda x: x, Linear()), (1, 8, 8))
