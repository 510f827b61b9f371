"""The cost before a run is the cost of the run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from art_denoised import DiffusionClassifier, LikelihoodMaximization
from art_denoised.checks import InputError
from art_denoised.diffusion import noise_levels, preview_cost
from art_denoised.models.cost import FlopCounter
from art_denoised.rdc import RDC, Momentum
from tests.rdc.test_classifier import LEVELS, Counting, images, small_model

SHAPE = (1, 8, 8)


def counted(defence, x, *, gradient: bool) -> float:
    with FlopCounter() as counter:
        if gradient:
            defence(x.clone().requires_grad_()).log_softmax(1)[:, 3].sum().backward()
        else:
            with torch.no_grad():
                defence(x)
    return counter.flop


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("form", ["adam", "adam_reference", Momentum(LEVELS)], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "bpda"])
def test_passes_and_operations_are_those_of_a_run(recompute, form, gradient):
    model, x = small_model(torch.float32), images(3, torch.float32)
    lm = LikelihoodMaximization(model, steps=2, eta=0.1, form=form, gradient=gradient, seed=0)
    defence = RDC(lm, DiffusionClassifier(model, levels=LEVELS, recompute=recompute, seed=0))
    cost = preview_cost(defence, SHAPE, images=3)
    assert cost.flop == counted(defence, x, gradient=False)
    # The first step's gradient does not reach the image it began with: exact ones save a little.
    assert counted(defence, x, gradient=True) == pytest.approx(cost.gradient_flop, rel=0.02)
    model.network = counting = Counting(model.network)
    with torch.no_grad():
        defence(x)
    assert counting.rows == cost.nfe == defence.nfe(3)
    assert preview_cost(nn.Sequential(*defence.children()), SHAPE, images=3) == cost


def test_memory_is_bounded_by_the_batch_and_not_by_levels():
    def memory(images: int, levels: int, **options: int) -> int:
        dc = DiffusionClassifier(
            small_model(), levels=noise_levels(levels), **{"max_batch": 40, **options}
        )
        return preview_cost(dc, SHAPE, images=images).memory

    assert memory(1, 4) == memory(1, 64) == memory(100, 4)
    assert memory(1, 64, max_batch=80) > 1.5 * memory(1, 64)
    lm = LikelihoodMaximization(small_model(), seed=0)
    sizes = [preview_cost(lm, SHAPE, images=100, batch=b).memory for b in (1, 10, 100)]
    assert sizes == sorted(set(sizes))
    assert preview_cost(lm, SHAPE, images=10, batch=100) == preview_cost(lm, SHAPE, images=10)
    assert memory(1, 2) < memory(1, 4)  # less than a batch


def test_in_words():
    dc = DiffusionClassifier(small_model(), levels=LEVELS)
    assert "1 image: 30 network evaluations, " in str(preview_cost(dc, SHAPE))
    assert "5 images: 150 network evaluations" in str(preview_cost(dc, SHAPE, images=5))


def test_bad_input():
    dc = DiffusionClassifier(small_model(), levels=LEVELS)
    with pytest.raises(InputError, match="cost of a Linear is not known"):
        preview_cost(nn.Linear(2, 2), SHAPE)
    with pytest.raises(InputError, match=r"shape \(3, 8, 8\)"):
        preview_cost(dc, (3, 8, 8))
    with pytest.raises(InputError, match="images is 0"):
        preview_cost(dc, SHAPE, images=0)
