"""train-robust as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.data import digits
from art_denoised.demo import digits_network
from art_denoised.models import load_weights
from art_denoised.networks import ParametricSoftplus, load_trained
from tests.cli.command import refusal, words
from tests.nets import residual


def arguments(out: Path, *flags: str, **changes: object) -> list[str]:
    options = {
        "model": "art_denoised.demo:digits_network",
        "data": "digits",
        "recipe": "sat",
        "eps": "0.15",
        "epochs": 2,
        "lr": 0.1,
        "augment": "none",
        "average": 0.9,
        "out": out,
    }
    return words("train-robust", "--quiet", *flags, **(options | changes))


def test_a_classifier_is_trained_and_its_weights_load(tmp_path, capsys):
    options = {"validation": "digits", "validation_max": 50, "judge_steps": 3}
    trained = arguments(tmp_path, "--best", **options)
    assert main(trained) == 0
    printed = capsys.readouterr().out
    assert re.search(r"epoch 2, loss [\d.]+, accuracy 0\.\d+, robust 0\.\d+", printed)
    path = tmp_path / "model.safetensors"
    model, before = digits_network(), path.read_bytes()
    load_weights(model, path)
    x, y = digits(train=False).images, digits(train=False).labels
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() > 0.5
    header, *rows = [
        json.loads(line) for line in (tmp_path / "train.jsonl").read_text().split("\n")[:-1]
    ]
    assert header["settings"]["loss"]["recipe"]["eps"] == 0.15
    assert [row["epoch"] for row in rows] == [1, 2]
    assert main([*trained, "--resume"]) == 0
    assert path.read_bytes() == before


def test_blocks_and_activations_are_put_in_and_noted(tmp_path, capsys):
    changes = {"feature_denoising": "mean", "where": "1", "activation": "softplus"}
    assert main(arguments(tmp_path, model="tests.nets:residual", epochs=1, **changes)) == 0
    assert "0.00 M parameters" in capsys.readouterr().err
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        note = json.loads(file.metadata()["art_denoised"])
        names = set(file.keys())
    assert note["feature_denoising"] == "mean"
    assert note["activation"] == "softplus"
    assert {"1.block.conv.weight", "1.denoise.conv.weight"} <= names
    # The trained network is attacked by naming the same factory and the file.
    attack = ["attack", "--model", "tests.nets:residual", "--data", "digits", "--eps", "0.1"]
    attack += ["--attacks", "pgd:steps=1", "--max", "2", "--no-checks", "--quiet"]
    trained = [*attack, "--weights", str(tmp_path / "model.safetensors")]
    assert main([*trained, "--out", str(tmp_path / "attacked")]) == 0
    model = load_trained(residual(), tmp_path / "model.safetensors")
    assert not model.training
    assert sum("denoise" in name for name, _ in model.named_modules()) > 0
    assert any(isinstance(module, ParametricSoftplus) for module in model.modules())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, file.get_tensor(name))
    other = [*attack, "--weights", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "b")]
    assert "train.jsonl" in refusal(capsys, other)


@pytest.mark.parametrize(
    "note",
    [
        {"feature_denoising": "mean"},
        {"feature_denoising": "mean", "where": 3, "input_shape": [1, 8, 8]},
        {"feature_denoising": "mean", "input_shape": "abc"},
        {"activation": ["silu"]},
        [1],
    ],
)
def test_a_damaged_note_is_one_line(tmp_path, note):
    path = tmp_path / "model.safetensors"
    save_file(residual().state_dict(), path, metadata={"art_denoised": json.dumps(note)})
    with pytest.raises(InputError, match="note"):
        load_trained(residual(), path)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"eps": 8}, ["8/255 = 0.0314"]),
        ({"eps": "a/b"}, ["'a/b'", "8/255"]),
        ({"eps": "1e400"}, ["'1e400'"]),
        ({"eps": "8/0"}, ["'8/0'"]),
        ({"recipe": "fgsm"}, ["'fgsm'", "clean, feature-denoising, pgd, sat, sat-release, trades"]),
        ({"recipe": "clean"}, ["clean", "--eps"]),
        ({"where": "all"}, ["--where", "--feature-denoising"]),
        ({"feature_denoising": "mean"}, ["residual blocks"]),
        ({"feature_denoising": "mode", "where": "1"}, ["'mode'"]),
        ({"activation": "swish"}, ["'swish'"]),
        ({"norm": "l7"}, ["'l7'"]),
        ({"steps": 0}, ["steps is 0"]),
        ({"model": "tests.nets:colour"}, ["(1, 8, 8)"]),
        ({"model": "tests.nets:three_classes"}, ["0 to 2"]),
        ({"optimizer": "lion"}, ["lion", "adam"]),
        ({"data": "mnist"}, ["mnist"]),
        ({"validation": "digits", "validation_max": 0}, ["--validation-max is 0"]),
        ({"step_size": "a"}, ["--step-size", "'a'"]),
    ],
    ids=str,
)
def test_bad_trainings(tmp_path, capsys, changes, values):
    message = refusal(capsys, arguments(tmp_path / "out", **changes))
    for value in values:
        assert value in message


def test_other_validation_images_are_not_resumed_with(tmp_path, capsys):
    options = {"epochs": 1, "validation": "digits", "judge_steps": 1}
    assert main(arguments(tmp_path, validation_max=20, **options)) == 0
    message = refusal(capsys, arguments(tmp_path, "--resume", validation_max=30, **options))
    assert "evaluation.measure.x" in message


def test_overfitting_is_told_while_it_happens(tmp_path, capsys, monkeypatch):
    """The detector is made to cry in the second epoch; --stop then ends there, --resume too."""
    from art_denoised.training import robust

    monkeypatch.setattr(robust, "overfits", lambda figures: len(figures) == 2)
    options = {"epochs": 4, "validation": "digits", "validation_max": 20, "judge_steps": 1}
    trained = arguments(tmp_path, "--stop", **options)
    for more in ([], ["--resume"]):
        assert main([*trained, *more]) == 0
        heard = capsys.readouterr()
        assert "epoch 2" in heard.out
        assert ("notice: epoch 2: catastrophic overfitting" in heard.err) is not bool(more)
