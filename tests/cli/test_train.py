"""The commands `train-denoiser` and `train-diffusion`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from art_denoised import DiffusionClassifier, load_denoiser, load_diffusion, save_denoiser
from art_denoised.cli import main
from art_denoised.cli.train import ValidatedData
from art_denoised.data import digits
from art_denoised.diffusion import noise_levels
from art_denoised.evaluation import read_log
from tests.cli.command import MODEL, certify, refusal, words


def train(out: Path, *flags: str, **changes: object) -> list[str]:
    options = {
        "objective": "stability",
        "classifier": MODEL,
        "data": "digits",
        "sigma": 0.25,
        "architecture": "dncnn:4:12",
        "epochs": 2,
        "augment": "crop",
        "out": out,
    }
    return words("train-denoiser", "--quiet", *flags, **(options | changes))


def test_a_denoiser_is_trained_and_certified_with(tmp_path, capsys):
    arguments = train(tmp_path, validation="digits", epochs=6, lr=0.005, average=0.9)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"epoch 6, loss [\d.]+, mse [\d.]+, accuracy 0\.\d+", printed)
    denoiser = tmp_path / "denoiser.safetensors"
    first = denoiser.read_bytes()
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log[1:]] == [1, 2, 3, 4, 5, 6]
    assert "stability" in log[0]["settings"]["loss"]["objective"]
    assert main([*arguments, "--resume"]) == 0
    assert denoiser.read_bytes() == first
    assert main(certify(tmp_path / "with", denoiser=denoiser, max=20)) == 0
    assert main(certify(tmp_path / "without", max=20)) == 0
    accuracy = [
        sum(row.correct for row in read_log(tmp_path / run / "certify.jsonl").rows)
        for run in ("with", "without")
    ]
    assert accuracy[0] > accuracy[1]


def test_the_names_of_classes_give_the_order_of_the_labels(tmp_path):
    for place, name in enumerate(("circle", "square")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 99 * place).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "classes.txt").write_text("square\ncircle\n")
    folder = f"imagefolder:{tmp_path / 'images'}"
    data = ValidatedData(data=folder, validation=folder, classes=tmp_path / "classes.txt")
    assert [int(label) for _, label in (data.load()[0], data.load()[1])] == [1, 0]
    assert [int(label) for _, label in data.load_validation() or ()] == [1, 0]


def test_a_certificate_at_another_sigma_than_that_of_the_training_is_said(tmp_path, capsys):
    """Once, in one line, by certify and by attack; at the sigma of the training nothing is."""
    denoiser = tmp_path / "denoiser.safetensors"
    assert main(train(tmp_path, epochs=1, bf16="off")) == 0

    def said(command: list[str]) -> list[str]:
        capsys.readouterr()
        assert main(command) == 0
        return [line for line in capsys.readouterr().err.split("\n") if "trained for" in line]

    assert said(certify(tmp_path / "same", denoiser=denoiser, max=1)) == []
    (line,) = said(certify(tmp_path / "other", denoiser=denoiser, max=1, sigma=0.5))
    assert line.startswith("notice: ")
    assert re.search(r"sigma 0\.25, but sigma is 0\.5", line)
    attack = words(
        "attack", "--quiet", "--no-checks", model=MODEL, denoiser=denoiser, sigma=0.12, samples=2,
        data="digits", max=1, eps=0.1, norm="l2", attacks="pgd:steps=1", out=tmp_path / "attack",
    )  # fmt: skip
    assert re.search(r"sigma 0\.25, but sigma is 0\.12", said(attack)[0])


def test_hybrid_and_surrogates_from_the_command_line(tmp_path, capsys):
    half = tmp_path / "half.safetensors"
    surrogates = ["--surrogate", "tests.nets:surrogate", "--surrogate", "tests.nets:three_classes"]
    arguments = train(tmp_path, objective="hybrid", epochs=1, fine_epochs=1, sigma="0.1,0.5")
    assert main([*arguments, *surrogates]) == 0
    assert (tmp_path / "mse" / "train.jsonl").exists()
    settings = json.loads((tmp_path / "stability" / "train.jsonl").read_text().splitlines()[0])
    assert len(settings["settings"]["loss"]["classifiers"]) == 2
    save_denoiser(load_denoiser(tmp_path / "denoiser.safetensors").half(), half)
    again = train(tmp_path / "2", architecture=half, epochs=1, bf16="off")
    assert main(again) == 0  # go on from a checkpoint, in float32
    trained = tmp_path / "2" / "denoiser.safetensors"
    assert next(load_denoiser(trained).parameters()).dtype == torch.float32
    before = trained.read_bytes()
    message = refusal(capsys, train(tmp_path / "2", objective="hybrid", epochs=1))
    assert str(trained.parent) in message
    assert "--resume" in message
    assert trained.read_bytes() == before


def test_without_a_classifier_the_first_surrogate_is_evaluated(tmp_path, capsys):
    surrogate = ("--surrogate", "tests.nets:surrogate")
    options = {"classifier": None, "epochs": 1, "bf16": "off", "validation": "digits"}
    assert main(train(tmp_path, *surrogate, **options, validation_max=9)) == 0
    assert "first surrogate" in capsys.readouterr().err


def test_the_classifier_is_no_surrogate(tmp_path, capsys):
    assert "among the surrogates" in refusal(capsys, train(tmp_path, "--surrogate", MODEL))


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"objective": "l1"}, ["l1", "stability"]),
        ({"classifier": None}, ["classifier"]),
        ({"classifier": "tests.nets:training"}, ["training mode"]),
        ({"sigma": "0.5,0.1"}, ["lower one first"]),
        ({"sigma": "a"}, ["'a'"]),
        ({"sigma": "0.1,0.2,0.3"}, ["0.3"]),
        ({"architecture": "dncnn:a:b"}, ["--architecture", "dncnn:a:b"]),
        ({"architecture": "unet.bin"}, ["unet.bin"]),
        ({"architecture": "tests.nets:plain_denoiser"}, ["_Plain"]),
        ({"architecture": "tests.nets:colour_denoiser"}, ["denoiser", "(1, 8, 8)"]),
        ({"classifier": "tests.nets:colour"}, ["model", "(1, 8, 8)"]),
        ({"classifier": "tests.nets:three_classes", "objective": "classification"}, ["0 to 2"]),
        ({"seed": 2**64}, ["2^64"]),
        ({"fine_epochs": -3}, ["fine_epochs"]),
        ({"bf16": "yes"}, ["yes", "auto", "on", "off"]),
        ({"epochs": 0}, ["epochs is 0"]),
        ({"lr": 0}, ["0"]),
        ({"schedule": "linear"}, ["linear", "one-cycle"]),
        ({"data": "mnist"}, ["mnist"]),
        ({"validation": "digits", "validation_max": 0}, ["--validation-max is 0"]),
    ],
    ids=str,
)
def test_bad_trainings(tmp_path, capsys, changes, values):
    message = refusal(capsys, train(tmp_path / "out", **changes))
    for value in values:
        assert value in message


def diffusion(out: Path, *flags: str, **changes: object) -> list[str]:
    options = {
        "data": "digits",
        "augment": "none",
        "lr": 0.004,
        "widths": "16,32",
        "average": 0.95,
        "out": out,
    }
    return words("train-diffusion", "--quiet", *flags, **(options | changes))


def test_a_diffusion_model_is_trained_and_loaded(tmp_path, capsys):
    assert main(diffusion(tmp_path / "a", classes=10, epochs=2, batch_size=64)) == 0
    assert "loss 0." in capsys.readouterr().out
    model = load_diffusion(tmp_path / "a", classes=10)
    classifier = DiffusionClassifier(model, levels=noise_levels(4), seed=0)
    data = [digits(train=False)[i] for i in range(50)]
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    with torch.no_grad():
        assert (classifier(x).argmax(1) == y).double().mean() > 0.5
    np.savez(tmp_path / "few.npz", x=x, y=y)
    more = {"init": tmp_path / "a", "lr": 1e-9, "classes": 10, "epochs": 1}
    more["data"] = f"npz:{tmp_path / 'few.npz'}"
    assert main(diffusion(tmp_path / "more", **more)) == 0
    again = load_diffusion(tmp_path / "more", classes=10)
    assert torch.allclose(again(x, 0.5, y), model(x, 0.5, y), atol=1e-4)


def test_an_unconditional_model_is_a_denoiser(tmp_path):
    assert main(diffusion(tmp_path / "model", epochs=1)) == 0
    assert main(certify(tmp_path / "run", denoiser=tmp_path / "model", max=1, n=20)) == 0


@pytest.mark.parametrize(
    "changes", [{"widths": "12"}, {"widths": "8,8,8,8,8"}, {"drop": 1}, {"widths": "a"}], ids=str
)
def test_bad_diffusion_models(tmp_path, capsys, changes):
    (value,) = changes.values()
    assert str(value).split(",")[0] in refusal(capsys, diffusion(tmp_path, epochs=1, **changes))


def test_images_that_are_not_square(tmp_path, capsys):
    np.savez(tmp_path / "oblong.npz", x=np.zeros((8, 1, 8, 6)), y=np.zeros(8, int))
    arguments = diffusion(tmp_path / "out", data=f"npz:{tmp_path / 'oblong.npz'}", epochs=1)
    assert "8 x 6" in refusal(capsys, arguments)
