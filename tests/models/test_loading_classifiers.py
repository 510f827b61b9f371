"""Classifiers by name, beside what their libraries do with the same weights and photographs."""

from __future__ import annotations

import importlib
import json
import socket
import sys
from types import ModuleType
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn

from art_denoised.checks import InputError
from art_denoised.models import (
    EvalTransform,
    PretrainedClassifier,
    list_classifiers,
    load_classifier,
)
from tests.cli.command import MODEL


def photograph(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()[None] / 255


@pytest.fixture
def unreachable(monkeypatch):
    """No hub answers."""

    def refuse(*arguments, **options):
        raise OSError("no route to host")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["resnet18", "test_vit.r160_in1k", "mobilenetv3_small_050"])
@pytest.mark.parametrize(("width", "height"), [(301, 200), (200, 333)])
def test_timm_is_as_timm_does_it(tmp_path, name, width, height):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = load_classifier(f"timm:{name}", weights=tmp_path / "weights.pth", num_classes=7)
    image = photograph(width, height)
    config = timm.data.resolve_data_config({}, model=theirs)
    expected = timm.data.create_transform(**config)(image)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(pixels(model.transform(image))), theirs(expected))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small:IMAGENET1K_V1"])
@pytest.mark.parametrize(("width", "height"), [(301, 200), (200, 333), (256, 256)])
def test_torchvision_is_as_torchvision_does_it(tmp_path, name, width, height):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name.partition(":")[0], num_classes=7).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pth")
    model = load_classifier(
        tmp_path.as_posix() + "/weights.pth", architecture=f"torchvision:{name}", num_classes=7
    )
    published = torchvision.models.get_model_weights(name.partition(":")[0]).DEFAULT
    image = photograph(width, height)
    with torch.no_grad():
        expected = theirs(published.transforms()(image)[None])
        torch.testing.assert_close(model(pixels(model.transform(image))), expected)


PROCESSORS = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}, "resample": 2},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3},
    "BitImageProcessor": {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
    },
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_transformers_is_as_transformers_does_it(tmp_path, processor):
    torch.manual_seed(0)
    theirs = vit()
    theirs.save_pretrained(tmp_path)
    slow = getattr(transformers, processor)(**PROCESSORS[processor])
    slow.save_pretrained(tmp_path)
    image = photograph(62, 50)
    expected = slow(image, return_tensors="pt")["pixel_values"]
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    for weights in (None, tmp_path / "weights.pth"):
        model = load_classifier(f"hf:{tmp_path}", weights=weights)
        x = pixels(model.transform(image))
        normalised = (x - model.mean) / model.std
        # Fast processors resize with torch: a level or two of 255 apart.
        assert (normalised - expected).abs().mean() < 0.02
        with torch.no_grad():
            torch.testing.assert_close(model(x), theirs(normalised).logits)


def test_robustbench_takes_images_as_they_are(monkeypatch):
    asked = []

    def load_model(**options: str) -> nn.Module:
        asked.append(options)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))

    zoo = ModuleType("robustbench.utils")
    zoo.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", zoo)
    model = load_classifier("robustbench:Carmon2019Unlabeled:cifar10:Linf")
    assert asked == [
        {"model_name": "Carmon2019Unlabeled", "dataset": "cifar10", "threat_model": "Linf"}
    ]
    assert not model.training
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 10)
    with pytest.raises(InputError, match="weights"):
        load_classifier("robustbench:Carmon2019Unlabeled:cifar10:Linf", num_classes=3)
    with pytest.raises(InputError, match="Carmon2019Unlabeled:cifar10"):
        load_classifier("robustbench:Carmon2019Unlabeled:cifar10")


def test_a_function_may_be_given_its_normalisation():
    bare, x = load_classifier(MODEL), torch.rand(2, 1, 8, 8)
    with_mean = load_classifier(MODEL, mean=[0.25], std=[0.5])
    torch.testing.assert_close(with_mean(x), bare((x - 0.25) / 0.5))


