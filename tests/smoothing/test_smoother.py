"""Certify and Predict on real base classifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from art_denoised import Anytime, AtRadii, FixedN, InputError, Smoother, Voting
from art_denoised.demo import digits_classifier, digits_denoiser
from art_denoised.smoothing import DenoisedClassifier, Draw, Stage, Task
from art_denoised.smoothing.noise import Gaussian, Stream, StreamKey

SIGMA = 0.25


class HalfSpace(nn.Module):
    """Class 0 where the mean pixel exceeds 0.5: at x its distance in l2 is exactly known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        margin = x.mean((1, 2, 3)) - 0.5
        return torch.stack([margin, -margin], dim=1)


def cohen(base, x, n0, n, alpha, seed, index):
    """Certify as Cohen et al. write it: one sample at a time, no cleverness."""

    def sample_under_noise(stage, count):
        votes = np.zeros(10, int)
        stream = Stream(Gaussian(SIGMA), StreamKey(seed, index, stage), x.shape)
        for noise in stream.take(count):
            with torch.no_grad():
                votes[int(base((x + SIGMA * noise)[None]).argmax())] += 1
        return votes

    top = int(sample_under_noise(Stage.SELECTION, n0).argmax())
    k = int(sample_under_noise(Stage.ESTIMATION, n)[top])
    p_lower = float(stats.beta.ppf(alpha, k, n - k + 1)) if k else 0.0
    return (top, SIGMA * stats.norm.ppf(p_lower)) if p_lower > 0.5 else (-1, 0.0)


def half_space(**options: object) -> Smoother:
    return Smoother(HalfSpace().eval(), **{"sigma": SIGMA, **options})


def grey(value: float = 0.6) -> torch.Tensor:
    return torch.full((1, 1, 8, 8), value)


def test_agrees_with_a_literal_loop(digits):
    base = DenoisedClassifier(digits_classifier(), digits_denoiser(), sigma=SIGMA)
    smoother = Smoother(digits_classifier(), denoiser=digits_denoiser(), sigma=SIGMA, seed=7)
    ours = smoother.certify(digits[0][:5], FixedN(250, n0=50))
    for index, certificate in enumerate(ours):
        label, radius = cohen(base, digits[0][index], 50, 250, 0.001, 7, index)
        assert certificate.label == label
        assert radius - 1e-6 <= certificate.radius <= radius


def test_images_are_certified_as_if_alone(digits):
    smoother = Smoother(digits_classifier(), sigma=SIGMA, batch_size=50)
    together = smoother.certify(digits[0][:4], FixedN(150))
    assert [together[3]] == smoother.certify(digits[0][3:4], FixedN(150), first_index=3)


def test_radius_is_at_most_the_true_distance_and_tends_to_it():
    """For a half-space Theorem 1 is tight: the true radius is the distance to the plane."""
    distance = 0.03 * 8  # ||1||_2 = 8 and the mean divides by 64
    smoother = half_space(seed=1)
    radii = [smoother.certify(grey(0.53), FixedN(n))[0].radius for n in (100, 1000, 20_000)]
    assert max(radii) <= distance  # fails by chance with probability 0.003
    assert radii[-1] > 0.93 * distance


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.extend(x)
        return torch.eye(2)[torch.zeros(len(x), dtype=torch.long)]


def test_selection_and_estimation_see_different_noise():
    recorder = Recorder().eval()
    smoother = Smoother(recorder, sigma=1.0, batch_size=10)  # fills every batch
    smoother.certify(torch.zeros(1, 1, 4, 4), FixedN(120, n0=50))
    noisy = recorder.seen[-170:]  # the model is tried on other images before
    assert len({tuple(x.flatten().tolist()) for x in noisy}) == 170
    assert all(bool(x.any()) for x in noisy)


def test_certificate_carries_everything(digits):
    x, stop = digits[0][:1], FixedN(200, n0=30, alpha=0.01)
    (c,) = Smoother(digits_classifier(), sigma=SIGMA, seed=9).certify(x, stop)
    assert (c.n0, c.n, c.alpha, c.sigma, c.seed, c.dtype) == (30, 200, 0.01, SIGMA, 9, "float32")
    assert sum(c.counts.values()) == 200
    half = Smoother(digits_classifier().bfloat16(), sigma=SIGMA)
    assert half.certify(x, FixedN(100))[0].dtype == "bfloat16"


