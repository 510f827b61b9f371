"""Networks with denoising blocks as ART classifiers, and our training as a trainer of ART.

What holds for every defence is in tests/conformance.
"""

from __future__ import annotations

import art.attacks.evasion as evasion
import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std import StandardisationMeanStdPyTorch
from torch import nn

from art_denoised import (
    FeatureDenoisingClassifier,
    ParametricSoftplus,
    RobustTrainer,
    TrainingConfig,
)
from art_denoised.checks import InputError
from art_denoised.data import digits as load_digits
from art_denoised.demo import digits_network
from art_denoised.networks import FeatureDenoising
from art_denoised.training import RECIPES, Adversarial
from tests.nets import residual

CONFIG = TrainingConfig(
    epochs=4, batch_size=64, optimizer="sgd", lr=0.1, schedule="one-cycle", average=0.9,
    clip=0.0, augment="none",
)  # fmt: skip


def classifier(**options: object) -> FeatureDenoisingClassifier:
    net = options.pop("backbone", None) or residual()
    defaults = {
        "input_shape": (1, 8, 8),
        "nb_classes": 10,
        "activation": "silu",
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
        "device_type": "cpu",
    }
    return FeatureDenoisingClassifier(net, **{**defaults, **options})


@pytest.fixture(scope="module")
def trained():
    made, data = classifier(), load_digits(train=True)
    recipe = Adversarial(eps=0.1, steps=1, relative_step_size=1.0)
    RobustTrainer(made, recipe=recipe, config=CONFIG).fit(data.images.numpy(), data.labels.numpy())
    return made


@pytest.fixture(scope="module")
def batch(digits):
    return digits[0][:20].numpy(), digits[1][:20].numpy()


def test_it_is_the_backbone_changed_as_asked():
    net = residual()
    made = classifier()
    blocks = [n for n, m in made.model.named_modules() if isinstance(m, FeatureDenoising)]
    assert blocks == ["1.denoise", "3.denoise"]
    assert [type(m) for m in made.model.modules() if isinstance(m, (nn.ReLU, nn.SiLU))] == [
        nn.SiLU
    ] * 2
    x = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    plain = classifier(activation=None)
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(plain.predict(x), expected)  # fresh blocks are the identity
    options = classifier(
        operation="mean", where=["3"], block={"kernel_size": 5}, activation=ParametricSoftplus(10.0)
    )
    assert [n for n, m in options.model.named_modules() if isinstance(m, FeatureDenoising)] == [
        "3.denoise"
    ]
    assert not [m for m in residual().modules() if isinstance(m, FeatureDenoising)]


def test_our_trainer_makes_it_robust(trained, digits):
    x, y = digits[0][:100].numpy(), digits[1][:100].numpy()
    attack = evasion.ProjectedGradientDescent(
        trained, eps=0.1, eps_step=0.02, max_iter=10, verbose=False
    )
    accuracy = [(trained.predict(i).argmax(1) == y).mean() for i in (x, attack.generate(x, y))]
    assert accuracy[0] > 0.9
    assert accuracy[1] > 0.6


def test_trainers_of_any_classifier_and_what_fit_takes(tmp_path):
    net, data = digits_network(), load_digits(train=True)
    art = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), preprocessing=(0.5, 2.0),
        device_type="cpu",
    )  # fmt: skip
    x, y = data.images[:128].numpy(), data.labels[:128].numpy()
    trainer = RobustTrainer(art, recipe="clean", config=CONFIG)
    trainer.fit(x, np.eye(10)[y], (x[:20], y[:20]), batch_size=32, nb_epochs=2, run=tmp_path)
    assert [row.epoch for row in trainer.rows] == [1, 2]
    assert {"accuracy", "robust"} <= set(trainer.rows[0].figures)
    assert (tmp_path / "train.jsonl").exists()
    assert trainer.get_classifier() is art


