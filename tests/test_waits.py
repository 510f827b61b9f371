"""How often the work waits for a device, counted on a CPU by the operations that would wait."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from art_denoised import (
    PGD,
    DiffusionClassifier,
    FixedN,
    LikelihoodMaximization,
    Smoother,
    TrainingConfig,
)
from art_denoised.demo import digits_classifier, digits_diffusion
from art_denoised.diffusion import noise_levels
from art_denoised.rdc import Adam, Momentum
from art_denoised.training import RECIPES, train_robust

# A value that is read, a size that depends on values, a comparison that returns a Python bool.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount"}
WAITING |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}


class Waits(TorchDispatchMode):
    """Counts operations that wait for a device.

    Copies to the host are no operation on a CPU; `tolist` and `numpy` of what was copied are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        # Integers that are read are counters of modules, which are held on the host.
        held = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.long
        if name in WAITING and not (held and name == "_local_scalar_dense"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def test_counter_sees_what_waits():
    with Waits() as waits:
        x = torch.arange(3.0)
        float(x.sum()), bool((x > 1).any()), x.nonzero(), torch.equal(x, x)
    assert waits.counts == {"_local_scalar_dense": 2, "nonzero": 1, "equal": 1}


@pytest.mark.parametrize("noise", ["gaussian", "quantised"])
def test_sampling_waits_for_no_batch(noise, digits):
    """The number of waits is that of the checks at the door, whatever the number of samples."""
    x = (digits[0][:2] * 255).round() / 255
    totals = []
    for n in (200, 2200):
        smoother = Smoother(digits_classifier(), sigma=0.25, noise=noise, batch_size=50)
        with Waits() as waits:
            smoother.certify(x, FixedN(n))
        totals.append(waits.total)
    assert totals[0] == totals[1] <= 20


def test_votes_are_copied_once_a_draw(monkeypatch, digits):
    """Of two images with two draws each, packed into batches together."""
    copies, to = [], torch.Tensor.to

    def counted(tensor, *args, **options):
        if "non_blocking" in options and args == ("cpu",):
            copies.append(tensor.shape)
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    smoother = Smoother(digits_classifier(), sigma=0.25, batch_size=50)
    monkeypatch.setattr("art_denoised.smoothing.voters._TICK", 1e9)
    smoother.certify(digits[0][:2], FixedN(1000))
    assert len(copies) <= 4


def diffusion_classifier(**options) -> DiffusionClassifier:
    levels = noise_levels(8)
    return DiffusionClassifier(digits_diffusion(), levels=levels, temperature=1e3, **options)


@pytest.mark.parametrize("options", [{"seed": 0}, {"seed": None}, {"seed": 0, "recompute": False}])
def test_a_gradient_of_a_diffusion_classifier_waits_for_no_chunk(options, digits):
    x, y = digits[0][:2], digits[1][:2]
    totals = []
    for chunk in (8, 80):
        classifier = diffusion_classifier(max_batch=chunk, **options)
        with Waits() as waits:
            leaf = x.clone().requires_grad_()
            F.cross_entropy(classifier(leaf), y).backward()
        totals.append(waits.total)
    assert totals[0] == totals[1] <= 4  # images, range, finite values, classes with a gradient


@pytest.mark.parametrize("form", [Adam(), Momentum(noise_levels(4))])
def test_likelihood_maximization_waits_for_no_step(form, digits):
    totals = []
    for steps in (1, 3):
        maximize = LikelihoodMaximization(digits_diffusion(), steps=steps, form=form, seed=0)
        with Waits() as waits:
            leaf = digits[0][:2].clone().requires_grad_()
            maximize(leaf).sum().backward()
        totals.append(waits.total)
    assert totals[0] == totals[1] <= 4


def test_an_attack_waits_for_no_step(digits):
    totals = []
    for steps in (2, 8):
        with Waits() as waits:
            PGD(0.1, steps=steps)(digits_classifier(), digits[0][:4], digits[1][:4])
        totals.append(waits.total)
    assert totals[0] == totals[1] <= 9  # of which all but one are checks at the door


def test_training_waits_for_no_step(monkeypatch, digits):
    """Losses are read at the end of an epoch, and between at times; weights are averaged."""
    monkeypatch.setattr("art_denoised.training.loop._TICK", 1e9)
    data = torch.utils.data.TensorDataset(digits[0][:64], digits[1][:64])
    totals = []
    for size in (32, 8):  # two steps and eight
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)
        )
        config = TrainingConfig(
            epochs=1, batch_size=size, average=0.9, clip=1.0, optimizer="sgd", bf16=False
        )
        with Waits() as waits:
            train_robust(network, data, RECIPES["pgd"], config, progress=False)
        totals.append((waits.total, 64 // size))
    (few, two), (many, eight) = totals
    # On the host: a check of the images where they are loaded, and two readings of a count.
    assert (many - few) / (eight - two) <= 3
