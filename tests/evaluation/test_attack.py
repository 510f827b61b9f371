"""Evaluations under attack: rows are true and survive a killed process, errors are one line."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from art_denoised import (
    DenoisedClassifier,
    DenoisedSmoothing,
    DiffusionClassifier,
    LikelihoodMaximization,
    SmoothedClassifier,
    evaluate,
)
from art_denoised.attacks import PGD, AutoAttack, TorchAttack
from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.demo import digits_classifier, digits_diffusion
from art_denoised.diffusion import NoisedDiffusion, noise_levels
from art_denoised.estimators.defended import ArtAttack, without_preprocessing
from art_denoised.evaluation import CLEAN, Probes, read_attack_log
from art_denoised.evaluation.attack import PassProgress
from art_denoised.evaluation.target import Target, columns
from art_denoised.runs import identity
from art_denoised.runs.journal import describe
from tests.evaluation import defects
from tests.forked import forked

EPS = 0.1
FAST = {"masking_checks": False, "progress": False, "repeats": 6, "pictures": 0}


class Keeping:
    """An attack that keeps what it was given and what it found."""

    norm, eps = "linf", EPS

    def __init__(self, found=None):
        self.calls, self.found = [], found

    def __call__(self, model, x, y):
        x_adv = PGD(EPS, steps=5)(model, x, y) if self.found is None else self.found(x)
        self.calls.append((x, y, x_adv))
        return x_adv


def test_pictures_of_a_network_in_half_precision(digits):
    """Its denoiser returns images in that type, which numpy has not."""
    base = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(torch.bfloat16).eval()
    denoised = DenoisedClassifier(base, lambda x, sigma: x, sigma=0.25)
    model = SmoothedClassifier(denoised, sigma=0.25, samples=1, seed=0)
    data = TensorDataset(digits[0][:1], digits[1][:1])
    log = evaluate(model, data, [PGD(EPS, steps=1)], **(FAST | {"pictures": 1}))
    assert {"denoised", CLEAN} <= {image.stage for image in log.images}


def test_rows_say_what_the_model_answers(digits):
    """Images that are wrong anyway are not attacked; the others are judged on what was found."""
    x, y = digits[0][:50], digits[1][:50].clone()
    y[7] = (y[7] + 1) % 10
    model, attack = digits_classifier(), Keeping()
    options = {**FAST, "pictures": 2}
    log = evaluate(model, TensorDataset(x, y), [attack], batch_size=20, **options)
    assert [len(call[0]) for call in attack.calls] == [19, 20, 10]
    assert list(log.columns) == [(CLEAN, "none", 0.0), ("keeping", "exact", EPS)]
    clean, attacked = log.columns.values()
    with torch.no_grad():
        assert [row.counted for row in clean] == (model(x).argmax(1) == y).tolist()
    x_adv = torch.cat([call[2] for call in attack.calls])
    x_in, y_in = (torch.cat([call[i] for call in attack.calls]) for i in (0, 1))
    assert torch.equal(y_in, torch.cat([y[:7], y[8:]]))
    rows = [row for row in attacked if row.clean]
    with torch.no_grad():
        right = (model(x_adv).argmax(1) == y_in).tolist()
    assert [row.counted for row in rows] == right
    assert [row.fresh for row in rows] == [(one,) for one in right]
    far = (x_adv - x_in).flatten(1).abs().amax(1)
    assert [row.distance_linf for row in rows] == pytest.approx(far.tolist())
    assert 0 < sum(right) < 45
    (skipped,) = [row for row in attacked if not row.clean]
    assert (skipped.index, skipped.counted, skipped.fresh) == (7, False, (False,))
    assert skipped.distance_l2 == 0
    assert log.trusted is None
    # Without attack the model is asked twice, to detect randomness; after it, once. PGD: 5 steps.
    assert sum(row.queries for row in clean) == pytest.approx(2 * 50)
    assert sum(row.queries for row in attacked) == pytest.approx((5 + 1 + 1) * 49, abs=49)
    for image in log.images:
        place = image.index - (image.index > 7)  # 7 was skipped
        shown = x[image.index] if image.stage == CLEAN else x_adv[place]
        assert image.prediction == int(model(shown[None]).argmax(1))
    assert log.settings["images"] == 50
    assert not log.settings["randomised"]


def test_a_randomised_model_is_judged_on_fresh_noise(digits):
    """The coin keeps its 15% of random answers, whatever an attack found on one draw.

    Each of 51 x 2 x 60 answers is right with probability 0.865: the mean lies within 0.02 of that
    but for a chance of 1e-5.
    """
    x, y = (part[digits[1] == 2] for part in digits)
    attacks = [AutoAttack(0.1, version="rand", steps=3), PGD(0.1, steps=3)]
    log = evaluate(defects.Coin().eval(), TensorDataset(x, y), attacks, **{**FAST, "repeats": 60})
    assert log.settings["randomised"]
    assert log.settings["noise"] == "fresh"
    for key, rows in log.columns.items():
        assert all(len(row.fresh) == 60 for row in rows)
        fresh = sum(row.mean for row in rows) / len(rows)
        assert fresh == pytest.approx(0.865, abs=0.02), key
        assert sum(row.worst for row in rows) <= 2
    counted = [sum(row.counted for row in rows) / len(rows) for rows in log.columns.values()]
    assert counted[1] < 0.7, "autoattack-rand counts every unlucky draw"


def test_no_evaluation_sees_noise_that_the_attack_or_another_saw(digits):
    draws = []

    class Noisy(defects.Defect):
        def forward(self, x):
            draws.append(torch.randn(x.shape))
            return self.net(x + 0.05 * draws[-1])

    class Asking(Keeping):
        def __call__(self, model, x, y):
            draws.clear()
            model(x)
            return x

    attacks = {"asking": Asking()}
    evaluate(Noisy().eval(), TensorDataset(*digits), attacks, indices=range(5), **FAST)
    assert len(draws) == 1 + 1 + FAST["repeats"]  # the attack's, as it counted, and the later ones
    assert len({draw.numpy().tobytes() for draw in draws}) == len(draws)


def settings(**options):
    return {**FAST, "indices": range(30), "batch_size": 8, **options}


@pytest.mark.parametrize("make", [digits_classifier, lambda: defects.Coin().eval()])
def test_a_torn_log_resumes_to_the_same_rows(tmp_path, make, digits):
    """Also for a model that draws from the global generator: each batch has a stream of its own."""
    data = TensorDataset(*digits)
    attacks = [PGD(EPS, steps=3), TorchAttack(EPS, options={"steps": 3})]
    whole = evaluate(make(), data, attacks, run=tmp_path / "whole", **settings())
    lines = (tmp_path / "whole" / "attack.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (1, 37, 75):
        out = tmp_path / str(kept)
        out.mkdir()
        (out / "attack.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
        torch.rand(kept)  # the caller's state takes no part
        resumed = evaluate(make(), data, attacks, run=out, resume=True, **settings())
        assert resumed.rows == whole.rows
        assert read_attack_log(out).rows == whole.rows
    with pytest.raises(InputError, match="already holds a run"):
        evaluate(make(), data, attacks, run=out, **settings())
    for other in ({"seed": 1}, {"batch_size": 9}, {"indices": range(29)}):
        with pytest.raises(InputError, match="different settings"):
            evaluate(make(), data, attacks, run=out, resume=True, **settings(**other))
    with pytest.raises(InputError, match="steps"):
        evaluate(make(), data, [PGD(EPS, steps=4)], run=out, resume=True, **settings())


def test_a_killed_process_resumes_to_the_same_rows_and_checks(tmp_path):
    command = [
        *("attack", "--model", "tests.nets:slow"),
        *("--data", "digits", "--eps", "0.05,0.1", "--attacks", "pgd:steps=2,square:queries=4"),
        *("--max", "24", "--batch-size", "6", "--quiet"),
    ]
    out, log = tmp_path / "killed", tmp_path / "killed" / "attack.jsonl"
    slowly = {"SLOW_SECONDS": "0.06"}
    process = forked(main, [*command, "--out", str(out)], environment=slowly)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 50):
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    held = log.read_text().count('"kind": "attack"')
    assert 30 < held < 24 * 5
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = read_attack_log(out), read_attack_log(tmp_path / "whole")
    assert len(whole.rows) == 24 * 5
    assert resumed.rows == whole.rows
    assert resumed.checks == whole.checks
    assert resumed.images == whole.images
    assert len(whole.checks) >= 10


@pytest.mark.parametrize(
    ("then", "words"),
    [
        ("raises", "the model failed.*out of memory|attack 'pgd' failed.*out of memory"),
        ("nan", "NaN or infinite logits"),
        ("shape", r"the model returned shape \(\d, 10, 1\) for \d images"),
        ("classes", r"the model returned shape \(\d, 9\) for \d images"),
    ],
)
@pytest.mark.parametrize("calls", [40, 53])  # among the clean images, and under attack
def test_a_model_that_fails_on_the_way_keeps_what_was_done(tmp_path, digits, then, words, calls):
    model = defects.Failing(calls, then).eval()
    with pytest.raises(InputError, match=words) as caught:
        evaluate(model, TensorDataset(*digits), [PGD(EPS, steps=3)], run=tmp_path, **settings())
    assert "\n" not in str(caught.value)
    rows = read_attack_log(tmp_path).rows
    assert 8 <= len(rows) < 60
    model._left = 10**6
    whole = evaluate(
        model, TensorDataset(*digits), [PGD(EPS, steps=3)], run=tmp_path, resume=True, **settings()
    )
    assert len(whole.rows) == 60
    assert whole.rows[: len(rows)] == rows


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda x: (x + 0.2).clamp(0, 1), r"image 0 moved by 0\.2.* in linf, eps"),
        (lambda x: x - 0.05, r"pixels in \[-0\.05, 0\.95\]"),
        (lambda x: x * torch.nan, "NaN or infinite pixels"),
        (lambda x: x[:1], r"returned \(1, 1, 8, 8\) for images of shape \(\d+, 1, 8, 8\)"),
        (lambda x: None, "must return one image for each"),
        (lambda x: 1 / 0, "attack 'keeping' failed: ZeroDivisionError"),
    ],
)
def test_an_attack_that_cheats_or_fails_is_named(tmp_path, digits, found, words):
    with pytest.raises(InputError, match=words):
        evaluate(
            digits_classifier(), TensorDataset(*digits), [Keeping(found)], run=tmp_path,
            **settings(),
        )  # fmt: skip
    assert len(read_attack_log(tmp_path).rows) == 30, "the clean rows are kept"


def test_noise_is_as_asked_and_put_back(digits):
    def settings_of(seed, noise):
        model = SmoothedClassifier(digits_classifier(), sigma=0.3, samples=2, seed=seed)
        options = {**FAST, "indices": range(8)}
        log = evaluate(model, TensorDataset(*digits), [PGD(EPS, steps=2)], noise=noise, **options)
        assert model.seed == seed
        return [log.settings[name] for name in ("randomised", "noise", "repeats")]

    assert settings_of(None, None) == settings_of(0, "fresh") == [True, "fresh", 6]
    assert settings_of(0, None) == settings_of(None, "fixed") == [False, "fixed", 1]
    with pytest.raises(InputError, match="noise is 'fixed'"):
        evaluate(digits_classifier(), TensorDataset(*digits), [], noise="fixed", **FAST)
    with pytest.raises(InputError, match="noise is 'loud'"):
        evaluate(digits_classifier(), TensorDataset(*digits), [], noise="loud", **FAST)


def rdc() -> nn.Module:
    diffusion = digits_diffusion()
    return nn.Sequential(
        LikelihoodMaximization(diffusion, steps=1, eta=0.1, seed=0),
        DiffusionClassifier(diffusion, levels=noise_levels(2), seed=0, temperature=20),
    ).eval()


def test_exact_and_bpda_gradients_side_by_side(digits):
    model = rdc()
    attacks = [PGD(EPS, steps=2), AutoAttack(EPS, parts=("square",), queries=3)]
    options = {**FAST, "indices": range(4), "pictures": 1}
    log = evaluate(model, TensorDataset(*digits), attacks, **options)
    assert list(log.columns)[1:] == [
        ("pgd", "exact", EPS), ("pgd", "bpda", EPS), ("square", "none", EPS)
    ]  # fmt: skip
    exact, bpda = log.columns["pgd", "exact", EPS], log.columns["pgd", "bpda", EPS]
    assert [row.distance_l2 for row in exact] != [row.distance_l2 for row in bpda]
    assert model[0].gradient == "exact"
    pictures = {(image.attack, image.gradient, image.stage): image.array for image in log.images}
    denoised = pictures[CLEAN, "none", "denoised"]
    with torch.no_grad():
        assert abs(denoised / 255 - model[0](digits[0][:1])[0].numpy()).max() <= 0.51 / 255
    assert ("pgd", "bpda", "attacked and denoised") in pictures
    only = evaluate(model, TensorDataset(*digits), attacks[:1], gradients=["bpda"], **options)
    assert only.columns["pgd", "bpda", EPS] == bpda
    with pytest.raises(InputError, match="gradients has 'smooth'; this model has exact and bpda"):
        evaluate(model, TensorDataset(*digits), attacks, gradients=["smooth"], **options)


def test_rows_are_kept_where_a_picture_cannot_be_taken(tmp_path, digits):
    """What was computed is written first; resuming takes the pictures that are missing."""
    data, left, asked = TensorDataset(*digits), [2], []  # the clean images, not the others

    class Asked:
        norm, eps = "linf", EPS

        def __call__(self, model, x, y):
            asked.append(len(x))
            return PGD(EPS, steps=3)(model, x, y)

    class Purifying(defects.Defect):
        def purify(self, x):
            left[0] -= 1
            return x if left[0] >= 0 else 1 / 0

        def forward(self, x):
            return self.net(x)

    model, attack, options = Purifying().eval(), Asked(), settings(pictures=2)
    with pytest.raises(InputError, match="Purifying.purify failed: ZeroDivisionError.*pictures=0"):
        evaluate(model, data, [attack], run=tmp_path, **options)
    torn = read_attack_log(tmp_path)
    assert len(torn.rows) == 30 + 8
    assert [picture.index for picture in torn.images] == [0, 0, 15, 15]  # of 30, evenly spaced
    left[0] = 100
    resumed = evaluate(model, data, [attack], run=tmp_path, resume=True, **options)
    whole = evaluate(model, data, [attack], **options)
    assert resumed.rows == whole.rows
    assert resumed.images == whole.images
    assert len(whole.images) == 8
    asked.clear()
    assert evaluate(model, data, [attack], run=tmp_path, resume=True, **options) == resumed
    assert not asked, "a finished run is not attacked again"


def test_an_estimator_of_ours_is_evaluated_like_its_module(digits):
    estimator = DenoisedSmoothing(
        digits_classifier(), sigma=0.1, input_shape=(1, 8, 8), nb_classes=10, seed=0, samples=2
    )
    options = {**FAST, "indices": range(12)}
    attacks = [PGD(EPS, steps=4), ArtAttack(EPS, options={"max_iter": 4})]
    data = TensorDataset(*digits)
    log = evaluate(estimator, data, attacks, **options)
    assert log.rows == evaluate(estimator.model, data, attacks, **options).rows
    assert sum(row.counted for row in log.columns["pgd", "exact", EPS]) < 12


def test_noise_in_few_answers_is_found(digits):
    """A coin that changes an answer in 13.5% of cases: missed with probability 1e-6 a seed."""
    coin, x = defects.Coin().eval(), digits[0]
    for images in (1, 4, 32):
        for seed in range(5):
            assert Target(coin, x[:images], noise=None, repeats=5, seed=seed).randomised
    assert not Target(digits_classifier(), x, noise=None, repeats=5, seed=0).randomised
    log_odds = nn.Sequential(digits_classifier(), nn.Hardshrink(2), defects.Log()).eval()
    assert torch.isinf(log_odds(x)).any()
    assert not Target(log_odds, x, noise=None, repeats=5, seed=0).randomised


class Late(defects.Defect):
    """Deterministic for many calls, and then random."""

    _left = 80

    def forward(self, x):
        self._left -= 1
        return self.net(x) + (0.1 * torch.rand(len(x), 1) if self._left < 0 else 0)


def test_noise_that_shows_late_contradicts(tmp_path, digits):
    data, options = TensorDataset(*digits), {**FAST, "indices": range(64), "batch_size": 2}
    with pytest.raises(InputError, match=r"randomised.*image \d+; give noise='fresh'"):
        evaluate(Late().eval(), data, [PGD(EPS, steps=2)], run=tmp_path, **options)
    options |= {"noise": "fresh", "indices": range(4)}
    log = evaluate(Late().eval(), data, [PGD(EPS, steps=2)], **options)
    assert log.settings["randomised"]
    assert all(len(row.fresh) == 6 for row in log.rows)


class Stepping:
    """An attack with options of its own, one of them an object."""

    norm, eps = "linf", EPS

    def __init__(self, steps, schedule=None):
        self.steps, self.schedule = steps, schedule or SimpleNamespace(decay=0.5)

    def __call__(self, model, x, y):
        return x


def test_only_the_same_run_is_resumed(tmp_path, digits):
    """Same first, last and number of images and same weights are not enough."""
    (x, y), indices = (part[:9].clone() for part in digits), [0, 3, 5, 8]
    other_x, other_y = x.clone(), y.clone()
    other_x[3, 0, 0, 0], other_y[5] = 0.5, (y[5] + 1) % 10

    def run(x=x, y=y, attack=None, indices=indices, sigma=0.1):
        model = SmoothedClassifier(digits_classifier(), sigma=sigma, samples=2, seed=0).eval()
        data, options = TensorDataset(x, y), {**FAST, "indices": indices}
        evaluate(model, data, [attack or Stepping(3)], run=tmp_path, resume=True, **options)

    run()
    run()
    with pytest.raises(InputError, match="pixels"):
        run(x=other_x)
    with pytest.raises(InputError, match="labels"):
        run(y=other_y)
    with pytest.raises(InputError, match="indices|pixels"):
        run(indices=[0, 3, 6, 8])
    with pytest.raises(InputError, match="attributes"):
        run(sigma=0.2)
    with pytest.raises(InputError, match=r"attacks.*steps"):
        run(attack=Stepping(4))
    with pytest.raises(InputError, match=r"attacks.*decay.*0\.25"):
        run(attack=Stepping(3, SimpleNamespace(decay=0.25)))


def test_what_a_module_hides_tells_it_from_another():
    """Neither has other weights: the noise within images, ART's preprocessing."""
    diffusion, net = digits_diffusion(), digits_classifier()

    def preprocessed(mean):
        return without_preprocessing(
            PyTorchClassifier(
                net, nn.CrossEntropyLoss(), (1, 8, 8), 10, preprocessing=(mean, 1.0),
                clip_values=(0, 1), device_type="cpu",
            )
        )  # fmt: skip

    for one, other in (
        (NoisedDiffusion(diffusion, 0.25), NoisedDiffusion(diffusion, 0.5)),
        (preprocessed(0.1), preprocessed(0.5)),
        (preprocessed(np.zeros((1, 8, 8))), preprocessed(np.eye(8)[None])),
    ):
        assert identity(one)["weights"] == identity(other)["weights"]
        assert identity(one)["attributes"] != identity(other)["attributes"]


