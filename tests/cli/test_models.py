"""Networks by name, from every command."""

from __future__ import annotations

import json
import logging
import sys
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn

from art_denoised.cli import main
from art_denoised.diffusion import edm_diffusion, openai_diffusion, save_diffusion
from art_denoised.evaluation import read_attack_log, read_log
from art_denoised.models.loading import build_classifier
from art_denoised.networks import FeatureDenoising, load_trained
from art_denoised.runs import identity
from tests.cli.command import certify, refusal
from tests.diffusion import edm_files


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of two photographs, each of another size."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for n, (width, height) in enumerate([(50, 40), (40, 61)]):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{n}.png")
    return folder


def tiny_vit(folder):
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    network = transformers.ViTForImageClassification(config)
    return of_transformers(network, transformers.ViTImageProcessor, folder, height=32, width=32), ()


def of_transformers(network, processor, folder, **size):
    network.save_pretrained(folder)
    processor(size=size).save_pretrained(folder)
    return f"hf:{folder}"


def tiny_resnet(folder):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    network = transformers.ResNetForImageClassification(config)
    return of_transformers(network, transformers.ConvNextImageProcessor, folder, shortest_edge=32)


def tiny_convnext(folder):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    network = transformers.ConvNextForImageClassification(config)
    return of_transformers(network, transformers.ConvNextImageProcessor, folder, shortest_edge=32)


def of_timm(name):
    def make(folder):
        torch.save(timm.create_model(name, num_classes=2).state_dict(), folder / "w.pth")
        return f"timm:{name}", ("--weights", str(folder / "w.pth"), "--num-classes", "2")

    return make


def of_torchvision(name):
    def make(folder):
        network = torchvision.models.get_model(name, num_classes=2)
        torch.save({"state_dict": network.state_dict()}, folder / "w.pth")
        return f"torchvision:{name}", ("--weights", str(folder / "w.pth"), "--num-classes", "2")

    return make


def of_robustbench(folder):
    return "robustbench:Carmon2019Unlabeled:cifar10:Linf", ()