def test_what_is_trained_is_the_classifier_as_it_is_now(monkeypatch):
    """Its preprocessing can be set after the trainer was made."""
    art = PyTorchClassifier(
        digits_network(),
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    trainer, trained = RobustTrainer(art, recipe="clean", config=CONFIG), []
    art.set_params(preprocessing_defences=[StandardisationMeanStdPyTorch(0.5, 2.0)])
    monkeypatch.setattr(
        "art_denoised.estimators.networks.train_robust",
        lambda model, *rest, **options: trained.append(model),
    )
    x = torch.rand(4, 1, 8, 8)
    trainer.fit(x.numpy(), np.arange(4))
    assert torch.equal(trained[0].eval()(x), art.model((x - 0.5) / 2))


def test_labels_of_every_form_are_understood_or_refused(batch):
    """A column of labels is not a row of one class each."""
    x, y = batch
    classifier = FeatureDenoisingClassifier(
        digits_network(), input_shape=(1, 8, 8), nb_classes=10, operation=None, device_type="cpu"
    )
    trainer = RobustTrainer(classifier, recipe="clean")
    for labels in (y, y[:, None], np.eye(10)[y]):
        assert trainer._data(x, labels).tensors[1].tolist() == y.tolist()
    with pytest.raises(InputError, match="one integer class index"):
        trainer._data(x, np.eye(12)[y])


def test_the_backbone_stays_as_it_was():
    backbone = digits_network().train()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.02)  # whose defaults are not options
    classifier = FeatureDenoisingClassifier(
        backbone,
        input_shape=(1, 8, 8),
        nb_classes=10,
        operation=None,
        optimizer=optimizer,
        device_type="cpu",
    )
    assert classifier.model is not backbone
    assert backbone.training
    assert classifier.optimizer.defaults["lr"] == 0.02
    own = {id(parameter) for parameter in classifier.model.parameters()}
    assert {id(p) for p in classifier.optimizer.param_groups[0]["params"]} == own


def test_a_network_may_write_into_its_input(batch):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = digits_network()

        def forward(self, x):
            return self.network(x.sub_(0.5))

    made, x = classifier(backbone=Centred(), operation=None, activation=None), batch[0].copy()
    first = made.predict(x)
    assert np.array_equal(x, batch[0])
    assert np.array_equal(made.predict(x), first)


def test_refitting_starts_at_the_identity_as_well():
    made = classifier()
    for block in (m for m in made.model.modules() if isinstance(m, FeatureDenoising)):
        nn.init.ones_(block.bn.weight)
    clone = made.clone_for_refitting()
    assert clone.optimizer.param_groups[0]["momentum"] == 0.9
    for block in (m for m in clone.model.modules() if isinstance(m, FeatureDenoising)):
        assert (block.bn.weight == 0).all()


def test_bad_input(batch):
    x, y = batch
    for options, message in [
        ({"operation": "wavelet"}, "operation is 'wavelet'"),
        ({"activation": "swish2"}, "activation is 'swish2'"),
        ({"where": "layer9"}, "named 'layer9'"),
        ({"nb_classes": 7}, "nb_classes is 7 but the model returns 10"),
        ({"input_shape": (8, 8)}, r"give \(channels, height, width\)"),
        ({"input_shape": (3, 8, 8)}, "failed on an image of shape"),
    ]:
        with pytest.raises(InputError, match=message):
            classifier(**options)
    with pytest.raises(InputError, match="is a Sequential; give an ART PyTorchClassifier"):
        RobustTrainer(residual())
    trainer = RobustTrainer(classifier(), recipe=RECIPES["sat"], config=CONFIG)
    with pytest.raises(InputError, match="20 images and 3 labels"):
        trainer.fit(x, y[:3])
    with pytest.raises(InputError, match="divide by 255"):
        trainer.fit(255 * x, y)
    with pytest.raises(InputError, match="epochs is 0"):
        trainer.fit(x, y, nb_epochs=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": 3}, "recipe is 3"),
        ({"recipe": None}, "recipe is None"),
        ({"recipe": Adversarial}, "recipe is .*Adversarial"),
        ({"recipe": "pgdd"}, "recipe is 'pgdd'"),
        ({"config": None}, "config is None"),
        ({"config": {"epochs": 1}}, "config is {'epochs': 1}"),
    ],
)
def test_a_trainer_that_cannot_train_is_refused_where_it_is_made(options, words):
    with pytest.raises(InputError, match=words):
        RobustTrainer(classifier(), **options)


def test_validation_data_are_a_pair(batch):
    x, y = batch
    trainer = RobustTrainer(classifier(), config=CONFIG)
    for wrong, words in ((x, "20 entries"), ((x, y, y), "3 entries"), (3, "is 3"), ("xy", "'xy'")):
        with pytest.raises(InputError, match=f"validation_data.*{words}"):
            trainer.fit(x, y, wrong)