def test_vote_abstains_where_it_cannot_tell():
    assert half_space().vote(grey(0.5), Voting(200))[0].label == -1
    assert half_space().vote(grey(0.6), Voting(200))[0].label == 0


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: half_space(sigma=0), "sigma is 0"),
        (lambda: half_space(sigma=float("inf")), "sigma is inf"),
        (lambda: half_space(sigma="loud"), "loud"),
        (lambda: half_space(sigma=64), "image units"),
        (lambda: half_space(seed=-1), "seed is -1"),
        (lambda: half_space(batch_size=0), "batch_size is 0"),
        (lambda: Smoother(nn.Dropout(), sigma=SIGMA), "training mode"),
        (lambda: Smoother(HalfSpace(), sigma=SIGMA), "HalfSpace"),
        (lambda: FixedN(alpha=0.5), "alpha is 0.5"),
        (lambda: FixedN(n0=0), "n0 is 0"),
        (lambda: FixedN(9), "n is 9"),
        (lambda: FixedN(10.5), "n is 10.5"),
        (lambda: Anytime(9), "n is 9"),
        (lambda: Anytime(seconds=0), "seconds is 0"),
        (lambda: AtRadii([]), "radii is empty"),
        (lambda: AtRadii([-1]), "-1"),
        (lambda: Voting(0), "n is 0"),
        (lambda: half_space().certify(255 * grey(), FixedN(100)), "divide by 255"),
        (lambda: half_space(clip_values=(0, 2)).certify(255 * grey(), FixedN(100)), "153"),
        (lambda: half_space().certify(grey()[0], FixedN(100)), "shape"),
        (lambda: half_space().certify(grey() / 0 * 0, FixedN(100)), "NaN"),
        (lambda: half_space().certify(grey(), FixedN(100), labels=[0, 1]), "1 images and 2 labels"),
        (lambda: half_space().certify(grey(), AtRadii([0.1]), labels=["x"]), "labels"),
        (lambda: half_space().certify(grey(), AtRadii([0.1]), labels=[2]), "label 2"),
        (lambda: half_space().certify(grey(), Voting(100)), "stop is Voting"),
        (lambda: half_space().certify(grey(), 100), "stop is 100"),
        (lambda: half_space().vote(grey(), FixedN(100)), "stop is FixedN"),
        (lambda: half_space().vote(grey(), first_index=-1), "first_index is -1"),
    ],
)
def test_bad_values(make, word):
    with pytest.raises(InputError, match=word):
        make()


def test_the_first_index_may_be_of_numpy_or_torch():
    smoother, stop = half_space(), FixedN(20, n0=5)
    for first in (np.int64(3), torch.tensor(3)):
        found = smoother.certify(grey(), stop, first_index=first)
        assert found == smoother.certify(grey(), stop, first_index=3)
        assert smoother.vote(grey(), Voting(20), first_index=first)[0].label == 0


class OfTheBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return HalfSpace()(x - x.mean(0) + 0.5)


class Functional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return HalfSpace()(nn.functional.dropout(x, 0.5, self.training))


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return HalfSpace()(x + torch.rand(len(x), 1, 1, 1))


@pytest.mark.parametrize(
    ("base", "word"),
    [
        (OfTheBatch().eval(), "other images of its batch"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), HalfSpace()).eval(), "batch"),
        (Random().eval(), "two answers"),
        (Functional(), "Functional"),
        (lambda x: torch.zeros(len(x), len(x) + 1), "2 logits for one image and 3"),
    ],
)
def test_what_is_no_function_of_an_image_is_refused(base, word):
    with pytest.raises(InputError, match=word):
        Smoother(base, sigma=SIGMA).certify(grey(), FixedN(100))


def test_a_base_or_denoiser_may_write_into_its_input(digits):
    """In bfloat16 many samples are near ties, and are classified again."""
    net, x = digits_classifier().bfloat16(), digits[0][3:4]

    def base(x: torch.Tensor) -> torch.Tensor:
        return net((x - 0.3) / 0.5)

    def in_place(x: torch.Tensor) -> torch.Tensor:
        return net(x.sub_(0.3).div_(0.5))

    def denoiser(x: torch.Tensor, sigma: object) -> torch.Tensor:
        return x.mul_(0.9)

    class Half(nn.Module):
        def __init__(self, forward: object) -> None:
            super().__init__()
            self.net, self.forward = net, forward
            self.eval()

    stop = FixedN(500, n0=50)
    expected = Smoother(Half(base), sigma=SIGMA).certify(x, stop)
    assert Smoother(Half(in_place), sigma=SIGMA).certify(x, stop) == expected
    plain = Smoother(Half(base), sigma=SIGMA, denoiser=lambda x, sigma: x * 0.9)
    writing = Smoother(Half(base), sigma=SIGMA, denoiser=denoiser)
    assert writing.certify(x, stop) == plain.certify(x, stop)


def test_the_smallest_n_that_can_certify_does():
    assert half_space().certify(grey(1.0), FixedN(10))[0].radius > 0