def test_the_state_dict_of_a_named_model_fits_it_again(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "a.pth")
    model = load_classifier("timm:resnet10t", weights=tmp_path / "a.pth", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    again = load_classifier("timm:resnet10t", weights=tmp_path / "b.pth", num_classes=3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "name", ["timm:resnet10t.c3_in1k", "torchvision:resnet18", "hf:google/vit"]
)
@pytest.mark.usefixtures("unreachable")
def test_a_hub_that_does_not_answer(monkeypatch, tmp_path, name):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it asks for long
    with pytest.raises(InputError, match=name) as refused:
        load_classifier(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("timm:resnet19", {}, "resnet18"),
        ("timm:no-such", {}, "no-such"),
        ("torchvision:resnet51", {}, "resnet50"),
        ("torchvision:resnet18:IMAGENET1K_V7", {}, "IMAGENET1K_V1"),
        ("timm:resnet18", {"num_classes": 10}, "10"),
        ("model.pth", {}, "model.pth"),
        (MODEL, {"mean": [0.5]}, "std"),
        (MODEL, {"mean": [0.5], "std": [0.0]}, "0"),
        (MODEL, {"mean": [0.5], "std": [0.5, 0.5]}, "2"),
        (MODEL, {"mean": [], "std": []}, "0 channels"),
        (MODEL, {"mean": 0.5, "std": 0.5}, r"0\.5"),
        (MODEL, {"mean": [123.675], "std": [58.4]}, r"123\.675"),
        (MODEL, {"mean": [float("nan")], "std": [1.0]}, "nan"),
        (MODEL, {"num_classes": 3}, "3"),
        ("tmm:resnet18", {}, "tmm"),
    ],
)
def test_names_that_cannot_be_used(name, options, value):
    with pytest.raises(InputError, match=value):
        load_classifier(name, **options)


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        load_classifier("timm:resnet18")
    assert all(name.startswith("torchvision:") for name in list_classifiers("resnet*"))
    lacking = ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources")
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=lacking))
    with pytest.raises(InputError, match="'pkg_resources'"):
        load_classifier("robustbench:Carmon2019Unlabeled:cifar10:Linf")


def test_names_are_listed_by_pattern():
    assert list_classifiers("torchvision:resnet1*") == [
        "torchvision:resnet101",
        "torchvision:resnet152",
        "torchvision:resnet18",
    ]
    for pattern in ("resnet50.a1", "resnet50.a1*", "timm:resnet50*"):
        assert "timm:resnet50.a1_in1k" in list_classifiers(pattern)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"resize": 0}, "0"),
        ({"resize": 7}, "7"),
        ({"resize": (9, 7)}, "7"),
        ({"crop": (8, -1)}, "-1"),
        ({"interpolation": "cubic"}, "cubic"),
    ],
)
def test_transforms_that_cannot_be(options, value):
    with pytest.raises(InputError, match=value):
        EvalTransform(**{"resize": 9, "crop": (8, 8), **options})


def test_gradients_reach_the_image():
    model = PretrainedClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), mean=[0.5] * 3, std=[0.5] * 3
    )
    x = torch.rand(1, 3, 1, 1, requires_grad=True)
    model(x).sum().backward()
    expected = model.network[1].weight.sum(0) / 0.5
    torch.testing.assert_close(x.grad.flatten(), expected)


def test_images_of_other_channels_are_refused():
    """One channel would be broadcast to three, and three means to one."""
    model = PretrainedClassifier(nn.Flatten(), mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(InputError, match="1 channels"):
        model(torch.rand(2, 1, 4, 4))


def test_an_old_size_of_transformers_is_a_square(tmp_path):
    """ViT's processor warps to a square where older files say one number."""
    vit().save_pretrained(tmp_path)
    said = {"image_processor_type": "ViTImageProcessor", "size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    assert load_classifier(f"hf:{tmp_path}").transform.resize == (32, 32)


def test_a_drawn_head_or_blue_first_is_refused(tmp_path):
    vit().vit.save_pretrained(tmp_path)  # the trunk alone
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="classifier"):
        load_classifier(f"hf:{tmp_path}")
    vit().save_pretrained(tmp_path)
    transformers.MobileViTImageProcessor(do_flip_channel_order=True).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="blue"):
        load_classifier(f"hf:{tmp_path}")


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config).eval()


def test_statistics_may_be_of_any_library():
    x = torch.rand(1, 1, 8, 8)
    expected = load_classifier(MODEL, mean=[0.25], std=[0.5])(x)
    for kind in (np.asarray, torch.tensor, iter):
        assert torch.equal(load_classifier(MODEL, mean=kind([0.25]), std=kind([0.5]))(x), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_classifier(MODEL, mean="0.5", std="0.5"), "mean is '0.5'"),
        (lambda: load_classifier(MODEL, mean=0.5, std=0.5), "mean is 0.5"),
        (lambda: load_classifier(MODEL, mean=[True], std=[1]), "mean is True"),
        (lambda: load_classifier(MODEL, architecture="timm:resnet18"), "timm:resnet18"),
        (lambda: load_classifier(None), "NoneType"),
        (lambda: load_classifier(nn.ReLU()), "ReLU"),
        (
            lambda: load_classifier(MODEL, mean=[0.5], std=[0.5])(
                torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
            ),
            "uint8",  # images from 0 to 255 were normalised as if they were in [0, 1]
        ),
    ],
)
def test_what_cannot_be_a_classifier_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_a_function_whose_network_is_in_training_mode_gives_one_in_eval_mode(tmp_path):
    torch.save(load_classifier(MODEL).state_dict(), tmp_path / "a.pth")
    for weights in (None, tmp_path / "a.pth"):
        found = load_classifier("art_denoised.demo:digits_network", weights=weights)
        assert not any(part.training for part in found.modules())