def test_settings_hold_no_addresses():
    def attack(model, x, y, *, loss=lambda logits: logits, at=None):
        return x + bias

    bias = torch.zeros(1)
    for value in (attack, functools.partial(attack, at=object()), nn.ReLU(), torch.device("cpu")):
        assert " at 0x" not in json.dumps(describe(value))
    before = describe(attack)
    bias = torch.ones(1)
    assert describe(attack) != before


def test_an_attack_s_own_seed_counts(digits):
    """It is mixed into that of the run."""

    def far(own, seed=0):
        options = {**FAST, "indices": range(4), "seed": seed}
        log = evaluate(
            digits_classifier(), TensorDataset(*digits), [PGD(EPS, steps=1, seed=own)], **options
        )
        assert log.settings["attacks"][0]["seed"] == own
        return [row.distance_l2 for row in log.columns["pgd", "exact", EPS]]

    assert far(0) == far(0) != far(1) != far(0, seed=1)


def test_columns_say_how_much_their_attack_sees(digits):
    """Also of callables that are no Suite."""

    class Blind(Keeping):
        gradient_free = True

    attacks = [Blind(), AutoAttack(EPS), AutoAttack(EPS, parts=("square",))]
    seen = {c.name: (c.gradient, c.mixed) for c in columns(attacks, ("exact",))}
    assert seen == {
        "blind": ("none", False),
        "autoattack": ("exact", True),
        "square": ("none", False),
    }
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False).eval()
    log = evaluate(model, TensorDataset(*digits), [Blind()], indices=range(2), **FAST)
    assert not log.settings["attacks"][0]["mixed"]


