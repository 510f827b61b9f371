"""Checkpoints: dtypes, the global random state, every way of being unreadable."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from art_denoised import DnCNN, InputError, MemNet, load_denoiser, save_denoiser
from art_denoised.models import load_weights, read_state_dict

X = torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)


def denoiser() -> DnCNN:
    return DnCNN(1, depth=3, width=4).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_denoiser_comes_back_in_the_dtype_of_its_weights(tmp_path, dtype):
    original = denoiser().to(dtype)
    save_denoiser(original, tmp_path / "a.safetensors")
    torch.save(original.state_dict(), tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert torch.equal(load_denoiser(tmp_path / name)(X.to(dtype)), original(X.to(dtype)))


def test_own_modules_keep_their_dtype_and_their_parameters(tmp_path):
    torch.save(denoiser().double().state_dict(), tmp_path / "a.pt")
    target = denoiser()
    before = list(target.parameters())
    load_weights(target, tmp_path / "a.pt")
    assert all(
        a is b and a.dtype == torch.float32
        for a, b in zip(before, target.parameters(), strict=True)
    )


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    save_denoiser(denoiser(), tmp_path / "a.safetensors")
    before = torch.random.get_rng_state()
    load_denoiser(tmp_path / "a.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_architecture_is_read_off_the_checkpoint(tmp_path):
    save_denoiser(
        MemNet(2, width=5, memory_blocks=2, residual_blocks=3), tmp_path / "a.safetensors"
    )
    loaded = load_denoiser(tmp_path / "a.safetensors")
    assert loaded.feature_extractor.conv.weight.shape == (5, 2, 3, 3)
    assert [len(block.recursive_unit) for block in loaded.dense_memory] == [3, 3]
    torch.save(DnCNN(2, depth=2, width=5).state_dict(), tmp_path / "a.pth")
    assert len(load_denoiser(tmp_path / "a.pth").dncnn) == 3


def test_a_huge_layer_number_builds_no_huge_network(tmp_path):
    state = {**denoiser().state_dict(), "dncnn.999999999999.weight": torch.ones(1)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match="1 unexpected"):
        load_denoiser(tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_torn_torch_files(tmp_path, legacy, share):
    path = tmp_path / "a.pth"
    torch.save(denoiser().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="damaged or of another format"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"hello", b"\0" * 99, b"\xff" * 99, b'{"a": 1}'])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_something_else(tmp_path, content, suffix):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged or of another|is not a safetensors file"):
        read_state_dict(tmp_path / f"a{suffix}")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("junk", [b"", b"junk", b"PK\x03\x04junk", b"\x80\x02junk"])
def test_junk_is_refused_in_one_line(tmp_path, junk):
    path = tmp_path / "junk.pth"
    path.write_bytes(junk)
    with pytest.raises(InputError, match=r"unsafe unpickling|of another format"):
        read_state_dict(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol_is_refused_and_not_executed(tmp_path, protocol):
    evidence, path = tmp_path / "executed", tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(Malicious(evidence), protocol=protocol))
    for read in (read_state_dict, load_denoiser, lambda p: load_weights(denoiser(), p)):
        with pytest.raises(InputError, match=r"unsafe unpickling|of another format"):
            read(path)
    assert not evidence.exists()
    pickle.loads(path.read_bytes())  # the same file, read carelessly
    assert evidence.exists()


def test_a_pickled_module_is_refused_with_the_remedy(tmp_path):
    torch.save(denoiser(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"where you trust it, convert .* to safetensors"):
        load_denoiser(tmp_path / "a.pth")


def test_names_that_are_no_text_and_weights_that_are_no_floats(tmp_path):
    torch.save({0: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="no state dict"):
        read_state_dict(tmp_path / "a.pth")
    torch.save(
        {"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)}, tmp_path / "b.pt"
    )
    with pytest.raises(InputError, match=r"weight as torch\.int8"):
        load_weights(nn.Linear(2, 2), tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ('{"unet": {"no_such_option": 1}}', "is not DnCNN, MemNet or a saved U-Net"),
        ("no JSON", "is damaged: its note is 'no JSON'"),
        ("[1]", "is damaged"),
        ('{"sigma": ["much"]}', "is damaged"),
        ('{"sigma": 0.5}', "is damaged"),
    ],
)
def test_an_unusable_note_is_one_line(tmp_path, note, message):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", {"art_denoised": note})
    with pytest.raises(InputError, match=message):
        load_denoiser(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("trained", "sigma", "said"),
    [
        (0.5, 0.25, r"sigma 0\.5, but sigma is 0\.25"),
        ((0.1, 0.6), 0.75, r"sigma 0\.1 to 0\.6, but sigma is 0\.75"),
        ((0.1, 0.6), 0.05, r"sigma is 0\.05"),
    ],
)
def test_another_sigma_than_that_of_the_training_is_said(tmp_path, trained, sigma, said):
    path = tmp_path / "a.safetensors"
    save_denoiser(denoiser(), path, sigma=trained)
    with pytest.warns(UserWarning, match=said) as warned:
        loaded = load_denoiser(path, sigma=sigma)
    assert len(warned) == 1
    assert torch.equal(loaded(X), load_denoiser(path)(X))


@pytest.mark.parametrize(
    ("trained", "sigma"), [(0.5, 0.5), ((0.1, 0.6), 0.6), ((0.1, 0.6), 0.25), (None, 9.0)]
)
def test_the_sigma_of_the_training_is_silent(tmp_path, trained, sigma):
    """Warnings are errors in these tests."""
    save_denoiser(denoiser(), tmp_path / "a.safetensors", sigma=trained)
    assert not load_denoiser(tmp_path / "a.safetensors", sigma=sigma).training


def test_a_sigma_that_is_no_noise_level_is_refused(tmp_path):
    with pytest.raises(InputError, match="sigma is -1"):
        save_denoiser(denoiser(), tmp_path / "a.safetensors", sigma=-1)
    assert not list(tmp_path.iterdir())


def test_saved_metadata_holds_no_paths(tmp_path):
    from art_denoised import UNetDenoiser

    unet = UNetDenoiser.from_config(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    unet.unet.save_pretrained(tmp_path / "folder")
    save_denoiser(load_denoiser(tmp_path / "folder"), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert str(tmp_path) not in file.metadata()["art_denoised"]


def test_a_subclass_is_not_saved_as_its_base(tmp_path):
    class Other(DnCNN):
        pass

    with pytest.raises(InputError, match="the denoiser is a Other"):
        save_denoiser(Other(1, 3, 4), tmp_path / "a.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_denoiser(denoiser(), path)
    old = path.read_bytes()

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"a\.safetensors cannot be written \(No space left on device\)"
    ):
        save_denoiser(denoiser(), path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written .*No such file or directory"):
        save_denoiser(denoiser(), tmp_path / "none" / "a.safetensors")