@pytest.fixture
def zoo(monkeypatch):
    """RobustBench with one network, which is made where it would be fetched."""

    def load_model(**options):
        assert options == {
            "model_name": "Carmon2019Unlabeled",
            "dataset": "cifar10",
            "threat_model": "Linf",
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

    zoo = ModuleType("robustbench.utils")
    zoo.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", zoo)


NETWORKS = {
    "timm": of_timm("test_resnet.r160_in1k"),
    "torchvision": of_torchvision("squeezenet1_1"),
    "hf": tiny_vit,
    "robustbench": of_robustbench,
}


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("library", NETWORKS)
def test_the_network_that_is_certified_is_attacked(library, tmp_path, photographs, capsys):
    torch.manual_seed(0)
    name, weights = NETWORKS[library](tmp_path)
    common = ["--model", name, *weights, "--data", f"imagefolder:{photographs}", "--quiet"]
    size = ["--resize", "36", "--crop", "32"] if library != "hf" else []
    sampled = ["--sigma", "0.25", "--n", "20", "--batch-size", "8"]
    certified, attacked = tmp_path / "certified", tmp_path / "attacked"
    assert main(["certify", *common, *size, *sampled, "--out", str(certified)]) == 0
    words = [*size, "--eps", "1/255", "--attacks", "pgd:steps=1", "--no-checks"]
    assert main(["attack", *common, *words, "--out", str(attacked)]) == 0
    logs = read_log(certified), read_attack_log(attacked)
    assert [len(log.rows) > 0 for log in logs] == [True, True]
    header, other = (log.settings for log in logs)
    assert header["model"] == other["model"] == name
    assert header["weights"] == other["weights"]
    assert header["transform"] == other["transform"]
    assert "32" in header["transform"]
    assert "photographs: resized" in capsys.readouterr().err


def test_models_are_listed(capsys):
    assert main(["models", "torchvision:resnet1*"]) == 0
    assert capsys.readouterr().out.split() == [
        "torchvision:resnet101",
        "torchvision:resnet152",
        "torchvision:resnet18",
    ]
    assert "nothing-like-it" in refusal(capsys, ["models", "nothing-like-it"])


def test_one_specification_names_a_network_to_every_command(tmp_path, capsys):
    """Trained with blocks, trained on, attacked, certified and defended: each time the same."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).random((8, 3, 32, 32), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(8) % 2)
    data = ["--data", f"npz:{tmp_path}/data.npz", "--quiet"]
    named = ["--model", "timm:test_resnet", "--num-classes", "2", *data]
    training = ["--epochs", "1", "--batch-size", "4"]

    def run(command, folder, *words):
        assert main([command, *named, *words, "--out", str(tmp_path / folder)]) == 0
        return json.loads((tmp_path / folder / "train.jsonl").read_text().partition("\n")[0])

    changes = ["--feature-denoising", "mean", "--activation", "silu"]
    run("train-robust", "first", *training, "--recipe", "clean", *changes)
    weights = ["--weights", str(tmp_path / "first" / "model.safetensors")]
    again = ["train-robust", *named, *training, "--recipe", "clean", *weights]
    assert "model.safetensors" in refusal(capsys, [*again, *changes, "--out", str(tmp_path / "a")])
    run("train-robust", "second", *training, "--recipe", "clean", *weights)

    weights = ["--weights", str(tmp_path / "second" / "model.safetensors")]
    network = load_trained(build_classifier(named[1], pretrained=False, num_classes=2), weights[1])
    assert any(isinstance(part, FeatureDenoising) for part in network.modules())
    objective = ["--objective", "stability", "--sigma", "0.25", "--architecture", "dncnn:2:4"]
    header = run("train-denoiser", "denoiser", *training, *weights, *objective)
    assert header["settings"]["loss"]["classifiers"] == [identity(network)]
    attack = ["--eps", "8/255", "--attacks", "pgd:steps=1", "--no-checks"]
    sampling = ["--sigma", "0.25", "--n", "10", "--n0", "2"]
    for command, words in (("attack", attack), ("certify", sampling), ("predict", sampling[:4])):
        assert main([command, *named, *weights, *words, "--out", str(tmp_path / command)]) == 0
        (log,) = (tmp_path / command).glob("*.jsonl")
        settings = json.loads(log.read_text().partition("\n")[0])["settings"]
        assert settings["weights"] == identity(network)["weights"]


# Network, places of blocks, activation (of those with ReLU), side of its images, command after it.
FAMILIES = [
    ("timm:test_resnet", "stages", "silu", 32, None),
    ("timm:test_byobnet", "stages", "gelu", 32, None),
    ("timm:test_nfnet", "stages", "softplus", 32, None),
    ("timm:test_efficientnet", "network.blocks.*.*", None, 32, None),
    ("timm:test_convnext", "all", None, 32, None),
    ("timm:test_mambaout", "stages", None, 32, None),
    ("timm:test_vit", "network.patch_embed.proj", None, 160, "certify"),
    ("torchvision:squeezenet1_1", "network.features.12", "smoothrelu", 32, "attack"),
    (tiny_resnet, "stages", "elu", 32, "certify"),
    (tiny_convnext, "stages", None, 32, "attack"),
]


@pytest.mark.parametrize(
    ("network", "where", "activation", "side", "command"),
    FAMILIES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_networks_of_many_makes_are_changed(
    tmp_path, network, where, activation, side, command, capsys
):
    """They get blocks and activations by name, and are read, certified or attacked with them."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).random((2, 3, side, side), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(2))
    name = network if isinstance(network, str) else network(tmp_path / "network")
    common = ["--model", name, "--num-classes", "2", "--data", f"npz:{tmp_path}/data.npz"]
    words = ["--feature-denoising", "mean", "--where", where, "--recipe", "clean", "--quiet"]
    words += ["--activation", activation] if activation else []
    words += ["--epochs", "1", "--batch-size", "2", "--lr", ".01", "--out", str(tmp_path / "a")]
    assert main(["train-robust", *common, *words]) == 0
    assert "denoising blocks: adds" in capsys.readouterr().err
    weights = str(tmp_path / "a" / "model.safetensors")
    read = load_trained(build_classifier(name, pretrained=False, num_classes=2), weights)
    assert any(isinstance(part, FeatureDenoising) for part in read.modules())
    assert torch.isfinite(read.eval()(torch.from_numpy(x))).all()
    if command is None:
        return
    words = ["--weights", weights, "--quiet"]
    words += {
        "certify": ["--sigma", "0.25", "--n", "10", "--n0", "2", "--batch-size", "4"],
        "attack": ["--eps", "1/255", "--attacks", "pgd:steps=1", "--no-checks"],
    }[command]
    assert main([command, *common, *words, "--out", str(tmp_path / "b")]) == 0
    log = (read_log if command == "certify" else read_attack_log)(tmp_path / "b")
    assert len(log.rows) >= 2


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--model", "timm:resnet19"], "resnet18"),
        (["--model", "resnet18"], "resnet18"),
        (["--model", "timm:test_resnet", "--num-classes", "2"], "weights"),
        (["--model", "art_denoised.demo:digits_classifier", "--mean", "0.5"], "std"),
        (["--model", "art_denoised.demo:digits_classifier", "--resize", "8"], "digits"),
        (["--model", "art_denoised.demo:digits_classifier", "--resize", "0"], "0"),
        (["--model", "art_denoised.demo:digits_classifier", "--resize", "8", "--crop", "9"], "9"),
    ],
)
def test_names_and_sizes_that_cannot_be_used(options, value, capsys, tmp_path):
    words = ["--data", "digits", "--sigma", "0.25", "--out", str(tmp_path / "run")]
    assert value in refusal(capsys, ["certify", *options, *words])
    assert not (tmp_path / "run").exists()


