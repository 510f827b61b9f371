"""Adversarial training: robust if it attacks, not if it does not, and exact under resuming."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from art_denoised import PGD, InputError, TrainingConfig, train_robust
from art_denoised.attacks.pgd import cross_entropy
from art_denoised.data import digits as load_digits
from art_denoised.demo import digits_network
from art_denoised.training import (
    RECIPES,
    Adversarial,
    Trades,
    Validation,
)
from art_denoised.training.robust import measure_classifier, overfits

EPS = 0.15
CONFIG = TrainingConfig(
    epochs=6, batch_size=64, optimizer="sgd", lr=0.2, schedule="one-cycle", average=0.9,
    clip=0.0, augment="none",
)  # fmt: skip


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return digits_network()


def normed(seed: int = 0) -> nn.Module:
    """Batch norm and dropout: what a careless attack would disturb."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(36, 10),
        )  # fmt: skip


def small(n: int = 96) -> TensorDataset:
    data = load_digits(train=True)
    return TensorDataset(data.images[:n], data.labels[:n])


def robust_after(recipe: Adversarial, digits) -> dict[str, float]:
    model = network()
    train_robust(model, load_digits(train=True), recipe, CONFIG, progress=False)
    x, y = (part[:200] for part in digits)
    return measure_classifier(model, x, y, PGD(EPS, steps=20))


def test_training_makes_robust_and_a_broken_attacker_does_not(digits):
    """PGD-20 on held-out digits after 6 epochs: 65% with a working attacker, 16% with eps 0."""
    trained = robust_after(replace(RECIPES["sat"], eps=EPS), digits)
    broken = robust_after(replace(RECIPES["sat"], eps=0.0), digits)
    assert trained["accuracy"] > 0.95
    assert trained["robust"] > 0.55
    assert broken["accuracy"] > 0.95
    assert broken["robust"] < 0.3


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains(name, tmp_path):
    recipe = RECIPES[name]
    if recipe.eps:
        recipe = replace(recipe, eps=0.1, steps=min(recipe.steps, 2))
    model, config = normed(), replace(CONFIG, epochs=3, batch_size=32)
    options = {"validation": small(20), "run": tmp_path, "progress": False}
    rows = train_robust(model, small(), recipe, config, **options)
    assert rows[-1].loss < rows[0].loss
    assert rows[-1].figures["accuracy"] >= rows[-1].figures["robust"]
    settings = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["loss"]["recipe"]["eps"] == recipe.eps
    assert not model.training


