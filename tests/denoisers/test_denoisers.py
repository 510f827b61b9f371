"""Denoisers and their checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import deepinv
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from art_denoised import (
    DenoisedClassifier,
    DnCNN,
    InputError,
    MemNet,
    UNetDenoiser,
    load_denoiser,
    save_denoiser,
)
from art_denoised.models import load_weights
from tests.nets import SMALL_UNET

UNET = SMALL_UNET | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}


def small(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "dncnn": lambda: DnCNN(1, depth=4, width=6),
            "memnet": lambda: MemNet(1, width=4, memory_blocks=2, residual_blocks=3),
            "unet": lambda: UNetDenoiser.from_config(**UNET),
        }[kind]()
        for parameter in made.parameters():  # so that swapped layers would show
            nn.init.normal_(parameter, std=0.1)
        return made.eval()


KINDS = ["dncnn", "memnet", "unet"]
X = torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)


def test_names_of_the_published_dncnn():
    state = DnCNN().state_dict()
    expected = {"dncnn.0.weight", "dncnn.0.bias", "dncnn.47.weight"}
    for k in range(15):
        expected |= {f"dncnn.{2 + 3 * k}.weight"}
        expected |= {
            f"dncnn.{3 + 3 * k}.{name}"
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }
    assert set(state) == expected
    assert sum(p.numel() for p in DnCNN().parameters()) == 558_400
    norm = DnCNN().dncnn[3]
    assert (norm.eps, norm.momentum) == (1e-4, 0.95)


def test_names_of_the_published_memnet():
    model = MemNet()
    layers = ["feature_extractor", "reconstructor"]
    for i in range(3):
        layers.append(f"dense_memory.{i}.gate_unit")
        layers += [
            f"dense_memory.{i}.recursive_unit.{j}.relu_conv{k}" for j in range(6) for k in (1, 2)
        ]
    parameters = {f"{layer}.{name}" for layer in layers for name in ("bn.weight", "bn.bias")}
    parameters |= {f"{layer}.conv.weight" for layer in layers}
    assert {name for name, _ in model.named_parameters()} == parameters
    assert [b.gate_unit.conv.weight.shape[1] for b in model.dense_memory] == [448, 512, 576]
    assert sum(p.numel() for p in model.parameters()) == 1_436_678


def test_residual_forms():
    """With its last convolution at zero each network returns its input."""
    dncnn, memnet = small("dncnn"), small("memnet")
    nn.init.zeros_(dncnn.dncnn[-1].weight)
    nn.init.zeros_(memnet.reconstructor.conv.weight)
    assert torch.equal(dncnn(X, 0.25), X)
    assert torch.equal(memnet(X, 0.25), X)


def test_unet_takes_one_sigma_or_one_an_image():
    denoiser = small("unet")
    together = denoiser(X, torch.tensor([0.1, 0.7]))
    apart = torch.cat([denoiser(X[:1], 0.1), denoiser(X[1:], 0.7)])
    assert torch.allclose(together, apart, atol=1e-6)
    assert not torch.allclose(denoiser(X, 0.1), denoiser(X, 0.7))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_denoisers_come_back(tmp_path, kind):
    denoiser = small(kind)
    save_denoiser(denoiser, tmp_path / "a.safetensors")
    loaded = load_denoiser(tmp_path / "a.safetensors")
    assert not loaded.training
    assert torch.equal(loaded(X, 0.3), denoiser(X, 0.3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_diffusers_folder(tmp_path):
    denoiser = small("unet")
    denoiser.unet.save_pretrained(tmp_path, safe_serialization=True)
    assert torch.equal(load_denoiser(tmp_path)(X, 0.3), denoiser(X, 0.3))
    with pytest.raises(InputError, match="not the folder of a diffusers UNet2DModel"):
        load_denoiser(tmp_path.parent)


@pytest.mark.parametrize("prefix", ["", "module.", "1.", "1.module.", "module.1."])
@pytest.mark.parametrize("kind", ["dncnn", "memnet"])
def test_published_checkpoints_load_with_their_prefixes(tmp_path, kind, prefix):
    denoiser = small(kind)
    optimizer = torch.optim.Adam(denoiser.parameters())
    checkpoint = {
        "epoch": 90,
        "arch": f"cifar_{kind}",
        "state_dict": {prefix + name: value for name, value in denoiser.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(checkpoint, path)
    assert torch.equal(load_denoiser(path)(X, 0.3), denoiser(X, 0.3))
    twin = small(kind)
    nn.init.zeros_(next(iter(twin.parameters())))
    load_weights(twin, path)
    assert torch.equal(twin(X, 0.3), denoiser(X, 0.3))


def test_classifier_behind_a_normalisation(tmp_path):
    """Sequential(normalise, net): names that begin with 1., for the net and for the whole."""
    whole = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "a.pth")
    for target in (nn.Linear(2, 2), nn.Sequential(nn.Identity(), nn.Linear(2, 2))):
        load_weights(target, tmp_path / "a.pth")
        assert torch.equal(next(iter(target.parameters())), whole[1].weight)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_no_pickle_is_executed(tmp_path):
    evidence = tmp_path / "executed"
    torch.save({"state_dict": {"w": Malicious(evidence)}}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Malicious(evidence)))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(InputError, match=r"unsafe unpickling|damaged"):
            load_denoiser(tmp_path / name)
    with pytest.raises(InputError, match="unsafe unpickling"):
        load_denoiser(tmp_path / "a.pth")
    assert not evidence.exists()


def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path):
    torch.save(small("dncnn").state_dict(), tmp_path / "a.pth")
    target = DnCNN(1, depth=5, width=6)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(InputError, match="6 missing .*dncnn.11.weight"):
        load_weights(target, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"dncnn.0.weight has shape \(6, 1, 3, 3\), not \(8, 1"):
        load_weights(DnCNN(1, depth=4, width=8), tmp_path / "a.pth")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_unreadable_checkpoints(tmp_path):
    save_denoiser(small("dncnn"), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({}, tmp_path / "nothing.pth")
    save_file({}, tmp_path / "nothing.safetensors")
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "other.pth")
    torch.save({"dncnn.0.weight": torch.ones(2)}, tmp_path / "odd.pth")
    save_file(
        {"w": torch.ones(1)},
        tmp_path / "unet.safetensors",
        {"art_denoised": json.dumps({"unet": [1]})},
    )
    names = [path.name for path in tmp_path.iterdir() if path.name != "whole.safetensors"]
    for name in [*names, "missing.pth"]:
        with pytest.raises(InputError, match=name) as caught:
            load_denoiser(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_only_what_can_be_read_back_is_saved(tmp_path):
    with pytest.raises(InputError, match="Linear"):
        save_denoiser(nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"\.safetensors"):
        save_denoiser(small("dncnn"), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "denoiser",
    [
        deepinv.models.DnCNN(in_channels=1, out_channels=1, depth=3, nf=4, pretrained=None),
        deepinv.models.MedianFilter(),
    ],
    ids=lambda denoiser: type(denoiser).__name__,
)
def test_denoisers_of_deepinv_fit_without_an_adapter(denoiser):
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    base = DenoisedClassifier(classifier, denoiser.eval(), sigma=0.25)
    with torch.no_grad():
        assert torch.equal(base(X), classifier(denoiser(X, 0.25)))