class Centred(nn.Module):
    """Its output for an image depends on the other images of its batch."""

    def forward(self, x):
        return x - x.mean(0)


def test_bad_input(digits):
    data, model = TensorDataset(*digits), digits_classifier()
    for attacks, words in (
        ([lambda m, x, y: x], "give a callable .* with eps and norm"),
        ([PGD(0.1), PGD(0.1, steps=3)], "'pgd' with eps 0.1"),
        ({CLEAN: PGD(0.1)}, "is named 'clean'"),
        ([SimpleNamespace(norm="linf")], "give a callable"),
        ([type("Bare", (Keeping,), {"eps": None})()], "eps of bare is None; give a number"),
        ([type("Large", (Keeping,), {"eps": 8})()], "eps is 8, more than the range"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(model, data, attacks, **FAST)
    assert len(list(columns([("a", PGD(0.1)), ("b", PGD(0.1)), PGD(0.2)], ("exact",)))) == 3
    for options, words in (
        ({"indices": []}, "no images"),
        ({"indices": [0, 0, 1]}, "named twice"),
        ({"indices": [0, 10**6]}, "not in the data"),
        ({"indices": [-1]}, "index is -1"),
        ({"gradients": []}, "gradients is empty"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(model, data, [PGD(0.1)], **{**FAST, **options})
    with pytest.raises(InputError, match=r"the model is a str; give an nn.Module"):
        evaluate("resnet", data, [PGD(0.1)], **FAST)
    with pytest.raises(InputError, match="needs gradients"):
        evaluate(defects.Detached().eval(), data, [PGD(0.1)], **FAST)
    with pytest.raises(InputError, match="image 1: label 12 is out of range"):
        evaluate(model, TensorDataset(digits[0][:2], torch.tensor([2, 12])), [PGD(0.1)], **FAST)
    one_hot = nn.functional.one_hot(digits[1][:2], 10)
    with pytest.raises(InputError, match="image 0: .*"):
        evaluate(model, TensorDataset(digits[0][:2], one_hot), [PGD(0.1)], **FAST)
    with pytest.raises(InputError, match="images is 0"):
        Probes(images=0)
    centred = nn.Sequential(Centred(), model).eval()
    with pytest.raises(InputError, match="other images of its batch"):
        evaluate(centred, data, [PGD(0.1)], **FAST)
    for undefended, words in ((centred, "other images"), (nn.Dropout(), "training mode")):
        with pytest.raises(InputError, match=words):
            evaluate(model, data, [PGD(0.1)], undefended=undefended, **FAST)
    with pytest.raises(InputError, match="training mode"):
        Target(nn.Sequential(nn.Dropout(), model), digits[0], noise=None, repeats=1, seed=0)


def test_a_log_of_the_first_version_is_read_and_not_continued(tmp_path, digits):
    folder = shutil.copytree(Path(__file__).parents[1] / "golden/logs/attack", tmp_path / "old")
    log = read_attack_log(folder)
    assert next(iter(log.columns)) == (CLEAN, "none", 0.0)
    assert len(log.rows) + len(log.checks) + len(log.images) == 26
    with pytest.raises(InputError, match="earlier version"):
        evaluate(digits_classifier(), TensorDataset(*digits), [], run=folder, resume=True, **FAST)


class InPlace(defects.Defect):
    """Normalises the very tensor that it is given."""

    def forward(self, x):
        return self.net(x.sub_(0.1).mul_(1.2))


class OutOfPlace(defects.Defect):
    def forward(self, x):
        return self.net((x - 0.1) * 1.2)


def test_a_model_that_writes_into_its_input_gets_the_same_rows(digits):
    data = TensorDataset(*(part[:24].clone() for part in digits))
    before = data.tensors[0].clone()
    attacks = [
        PGD(EPS, steps=3),
        AutoAttack(EPS, parts=("apgd-ce", "square"), steps=3, queries=5),
        TorchAttack(EPS, options={"steps": 3}),
    ]
    options = {**FAST, "masking_checks": True, "probes": Probes(8, 4, 10, 1), "pictures": 1}
    logs = [evaluate(m().eval(), data, attacks, **options) for m in (InPlace, OutOfPlace)]
    assert logs[0].rows == logs[1].rows
    assert logs[0].checks == logs[1].checks
    assert logs[0].images == logs[1].images
    assert data.tensors[0].equal(before)


def test_an_attack_that_writes_into_its_input_is_measured_from_the_image(digits):
    attack = Keeping(lambda x: x.mul_(0.95))
    log = evaluate(digits_classifier(), TensorDataset(*digits), [attack], **settings())
    assert max(row.distance_linf for row in log.rows) == pytest.approx(0.05)


def test_an_output_that_holds_logits_stands_for_them(digits):
    """As models of Hugging Face give; also under attacks of other libraries, and in the checks."""

    class Wrapped(defects.Defect):
        def forward(self, x):
            return SimpleNamespace(logits=self.net(x), loss=None)

    attacks = [PGD(EPS, steps=2), AutoAttack(EPS, parts=("apgd-ce",), steps=2)]
    options = {**settings(), "masking_checks": True, "probes": Probes(8, 4, 10, 1)}
    models = Wrapped().eval(), digits_classifier()
    logs = [
        evaluate(one, TensorDataset(*digits), attacks, undefended=models[0], **options)
        for one in models
    ]
    assert logs[0].rows == logs[1].rows
    assert logs[0].checks == logs[1].checks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x, y, 7), "image 1: .*3 values"),
        (lambda x, y: x, "image 1: .*Tensor"),
        (lambda x, y: (Image.new("RGB", (8, 8)), y), "image 1: .*Image"),
        (lambda x, y: (x[:, :5], y), r"image 1: .*\(1, 5, 8\)"),
        (lambda x, y: (x, "cat"), "image 1: .*label"),
        (lambda x, y: ((255 * x).byte(), y), "image 1: .*uint8"),
    ],
)
def test_data_that_cannot_be_used_is_one_line_that_names_the_image(digits, change, words):
    pairs = list(zip(digits[0][:3], digits[1][:3].tolist(), strict=True))
    pairs[1] = change(*pairs[1])
    with pytest.raises(InputError, match=words) as caught:
        evaluate(digits_classifier(), pairs, [PGD(EPS)], **FAST)
    assert "\n" not in str(caught.value)


