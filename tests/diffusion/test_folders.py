"""Diffusion models from the hub and from files of weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDPMScheduler
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import nn

from art_denoised import load_denoiser
from art_denoised.checks import InputError
from art_denoised.diffusion import (
    EDM,
    DiffusionModel,
    Native,
    load_diffusion,
    save_diffusion,
    unet_diffusion,
)
from tests.diffusion.test_model import Recorder, save, unet

X, Y = torch.rand(2, 1, 8, 8), torch.tensor([3, 10])


def model(**options) -> DiffusionModel:
    torch.manual_seed(0)
    return unet_diffusion(1, 8, classes=10, **{"widths": (8, 16), **options}).eval()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository, as far as `snapshot_download` goes."""
    repository = tmp_path / "hub"

    def download(name, *, revision=None, allow_patterns=None):
        assert name == "owner/name"
        target = tmp_path / f"snapshot-{revision}"
        files = [str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, target / file)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_hub_id(hub, tmp_path, pipeline):
    network = unet()
    save(hub, network, DDPMScheduler(), pipeline)
    (hub / "model.bin").write_bytes(b"pickle")
    (hub / "README.md").write_text("a card")
    loaded = load_diffusion("owner/name", revision="main")
    assert torch.equal(loaded(X, 0.25), load_diffusion(hub)(X, 0.25))
    assert not [p for p in (tmp_path / "snapshot-main").rglob("*") if p.suffix in (".bin", ".md")]


def test_a_hub_id_without_safetensors(hub):
    save(hub, unet(), DDPMScheduler())
    (hub / "diffusion_pytorch_model.safetensors").rename(hub / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"no diffusion_pytorch_model\.safetensors"):
        load_diffusion("owner/name")
    with pytest.raises(InputError, match="pickle"):  # the folder itself tells why
        load_diffusion(hub)


def test_the_hub_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="owner/name is not a folder here") as caught:
        load_diffusion("owner/name")
    assert "\n" not in str(caught.value)
    for name in ("runs/a/b", "nothing", "../up/there"):
        with pytest.raises(InputError, match="does not exist"):
            load_diffusion(name)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("whole", [False, True])
def test_files_of_weights(tmp_path, suffix, whole):
    original = model()
    state = (original if whole else original.network).state_dict()
    path = tmp_path / f"a.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    torch.manual_seed(1)
    loaded = load_diffusion(path, into=unet_diffusion(1, 8, classes=10, widths=(8, 16)))
    assert not loaded.training
    assert torch.equal(loaded(X, 0.5, Y), original(X, 0.5, Y))


def test_files_that_cannot_be_loaded(tmp_path):
    torch.save(model(), tmp_path / "a.pkl")  # a whole module: needs unpickling
    with pytest.raises(InputError, match="unsafe unpickling"):
        load_diffusion(tmp_path / "a.pkl", into=model())
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="into=DiffusionModel"):
        load_diffusion(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="does not match"):
        load_diffusion(tmp_path / "a.safetensors", into=model(widths=(8, 24)))
    with pytest.raises(InputError, match="the model given has 10"):
        load_diffusion(tmp_path / "a.safetensors", into=model(), classes=9)
    with pytest.raises(InputError, match="is not a file of weights"):
        load_diffusion(tmp_path, into=DiffusionModel(Recorder(), Native()))


def test_folded_pixels_come_back(tmp_path):
    original = model(patch=2, widths=(16,))
    assert original.network.unet.config.in_channels == 4
    save_diffusion(original, tmp_path)
    loaded = load_diffusion(tmp_path, classes=10)
    assert torch.equal(loaded(X, 0.5, Y), original(X, 0.5, Y))
    save_diffusion(model(), tmp_path)  # over it, without a fold
    assert load_diffusion(tmp_path, classes=10).network.patch == 1
    (tmp_path / "art_denoised.json").write_text('{"patch": 0}')
    with pytest.raises(InputError, match="damaged"):
        load_diffusion(tmp_path, classes=10)
    widths = (8, 8, 8, 8)
    with pytest.raises(InputError, match="folded by 2 and halved 3 times; .* or a smaller patch$"):
        model(patch=2, widths=widths)
    with pytest.raises(InputError, match="cannot be halved 4 times; give fewer widths$"):
        model(widths=(*widths, 8))


def test_what_diffusers_has_no_place_for_comes_back_or_is_refused(tmp_path):
    parts = model().network, EDM()
    narrow = DiffusionModel(*parts, classes=10, null_class=10, image_range=(0, 1)).eval()
    save_diffusion(narrow, tmp_path)
    assert torch.equal(load_diffusion(tmp_path, classes=10)(X, 0.5, Y), narrow(X, 0.5, Y))
    with pytest.raises(InputError, match="null_class is 12"):
        save_diffusion(DiffusionModel(*parts, classes=10, null_class=12), tmp_path)
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.5", '"half"'))
    with pytest.raises(InputError, match="damaged"):
        load_diffusion(tmp_path, classes=10)


class Nested(nn.Module):
    """Its own names begin with "network.", as those of a whole model do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(1, 1, 1)

    def forward(self, x, c_noise, y):
        return self.network(x)


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_a_network_whose_names_look_like_a_model_s(tmp_path, whole):
    original = DiffusionModel(Nested(), EDM())
    save_file((original if whole else original.network).state_dict(), tmp_path / "a.safetensors")
    loaded = load_diffusion(tmp_path / "a.safetensors", into=DiffusionModel(Nested(), EDM()))
    assert torch.equal(loaded(X, 0.5), original(X, 0.5))


def config(path: Path, **content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"transformer/config.json": "DiTTransformer2DModel"}, r"\(DiT\)"),
        ({"config.json": "Transformer2DModel"}, r"\(DiT\)"),
        ({"model_index.json": "LDMPipeline"}, "latent"),
        ({"vae/config.json": "AutoencoderKL"}, "latent"),
    ],
)
def test_what_works_on_codes_is_refused(tmp_path, files, message):
    save(tmp_path, unet(), DDPMScheduler(), pipeline=True)
    for name, kind in files.items():
        config(tmp_path / name, _class_name=kind)
    with pytest.raises(InputError, match=message):
        load_diffusion(tmp_path)


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_class_embeddings_of_other_types_are_refused(tmp_path, kind):
    options = {"num_class_embeds": None, "class_embed_type": kind}
    save(tmp_path, unet(**options), DDPMScheduler())
    for classes in (None, 10):
        with pytest.raises(InputError, match=f"class_embed_type '{kind}'"):
            load_diffusion(tmp_path, classes=classes)


def test_a_network_that_centres_its_input_is_refused(tmp_path):
    save(tmp_path, unet(center_input_sample=True), DDPMScheduler())
    with pytest.raises(InputError, match="center_input_sample True"):
        load_diffusion(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_take_float32_images(tmp_path, dtype):
    save(tmp_path, unet(), DDPMScheduler())
    expected = load_diffusion(tmp_path)(X, 0.25)
    save(tmp_path, unet().to(dtype), DDPMScheduler())
    found = load_diffusion(tmp_path)(X, 0.25)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_a_class_conditional_folder_is_no_denoiser(tmp_path):
    save(tmp_path, unet(num_class_embeds=11), DDPMScheduler())
    with pytest.raises(InputError, match=r"class-conditional \(11 class.*classes=10\)"):
        load_denoiser(tmp_path)
