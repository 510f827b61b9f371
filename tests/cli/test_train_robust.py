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
from art_denoised.denoisers.checkpoints import load_weights
from art_denoised.models.loading import load_trained
from art_denoised.networks.activations import ParametricSoftplus
from tests.nets import residual
from tests.test_cli import assert_one_line


def arguments(out: Path, **changes: object) -> list[str]:
    options: dict[str, object] = {
        "model": "art_denoised.demo:digits_network",
        "data": "digits",
        "recipe": "sat",
        "eps": "0.15",
        "epochs": 2,
        "rate": 0.1,
        "augment": "none",
        "average": 0.9,
        "out": out,
    }
    options |= changes
    given = {name: value for name, value in options.items() if value is not None}
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return ["train-robust", "--quiet", *(word for pair in words for word in pair)]


def test_a_classifier_is_trained_and_its_weights_load(tmp_path, capsys):
    words = [*arguments(tmp_path, holdout="digits", holdout_max=50, judge_steps=3), "--best"]
    assert main(words) == 0
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
    assert header["settings"]["eps"] == 0.15
    assert [row["epoch"] for row in rows] == [1, 2]
    assert main([*words, "--resume"]) == 0
    assert path.read_bytes() == before


def test_blocks_and_activations_are_put_in_and_noted(tmp_path, capsys):
    words = arguments(
        tmp_path, model="tests.nets:residual", epochs=1, feature_denoising="mean", where="1",
        activation="softplus",
    )  # fmt: skip
    assert main(words) == 0
    assert "denoising blocks: adds 0.00 M parameters" in capsys.readouterr().err
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
    model = load_trained("--model", "tests.nets:residual", tmp_path / "model.safetensors")
    assert not model.training
    assert sum("denoise" in name for name, _ in model.named_modules()) > 0
    assert any(isinstance(module, ParametricSoftplus) for module in model.modules())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, file.get_tensor(name))
    capsys.readouterr()
    other = [*attack, "--weights", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "b")]
    assert main(other) == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    assert "train.jsonl is damaged or of another format" in message


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
    with pytest.raises(InputError, match="has a damaged note"):
        load_trained("--model", "tests.nets:residual", path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eps": 8}, "give it in image units, 8/255 = 0.0314"),
        ({"eps": "a/b"}, "'a/b' is no number; give one, or a fraction such as 8/255"),
        ({"eps": "1e400"}, "'1e400' is no number"),
        ({"eps": "8/0"}, "'8/0' is no number"),
        ({"recipe": "fgsm"}, "give one of clean, feature-denoising, pgd, sat, trades"),
        ({"recipe": "clean"}, "--recipe clean has no attack; leave --eps out"),
        ({"where": "all"}, "give --feature-denoising as well"),
        ({"feature_denoising": "mean"}, "no residual blocks that could be found"),
        ({"feature_denoising": "mode", "where": "1"}, "operation is 'mode'"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"norm": "l7"}, "norm is 'l7'"),
        ({"steps": 0}, "steps is 0"),
        ({"model": "tests.nets:colour"}, "failed on an image of shape (1, 8, 8)"),
        ({"model": "tests.nets:three_classes"}, "is out of range; labels go from 0 to 2"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"data": "mnist"}, "mnist"),
        ({"holdout": "digits", "holdout_max": 0}, "--holdout-max is 0"),
    ],
)  # fmt: skip
def test_bad_words_are_one_line(tmp_path, capsys, changes, words):
    try:
        code = main(arguments(tmp_path / "out", **changes))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    assert words in message


def test_denoisers_are_judged_on_at_least_one_image(tmp_path, capsys):
    words = ["--objective", "mse", "--data", "digits", "--holdout", "digits", "--holdout-max", "0"]
    assert main(["train-denoiser", *words, "--sigma", "0.25", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert_one_line(message)
    assert "--holdout-max is 0" in message


def test_another_holdout_is_no_resuming(tmp_path, capsys):
    words = arguments(tmp_path, epochs=1, holdout="digits", judge_steps=1)
    assert main([*words, "--holdout-max", "20"]) == 0
    assert main([*words, "--holdout-max", "30", "--resume"]) == 2
    assert "other settings (holdout " in capsys.readouterr().err


def test_overfitting_is_told_while_it_happens(tmp_path, capsys, monkeypatch):
    """The detector is made to cry in the second epoch; --stop then ends there, --resume too."""
    from art_denoised.training import adversarial

    monkeypatch.setattr(adversarial, "overfits", lambda rows: len(rows) == 2)
    words = [
        *arguments(tmp_path, epochs=4, holdout="digits", holdout_max=20, judge_steps=1),
        "--stop",
    ]
    for more in ([], ["--resume"]):
        assert main([*words, *more]) == 0
        heard = capsys.readouterr()
        assert "epoch 2" in heard.out
        assert ("notice: epoch 2: catastrophic overfitting" in heard.err) is not bool(more)
