"""The masking checks count what they say: reference values, on a target that answers as told."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from art_denoised.attacks import PGD, AutoAttack
from art_denoised.evaluation import CHECKS, CLEAN, AttackRow, Probes, masking
from art_denoised.evaluation.masking import Ball, Count, Subject, judged
from art_denoised.evaluation.target import Column

N = 40
PROBES = Probes(images=N, steps=20, queries=30, eot=3)


class Told:
    """A target whose images are right in as many quarters of the evaluations as it is told.

    ``shares(attack, gradient)`` is for images under an attack; their first pixel says it.
    """

    differentiable, device = True, torch.device("cpu")

    def __init__(self, shares=lambda attack, gradient: 1.0, *, ways=("exact",), randomised=False):
        self.shares, self.ways, self.randomised = shares, ways, randomised
        self.attempts, self.logits = [], lambda x: x.flatten(1)[:, :2]

    def gradients(self):
        return self.ways

    def attempt(self, attack, gradient, x, y, seed):
        self.attempts.append((attack, gradient))
        x_adv = x.clone()
        x_adv[:, 0, 0, 0] = torch.as_tensor(self.shares(attack, gradient)).expand(len(x))
        return SimpleNamespace(x_adv=x_adv)

    def right(self, x, y, seed):
        return torch.stack([x[:, 0, 0, 0] > quarter / 4 for quarter in range(4)])

    def session(self, seed):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def taking(self, how):
        self.how = how
        yield


def row(index, share, *, attack="pgd", gradient="exact", norm="linf", eps=0.1):
    fresh = tuple(quarter / 4 < share for quarter in range(4))
    return AttackRow(index, 0, attack, gradient, norm, eps, True, False, fresh, 0.1, 0.1, 0.0)


def subject(target, rows=(), *, balls=(("linf", 0.1),), probes=PROBES, n=N):
    clean = [row(i, 1.0, attack=CLEAN, gradient="none", eps=0.0) for i in range(n)]
    used = tuple(Column("pgd", "exact", PGD(eps, norm=norm)) for norm, eps in balls)
    x, y = torch.ones(n, 1, 4, 4), torch.zeros(n, dtype=torch.long)
    return Subject(target, x, y, tuple(range(n)), (*clean, *rows), used, None, probes)


TOLERANCES = {
    "gradient-free attacks": 0.02,
    "stronger attack": 0.05,
    "zero gradients": 0.01,
    "more steps": 0.05,
    "larger eps": 0.05,
    "eps large enough": 0.05,
    "gradient against random": 0.2,
    "transfer": 0.02,
}


def test_tolerances_are_those_of_the_documentation(digits, undefended):
    for name, tolerance in TOLERANCES.items():
        looked = subject(Told())
        looked.undefended = undefended
        numbers = masking.make(name, looked).numbers
        assert (numbers["tolerance"], numbers["alpha"]) == (tolerance, 0.01), name
    assert set(CHECKS) - set(TOLERANCES) == {"logits", "global seed"}


@pytest.fixture
def undefended():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()


@pytest.mark.parametrize("few", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("many", [0.0, 0.5, 0.75, 1.0])
def test_only_clear_cases_count(few, many):
    """Lost is a quarter of the evaluations or fewer, kept three quarters or more."""
    target = Told(lambda attack, gradient: few if attack.steps == 5 else many)
    check = masking.make("more steps", subject(target))
    assert check.numbers["count"] == (N if few <= 0.25 and many >= 0.75 else 0)
    assert {attack.steps for attack, _ in target.attempts} == {5, 20}


@pytest.mark.parametrize("stood", [0.5, 0.75])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_stronger_attack_counts_what_the_worst_of_the_run_left(stood, share):
    rows = [row(i, 1.0) for i in range(N)] + [row(i, stood, attack="other") for i in range(N)]
    check = masking.make("stronger attack", subject(Told(lambda *_: share), rows))
    assert check.numbers["count"] == (N if share <= 0.25 and stood >= 0.75 else 0)


def test_the_worst_of_the_ways_of_taking_gradients_counts():
    for ways in (("exact", "bpda"), ("bpda", "exact")):
        target = Told(lambda attack, gradient: 0.0 if gradient == "bpda" else 1.0, ways=ways)
        assert subject(target).pgd(Ball("linf", 0.1), 20).tolist() == [0.0] * N


@pytest.mark.parametrize("randomised", [False, True])
def test_what_square_alone_broke_is_attacked_harder(randomised):
    """By PGD of five times the steps and four starts; averaged if the model is randomised."""
    target = Told(lambda a, _: 0.0 if isinstance(a, AutoAttack) else 1.0, randomised=randomised)
    check = masking.make("gradient-free attacks", subject(target))
    assert check.passed is False
    assert check.numbers["count"] == N
    (_, pgd), (square, blind), (hard, _) = target.attempts
    assert (square.parts, square.queries, blind) == (("square",), 30, "none")
    assert (hard.steps, hard.restarts, hard.eot) == (100, 4, 3 if randomised else 1)
    assert pgd == "exact"


@pytest.mark.parametrize(("balls", "passes"), [((0.1,), False), ((0.1, 0.2), True)])
def test_each_ball_and_each_attack_of_the_run_may_be_the_gravest(balls, passes):
    """7 of 100 at 2 % have a p-value of .0041: below 1 % / 2, and above 1 % / 4."""
    rows = []
    for eps in balls:
        rows += [row(i, 1.0, eps=eps) for i in range(100)]
        rows += [row(i, i >= 7, attack="s", gradient="none", eps=eps) for i in range(100)]
    looked = subject(Told(), rows, balls=[("linf", eps) for eps in balls], n=100)
    check = masking.make("gradient-free attacks", looked)
    assert check.numbers["count"] == 7
    assert check.passed is passes


def test_the_largest_ball_in_which_some_image_survives_is_looked_at():
    """The smallest one, if none survives in any."""
    target = Told(lambda attack, gradient: float(attack.eps < 0.3))
    assert subject(target, balls=[("linf", e) for e in (0.1, 0.2, 0.4)]).ball == ("linf", 0.2)
    assert subject(target, balls=[("linf", e) for e in (0.5, 0.4)]).ball == ("linf", 0.4)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.5), ("l2", 2.0)])
@pytest.mark.parametrize(("share", "held"), [(0.5, 0), (0.75, N)])
def test_an_eps_that_holds_grey_is_attacked_with_twice_the_steps(norm, eps, share, held):
    """An image of 16 pixels is 0.5 sqrt(16) from grey in l2, at most."""
    target = Told(lambda attack, gradient: share)
    check = masking.make("eps large enough", subject(target, balls=[(norm, 0.1)]))
    assert check.numbers["count"] == held
    assert (target.attempts[-1][0].eps, target.attempts[-1][0].steps) == (eps, 40)


def rising(x, how):
    """Logits whose margin rises along the gradient of "exact", and whose "bpda" points back."""
    flat = x.flatten(1)
    along = flat if how == "exact" else 2 * flat.detach() - flat
    return torch.stack([0 * flat[:, 0], along.sum(1)], 1)


@pytest.mark.parametrize("ways", [("exact", "bpda"), ("bpda",)])
def test_the_gradient_is_followed_for_a_quarter_of_eps(ways):
    """The best of the ways of taking gradients counts, against noise as long."""
    target, seen = Told(ways=ways), []
    target.logits = lambda x: seen.append(x.detach()) or rising(x, target.how)
    target.how = "exact"
    looked = subject(target)
    looked.x = torch.full_like(looked.x, 0.5)
    check = masking.make("gradient against random", looked)
    assert check.numbers["count"] == (0 if "exact" in ways else N)
    tried = [x for x in seen if not torch.equal(x, looked.x)]
    far = [float((x - looked.x).abs().max()) for x in tried]
    assert far == pytest.approx([0.1 / 4] * len(far))
    for edge in (0.0, 1.0):  # no image beyond black or white is tried
        looked.x = torch.full_like(looked.x, edge)
        masking.make("gradient against random", looked)
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)


@pytest.mark.parametrize(
    ("margin", "passes"), [(79.0, True), (80.0, True), (81.0, False), (2e-3, True), (0.5e-3, False)]
)
def test_margins_that_saturate_or_drown(margin, passes):
    """Beyond 80, or below 1e-5 of the largest logit: that is 99 here, and 1 is added to it."""
    target = Told()
    each = 99 - torch.arange(N).double() % 2  # the logits differ from image to image
    target.logits = lambda x: torch.stack([each, each - margin, 0 * each], 1)
    check = masking.make("logits", subject(target))
    assert check.passed is passes
    assert check.numbers["median_margin"] == pytest.approx(margin, abs=1e-6)


@pytest.mark.parametrize(("n", "passes"), [(1, True), (2, False)])
def test_images_with_the_same_logits_are_found_if_there_are_several(n, passes):
    target = Told()
    target.logits = lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2)
    check = masking.make("logits", subject(target, n=n))
    assert check.passed is passes
    assert check.numbers["spread"] == 0.0
    assert ("same for every image" in check.finding) is not passes


def test_the_size_of_the_checks_is_the_documented_one():
    assert Probes() == Probes(images=32, steps=20, queries=200, eot=8)


def test_losses_of_a_random_model_are_averaged_over_draws():
    draws = iter([1.0, 5.0, 6.0])
    target = Told(randomised=True)
    target.logits = lambda x: torch.tensor([[0.0, next(draws)]]).expand(len(x), 2)
    assert subject(target).losses(torch.ones(N, 1, 4, 4)).tolist() == [4.0] * N


def test_a_small_share_of_many_is_graver_than_a_large_one_of_few():
    counts = [Count(1, 8, "few"), Count(45, 500, "many")]
    verdict = judged(counts, 0.05)
    assert (verdict.passed, verdict.numbers["count"], verdict.numbers["images"]) == (False, 45, 500)
    assert judged([Count(1, 8, "few")], 0.05).passed is True
