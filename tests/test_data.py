"""Data sets as the command line names them. Refusals are in tests/cli/test_certify.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from art_denoised.checks import InputError
from art_denoised.data import digits, load_data, only_class, select


def test_digits_are_split_without_overlap():
    train, test = digits(train=True), digits(train=False)
    seen = {tuple(train[i][0].flatten().tolist()) for i in range(len(train))}
    held_out = {tuple(test[i][0].flatten().tolist()) for i in range(len(test))}
    assert not seen & held_out
    assert min(np.bincount([test[i][1] for i in range(500)])) > 30
    values = torch.stack([test[i][0] for i in range(500)])
    assert (float(values.min()), float(values.max())) == (0.0, 1.0)


def test_npz(tmp_path):
    x = np.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    np.savez(tmp_path / "a.npz", x=x, y=[5, 1])
    data = load_data(f"npz:{tmp_path / 'a.npz'}")
    assert len(data) == 2
    assert data[0][0].dtype == torch.float32
    assert np.allclose(data[1][0], x[1])
    assert [data[i][1] for i in range(2)] == [5, 1]


def test_npz_without_the_arrays_or_damaged(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(InputError, match=r"\['images'\].*x \(images\)"):
        load_data(f"npz:{tmp_path / 'a.npz'}")
    (tmp_path / "b.npz").write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"b\.npz"):
        load_data(f"npz:{tmp_path / 'b.npz'}")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "c.npy", np.zeros(3))
    (tmp_path / "c.npy").rename(tmp_path / "single.npz")
    np.savez(tmp_path / "words.npz", x=np.zeros((1, 1, 2, 2)), y=["cat"])
    np.savez_compressed(
        tmp_path / "torn.npz", x=np.random.default_rng(0).random((9, 1, 9, 9)), y=[0] * 9
    )
    whole = bytearray((tmp_path / "torn.npz").read_bytes())
    whole[300:400] = bytes(100)
    (tmp_path / "torn.npz").write_bytes(whole)
    for name, message in (
        ("empty", "cannot be read"),
        ("single", "single array"),
        ("words", "class indices"),
        ("torn", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            load_data(f"npz:{tmp_path / name}.npz")


def test_npz_of_another_machine(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.full((1, 1, 2, 2), 0.25, ">f4"), y=np.array([5], ">u2"))
    x, y = load_data(f"npz:{tmp_path / 'a.npz'}")[0]
    assert (float(x[0, 0, 0]), y) == (0.25, 5)


def test_image_folder(tmp_path):
    for label, value in (("cat", 51), ("dog", 255)):
        (tmp_path / label).mkdir()
        Image.new("RGB", (4, 6), (value, 0, 0)).save(tmp_path / label / "1.png")
    data = load_data(f"imagefolder:{tmp_path}")
    assert [data[i][1] for i in range(2)] == [0, 1]
    assert data[0][0].shape == (3, 6, 4)
    assert float(data[0][0][0].max()) == pytest.approx(0.2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        load_data(f"imagefolder:{tmp_path}")


def test_grey_image_folders_have_one_channel(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("L", (4, 6), 51).save(tmp_path / "cat" / "1.png")
    Image.new("1", (4, 6), 1).save(tmp_path / "cat" / "2.png")
    data = load_data(f"imagefolder:{tmp_path}")
    assert data[0][0].shape == (1, 6, 4)
    assert [float(data[i][0].max()) for i in range(2)] == pytest.approx([0.2, 1.0])
    Image.new("RGB", (4, 6), (255, 0, 0)).save(tmp_path / "cat" / "3.png")
    with pytest.raises(InputError, match="has mode RGB"):  # no colours are thrown away unseen
        load_data(f"imagefolder:{tmp_path}")[2]
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read"):
        load_data(f"imagefolder:{tmp_path}")


def test_torchvision_reads_what_is_there(tmp_path):
    from torchvision.datasets import FakeData

    assert FakeData  # has no test part, so it is refused by name
    with pytest.raises(InputError, match="FakeData"):
        load_data(f"torchvision:FakeData:{tmp_path}")
    for name in ("EMNIST", "Kinetics", "ImageNet"):
        with pytest.raises(InputError, match=f"{name} cannot be read from"):
            load_data(f"torchvision:{name}:{tmp_path}")
    # EMNIST-style files are large; MNIST's raw format is four small files.
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8) % 251
    for part in ("train", "t10k"):
        header = np.array([0x803, 2, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([0x801, 2], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes([7, 2]))
    data = load_data(f"torchvision:MNIST:{tmp_path}")
    assert [data[i][1] for i in range(2)] == [7, 2]
    assert np.allclose(data[0][0].flatten() * 255, pixels[:784])


def test_select():
    assert list(select(range(100), skip=30)) == [0, 30, 60, 90]
    assert list(select(range(3))) == [0, 1, 2]
    with pytest.raises(InputError, match="skip"):
        select(range(3), skip=0)


def test_a_limit_takes_a_sample_of_all():
    few, many = select(range(1000), limit=40), select(range(1000), limit=200)
    assert len(set(few)) == 40
    assert set(few) < set(many)
    assert list(few) == sorted(few)
    for part in np.array_split(np.arange(1000), 5):
        assert 3 <= len(set(few) & set(part.tolist())) <= 16
    assert few == select(range(1000), limit=40)
    assert set(select(range(1000), skip=7, limit=9)) < set(range(0, 1000, 7))
    assert list(select(range(10), limit=10)) == list(range(10))
    with pytest.raises(InputError, match="max is 0"):
        select(range(3), limit=0)


def test_only_class_reads_no_more_than_it_must():
    read = []

    class Data:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            read.append(index)
            return None, [3, 3, 4, 4][index]

    assert only_class(Data(), range(4)) is None
    assert read == [0, 1, 2]
    assert only_class(Data(), [2, 3]) == 4
    assert only_class(Data(), [2]) is None
