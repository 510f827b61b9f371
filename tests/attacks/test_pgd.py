"""PGD: stays in its ball, leaves no traces, and finds what others find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.nn import functional as F

from art_denoised import PGD
from art_denoised.attacks.pgd import cross_entropy, dlr, in_eval, margin
from art_denoised.checks import InputError
from art_denoised.data import digits as load_digits
from art_denoised.demo import digits_classifier, digits_network


@pytest.fixture(scope="module")
def batch(digits):
    return digits[0][:100], digits[1][:100]


@pytest.fixture(scope="module")
def noisy_cnn():
    """A small network trained here, with noise: harder to fool than the packaged one."""
    data = load_digits(train=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = digits_network()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(3):
            for index in torch.randperm(len(data)).split(64):
                x = data.images[index] + 0.3 * torch.randn(len(index), 1, 8, 8)
                loss = F.cross_entropy(net(x), data.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval()


def fooled(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) != y).sum())


class Random(nn.Module):
    """Fresh noise in every call, from a generator of its own."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.net, self.sigma = digits_classifier(), sigma
        self.generator = torch.Generator().manual_seed(0)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x + self.sigma * torch.randn(x.shape, generator=self.generator))


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("eps", [0.08, 0.15])
@pytest.mark.parametrize("which", ["packaged", "noisy"])
def test_it_finds_at_least_what_torchattacks_and_art_find(batch, noisy_cnn, which, eps, steps):
    """From the image itself all three take the same steps; ours keeps what it saw on the way."""
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    x, y = batch
    model = digits_classifier() if which == "packaged" else noisy_cnn
    size = 2.5 * eps / steps
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), device_type="cpu"
    )
    theirs = torchattacks.PGD(model, eps=eps, alpha=size, steps=steps, random_start=False)(x, y)
    arts = ProjectedGradientDescent(
        classifier, eps=eps, eps_step=size, max_iter=steps, num_random_init=0, verbose=False
    ).generate(x.numpy(), y.numpy())
    ours = fooled(model, PGD(eps, steps=steps, random_start=False)(model, x, y), y)
    assert ours >= fooled(model, theirs, y)
    assert ours >= fooled(model, torch.from_numpy(arts), y)
    assert ours > 5


def test_the_default_step_size_is_two_and_a_half_balls_over_the_steps(batch):
    x, y = batch[0][:20], batch[1][:20]
    model, stepped = digits_classifier(), PGD(0.2, steps=7, step_size=2.5 * 0.2 / 7)
    assert torch.equal(PGD(0.2, steps=7)(model, x, y), stepped(model, x, y))


def test_defaults_are_the_documented_ones():
    stated = PGD(
        8 / 255, norm="linf", steps=50, step_size=None, loss="ce", targeted=False, restarts=1,
        random_start=True, eot=1, keep="worst", seed=0, batch_size=None,
    )  # fmt: skip
    assert PGD() == stated


def test_random_starts_fool_as_many_as_torchattacks(batch, noisy_cnn):
    """The mean of six seeds; that of torchattacks' has a standard error of .6 images of 100."""
    import torchattacks

    (x, y), eps = batch, 0.15
    counts = []
    for seed in range(6):
        torch.manual_seed(seed)
        theirs = torchattacks.PGD(noisy_cnn, eps=eps, alpha=eps / 2, steps=5)(x, y)
        ours = PGD(eps, steps=5, seed=seed)(noisy_cnn, x, y)
        counts.append([fooled(noisy_cnn, found, y) for found in (ours, theirs)])
    mean = np.mean(counts, 0)
    assert mean[0] >= mean[1] - 2


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, "random", "least_likely", "likeliest"])
def test_every_kind_fools_and_keeps_to_its_ball(batch, norm, loss, targeted):
    x, y = batch[0][:40], batch[1][:40]
    model, eps = digits_classifier(), {"linf": 0.3, "l2": 2.0}[norm]
    attack = PGD(eps, norm=norm, loss=loss, targeted=targeted, steps=10, restarts=2)
    x_adv = attack(model, x, y)
    assert fooled(model, x_adv, y) > {False: 35, "likeliest": 35}.get(targeted, 20)
    offset = (x_adv - x).flatten(1)
    size = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-6)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert x_adv.dtype == x.dtype


def test_more_restarts_never_fool_less_and_the_first_is_that_of_one(batch, noisy_cnn):
    x, y = batch
    found = [
        (noisy_cnn(PGD(0.12, steps=4, restarts=n)(noisy_cnn, x, y)).argmax(1) != y)
        for n in (1, 2, 4)
    ]
    assert (found[1] >= found[0]).all()
    assert (found[2] >= found[1]).all()
    assert found[2].sum() > found[0].sum()


def test_the_worst_point_is_kept(batch):
    """Steps so long that they lead back: the last iterate is worse than one before it."""
    x, y = batch
    model = digits_classifier()
    counts = [fooled(model, PGD(0.1, steps=n, step_size=0.2)(model, x, y), y) for n in (1, 2, 9)]
    assert counts == sorted(counts)


def test_results_do_not_depend_on_the_batch_size(batch):
    x, y = batch
    x, y, model = x[:30].double(), y[:30], digits_classifier().double()
    for options in ({"targeted": "random"}, {"norm": "l2", "restarts": 2}, {"loss": "dlr"}):
        whole, parts = (
            PGD(0.1, steps=3, batch_size=size, **options)(model, x, y) for size in (None, 7)
        )
        assert torch.allclose(whole, parts, atol=1e-9)
    a, b = (PGD(0.1, steps=1, seed=seed)(model, x, y) for seed in (0, 1))
    assert not torch.allclose(a, b, atol=1e-3)


