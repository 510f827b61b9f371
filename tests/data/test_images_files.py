"""Image folders: what is in a file is what the classifier sees, or one line says why not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import ToTensor

from art_denoised.checks import InputError
from art_denoised.data import ImageFolder, load_data
from art_denoised.data.images import Chosen
from art_denoised.evaluation import read_log
from art_denoised.models import EvalTransform


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cat").mkdir()
    return tmp_path


def ramp(maximum: int) -> np.ndarray:
    return np.linspace(0, maximum, 64).reshape(8, 8)


def test_sixteen_bits_are_kept(folder):
    """Read as 8 bits they were almost white."""
    Image.fromarray(ramp(65535).astype(np.uint16)).save(folder / "cat" / "1.png")
    x, _ = ImageFolder(folder)[0]
    assert x.shape == (1, 8, 8)
    np.testing.assert_allclose(x[0].numpy(), ramp(1), atol=1e-4)


def test_floating_point_images_are_refused_by_name(folder):
    Image.fromarray(ramp(1).astype(np.float32)).save(folder / "cat" / "1.tiff")
    with pytest.raises(InputError, match=r"1\.tiff.*mode F"):
        ImageFolder(folder)[0]


def test_palettes_and_cmyk_are_colours(folder):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.save(folder / "cat" / "0.png")
    red.convert("P").save(folder / "cat" / "1.png")
    red.convert("CMYK").save(folder / "cat" / "2.jpg", quality=100)
    Image.new("L", (4, 4), 51).save(folder / "cat" / "3.png")
    data = ImageFolder(folder)
    for i in range(3):
        assert data[i][0].mean((1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.02)
    assert data[3][0].mean((1, 2)).tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(("alpha", "is_read"), [(255, True), (254, False)])
def test_transparent_pixels_are_refused(folder, alpha, is_read):
    Image.new("RGBA", (4, 4), (255, 0, 0, alpha)).save(folder / "cat" / "1.png")
    if is_read:
        assert ImageFolder(folder)[0][0].mean((1, 2)).tolist() == [1, 0, 0]
    else:
        with pytest.raises(InputError, match="transparent"):
            ImageFolder(folder)[0]


def test_the_camera_s_rotation_is_applied(folder):
    image = Image.fromarray(np.repeat(ramp(255).astype(np.uint8)[:, :6, None], 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(folder / "cat" / "1.png", exif=exif)
    x, _ = ImageFolder(folder)[0]
    assert x.shape == (3, 6, 8)
    np.testing.assert_allclose(
        x[0].numpy(), np.asarray(image.rotate(-90, expand=True))[..., 0] / 255
    )


def test_hidden_folders_are_no_classes(folder):
    """They became class 0, and all labels were shifted."""
    for name in (".ipynb_checkpoints", "__MACOSX", "dog"):
        (folder / name).mkdir()
        Image.new("L", (4, 4)).save(folder / name / "1.png")
    Image.new("L", (4, 4)).save(folder / "cat" / "1.png")
    Image.new("L", (4, 4)).save(folder / "cat" / ".2.png")
    (folder / "cat" / ".ipynb_checkpoints").mkdir()
    Image.new("L", (4, 4)).save(folder / "cat" / ".ipynb_checkpoints" / "1-checkpoint.png")
    data = load_data(f"imagefolder:{folder}")
    assert data.classes == ("cat", "dog")
    assert [data[i][1] for i in range(len(data))] == [0, 1]
    assert Chosen(data).settings()["classes"] == ["cat", "dog"]


def test_classes_can_be_given_with_synonyms(folder):
    (folder / "n02").mkdir()
    for name in ("cat", "n02"):
        Image.new("L", (4, 4)).save(folder / name / "1.png")
    data = ImageFolder(folder, ["dog, n02", "Cat"])
    assert [data[i][1] for i in range(2)] == [1, 0]
    for wrong in (["dog"], ["cat", "cat"], ["cat", ""]):
        with pytest.raises(InputError):
            ImageFolder(folder, wrong)


def test_bombs_and_broken_files_are_one_line(folder):
    bomb = Image.new("1", (30_000, 30_000))
    bomb.save(folder / "cat" / "1.png")
    with pytest.raises(InputError, match=r"1\.png") as error:
        ImageFolder(folder)
    assert "\n" not in str(error.value)
    whole = folder / "cat" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"1\.png"):
        ImageFolder(folder)[0]


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folders"):
        ImageFolder(tmp_path)


def test_classes_are_read_from_a_file(folder, capsys):
    from art_denoised.cli import main

    (folder / "n02").mkdir()
    for name in ("cat", "n02"):
        Image.new("L", (8, 8)).save(folder / name / "1.png")
    names = folder.parent / "classes.txt"
    names.write_text("dog, n02\n\ncat\n")
    options = ["--model", "art_denoised.demo:digits_classifier", "--sigma", "0.25", "--n", "50"]
    options += ["--data", f"imagefolder:{folder}", "--quiet", "--out", str(folder.parent / "run")]
    assert main(["certify", *options, "--classes", str(names)]) == 0
    assert "0 dog, 1 cat" in capsys.readouterr().err
    log = read_log(folder.parent / "run")
    assert [row.label for row in log.rows] == [1, 0]
    assert log.settings["classes"] == ["dog", "cat"]
    names.write_text("")
    assert main(["certify", *options, "--classes", str(names)]) == 2
    assert main(["certify", *options, "--data", "digits", "--classes", str(names)]) == 2


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_a_file_of_several_images_is_refused(tmp_path, suffix):
    (tmp_path / "cat").mkdir()
    pages = [Image.new("RGB", (8, 8), (grey, grey, grey)) for grey in (0, 255)]
    pages[0].save(tmp_path / "cat" / f"a.{suffix}", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match="2 images"):
        ImageFolder(tmp_path)[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_photographs_are_resized_and_cut_as_a_classifier_says(folder, mode):
    """A photograph of one colour keeps it; one of two halves is cut in its middle."""
    white = 65535 if mode == "I;16" else 255
    halves = np.zeros((20, 60), np.uint16 if mode == "I;16" else np.uint8)
    halves[:, 30:] = white
    image = Image.fromarray(halves)
    (image.convert(mode) if mode == "RGB" else image).save(folder / "cat" / "1.png")
    transform = EvalTransform(resize=10, crop=(8, 8))
    x, _ = load_data(f"imagefolder:{folder}", transform=transform)[0]
    assert x.shape == (3 if mode == "RGB" else 1, 8, 8)
    assert (x[:, :, :3] < 1e-3).all()
    assert (x[:, :, 5:] > 1 - 1e-3).all()


def test_arrays_are_not_resized():
    with pytest.raises(InputError, match="digits"):
        load_data("digits", transform=EvalTransform(resize=10, crop=(8, 8)))


@pytest.mark.parametrize("name", ["@eaDir", "$RECYCLE.BIN", "lost+found", "__MACOSX"])
def test_folders_of_systems_are_neither_classes_nor_images(folder, name):
    for place in (folder / "cat", folder / name, folder / "cat" / name / "1.png"):
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(place / "1.png")
    data = ImageFolder(folder)
    assert (data.classes, len(data)) == (("cat",), 1)


def test_a_transform_to_a_tensor_is_refused(folder):
    """Its pixels were divided by 255 once more: white was black."""
    Image.new("RGB", (8, 8), "white").save(folder / "cat" / "1.png")
    with pytest.raises(InputError, match="returned a Tensor"):
        ImageFolder(folder, transform=ToTensor())[0]


def test_accents_may_be_stored_in_either_way(tmp_path):
    (tmp_path / "caf\u00e9").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "caf\u00e9" / "1.png")
    assert ImageFolder(tmp_path, ["tea", "cafe\u0301"])[0][1] == 1


def test_sixteen_bits_in_which_zero_is_white_are_refused(folder):
    """Pillow inverts 8 bits alone."""
    path = folder / "cat" / "1.tif"
    Image.fromarray(np.full((8, 8), 9, np.uint16)).save(path)
    tag = bytes([6, 1, 3, 0, 1, 0, 0, 0])  # PhotometricInterpretation, one SHORT
    path.write_bytes(path.read_bytes().replace(tag + b"\1", tag + b"\0"))
    with pytest.raises(InputError, match="0 is white"):
        ImageFolder(folder)[0]
