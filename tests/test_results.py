"""What is committed under results/ can be read by today's code, logs of earlier versions too."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from art_denoised import load_classifier
from art_denoised.evaluation import read_attack_log, read_log, verify
from art_denoised.networks import load_trained

RESULTS = Path(__file__).parent.parent / "results"

CERTIFIED = sorted(RESULTS.rglob("certify.jsonl"))
ATTACKED = sorted(RESULTS.rglob("attack.jsonl"))


def name(path: Path) -> str:
    return path.relative_to(RESULTS).as_posix()


@pytest.mark.parametrize("path", CERTIFIED, ids=name)
def test_certificates_follow_from_their_votes(path):
    log = read_log(path)
    assert len(log.rows) > 0
    assert verify(log) == []


@pytest.mark.parametrize("path", ATTACKED, ids=name)
def test_attacks_are_within_their_balls(path):
    log = read_attack_log(path)
    assert len(log.rows) > 0
    assert verify(log) == []


def test_weights_fit_the_networks_beside_them(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS / "cifar10")
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    for factory in ("classifier", "surrogate_plain", "surrogate_resnet14"):
        assert not load_classifier(f"networks:{factory}").training
    for activation in ("relu", "softplus"):
        weights = RESULTS / "cifar10" / "robust" / f"{activation}-0" / "model.safetensors"
        network = load_trained(load_classifier("networks:small"), weights)
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    monkeypatch.delitem(sys.modules, "networks")


@pytest.fixture
def beside(monkeypatch):
    """Programs of results/cifar10/gpu and their neighbours, which are forgotten afterwards."""
    folder = RESULTS / "cifar10" / "gpu"
    neighbours = {path.stem for path in (*folder.glob("*.py"), *folder.parent.glob("*.py"))}
    for name in neighbours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in neighbours:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["classifier", "denoiser", "diffusion"])
def test_gpu_training_runs_without_a_gpu(as_program, beside, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [name, "--tiny", "--out", "out"])
    script = runpy.run_path(str(beside / f"{name}.py"), run_name="__main__")
    script["print_cost"]()
    import card

    out = as_program / "out"
    figures = json.loads((out / "figures.json").read_text())
    network = card.read(script["network"](True), out)
    assert figures["parameters"] == sum(p.numel() for p in network.parameters())
    weights = [p for p in network.parameters() if p.ndim > 1]
    assert all(torch.equal(p, p.half().float()) for p in weights)
    assert not list(out.rglob("checkpoint.pt"))


def test_weights_travel_in_parts(beside, monkeypatch, tmp_path):
    import card

    monkeypatch.setattr(card, "SHARD", 1000)
    written, read = (
        torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(5))) for _ in "ab"
    )
    given = card.Options(tiny=True, minutes=1, epochs=1, out=tmp_path, data=card.DATA)
    card.write(given, card.rounded(written), [])
    files = sorted(tmp_path.glob("weights-*"))
    assert len(files) == 5
    card.read(read, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(written.parameters(), read.parameters(), strict=True)
    )
    files[2].unlink()
    with pytest.raises(SystemExit, match="lacks a file"):
        card.read(read, tmp_path)


def test_packed_images_are_those_of_the_files(beside, monkeypatch, tmp_path):
    import card
    import pack
    from PIL import Image

    for split in ("train", "test"):
        for y, label in enumerate(pack.CLASSES):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (20 * y, 0, 100)).save(folder / "a.jpg")
    monkeypatch.setattr(sys, "argv", ["pack", str(tmp_path), "--out", str(tmp_path / "jpeg.npz")])
    pack.main()
    given = card.Options(tiny=False, minutes=1, epochs=1, out=tmp_path, data=tmp_path / "jpeg.npz")
    x, y = card.load(given)["train"].tensors
    assert sorted(y.tolist()) == list(range(10))
    torch.testing.assert_close(x.mean((2, 3))[:, 0], y * 20 / 255, atol=0.02, rtol=0)