def test_it_leaves_no_traces(batch):
    x, y = batch
    x = x[:8].clone().requires_grad_()
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout().eval(), digits_network())
    model[2][0].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    x_adv = PGD(0.1, steps=2)(model, x, y[:8])
    assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert x.grad is None
    assert not x_adv.requires_grad
    with torch.inference_mode():
        assert torch.equal(PGD(0.1, steps=2)(model, x * 1.0, y[:8]), x_adv)
    with pytest.raises(RuntimeError), in_eval(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


def test_eot_sees_through_noise(batch):
    """Averaged gradients of a noisy model fool more of its fresh draws than single ones do."""
    x, y = batch
    share = {}
    for eot in (1, 16):
        model = Random(0.4)
        x_adv = PGD(0.15, steps=8, eot=eot)(model, x, y)
        assert model.calls == 1 + 9 * eot
        judge = Random(0.4)
        share[eot] = np.mean([fooled(judge, x_adv, y) for _ in range(20)])
    assert share[16] > share[1] + 2


def test_a_model_without_gradient_gets_its_random_start(batch):
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)] + 0 * x.sum()

    x, y = batch
    for norm in ("linf", "l2"):
        x_adv = PGD(0.1, steps=2, norm=norm)(Constant(), x, torch.zeros_like(y))
        assert torch.isfinite(x_adv).all()
        assert (x_adv != x).flatten(1).any(1).all()


def test_a_model_that_writes_into_its_input_is_attacked_as_one_that_does_not(batch):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = digits_classifier()

        def forward(self, x):
            return self.net(x.sub_(0.3).div_(0.5))

    class OutOfPlace(InPlace):
        def forward(self, x):
            return self.net((x - 0.3) / 0.5)

    x, y = batch[0][:10], batch[1][:10]
    for options in ({"eot": 2}, {"targeted": "likeliest"}):
        found = [PGD(0.1, steps=3, **options)(m, x, y) for m in (InPlace(), OutOfPlace())]
        assert torch.equal(*found)


def test_no_attack_at_eps_zero(batch):
    x, y = batch
    for norm in ("linf", "l2"):
        assert torch.equal(PGD(0.0, norm=norm, steps=2)(digits_classifier(), x, y), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8}, r"give it in image units, 8/255 = 0.0314"),
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"norm": "l1"}, "norm is 'l1'; give one of linf, l2"),
        ({"loss": "cw"}, "loss is 'cw'"),
        ({"targeted": True}, "targeted is True; give one of random"),
        ({"steps": 0}, "steps is 0"),
        ({"restarts": 0}, "restarts is 0"),
        ({"eot": 0}, "eot is 0"),
        ({"step_size": 0}, "step_size is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        PGD(**options)


def test_bad_input(batch):
    x, y = batch
    model = digits_classifier()
    with pytest.raises(InputError, match="divide by 255"):
        PGD()(model, 255 * x, y)
    with pytest.raises(InputError, match="100 images and 3 labels"):
        PGD()(model, x, y[:3])
    with pytest.raises(InputError, match="label 13 is out of range"):
        PGD()(model, x, y + 5)
    with pytest.raises(InputError, match="failed on an image of shape"):
        PGD()(nn.Linear(3, 3), x, y)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(InputError, match="2 classes and this DLR loss needs 3"):
        PGD(loss="dlr", steps=1)(two, x, y % 2)
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InputError, match="needs 4"):
        PGD(loss="dlr", targeted="random", steps=1)(three, x, y % 3)
    assert cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1])).shape == (2,)
    assert margin(torch.zeros(2, 2), torch.tensor([0, 1])).tolist() == [0, 0]
    assert torch.isfinite(dlr(torch.zeros(2, 3), torch.tensor([0, 1]))).all()


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("column", [0, 5])
def test_nan_logits_are_no_success(loss, column):
    """Only where the attack goes, not at the images; arg max would take NaN for an answer."""

    class Brittle(nn.Module):
        def forward(self, x):
            logits = x.flatten(1)[:, :10] * 1
            far = (x - 0.5).abs().flatten(1).amax(1) > 0.05
            logits[far, column] = torch.nan
            return logits

    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    PGD(0.04, steps=2, loss=loss)(Brittle(), x, y)
    with pytest.raises(InputError, match="logits under attack"):
        PGD(0.2, steps=2, loss=loss)(Brittle(), x, y)


def art_classifier(**options):
    return PyTorchClassifier(
        digits_classifier(), nn.CrossEntropyLoss(), (1, 8, 8), 10, device_type="cpu", **options
    )


def test_an_estimator_of_art_is_attacked_as_its_module_or_refused(batch):
    """It has no modules of its own, on which PGD ended in an AttributeError."""
    x, y = batch[0][:5], batch[1][:5]
    expected = PGD(0.2, steps=2)(digits_classifier(), x, y)
    assert torch.equal(PGD(0.2, steps=2)(art_classifier(clip_values=(0, 1)), x, y), expected)
    for model, words in (
        (art_classifier(clip_values=(0, 255)), r"\(0, 255\)"),
        (art_classifier(preprocessing=(0.5, 0.2)), "without_preprocessing"),
        (digits_classifier().forward, "method"),
        (None, "NoneType"),
    ):
        with pytest.raises(InputError, match=words):
            PGD(0.2, steps=2)(model, x, y)