@pytest.mark.parametrize("recipe", ["sat", "trades", "feature-denoising"])
def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, recipe):
    recipe = replace(RECIPES[recipe], eps=0.1, steps=2)
    config = replace(CONFIG, epochs=2, batch_size=32)
    options = {"validation": Validation(small(20), keep_best=True), "progress": False}
    whole = normed()
    rows = train_robust(whole, small(), recipe, config, **options)

    class Failing(nn.Module):
        """Fails after some calls, in the middle of an attack."""

        def __init__(self, net: nn.Module, calls: int) -> None:
            super().__init__()
            self.net, self._calls = net, calls

        @property
        def calls(self) -> int:
            return self._calls

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self._calls -= 1
            if self._calls == 0:
                raise InterruptedError
            return self.net(x)

    wrapped, reference = Failing(normed(), -1), Failing(normed(), -1)
    train_robust(reference, small(), recipe, config, **options)
    assert all(
        torch.equal(a, b)
        for a, b in zip(reference.state_dict().values(), whole.state_dict().values(), strict=True)
    )  # the wrapper itself changes nothing
    options["run"] = tmp_path
    with pytest.raises(InterruptedError):
        train_robust(
            Failing(normed(), -1 - reference.calls - 12), small(), recipe, config, **options
        )
    resumed = train_robust(wrapped, small(), recipe, config, resume=True, **options)
    assert [row.loss for row in resumed] == [row.loss for row in rows]
    assert [row.figures for row in resumed] == [row.figures for row in rows]
    for a, b in zip(wrapped.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", [Adversarial(steps=2), Trades(steps=2)])
def test_the_attack_leaves_batch_norm_dropout_and_weights_alone(recipe):
    model = normed().train()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x_adv = (
        recipe.attack(model, x, y) if isinstance(recipe, Adversarial) else recipe.attack(model, x)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not x_adv.requires_grad
    assert (x_adv - x).abs().max() <= recipe.eps + 1e-7


def test_targets_are_wrong_and_uniform():
    """The attack on a linear model shows its target; each share has a standard error of .3%."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    torch.manual_seed(0)
    model[1].weight.data = torch.eye(10, 64)
    x, y = torch.full((9000, 1, 8, 8), 0.5), torch.full((9000,), 3)
    recipe = Adversarial(eps=0.1, steps=4, relative_step_size=1.0, targeted=True)
    aims = model(recipe.attack(model, x, y)).argmax(1).bincount(minlength=10) / 9000
    assert aims[3] == 0
    assert (aims[torch.arange(10) != 3] - 1 / 9).abs().max() < 0.02


def test_the_share_of_clean_starts_is_one_of_batches():
    """Without steps to speak of the attack returns its start; 5 standard errors are 0.13."""
    model, (x, y) = network(), (torch.full((4, 1, 8, 8), 0.5), torch.arange(4))
    recipe = Adversarial(eps=0.1, steps=1, relative_step_size=1e-6, clean_starts=0.2)
    torch.manual_seed(0)
    moved = [(recipe.attack(model, x, y) - x).abs().amax((1, 2, 3)) > 1e-3 for _ in range(250)]
    assert all(bool(m.all()) or not bool(m.any()) for m in moved)
    assert sum(not bool(m.any()) for m in moved) / 250 == pytest.approx(0.2, abs=0.13)


def test_trades_against_its_formula():
    model, (x, y) = network().eval(), (torch.rand(6, 1, 8, 8), torch.arange(6))
    recipe = Trades(eps=0.1, steps=3, beta=2.5)
    torch.manual_seed(1)
    value = recipe.loss(model, x, y)
    torch.manual_seed(1)
    x_adv = recipe.attack(model, x)
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    formula = F.cross_entropy(model(x), y) + 2.5 * divergence.mean()
    assert value.item() == pytest.approx(formula.item(), rel=1e-4)
    weights = list(model.parameters())
    slopes = zip(*(torch.autograd.grad(one, weights) for one in (value, formula)), strict=True)
    for found, expected in slopes:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    p, divergence = p.detach(), divergence.detach()
    torch.manual_seed(2)
    near = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    start = (p * (p / model(near).softmax(1)).log()).sum(1)
    assert divergence.mean() > 10 * start.mean()


def test_the_attack_of_a_recipe_is_that_of_pgd():
    """One implementation of the step: training's and evaluation's end at the same points."""
    model, (x, y) = network().eval(), (torch.rand(6, 1, 8, 8), torch.arange(6))
    recipe = Adversarial(eps=0.1, steps=1, relative_step_size=0.25, clean_starts=1.0)
    x_adv = recipe.attack(model, x, y)
    judged = PGD(0.1, steps=1, step_size=0.025, random_start=False)(model, x, y)
    raised = cross_entropy(model(x_adv), y) > cross_entropy(model(x), y)
    assert raised.any()
    assert torch.equal(x_adv[raised], judged[raised])


ROWS = [
    ([(0.4, 0.45), (0.45, 0.5), (0.02, 0.9)], True),
    ([(0.4, 0.45), (0.02, 0.9), (0.0, 0.95)], True),
    ([(0.4, 0.45), (0.02, 0.1)], False),  # broken, in plain sight
    ([(0.4, 0.45), (0.35, 0.6)], False),  # robust overfitting, not catastrophic
    ([(0.1, 0.12), (0.2, 0.25), (0.4, 0.45)], False),
    ([(0.0, 0.95)], True),  # within the first epoch
    ([(0.0, 0.95), (0.0, 0.99)], True),
    ([(0.02, 0.4)], False),  # a clean training's network: steps fool it, one or many
    ([(0.0, 0.2)], False),
]


@pytest.mark.parametrize(("figures", "expected"), ROWS)
def test_the_detector_on_rows_made_up(figures, expected):
    rows = [{"accuracy": 0.97, "robust": r, "one_step": o} for r, o in figures]
    assert overfits(rows) is expected


def test_the_detector_is_silent_while_little_is_learnt():
    assert not overfits([{"accuracy": 0.2, "robust": 0.0, "one_step": 0.2}])


def settled(tmp_path, model=None, recipe="clean", validation=None, resume=False):
    config = replace(CONFIG, epochs=1, batch_size=32)
    return train_robust(
        model or normed(), small(64), recipe, config, validation=validation or small(20),
        run=tmp_path, resume=resume, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("validation", "name"),
    [
        (small(21), "evaluation.measure.x"),
        (Validation(small(20), stop_on_overfitting=True), "evaluation.stop"),
        (Validation(small(20), keep_best=True), "evaluation.keep_best"),
        (Validation(small(20), steps=3), "evaluation.measure.attack.steps"),
    ],
)
def test_what_judges_the_epochs_is_compared_on_resuming(tmp_path, validation, name):
    settled(tmp_path)
    settled(tmp_path, resume=True)
    with pytest.raises(InputError, match=name):
        settled(tmp_path, validation=validation, resume=True)


def test_a_part_without_weights_is_compared_on_resuming(tmp_path):
    def model(slope: float) -> nn.Module:
        net = normed()
        net[2] = nn.LeakyReLU(slope)
        return net

    settled(tmp_path, model(0.1))
    with pytest.raises(InputError, match=r"network\.structure differs"):
        settled(tmp_path, model(0.2), resume=True)


def test_a_network_with_another_attribute_is_compared_on_resuming(tmp_path):
    settled(tmp_path)
    other = normed()
    other[2].limit = 6
    with pytest.raises(InputError, match=r"network\.attributes differs"):
        settled(tmp_path, other, resume=True)


class Own:
    """A recipe that is no dataclass; its repr is its address."""

    eps, norm = 0.0, "linf"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight, self.parts, self.rule = weight, ("a", {"b": 1}), F.cross_entropy

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.weight * self.rule(model(x), y)


@dataclass
class OwnData:
    eps: float = 0.0
    norm: str = "linf"
    weight: float = 1.0

    loss = Own.loss
    rule = staticmethod(F.cross_entropy)


@pytest.mark.parametrize("kind", [Own, OwnData])
def test_a_recipe_of_ones_own_is_resumed(tmp_path, kind):
    settled(tmp_path, recipe=kind())
    settled(tmp_path, recipe=kind(), resume=True)
    with pytest.raises(InputError, match=r"loss\.recipe\.weight is 1\.0, not 2\.0"):
        settled(tmp_path, recipe=kind(weight=2.0), resume=True)


def test_data_may_have_an_attribute_named_dataset():
    class Scaled(Dataset):
        """Its inner images are no images in [0, 1]."""

        def __init__(self) -> None:
            self.dataset = [(255 * torch.rand(1, 8, 8), i % 10) for i in range(32)]

        def __len__(self) -> int:
            return 32

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return self.dataset[i][0] / 255, self.dataset[i][1]

    config = replace(CONFIG, epochs=1, batch_size=32)
    odd = Subset([("no image", 0), *Scaled()], range(1, 33))
    for data in (Scaled(), DataLoader(odd)):
        assert len(train_robust(normed(), data, "clean", config, progress=False)) == 1


@pytest.mark.parametrize("recipe", [Adversarial(eps=0.1, steps=1), Trades(eps=0.1, steps=1)])
def test_outputs_beside_the_logits_are_refused_in_one_line(recipe):
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed()

        def forward(self, x):
            return (self.net(x), self.net(x)) if self.training else self.net(x)

    with pytest.raises(InputError, match="aux_logits=False"):
        train_robust(Auxiliary(), small(32), recipe, CONFIG, progress=False)


@pytest.mark.parametrize(
    ("eps", "steps", "step_size"), [(16, 30, 1.0), (16, 10, 1.6), (8, 30, 1.0), (8, 2, 4.0)]
)
def test_feature_denoising_takes_the_steps_of_its_paper(eps, steps, step_size):
    """max(1/255, eps / steps), and the attack goes so far."""
    recipe = replace(RECIPES["feature-denoising"], eps=eps / 255, steps=steps)
    assert recipe.step_size == pytest.approx(step_size / 255)
    model, (x, y) = network(), (torch.full((4, 1, 8, 8), 0.5), torch.arange(4))
    one = replace(
        recipe, steps=1, relative_step_size=recipe.step_size / recipe.eps, clean_starts=1.0
    )
    moved = (one.attack(model, x, y) - x).abs().max()
    assert float(moved) == pytest.approx(step_size / 255, rel=1e-4)


def test_bad_input():
    config = replace(CONFIG, epochs=1, batch_size=32)

    def run(model=None, data=None, recipe="clean", **options):
        data = small() if data is None else data
        return train_robust(model or network(), data, recipe, config, progress=False, **options)

    with pytest.raises(InputError, match=r"recipe is 'fgsm'.*clean, .*sat-release"):
        run(recipe="fgsm")
    with pytest.raises(InputError, match="255"):
        run(validation=[(255 * torch.rand(1, 8, 8), 0)])
    for validation in ([torch.rand(1, 8, 8)], [], DataLoader(small())):
        with pytest.raises(InputError, match="validation"):
            run(validation=validation)
    with pytest.raises(InputError, match="steps is 0"):
        run(validation=Validation(small(), steps=0))
    with pytest.raises(InputError, match=r"\(3, 8, 8\)"):
        run(validation=[(torch.rand(3, 8, 8), 0)])
    with pytest.raises(InputError, match=r"label 11 .*0 to 9"):
        run(data=TensorDataset(torch.rand(40, 1, 8, 8), torch.full((40,), 11)))
    with pytest.raises(InputError, match="label 11 "):
        run(validation=[(torch.rand(1, 8, 8), 11)])
    with pytest.raises(InputError, match="image of shape"):
        run(model=nn.Linear(3, 3))
    with pytest.raises(InputError, match="no images"):
        run(data=[])
    for options, message in [
        ({"eps": 8}, "8/255 = 0.0314"),
        ({"norm": "l0"}, "norm is 'l0'"),
        ({"relative_step_size": 0}, "relative_step_size is 0"),
        ({"clean_starts": 1.5}, "clean_starts is 1.5"),
        ({"label_smoothing": -1}, "label_smoothing is -1"),
    ]:
        with pytest.raises(InputError, match=message):
            Adversarial(**options)
    with pytest.raises(InputError, match="beta is 0"):
        Trades(beta=0)


def test_sat_is_there_as_in_the_paper_and_as_in_the_release():
    """The release: a fifth of starts clean, label smoothing .1, starts unclipped."""
    paper, release = RECIPES["sat"], RECIPES["sat-release"]
    assert (release.clean_starts, release.label_smoothing, release.clip_starts) == (0.2, 0.1, False)
    assert (paper.clean_starts, paper.label_smoothing, paper.clip_starts) == (0.0, 0.0, True)
    for recipe in (paper, release):
        assert (recipe.eps, recipe.steps, recipe.step_size) == (4 / 255, 1, 4 / 255)
        assert not recipe.targeted


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_leaves_the_cube_only_if_it_may(clip, norm):
    class Recorder(nn.Module):
        """Keeps what it was asked."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = network(), []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x.detach())
            return self.net(x)

    model, (x, y) = Recorder(), (torch.zeros(4, 1, 8, 8), torch.arange(4))
    recipe = Adversarial(eps=0.1, norm=norm, steps=1, clip_starts=clip)
    x_adv = recipe.attack(model, x, y)
    (start,) = model.seen
    assert bool((start < 0).any()) is not clip
    assert x_adv.min() >= 0  # steps are always clipped
    assert x_adv.max() > 0
