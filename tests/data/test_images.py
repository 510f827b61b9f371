"""Data sets by name, and the images of a run. Other refusals are in tests/cli/test_certify.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from art_denoised.checks import InputError
from art_denoised.data import digits, load_data, select
from art_denoised.data.images import Chosen, Shard, index_range


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


@pytest.mark.parametrize("layout", ["first", "last"])
def test_npz_of_eight_bits_and_either_layout(tmp_path, layout):
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x if layout == "first" else x.transpose(0, 2, 3, 1), y=[1, 2])
    data = load_data(f"npz:{tmp_path / 'a.npz'}")
    np.testing.assert_allclose(data[1][0].numpy(), x[1] / 255, rtol=1e-6)


def hostile(kind: str, path) -> None:
    """Write an .npz that claims what it does not hold, or that zipfile cannot open."""
    import io
    import zipfile

    array = io.BytesIO()
    np.save(array, np.zeros((1, 1, 2, 2)))
    content = array.getvalue()
    if kind == "huge":
        content = content.replace(b"(1, 1, 2, 2)", b"(1000000000000000, 1)")[: len(content)]
    with zipfile.ZipFile(path, "w") as file:
        for name in ("x.npy", "y.npy"):
            file.writestr(name, content)
    raw = bytearray(path.read_bytes())
    for at in [i for i in range(len(raw) - 4) if raw[i : i + 4] in (b"PK\x01\x02", b"PK\x03\x04")]:
        flags, method = (8, 10) if raw[at + 2] == 1 else (6, 8)
        if kind == "encrypted":
            raw[at + flags] |= 1
        if kind == "unknown compression":
            raw[at + method] = 97
        if kind == "lzma":
            raw[at + method] = 14
    path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["encrypted", "unknown compression", "lzma", "huge"])
def test_hostile_npz_is_one_line(tmp_path, kind):
    hostile(kind, tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"a\.npz") as error:
        load_data(f"npz:{tmp_path / 'a.npz'}")
    assert "\n" not in str(error.value)


GREY = torch.full((1, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ((torch.zeros(1, 5, 5), 0), "5, 5"),
        ((GREY, 0, "id"), "3 values"),
        ((Image.new("L", (4, 4)), 0), "Image"),
        ((GREY.byte(), 0), "uint8"),
        ((GREY * 255, 0), "127"),
        ((GREY / 0, 0), "infinite"),
        ((GREY[0], 0), "shape"),
        ((GREY, 1.5), "float"),
        ((GREY, "cat"), "cat|label"),
        ((GREY, True), "bool"),
        ((GREY, -1), "-1"),
        ((GREY, 3), "3"),
        (GREY, "Tensor"),
        ((np.ma.masked_less(GREY.numpy(), 1), 0), "masked"),  # whose masked pixels count as pixels
        ((GREY.numpy().astype(object), 0), "object"),
    ],
)
def test_what_cannot_be_used_is_named(entry, word):
    images = Chosen([(GREY, 0), entry], classes=3)
    with pytest.raises(InputError, match=f"(?s)image 1: .*({word})") as error:
        list(images)
    assert "\n" not in str(error.value)


def test_arrays_and_integers_of_every_kind_are_taken():
    entries = [(GREY.numpy(), np.int64(2)), (GREY.double(), torch.tensor(1)), [GREY, 0]]
    entries += [(GREY.numpy().astype(">f4"), 0)]
    assert [label for _, _, label in Chosen(entries, classes=3)] == [2, 1, 0, 0]
    assert all(x.dtype == torch.float32 for _, x, _ in Chosen(entries))


@pytest.mark.parametrize(
    ("indices", "header"),
    [
        (range(0, 9, 4), "0:9:4"),
        ([5], "5:6:1"),
        ([3, 1], [3, 1]),
        ([0, 1, 3], [0, 1, 3]),
        ([], []),
    ],
)
def test_indices_survive_a_header(indices, header):
    settings = Chosen([(GREY, 0)] * 10, indices).settings()
    assert settings["indices"] == header
    assert list(index_range(header)) == list(indices)


def test_settings_tell_images_labels_and_choice_apart():
    data = [(GREY, 0), (GREY + 0.1, 1)]
    others = {
        "pixels": ([data[0], (GREY + 0.11, 1)], None),
        "labels": ([data[0], (GREY + 0.1, 0)], None),
        "indices": (data, [1, 0]),
        "images": (data, [0]),
    }
    for name, (other, indices) in others.items():
        assert Chosen(other, indices).settings()[name] != Chosen(data).settings()[name]
    assert Chosen(list(data)).settings() == Chosen(data).settings()


@pytest.mark.parametrize("classes", [10, np.arange(3), torch.arange(3), lambda: 3, [1, 2], None])
def test_only_names_of_classes_are_recorded(classes):
    class Named(list):
        pass

    data = Named([(torch.zeros(1, 2, 2), 0)])
    data.classes = classes
    assert "classes" not in Chosen(data).settings()


def test_shards_divide_the_images():
    whole = [5, 3, 9, 1, 8, 0, 2]
    parts = [Shard(whole, part, 3) for part in (1, 2, 3)]
    assert [list(part) for part in parts] == [[5, 1, 2], [3, 8], [9, 0]]
    pairs = [Shard(whole, part, 3).in_blocks(2) for part in (1, 2, 3)]
    assert [list(part) for part in pairs] == [[5, 3, 2], [9, 1], [8, 0]]


def test_the_header_of_a_shard_is_that_of_all_images_and_its_name():
    data = [(GREY, i % 3) for i in range(10)]
    whole, part = Chosen(data, [1, 4, 5]), Chosen(data, Shard([1, 4, 5], 2, 2))
    assert (part.indices, part.whole) == ([4], [1, 4, 5])
    assert part.settings() == {**whole.settings(), "shard": "2/2"}
    assert Chosen(data, Shard([1, 4, 5], 1, 1)).settings() == whole.settings()


def test_binary_images_in_uint8_are_refused(tmp_path):
    """Divided by 255 they would be black."""
    np.savez(tmp_path / "a.npz", x=np.eye(4, dtype=np.uint8)[None, None], y=[0])
    with pytest.raises(InputError, match="no value above 1"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def test_data_with_random_transforms_are_refused():
    """The images that were certified were not those whose hash is in the log."""

    class Noisy:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.rand(1, 4, 4), index

    images = Chosen(Noisy())
    assert images.settings()["images"] == 2
    with pytest.raises(InputError, match="image 1: a second reading"):
        images[1]
