"""U-Nets: the equation, precision, and the configurations that cannot work."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from art_denoised import InputError, UNetDenoiser, load_denoiser, save_denoiser
from tests.nets import SMALL_UNET

CONFIG = SMALL_UNET | {"block_out_channels": (4, 8), "layers_per_block": 1}
X = torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def denoiser() -> UNetDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNetDenoiser.from_config(**CONFIG).eval()


def test_removes_the_predicted_noise(denoiser):
    sigma = 0.3
    c_in = 1 / math.sqrt(sigma**2 + 0.5**2)
    noise = denoiser.unet(c_in * X, torch.tensor(1000 * math.log(sigma) / 4)).sample
    assert torch.allclose(denoiser(X, sigma), X - sigma * noise, atol=1e-5)


def test_sigma_as_number_scalar_or_tensor_is_the_same(denoiser):
    for sigma in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([0.3, 0.3])):
        assert torch.equal(denoiser(X, sigma), denoiser(X, 0.3))


def test_half_precision_keeps_its_dtype_and_its_timestep(denoiser):
    seen = []
    denoiser.bfloat16().unet.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    assert denoiser(X.bfloat16(), 0.25).dtype == torch.bfloat16
    assert torch.allclose(seen[0], torch.tensor(250 * math.log(0.25)))  # bfloat16 holds -346 only


def test_pixels_are_folded_into_channels_and_back(tmp_path):
    folded = {**CONFIG, "in_channels": 4, "out_channels": 4, "sample_size": 4}
    denoiser, sigma = UNetDenoiser.from_config(patch=2, **folded).eval(), 0.3
    squares = torch.nn.functional.pixel_unshuffle(X, 2) / math.sqrt(sigma**2 + 0.5**2)
    noise = denoiser.unet(squares, torch.tensor(1000 * math.log(sigma) / 4)).sample
    expected = X - sigma * torch.nn.functional.pixel_shuffle(noise, 2)
    assert torch.allclose(denoiser(X, sigma), expected, atol=1e-5)
    save_denoiser(denoiser, tmp_path / "folded.safetensors")
    assert torch.equal(load_denoiser(tmp_path / "folded.safetensors")(X, sigma), denoiser(X, sigma))
    with pytest.raises(InputError, match="7x8"):
        denoiser(torch.rand(1, 1, 7, 8), 0.3)
    with pytest.raises(InputError, match="patch is 3, but the U-Net has 4 channels"):
        UNetDenoiser.from_config(patch=3, **folded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"num_class_embeds": 10}, "needs class labels"),
        ({"out_channels": 2}, "maps 1 channels to 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_configurations_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        UNetDenoiser.from_config(**{**CONFIG, **change})


def test_other_networks_are_refused():
    with pytest.raises(InputError, match="Linear; give a diffusers UNet2DModel"):
        UNetDenoiser(nn.Linear(2, 2))


def test_folder_keeps_the_dtype_of_its_weights(denoiser, tmp_path):
    denoiser.unet.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = UNetDenoiser.from_folder(tmp_path)
    assert not loaded.training
    own = denoiser.state_dict()
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, own[name])


def test_folder_whose_weights_do_not_match_is_refused(denoiser, tmp_path):
    """Diffusers itself draws missing weights at random and goes on."""
    denoiser.unet.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for changed in (
        {name: value for name, value in state.items() if name != "conv_in.bias"},
        {**state, "conv_more.bias": torch.ones(1)},
        {**state, "conv_in.bias": torch.ones(99)},
    ):
        save_file(changed, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(InputError, match=r"conv_(in|more)\.bias") as caught:
            UNetDenoiser.from_folder(tmp_path)
        assert "\n" not in str(caught.value)


def test_folder_that_is_torn_or_holds_a_pickle_is_refused(denoiser, tmp_path):
    denoiser.unet.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:3000])
    with pytest.raises(InputError, match="is not the folder of a diffusers UNet2DModel"):
        UNetDenoiser.from_folder(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(denoiser.unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="as a pickle"):
        UNetDenoiser.from_folder(tmp_path)