def test_a_hub_that_does_not_answer(monkeypatch, capsys, tmp_path):
    """One line, without the attempts that a library logs and prints."""

    def create_model(*args, **options):
        logging.getLogger("huggingface_hub.utils").warning("retrying")
        print("downloading")
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", create_model)
    heard = logging.StreamHandler(sys.stdout)
    logging.getLogger("huggingface_hub").addHandler(heard)
    try:
        status = main(certify(tmp_path / "run", model="timm:test_resnet"))
    finally:
        logging.getLogger("huggingface_hub").removeHandler(heard)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert "timm:test_resnet" in err.splitlines()[-1]
    assert "not known" in err.splitlines()[-1]


EDM = {
    "img_resolution": 16,
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def another_architecture(folder):
    torch.save(nn.Linear(2, 2).state_dict(), folder / "64x64_diffusion.pt")
    return folder / "64x64_diffusion.pt"


def contradicting_flags(folder):
    flags = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1}
    path = folder / "256x256_diffusion_uncond.pt"
    torch.save(openai_diffusion(flags).network.state_dict(), path)
    return path


def half_a_pickle(folder):
    root = {"ema": edm_files.precond(edm_diffusion(**EDM).network, EDM)}
    whole = edm_files.write(folder / "edm.pkl", root).read_bytes()
    (folder / "edm.pkl").write_bytes(whole[: len(whole) // 2])
    return folder / "edm.pkl"


def another_size(folder):
    save_diffusion(edm_diffusion(**EDM), folder / "edm")
    return folder / "edm"


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (another_architecture, ["64x64_diffusion.pt", "OpenAI"]),
        (contradicting_flags, ["num_channels is 256", "32"]),
        (half_a_pickle, ["edm.pkl", "damaged"]),
        (another_size, ["(1, 8, 8)", "(3, 16, 16)"]),
    ],
)
def test_a_published_denoiser_that_cannot_be_used(make, values, tmp_path, capsys):
    message = refusal(capsys, certify(tmp_path / "run", denoiser=make(tmp_path)))
    for value in values:
        assert value in message


def test_a_diffusion_model_of_its_own_size_is_in_front(tmp_path, photographs, capsys):
    """Photographs get its size, and what it returns that of the classifier (Carlini et al.)."""
    torch.manual_seed(0)
    save_diffusion(edm_diffusion(**EDM), tmp_path / "diffusion")
    name, weights = NETWORKS["hf"](tmp_path / "vit")
    common = ["--model", name, *weights, "--data", f"imagefolder:{photographs}", "--quiet"]
    common += ["--denoiser", str(tmp_path / "diffusion"), "--sigma", "0.25"]
    certified, attacked = tmp_path / "certified", tmp_path / "attacked"
    sampled = ["--n", "20", "--batch-size", "8"]
    assert main(["certify", *common, *sampled, "--out", str(certified)]) == 0
    words = ["--eps", "0.1", "--norm", "l2", "--attacks", "pgd:steps=1", "--no-checks"]
    assert main(["attack", *common, *words, "--samples", "2", "--out", str(attacked)]) == 0
    assert "resized to 16, cut to 16x16" in capsys.readouterr().err
    logs = read_log(certified), read_attack_log(attacked)
    assert len({log.settings["transform"] for log in logs}) == 1
    assert all(len(log.rows) >= 4 for log in logs)