def test_radii_stop_sampling_and_labels_skip(digits):
    smoother, x = Smoother(digits_classifier(), sigma=SIGMA), digits[0][:1]
    stop = AtRadii([0.1], n=10_000)
    (c,) = smoother.certify(x, stop)
    assert c.proves(0.1)
    assert c.drawn < 2000
    wrong = [(c.label + 1) % 10]
    (skipped,) = smoother.certify(x, stop, labels=wrong)
    assert (skipped.label, skipped.n) == (-1, 0)
    assert smoother.certify(x, AtRadii([0.1], n=10_000, labels=False), labels=wrong) == [c]
    (whole,) = smoother.certify(x, FixedN(1000), labels=wrong)
    assert whole.n == 1000  # the full radius is in question


def test_anytime_certificates_are_tightened_and_stop_in_time(digits):
    base, x = digits_classifier(), digits[0][:2]
    smoother = Smoother(base, sigma=SIGMA)
    first = smoother.certify(x, Anytime(150, n0=50))
    second = smoother.certify(x, Anytime(2000, n0=50), earlier=first)
    whole = Smoother(base, sigma=SIGMA, batch_size=7).certify(x, Anytime(2000, n0=50))
    assert second == whole
    assert smoother.certify(x, Anytime(100, n0=50), earlier=second) == second
    for other, rule in (
        ({"sigma": 0.5}, Anytime()),
        ({"seed": 1}, Anytime()),
        ({}, Anytime(alpha=0.01)),
    ):
        word = next(iter(other), "alpha")
        with pytest.raises(InputError, match=word):
            Smoother(base, **{"sigma": SIGMA, **other}).certify(x, rule, earlier=first)
    for bad in ([first[0], 3], iter(first), {0: first[0]}):
        with pytest.raises(InputError, match="earlier is"):
            smoother.certify(x, Anytime(2000, n0=50), earlier=bad)
    with pytest.raises(InputError, match="FixedN cannot go on"):
        smoother.certify(x, FixedN(200), earlier=first)
    with pytest.raises(InputError, match="bound"):
        smoother.certify(x, Anytime(), earlier=smoother.certify(x, FixedN(150)))
    labels = [whole[0].label, (whole[1].label + 1) % 10]
    right, wrong = smoother.certify(x, Anytime(2000, n0=50), labels=labels)
    assert (right, wrong.n, wrong.n0) == (whole[0], 0, 50)  # nothing is spent on a wrong class
    assert smoother.certify(x, Anytime(2000, n0=50, labels=False), labels=labels) == whole
    quick = smoother.certify(x, Anytime(10**9, seconds=0.5))
    assert all(0 < c.n < 10**9 for c in quick)
    assert smoother.certify(x, Anytime(n0=50, seconds=1e-9), earlier=first) == first
    with pytest.raises(InputError, match="image 0"):
        smoother.certify(x, Anytime(n0=10**9, seconds=0.05))


class Noting:
    """A voter that notes the draws, and answers class 0."""

    appetite = 1

    def __init__(self) -> None:
        self.draws: list[tuple[int, Draw]] = []
        self.waiting: list[tuple[Task, Draw]] = []
        self.closed = False

    @property
    def pending(self) -> int:
        return len(self.waiting)

    def submit(self, task: Task, draw: Draw) -> None:
        self.draws.append((task.index, draw))
        self.waiting.append((task, draw))

    def next(self) -> tuple[Task, Draw, dict[int, int]]:
        task, draw = self.waiting.pop()
        return task, draw, {0: draw.size}

    def close(self) -> None:
        self.closed = True


def test_with_a_time_limit_images_take_turns_of_doubled_counts():
    voter = Noting()
    smoother = half_space(workers=lambda smoother: voter)
    x = torch.cat([grey(), grey(0.7)])
    found = smoother.certify(x, Anytime(500, n0=10, seconds=1000), first_index=7)
    assert [c.n for c in found] == [500, 500]
    turns = [(0, 100), (100, 200), (200, 400), (400, 500)]
    drawn = [(i, *draw[1:]) for i, draw in voter.draws if draw.stage is Stage.ESTIMATION]
    assert drawn == [(index, *turn) for turn in turns for index in (7, 8)]
    assert voter.closed


def test_a_network_that_answers_large_batches_otherwise_is_refused():
    """One image and pairs agreed, and 64 noisy copies were another class's."""

    def of_size(x):
        return torch.eye(3)[torch.full((len(x),), int(len(x) > 2))]

    with pytest.raises(InputError, match="size of its batch"):
        Smoother(of_size, sigma=0.25).certify(torch.full((1, 1, 4, 4), 0.5), FixedN(100))


@pytest.mark.parametrize("base", [None, "resnet18", torch.nn.Linear])
def test_a_base_that_is_no_function_is_refused(base):
    with pytest.raises(InputError, match="base is"):
        Smoother(base, sigma=0.25)
