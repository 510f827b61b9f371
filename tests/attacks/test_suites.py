"""The faces of other libraries' attacks: they attack, and leave nothing behind."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchattacks
from art.estimators.classification.pytorch import PyTorchClassifier
from torch import nn

from art_denoised import DenoisedSmoothing
from art_denoised.attacks import PGD, AutoAttack, TorchAttack
from art_denoised.attacks.pgd import distances, margin, within
from art_denoised.attacks.suites import Generators, contained
from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier
from art_denoised.estimators.defended import ArtAttack
from tests.evaluation.defects import Defect, Resetting

EPS, L2 = 0.2, 2.0
FACES = [
    AutoAttack(EPS, steps=5, queries=20),
    AutoAttack(EPS, version="rand", steps=5, eot=2),
    AutoAttack(EPS, parts=("apgd-dlr",), steps=10),
    AutoAttack(EPS, parts=("square",), queries=150),
    AutoAttack(L2, norm="l2", parts=("apgd-t", "fab-t"), steps=5),
    TorchAttack(EPS, kind="PGD", options={"alpha": 0.05, "steps": 10}),
    TorchAttack(L2, kind="PGDL2", norm="l2", options={"alpha": 0.5, "steps": 10}),
    TorchAttack(EPS, kind="APGD", options={"steps": 10}),
    TorchAttack(EPS, kind="EOTPGD", options={"alpha": 0.05, "steps": 10}),
    TorchAttack(EPS, kind="Square", options={"n_queries": 150}),
    TorchAttack(L2, norm="l2", kind="CW", options={"steps": 12, "c": 10, "lr": 0.1}),
    ArtAttack(EPS, options={"max_iter": 10}),
    ArtAttack(EPS, kind="SquareAttack", options={"max_iter": 150}),
    ArtAttack(L2, norm="l2", kind="DeepFool", options={"max_iter": 10}),
]


@pytest.fixture(scope="module")
def data(digits):
    return digits[0][:8], digits[1][:8]


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("face", FACES, ids=lambda face: f"{face.name} {face.norm}")
def test_it_attacks_within_its_ball_and_leaves_nothing_behind(face, data, capsys):
    (x, y), model = data, digits_classifier()
    model[1].train()
    before, modes = Generators.now(), [part.training for part in model.modules()]
    x_adv = face(model, x, y)
    assert Generators.now().differing(before) == []
    assert [part.training for part in model.modules()] == modes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert capsys.readouterr().out == ""
    assert x_adv.dtype == x.dtype
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1 + 1e-6
    assert distances(x, x_adv)[face.norm].max() <= face.eps * (1 + 1e-4)
    with torch.no_grad():
        assert (model(x_adv).argmax(1) == y).float().mean() <= 0.8
    assert torch.equal(face(model, x, y), x_adv), "its seed does not fix it"
    assert face(model, x[:0], y[:0]).shape == (0, *x.shape[1:])


def test_which_are_gradient_free():
    free = {face.name for face in FACES if face.gradient_free}
    assert free == {"square", "torchattacks:Square", "art:SquareAttack"}


def test_what_may_be_kept_is_what_may_be_returned():
    """One tolerance: a nearest-adversarial attack is not undone by rounding."""
    x = torch.zeros(3, 1, 1, 1)
    x_adv = x + EPS * torch.tensor([1 + 5e-5, 1.01, torch.nan]).reshape(3, 1, 1, 1)
    assert within(x, x_adv, "linf", EPS).tolist() == [True, False, False]
    kept = TorchAttack(EPS, kind="CW").outcome(torchattacks.CW, x, x_adv).x_adv
    assert torch.equal(kept[0], x_adv[0])
    assert not kept[1:].any()
    all_of_it = TorchAttack(EPS, kind="APGD").outcome(torchattacks.APGD, x, x_adv).x_adv
    assert torch.equal(all_of_it[:2], x_adv[:2])  # it has a radius: what it leaves is a fault


def test_which_are_mixed():
    """Square in them may break what their gradients do not."""
    assert [face.name for face in FACES if face.mixed] == ["autoattack"]
    mixed = AutoAttack(EPS, parts=("apgd-ce", "square"))
    assert mixed.mixed
    assert not mixed.gradient_free
    assert TorchAttack(EPS, kind="AutoAttack").mixed
    assert not TorchAttack(EPS, kind="AutoAttack", options={"version": "rand"}).mixed
    assert ArtAttack(EPS, kind="AutoAttack").mixed


def test_a_defence_s_noise_is_not_the_attack_s(data):
    """Attacks set the global seed; a defence that draws from it keeps a stream of its own."""

    class Noisy(Defect):
        def forward(self, x):
            self.last = torch.rand(())
            return self.net(x)

    model, x = Noisy(), data[0]
    draws, outer = [], []
    with contained(model, 3):
        for _ in range(3):
            torch.manual_seed(0)
            model(x)
            draws.append(float(model.last))
            outer.append(float(torch.rand(())))
    assert len(set(draws)) == 3
    assert len(set(outer)) == 1
    with contained(model, 3):
        model(x)
        assert float(model.last) == draws[0]
    with contained(resetting := Resetting(), 3):
        state = torch.get_rng_state()
        resetting(x)
        assert torch.equal(torch.get_rng_state(), state)


def test_what_fails_inside_is_undone_too(data):
    model, before = digits_classifier(), Generators.now()

    def fail():
        with contained(model, 0):
            model.train()
            random.random()
            np.random.rand()
            model(torch.zeros(1, 3, 8, 8))

    with pytest.raises(RuntimeError):
        fail()
    assert Generators.now().differing(before) == []
    assert not model.training
    assert not model._forward_hooks


def test_an_estimator_that_is_not_its_module_is_refused(data):
    options = {"input_shape": (1, 8, 8), "nb_classes": 10, "device_type": "cpu"}
    loss, attack = nn.CrossEntropyLoss(), AutoAttack(EPS, parts=("apgd-ce",), steps=2)
    plain = PyTorchClassifier(digits_classifier(), loss, **options)
    attack(plain, *data)
    means_and_stds = [(0.5, 2.0), (0.5, 1.0), (0.0, 2.0), ([0.0, 0.5], [1, 1]), ([0, 0], [1, 2])]
    for mean, std in means_and_stds:
        scaled = PyTorchClassifier(
            digits_classifier(), loss, **options, preprocessing=(np.array(mean), np.array(std))
        )
        with pytest.raises(InputError, match="outside its model; give a module"):
            attack(scaled, *data)


def test_estimators_of_ours_are_attacked_as_they_are(data, monkeypatch):
    x, y = data
    estimator = DenoisedSmoothing(
        digits_classifier(), sigma=0.1, input_shape=(1, 8, 8), nb_classes=10, seed=0, samples=2
    )
    asked = []
    predict = DenoisedSmoothing.predict
    monkeypatch.setattr(
        DenoisedSmoothing,
        "predict",
        lambda self, *a, **k: asked.append(1) or predict(self, *a, **k),
    )
    x_adv = ArtAttack(EPS, kind="SquareAttack", options={"max_iter": 20})(estimator, x, y)
    assert asked
    assert (x_adv != x).any()
    asked.clear()
    assert (TorchAttack(EPS, options={"steps": 2})(estimator, x, y) != x).any()
    assert not asked


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AutoAttack(0), "eps is 0"),
        (lambda: AutoAttack(0.1, norm="l1"), "norm is 'l1'; give one of linf, l2"),
        (lambda: AutoAttack(0.1, version="plus"), "version is 'plus'"),
        (lambda: AutoAttack(0.1, parts=("pgd",)), "no part 'pgd'; give of apgd-ce"),
        (lambda: AutoAttack(0.1, parts=3), "parts is 3; give a sequence"),
        (lambda: TorchAttack(0.1, kind="Foo"), "torchattacks has no attack 'Foo'"),
        (lambda: TorchAttack(0.1, options="abc"), "options is 'abc'; give a dictionary"),
        (lambda: TorchAttack(0.1, kind="pgdl2", norm="l2"), "'pgdl2'; did you mean PGDL2"),
        (lambda: TorchAttack(0.1, kind="PIFGSM", options={"max_epsilon": 1}), "max_epsilon = 1"),
        (lambda: TorchAttack(0.1, options={"foo": 1}), "PGD has no option 'foo'; it has"),
        (lambda: ArtAttack(0.1, kind="Foo"), "ART has no evasion attack 'Foo'"),
        (lambda: ArtAttack(0.1, options={"max_iter": -1}), "cannot be made"),
        (lambda: ArtAttack(0.1, options={"foo": 1}), "has no option 'foo'"),
        (lambda: TorchAttack(0.3, options={"eps": 0.001}), "eps = 0.001; give eps to the attack"),
        (lambda: TorchAttack(0.3, options={"seed": 1}), "seed = 1; give seed to the attack"),
        (lambda: ArtAttack(0.3, options={"eps": 0.001}), "eps = 0.001; give eps to the attack"),
        (lambda: ArtAttack(0.3, options={"norm": 2}), "norm = 2; give norm to the attack"),
        (lambda: AutoAttack(8), "eps is 8, more than the range.*8/255"),
    ],
)
def test_bad_input(make, words, data):
    with pytest.raises(InputError, match=words):
        make()(digits_classifier(), *data)
    with pytest.raises(InputError, match=r"the model is a str; give an nn.Module"):
        AutoAttack(0.1)("resnet", *data)


class InPlace(nn.Module):
    """Writes into its input, and returns what Hugging Face does."""

    def __init__(self):
        super().__init__()
        self.net = digits_classifier()
        self.eval()

    def forward(self, x):
        return SimpleNamespace(logits=self.net(x.mul_(0.5).mul(2)))


@pytest.mark.parametrize(
    "face",
    [
        PGD(EPS, steps=3),
        AutoAttack(EPS, parts=("apgd-ce",), steps=3),
        TorchAttack(EPS, options={"alpha": 0.1, "steps": 3}),
        ArtAttack(EPS, options={"max_iter": 3}),
    ],
    ids=lambda face: type(face).__name__,
)
def test_a_network_that_writes_into_its_input_is_attacked(face, data):
    (x, y), before = data, data[0].clone()
    plain = face(digits_classifier(), x, y)
    assert torch.allclose(face(InPlace(), x, y), plain, atol=1e-5)
    assert torch.equal(x, before)
    with pytest.raises(InputError, match="no probabilities|integer class index"):
        face(digits_classifier(), x, nn.functional.one_hot(y, 10))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SignOPTAttack", {"max_iter": 3, "query_limit": 200}),
        ("SaliencyMapMethod", {"theta": 0.9}),
    ],
)
def test_attacks_of_art_that_are_targeted_by_default_lead_away_from_the_label(kind, options, data):
    """They led to it, and every model was robust. SignOPT ends on the boundary, up to rounding."""
    (x, y), model = (data[0][:3], data[1][:3]), digits_classifier()
    norm = "l2" if kind == "SignOPTAttack" else "linf"
    x_adv = ArtAttack(1.0 if norm == "linf" else 8.0, norm=norm, kind=kind, options=options)(
        model, x, y
    )
    slack = 1e-3 if kind == "SignOPTAttack" else 0.0
    assert (margin(model(x_adv), y) > -slack).all()
    assert (margin(model(x), y) < -1).all()


def test_targeted_attacks_are_refused():
    with pytest.raises(InputError, match="targeted = True"):
        ArtAttack(EPS, options={"targeted": True})
    with pytest.raises(InputError, match="given classes"):
        ArtAttack(EPS, kind="LowProFool")(
            digits_classifier(), torch.rand(1, 1, 8, 8), torch.ones(1).long()
        )
