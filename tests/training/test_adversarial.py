"""Adversarial training: robust if it attacks, not if it does not, and exact under resuming."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from art_denoised import PGD, Plan, train_robust
from art_denoised.attacks import cross_entropy
from art_denoised.checks import InputError
from art_denoised.data import digits as load_digits
from art_denoised.demo import digits_network
from art_denoised.training.adversarial import judge_classifier, overfits
from art_denoised.training.recipes import RECIPES, Adversarial, Trades

EPS = 0.15
PLAN = Plan(
    epochs=6, batch_size=64, optimizer="sgd", rate=0.2, schedule="one-cycle", average=0.9,
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
    train_robust(model, load_digits(train=True), recipe=recipe, plan=PLAN, progress=False)
    x, y = (part[:200] for part in digits)
    return judge_classifier(model, x, y, PGD(EPS, steps=20))


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
    model, holdout = normed(), small(20)
    plan = replace(PLAN, epochs=3, batch_size=32)
    rows = train_robust(
        model, small(), recipe=recipe, plan=plan, holdout=holdout, out=tmp_path, progress=False
    )
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["accuracy"] >= rows[-1]["robust"]
    settings = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["eps"] == recipe.eps
    assert not model.training


@pytest.mark.parametrize("recipe", ["sat", "trades", "feature-denoising"])
def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, recipe):
    recipe = replace(RECIPES[recipe], eps=0.1, steps=2)
    plan = replace(PLAN, epochs=2, batch_size=32)
    options = {"plan": plan, "holdout": small(20), "best": True, "progress": False}
    whole = normed()
    rows = train_robust(whole, small(), recipe=recipe, **options)

    class Failing(nn.Module):
        """Fails after some calls, in the middle of an attack."""

        def __init__(self, net: nn.Module, calls: int) -> None:
            super().__init__()
            self.net, self.calls = net, calls

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls -= 1
            if self.calls == 0:
                raise InterruptedError
            return self.net(x)

    wrapped = Failing(normed(), -1)
    reference = Failing(normed(), -1)
    train_robust(reference, small(), recipe=recipe, **options)
    assert all(
        torch.equal(a, b)
        for a, b in zip(reference.state_dict().values(), whole.state_dict().values(), strict=True)
    )  # the wrapper itself changes nothing
    options["out"] = tmp_path
    with pytest.raises(InterruptedError):
        train_robust(
            Failing(normed(), -1 - reference.calls - 12), small(), recipe=recipe, **options
        )
    resumed = train_robust(wrapped, small(), recipe=recipe, resume=True, **options)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
    assert [row["robust"] for row in resumed] == [row["robust"] for row in rows]
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
    recipe = Adversarial(eps=0.1, steps=4, stride=1.0, targeted=True)
    aims = model(recipe.attack(model, x, y)).argmax(1).bincount(minlength=10) / 9000
    assert aims[3] == 0
    assert (aims[torch.arange(10) != 3] - 1 / 9).abs().max() < 0.02


def test_the_share_of_clean_starts_is_one_of_batches():
    """Without steps to speak of the attack returns its start; 5 standard errors are 0.13."""
    model, (x, y) = network(), (torch.full((4, 1, 8, 8), 0.5), torch.arange(4))
    recipe = Adversarial(eps=0.1, steps=1, stride=1e-6, clean_starts=0.2)
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
    recipe = Adversarial(eps=0.1, steps=1, stride=0.25, clean_starts=1.0)
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


def settled(tmp_path, model=None, resume=False, **options):
    options = {"recipe": "clean", "holdout": small(20), **options}
    return train_robust(
        model or normed(), small(64), plan=replace(PLAN, epochs=1, batch_size=32), out=tmp_path,
        resume=resume, progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"holdout": small(21)}, "holdout"),
        ({"holdout": None}, "holdout"),
        ({"stop_on_overfitting": True}, "stop_on_overfitting"),
        ({"best": True}, "best"),
    ],
)
def test_what_judges_the_epochs_is_compared_on_resuming(tmp_path, changes, name):
    settled(tmp_path)
    settled(tmp_path, resume=True)
    with pytest.raises(InputError, match=f"other settings .*{name} "):
        settled(tmp_path, resume=True, **changes)


def test_a_part_without_weights_is_compared_on_resuming(tmp_path):
    def model(slope: float) -> nn.Module:
        net = normed()
        net[2] = nn.LeakyReLU(slope)
        return net

    settled(tmp_path, model(0.1))
    with pytest.raises(InputError, match=r"other settings .structure "):
        settled(tmp_path, model(0.2), resume=True)


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
    with pytest.raises(InputError, match=r"'weight': 2\.0"):
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

    plan = replace(PLAN, epochs=1, batch_size=32)
    train_robust(normed(), Scaled(), recipe="clean", plan=plan, progress=False)
    odd = Subset([("no image", 0), *Scaled()], range(1, 33))
    train_robust(normed(), DataLoader(odd), recipe="clean", plan=plan, progress=False)


@pytest.mark.parametrize("recipe", [Adversarial(eps=0.1, steps=1), Trades(eps=0.1, steps=1)])
def test_outputs_beside_the_logits_are_refused_in_one_line(recipe):
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed()

        def forward(self, x):
            return (self.net(x), self.net(x)) if self.training else self.net(x)

    with pytest.raises(InputError, match="build it with aux_logits=False"):
        train_robust(Auxiliary(), small(32), recipe=recipe, plan=PLAN, progress=False)


@pytest.mark.parametrize(
    ("eps", "steps", "step_size"), [(16, 30, 1.0), (16, 10, 1.6), (8, 30, 1.0), (8, 2, 4.0)]
)
def test_feature_denoising_takes_the_steps_of_its_paper(eps, steps, step_size):
    """max(1/255, eps / steps), and the attack goes so far."""
    recipe = replace(RECIPES["feature-denoising"], eps=eps / 255, steps=steps)
    assert recipe.step_size == pytest.approx(step_size / 255)
    model, (x, y) = network(), (torch.full((4, 1, 8, 8), 0.5), torch.arange(4))
    one = replace(recipe, steps=1, stride=recipe.step_size / recipe.eps, clean_starts=1.0)
    moved = (one.attack(model, x, y) - x).abs().max()
    assert float(moved) == pytest.approx(step_size / 255, rel=1e-4)


def test_bad_input(tmp_path):
    plan = replace(PLAN, epochs=1, batch_size=32)

    def run(model=None, data=None, **options):
        return train_robust(
            model or network(), data or small(), plan=plan, progress=False, **options
        )

    with pytest.raises(InputError, match="recipe is 'fgsm'; give one of clean, pgd, sat"):
        run(recipe="fgsm")
    with pytest.raises(InputError, match="no holdout"):
        run(best=True)
    with pytest.raises(InputError, match=r"divide by 255"):
        run(holdout=[(255 * torch.rand(1, 8, 8), 0)])
    for holdout in ([torch.rand(1, 8, 8)], [], DataLoader(small())):
        with pytest.raises(InputError, match="holdout must be pairs"):
            run(holdout=holdout)
    with pytest.raises(InputError, match=r"failed on an image of shape \(3, 8, 8\)"):
        run(holdout=[(torch.rand(3, 8, 8), 0)])
    with pytest.raises(InputError, match="label 11 is out of range; labels go from 0 to 9"):
        run(data=TensorDataset(torch.rand(40, 1, 8, 8), torch.full((40,), 11)))
    with pytest.raises(InputError, match="label 11 is out of range"):
        run(holdout=[(torch.rand(1, 8, 8), 11)])
    with pytest.raises(InputError, match="failed on an image of shape"):
        run(model=nn.Linear(3, 3))
    with pytest.raises(InputError, match="at least one"):
        train_robust(network(), [], plan=plan)
    for options, message in [
        ({"eps": 8}, "8/255 = 0.0314"),
        ({"norm": "l0"}, "norm is 'l0'"),
        ({"stride": 0}, "stride is 0"),
        ({"clean_starts": 1.5}, "clean_starts is 1.5"),
        ({"label_smoothing": -1}, "label_smoothing is -1"),
    ]:
        with pytest.raises(InputError, match=message):
            Adversarial(**options)
    with pytest.raises(InputError, match="beta is 0"):
        Trades(beta=0)