def test_read_only_arrays_are_data(digits):
    """Without a warning, which pytest would make an error."""
    arrays = digits[0][:4].numpy().copy()
    arrays.flags.writeable = False
    pairs = list(zip(arrays, digits[1][:4].numpy(), strict=True))
    log = evaluate(digits_classifier(), pairs, [PGD(EPS, steps=2)], **FAST)
    same = evaluate(
        digits_classifier(),
        TensorDataset(*digits),
        [PGD(EPS, steps=2)],
        **FAST | {"indices": range(4)},
    )
    assert log.rows == same.rows


def test_images_of_one_class_alone_are_remarked(digits, capsys):
    """The first of a folder sorted by class, say."""
    x, y = (part[digits[1] == 2] for part in digits)
    log = evaluate(digits_classifier(), TensorDataset(x, y), [], indices=range(5), **FAST)
    assert "all 5 images are of class 2" in log.notices[0]
    assert "all 5 images are of class 2" in capsys.readouterr().err
    assert not evaluate(
        digits_classifier(), TensorDataset(*digits), [], indices=range(5), **FAST
    ).notices


def test_progress_moves_within_a_batch_and_says_what_is_left(capsys):
    with PassProgress("attack", 8, interval=0.0) as progress:
        progress.begin("square", images=4, expected=10)
        progress.tick(4)
        progress.tick(16)
        shown = capsys.readouterr().err.splitlines()[-1]
        assert "square" in shown
        assert "2/8 images" in shown
        assert "left" in shown
        assert "NFE 20 of 40" in shown
        progress.end("50.0% right")
        progress.begin("new", images=4, expected=None)
        progress.tick(3)
        assert "4/8 images" in (shown := capsys.readouterr().err.splitlines()[-1])
        assert "NFE 3, 50.0% right" in shown


def test_forward_passes_of_an_attack_are_counted(digits):
    """As many as it says beforehand, up to those that look at the model first."""
    model, seen = defects.Constant().eval(), []
    x, y = digits[0][:4], torch.full((4,), 2)
    target = Target(model, x, noise=None, repeats=1, seed=0)
    target.tick = seen.append
    attacks = [
        PGD(EPS, steps=6, restarts=2),
        AutoAttack(EPS, parts=("apgd-ce",), steps=40),
        AutoAttack(EPS, steps=10, queries=90),
    ]
    for attack in attacks:
        seen.clear()
        target.attempt(attack, "exact", x, y, 0)
        assert sum(seen) / 4 == pytest.approx(attack.nfe, rel=0.4)
