"""U-Nets of OpenAI against the reference implementation, their flags and their files."""

from __future__ import annotations

import msgspec
import pytest
import torch

from art_denoised import load_diffusion
from art_denoised.checks import InputError
from art_denoised.diffusion import openai_diffusion, save_diffusion
from art_denoised.diffusion.openai import PUBLISHED, Flags, openai_flags
from tests.golden import published
from tests.golden.published import CLASSES, SCHEDULES, SMALL, figures, frozen, normal, weights

X, Y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
FLAGS = {**SMALL, "learn_sigma": True, "num_head_channels": 16}


def model(**flags):
    built = openai_diffusion({**FLAGS, **flags}).eval()
    weights(built.network)
    return built.requires_grad_(False)


@pytest.fixture
def file(tmp_path):
    torch.save(model().network.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("part", range(7))
def test_outputs_equal_the_reference(part):
    """Every combination of switches and heads, and sizes 16 to 64."""
    expected = frozen("openai")["flags"]
    for name, flags in list(published.openai_cases())[part::7]:
        network = openai_diffusion(flags).eval().requires_grad_(False).network
        weights(network)
        size = flags["image_size"]
        y = torch.tensor(CLASSES) if flags.get("class_cond") else None
        output = network(normal(1, 2, 3, size, size), torch.tensor([10, 700]), y)
        assert output.shape == (2, 3, size, size)
        assert figures(output) == pytest.approx(expected[name], abs=1e-5), flags


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_x0_equals_both_references_at_matched_noise(schedule):
    flags = published.schedule_flags(*schedule)
    diffusion = openai_diffusion(flags).eval().requires_grad_(False)
    weights(diffusion.network)
    x, eps = normal(1, 4, 3, 32, 32).double(), normal(2, 4, 3, 32, 32).double()  # in [-1, 1]
    abar = torch.tensor(diffusion.preconditioning.alphas_cumprod, dtype=torch.float64)
    steps = published.steps_of(flags["diffusion_steps"])
    sigma = ((1 - abar[steps]) / abar[steps]).sqrt()
    noisy = x + sigma[:, None, None, None] * eps
    x_hat = 2 * diffusion((noisy + 1) / 2, sigma / 2) - 1
    for repository in ("guided", "improved"):
        expected = frozen("openai")["x0"]["-".join(map(str, (repository, *schedule)))]
        for i, figures_of_step in enumerate(expected):
            scale = max(1, float(sigma[i]))
            assert figures(x_hat[i]) == pytest.approx(figures_of_step, abs=1e-5 * scale)


def test_published_sizes():
    millions = {"cifar10-uncond": 52.5, "imagenet64-cond": 295.9, "imagenet128-cond": 421.5}
    millions |= {"imagenet256-cond": 553.8, "imagenet256-uncond": 552.8, "imagenet512-cond": 559.0}
    expected = frozen("openai")["parameters"]
    assert set(expected) == {published.name for published in PUBLISHED}
    for name, count in expected.items():
        with torch.device("meta"):
            assert published.parameters(openai_diffusion(name).network) == count
        assert count / 1e6 == pytest.approx(millions.get(name, count / 1e6), abs=0.05)


IMPROVED = "num_res_blocks 3 learn_sigma True diffusion_steps 4000 noise_schedule cosine"
UNCOND = f"num_channels 128 {IMPROVED} rescale_timesteps True"
BEDROOM = (
    "image_size 256 num_channels 128 num_res_blocks 2 num_heads 1 learn_sigma True "
    "use_scale_shift_norm False attention_resolutions 16 diffusion_steps 1000 "
    "noise_schedule linear rescale_timesteps False"
)
ADM = (
    "attention_resolutions 32,16,8 diffusion_steps 1000 learn_sigma True resblock_updown True "
    "use_scale_shift_norm True"
)
ADM64 = (
    f"{ADM} class_cond True dropout 0.1 image_size 64 noise_schedule cosine num_channels 192 "
    "num_head_channels 64 num_res_blocks 3 use_new_attention_order True"
)
WIDE = f"{ADM} noise_schedule linear num_channels 256 num_res_blocks 2"
WIDE256 = f"{WIDE} image_size 256 num_head_channels 64"
README = {  # MODEL_FLAGS and DIFFUSION_FLAGS of both repositories; True was their default
    "cifar10-uncond": f"image_size 32 {UNCOND} dropout 0.3",
    "cifar10-uncond-vlb": f"image_size 32 {UNCOND} dropout 0.3",
    "imagenet64-uncond": f"image_size 64 {UNCOND}",
    "imagenet64-uncond-vlb": f"image_size 64 {UNCOND}",
    "imagenet64-cond-improved": (
        f"image_size 64 num_channels 192 {IMPROVED} class_cond True rescale_timesteps False"
    ),
    "lsun-bedroom-improved": BEDROOM,
    "lsun-bedroom-improved-2400k": BEDROOM,
    "imagenet64-cond": ADM64,
    "imagenet128-cond": f"{WIDE} image_size 128 num_heads 4 class_cond True",
    "imagenet256-cond": f"{WIDE256} class_cond True",
    "imagenet256-uncond": f"{WIDE256} class_cond False",
    "imagenet512-cond": f"{WIDE} image_size 512 num_head_channels 64 class_cond True",
    "lsun-bedroom": f"{WIDE256} class_cond False dropout 0.1",
    "lsun-cat": f"{WIDE256} class_cond False dropout 0.1",
    "lsun-horse": f"{WIDE256} class_cond False dropout 0.1",
    "lsun-horse-nodropout": f"{WIDE256} class_cond False dropout 0.0",
}


def test_published_flags_are_those_of_the_repositories():
    assert list(README) == [published.name for published in PUBLISHED]
    for name, words in README.items():
        pairs = iter(words.split())
        expected = msgspec.convert(dict(zip(pairs, pairs, strict=True)), Flags, strict=False)
        ours, theirs = (
            # What the network is told of a step at 1000 of them does not depend on the flag.
            {**msgspec.structs.asdict(flags), "rescale_timesteps": flags.time_scale}
            for flags in (openai_flags(name), expected)
        )
        assert ours == theirs, name


def test_flags_that_are_missing_have_the_defaults_of_both_repositories():
    """model_and_diffusion_defaults, except for two that change the training alone."""
    assert msgspec.structs.asdict(openai_flags({})) == {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_new_attention_order": False,
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "rescale_timesteps": None,  # the repositories differ, and it matters not at 1000 steps
        "predict_xstart": False,
        "timestep_respacing": "",
        "use_kl": False,
        "rescale_learned_sigmas": False,
        "sigma_small": False,
        "use_checkpoint": False,
        "use_fp16": False,
    }


def test_a_file_by_its_flags(file):
    loaded = load_diffusion(file, openai=FLAGS)
    assert torch.equal(loaded(X, 0.3), model()(X, 0.3))
    assert loaded.network.image_size == 16
    assert not loaded.training


def test_a_file_by_its_published_name(tmp_path, monkeypatch):
    small = PUBLISHED[0]._replace(flags=FLAGS)
    monkeypatch.setattr("art_denoised.diffusion.openai.PUBLISHED", (small,))
    path = tmp_path / f"{small.file}.pt"
    torch.save(model().network.state_dict(), path)
    assert torch.equal(load_diffusion(path)(X, 0.3), model()(X, 0.3))
    renamed = path.rename(tmp_path / "other.pt")
    assert torch.equal(load_diffusion(renamed, openai=small.name)(X, 0.3), model()(X, 0.3))
    with pytest.raises(InputError, match=r"give into=.*or openai="):
        load_diffusion(renamed)


def test_classes(tmp_path):
    path = tmp_path / "model.pt"
    conditional = model(class_cond=True)
    torch.save(conditional.network.state_dict(), path)
    loaded = load_diffusion(path, openai={**FLAGS, "class_cond": True})
    assert (loaded.classes, loaded.null_class) == (1000, None)
    assert torch.equal(loaded(X, 0.3, Y), conditional(X, 0.3, Y))
    null = load_diffusion(path, openai={**FLAGS, "class_cond": True}, classes=999)
    assert (null.classes, null.null_class) == (999, 999)
    assert torch.equal(null(X, 0.3), conditional(X, 0.3, torch.tensor([999, 999])))
    with pytest.raises(InputError, match="classes is 5, but .* embeds 1000"):
        load_diffusion(path, openai={**FLAGS, "class_cond": True}, classes=5)


def test_a_folder_holds_what_was_loaded(tmp_path):
    for flags in (FLAGS, {**FLAGS, "class_cond": True, "predict_xstart": True}):
        before = model(**flags)
        save_diffusion(before, tmp_path / "saved")
        after = load_diffusion(tmp_path / "saved")
        assert after.preconditioning == before.preconditioning
        y = Y if before.classes else None
        assert torch.equal(after(X, 0.3, y), before(X, 0.3, y))


def test_half_precision(tmp_path):
    """A file in float16 is computed in float32 unless it is asked for otherwise."""
    halves = {name: value.half() for name, value in model().network.state_dict().items()}
    torch.save(halves, tmp_path / "half.pt")
    full = load_diffusion(tmp_path / "half.pt", openai=FLAGS)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    x_hat = full(X, 0.3).detach()
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        half = load_diffusion(tmp_path / "half.pt", openai=FLAGS, dtype=dtype)
        assert {p.dtype for p in half.parameters()} == {dtype}
        assert half(X, 0.3).dtype == torch.float32
        torch.testing.assert_close(half(X, 0.3).detach(), x_hat, atol=tolerance, rtol=0)
    for dtype in (torch.int8, "int8", 16):
        with pytest.raises(InputError, match="dtype is '(int8|16)'"):
            load_diffusion(tmp_path / "half.pt", openai=FLAGS, dtype=dtype)


def test_gradients_reach_the_image_and_pass_twice():
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model()(x, 0.3).square().sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), x)
    assert torch.isfinite(curvature).all()
    assert curvature.abs().max() > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_channels": 64}, "num_channels is 64, but 32"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2, but 1"),
        ({"channel_mult": "1,2,2"}, r"channel_mult is \[1\.0, 2\.0, 2\.0\], but \[1\.0, 2\.0\]"),
        ({"attention_resolutions": "16,8"}, r"attention at downsampling is \[1, 2\], but \[2\]"),
        ({"class_cond": True}, "class_cond is True, but False"),
        ({"learn_sigma": False}, "learn_sigma is False, but True"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False, but True"),
        ({"resblock_updown": True}, "resblock_updown is True, but False"),
        ({"num_head_channels": 24}, "does not divide 64 channels"),
        ({"num_head_channels": -1, "num_heads": 3}, "does not divide 64 channels"),
        ({"num_head": 1}, "num_head"),
        ({"image_size": "16"}, "image_size"),
        ({"class_cond": 1}, "class_cond"),
        ({"attention_resolutions": "8;4"}, "attention_resolutions is '8;4'"),
        ({"channel_mult": "1,-2"}, "channel_mult is '1,-2'"),
        ({"channel_mult": "1,0"}, "channel_mult is '1,0'"),
        ({"num_channels": 1}, "num_channels is 1, but 32"),
        ({"channel_mult": ""}, "image_size 16 has no default"),
        ({"diffusion_steps": 4000}, "rescale_timesteps is missing"),
        ({"noise_schedule": "quadratic"}, "noise_schedule"),
    ],
)
def test_flags_that_contradict_the_file(file, wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        load_diffusion(file, openai={**FLAGS, **wrong})
    assert "\n" not in str(caught.value)


def test_shapes_tell_blocks_that_change_the_resolution_from_layers(tmp_path):
    torch.save(model(resblock_updown=True).network.state_dict(), tmp_path / "updown.pt")
    loaded = load_diffusion(tmp_path / "updown.pt", openai={**FLAGS, "resblock_updown": True})
    assert torch.equal(loaded(X, 0.3), model(resblock_updown=True)(X, 0.3))
    with pytest.raises(InputError, match="resblock_updown is False, but True"):
        load_diffusion(tmp_path / "updown.pt", openai=FLAGS)


def test_a_file_of_another_architecture(tmp_path):
    torch.save({"conv.weight": torch.ones(3, 3, 3, 3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="is not a U-Net of OpenAI"):
        load_diffusion(tmp_path / "other.pt", openai=FLAGS)
    state = model().network.state_dict()
    state["input_blocks.0.0.weight"] = torch.ones(32, 6, 3, 3)  # an upsampler
    torch.save(state, tmp_path / "upsampler.pt")
    with pytest.raises(InputError, match="in_channels is 3, but 6"):
        load_diffusion(tmp_path / "upsampler.pt", openai=FLAGS)


def test_unknown_names(file):
    with pytest.raises(InputError, match="did you mean imagenet256-"):
        load_diffusion(file, openai="imagenet256")
    with pytest.raises(InputError, match="give one of cifar10-uncond"):
        load_diffusion(file, openai="?")


def test_images_of_another_size():
    with pytest.raises(InputError, match=r"\(3, 32, 32\).*trained on \(3, 16, 16\)"):
        model()(torch.rand(1, 3, 32, 32), 0.3)


def test_flags_belong_to_a_file(file, tmp_path):
    with pytest.raises(InputError, match="leave out openai"):
        load_diffusion(file, openai=FLAGS, into=model())
    with pytest.raises(InputError, match="leave out openai"):
        load_diffusion(tmp_path, openai=FLAGS)
