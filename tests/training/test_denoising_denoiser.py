"""Denoiser training: what each objective is for, and who may see whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from art_denoised import DnCNN, InputError
from art_denoised.data import digits
from art_denoised.demo import digits_classifier, digits_network
from art_denoised.training import (
    Objective,
    TrainingConfig,
    train_denoiser,
)
from art_denoised.training import train as train_network
from art_denoised.training.denoising import (
    LOSSES,
    classification,
    measure_denoiser,
    mse,
    stability,
)

SIGMA = 0.5
CONFIG = TrainingConfig(epochs=12, batch_size=64, lr=5e-3, average=0.9, augment="crop")
BRIEF = TrainingConfig(epochs=1, batch_size=400)


def small() -> DnCNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DnCNN(1, depth=4, width=12)


def train(loss, config=CONFIG, *, sigma=SIGMA, denoiser=None, **options):
    """Train on digits; options go to the objective or to the training."""
    denoiser = denoiser or small()
    names = ("classifier", "surrogates", "fine_epochs")
    aims = {name: options.pop(name) for name in names if name in options}
    objective = Objective(loss, sigma, **aims)
    rows = train_denoiser(
        denoiser, digits(train=True), objective, config, progress=False, **options
    )
    return denoiser, rows


def measured(denoiser, pairs):
    x, y = torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
    return measure_denoiser(denoiser, digits_classifier(), x, y, SIGMA)


@pytest.fixture(scope="module")
def held_out():
    data = digits(train=False)
    return [data[i] for i in range(500)]


@pytest.fixture(scope="module")
def by_mse(held_out):
    denoiser, rows = train("mse", validation=held_out)
    return denoiser, rows, measured(denoiser, held_out)


def test_mse_training_removes_most_of_the_noise(by_mse):
    """The identity leaves sigma^2 = 0.25; this must leave less than a third of it."""
    _, rows, judged = by_mse
    assert judged["mse"] < SIGMA**2 / 3
    assert rows[-1].figures["mse"] == judged["mse"]
    assert rows[-1].loss < rows[0].loss / 2


def test_stability_training_serves_the_classifier_better_than_mse(by_mse, held_out):
    denoiser, rows = train("stability", classifier=digits_classifier())
    judged = measured(denoiser, held_out)
    assert judged["accuracy"] > by_mse[2]["accuracy"] + 0.05
    assert judged["mse"] > by_mse[2]["mse"]  # it is not after the image
    assert rows[-1].loss < rows[0].loss


def test_hybrid_starts_from_mse_and_adds_stability(by_mse, held_out, tmp_path):
    options = {"classifier": digits_classifier(), "fine_epochs": 4, "run": tmp_path}
    denoiser, rows = train("hybrid", **options)
    assert [row.epoch for row in rows] == [*range(1, 13), *range(1, 5)]
    assert rows[12].lr == pytest.approx(5e-5)
    judged = measured(denoiser, held_out)
    assert judged["accuracy"] > by_mse[2]["accuracy"]
    assert judged["mse"] < 2 * by_mse[2]["mse"]  # near where it came from
    assert (tmp_path / "mse" / "train.jsonl").exists()
    again, _ = train("hybrid", **options, resume=True)
    for a, b in zip(again.parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(a, b)


def test_objectives_are_what_they_are_named_after():
    classifier = nn.Flatten()
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).reshape(2, 2, 1, 1)
    x_hat, y = torch.zeros_like(x), torch.tensor([1, 1])
    log2 = torch.log(torch.tensor(2.0))
    assert mse(x_hat, x, y, None) == 2.0
    assert torch.allclose(stability(x_hat, x, y, classifier), log2)
    # The label that the classifier gives the clean image counts, not the true one.
    assert stability(x, x, y, classifier) < 0.2 < classification(x, x, y, classifier)


class Recorder(nn.Module):
    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        super().__init__()
        self.net, self.name, self._calls = digits_network(), name, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._calls.append((self.name, len(x)))
        return self.net(x)


def recorders(*names: str) -> tuple[list[Recorder], list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [Recorder(name, calls).eval() for name in names], calls


@pytest.mark.parametrize("objective", ["stability", "classification"])
def test_surrogates_take_turns_and_the_target_is_only_evaluated(held_out, objective):
    (a, b, c, target), calls = recorders("a", "b", "c", "target")
    train(
        objective,
        replace(BRIEF, batch_size=200),
        surrogates=[a, b, c],
        classifier=target,
        validation=held_out[:10],
    )
    tries = [(name, 1) for name in ("a", "b", "c", "target")]  # of data and of the validation set
    twice = 2 if objective == "stability" else 1  # the clean image and the denoised one
    turns = [(name, 200) for name in ("a", "b", "c", "a", "b", "c") for _ in range(twice)]
    assert calls == [*tries, *tries, *turns, ("target", 10)]


def surrogate(*layers: nn.Module) -> nn.Module:
    net = nn.Sequential(*layers)

    def cross_entropy(network, x, y, step):
        return nn.functional.cross_entropy(network(x), y)

    config = replace(CONFIG, epochs=8)
    train_network(net, digits(train=True), cross_entropy, config, progress=False)
    return net


def test_surrogates_serve_a_classifier_that_was_not_among_them(by_mse, held_out):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        surrogates = [
            surrogate(
                *(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3, 2), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(96, 10)),
            ),
            surrogate(
                *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
                *(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10)),
            ),
        ]
    denoiser, rows = train(
        "stability", surrogates=surrogates, classifier=digits_classifier(), validation=held_out
    )
    judged = measured(denoiser, held_out)
    assert judged["accuracy"] > by_mse[2]["accuracy"] + 0.03
    assert rows[-1].figures["accuracy"] == judged["accuracy"]  # of the target, not of a surrogate


def test_the_target_must_not_be_a_surrogate():
    target, weightless = digits_classifier(), nn.Flatten().eval()
    for surrogate, defended in (
        (digits_classifier(), target),
        (nn.Sequential(digits_classifier()).eval(), target),
        (digits_classifier(), nn.Sequential(nn.Identity(), target, nn.BatchNorm1d(10)).eval()),
        (weightless, weightless),
        (nn.Sequential(weightless).eval(), weightless),
    ):
        with pytest.raises(InputError, match="among the surrogates"):
            Objective("stability", SIGMA, defended, [surrogate])
    assert Objective("stability", SIGMA, weightless, [nn.Flatten().eval()]).judge is weightless


def test_classifiers_stay_as_they_are():
    classifier = digits_classifier()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    wanted = [p.requires_grad for p in classifier.parameters()]
    train("stability", BRIEF, classifier=classifier)
    after = classifier.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert wanted == [p.requires_grad for p in classifier.parameters()]
    assert all(p.grad is None for p in classifier.parameters())


@pytest.mark.parametrize("where", ["classifier", "surrogates"])
def test_classifiers_in_training_mode_are_refused_whatever_they_are_made_of(where):
    class Unknown(nn.Module):
        """What it does in training mode no check can know."""

        def __init__(self) -> None:
            super().__init__()
            self.net = digits_network().eval()

    given = {where: Unknown() if where == "classifier" else [Unknown()]}
    with pytest.raises(InputError, match=r"training mode.*Unknown"):
        Objective("stability", SIGMA, **given)


def test_a_range_of_sigmas_reaches_the_denoiser():
    seen = []

    class Told(DnCNN):
        def forward(self, x_noisy, sigma=None):
            seen.append(sigma)
            return super().forward(x_noisy)

    config = replace(BRIEF, batch_size=100)
    train("mse", config, sigma=(0.1, 0.4), denoiser=Told(1, depth=3, width=4))
    levels = torch.cat(seen)
    assert 0.1 <= levels.min() < 0.12
    assert 0.38 < levels.max() <= 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l1"}, "'l1'.*classification, hybrid, mse, stability"),
        *(
            ({"loss": name}, f"{name} needs a classifier")
            for name in sorted({*LOSSES, "hybrid"} - {"mse"})
        ),
        ({"loss": stability}, "needs a classifier"),
        ({"classifier": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))}, "training mode"),
        ({"sigma": (0.5, 0.1)}, r"0\.5 to 0\.1"),
        ({"sigma": (0.1, 0.2, 0.5)}, r"\(0\.1, 0\.2, 0\.5\)"),
        ({"sigma": 0}, "sigma is 0"),
        ({"fine_epochs": 3}, "fine_epochs is 3 "),
        ({"loss": "hybrid", "classifier": nn.Flatten(), "fine_epochs": -3}, "fine_epochs is -3"),
    ],
)
def test_bad_objectives(options, message):
    with pytest.raises(InputError, match=message):
        Objective(**{"loss": "mse", "sigma": SIGMA, **options})


class Enlarging(DnCNN):
    def forward(self, x_noisy, sigma=None):
        return super().forward(x_noisy).repeat(1, 1, 2, 2)


TWO_CLASSES = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
COLOUR = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(36, 10)).eval()
BLACK = {"loss": "stability", "surrogates": [digits_classifier()]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": DnCNN(3, 3, 4)}, r"denoiser failed on an image of shape \(1, 8, 8\)"),
        ({"denoiser": DnCNN(1, 3, 4).half()}, "DnCNN has float16 parameters"),
        ({"denoiser": Enlarging(1, 3, 4)}, r"\(1, 1, 16, 16\).*\(1, 1, 8, 8\)"),
        ({"loss": "stability", "classifier": COLOUR}, "model failed on an image"),
        ({**BLACK, "classifier": COLOUR}, "model failed on an image"),
        ({"loss": "classification", "classifier": TWO_CLASSES}, "from 0 to 1"),
        ({"validation": DataLoader(digits(train=False))}, "validation"),
        ({"validation": []}, "validation"),
        ({"validation": [(255 * torch.rand(1, 8, 8), 0)]}, "255"),
        ({**BLACK, "validation": [(torch.rand(3, 8, 8), 0)]}, r"\(3, 8, 8\)"),
    ],
)
def test_misfits_are_one_line_before_the_training(tmp_path, changes, message):
    options = {"loss": "mse", "config": BRIEF, **changes}
    with pytest.raises(InputError, match=message) as caught:
        train(**options, run=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_an_objective_of_ones_own_needs_no_classifier():
    def absolute(x_hat, x, y, classifier):
        assert classifier is None
        return (x_hat - x).abs().mean()

    _, rows = train(absolute, BRIEF)
    assert len(rows) == 1


@pytest.mark.parametrize(("first", "second"), [("mse", "hybrid"), ("hybrid", "mse")])
def test_hybrid_and_others_do_not_share_a_folder(tmp_path, first, second):
    options = {"classifier": digits_classifier(), "run": tmp_path}
    train(first, BRIEF, **options)
    with pytest.raises(InputError, match=r"another training .*checkpoint\.pt"):
        train(second, BRIEF, **options, resume=True)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("validation", r"evaluation\.measure\.x"),
        ("slope", r"loss\.classifiers"),
        ("classifier", r"evaluation\.measure\.classifier"),
    ],
)
def test_what_judges_or_teaches_must_be_the_same_on_resuming(held_out, tmp_path, other, named):
    def steep(slope: float) -> nn.Module:  # of equal weights
        return nn.Sequential(nn.Flatten(), nn.LeakyReLU(slope), nn.BatchNorm1d(64)).eval()

    before = {"surrogates": [steep(0.1)], "classifier": recorders("t")[0][0]}
    before |= {"validation": held_out[:10], "run": tmp_path}
    changed = {"validation": held_out[1:11], "slope": [steep(0.2)], "classifier": None}[other]
    if other == "classifier":
        changed = recorders("s", "t")[0][1]
    train("classification", BRIEF, **before)
    after = {**before, {"slope": "surrogates"}.get(other, other): changed}
    with pytest.raises(InputError, match=named):
        train("classification", BRIEF, **after, resume=True)
