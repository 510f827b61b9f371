"""The converter of released weights, on files made to the documented names and shapes.

The released files cannot be fetched by the tests. What is compared with is a literal evaluation of
TensorFlow's semantics in numpy, on NHWC arrays and HWIO weights, that shares no code with the
converter.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from art_denoised import InputError
from art_denoised.networks import Architecture, load_published
from art_denoised.networks.published import ARCHITECTURES, array_name, build, same_padding

# One block a stage, two in the second: so that "the last of a stage" is not "every one".
SMALL = {
    "none": Architecture((1, 2, 1, 1), after="none"),
    "stage": Architecture((1, 2, 1, 1)),
    "block": Architecture((1, 2, 1, 1), 32, 8, "block", "dot_product", False),
}
CLASSES = 5


def write(path: Path, architecture: Architecture, suffix: str = "") -> dict[str, np.ndarray]:
    """Random weights by the names and shapes of the release (TensorFlow's, HWIO)."""
    draw = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def conv(name: str, kernel: int, inputs: int, outputs: int, gain: float = 1.0) -> None:
        scale = gain / np.sqrt(kernel * kernel * inputs)
        shape = (kernel, kernel, inputs, outputs)
        arrays[f"{name}/W"] = scale * draw.standard_normal(shape, dtype=np.float32)

    def conv_bn(name: str, kernel: int, inputs: int, outputs: int) -> None:
        conv(name, kernel, inputs, outputs)
        for part in ("gamma", "beta", "mean/EMA", "variance/EMA"):
            values = 0.3 * draw.standard_normal(outputs, dtype=np.float32)
            arrays[f"{name}/bn/{part}"] = 1 + np.abs(values) if part[0] in "gv" else values

    conv_bn("conv0", 7, 3, 64)
    inputs = 64
    for g, depth in enumerate(architecture.depths):
        planes, outputs = 64 * 2**g, 256 * 2**g
        inner = planes * architecture.width_per_group // 64 * architecture.groups
        for i in range(depth):
            block = f"group{g}/block{i}"
            conv_bn(f"{block}/conv1", 1, inputs, inner)
            conv_bn(f"{block}/conv2", 3, inner // architecture.groups, inner)
            conv_bn(f"{block}/conv3", 1, inner, outputs)
            if i == 0:
                conv_bn(f"{block}/convshortcut", 1, inputs, outputs)
            if architecture.after == "block":
                conv_bn(f"{block}/non_local/conv", 1, outputs, outputs)
                # The dot product is cubic in its input: tame it, or numbers overflow.
                arrays[f"{block}/non_local/conv/bn/variance/EMA"] *= (10 * outputs) ** 2
            inputs = outputs
        if architecture.after == "stage":
            conv_bn(f"group{g}_denoise/conv", 1, outputs, outputs)
            for name in ("theta", "phi"):
                conv(f"group{g}_denoise/embedding_{name}", 1, outputs, outputs // 2, 2.0)
    arrays["linear/W"] = 0.05 * draw.standard_normal((inputs, CLASSES), dtype=np.float32)
    arrays["linear/b"] = draw.standard_normal(CLASSES, dtype=np.float32)
    np.savez(path, **{name + suffix: array for name, array in arrays.items()})
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def tf_windows(x: np.ndarray, kernel: int, stride: int, fill: float) -> np.ndarray:
    """TensorFlow's SAME: ceil(size / stride) windows; (n, rows, columns, kernel, kernel, c)."""
    pads = []
    for size in x.shape[1:3]:
        out = -(-size // stride)
        total = max((out - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    return windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def tf_conv(x: np.ndarray, w: np.ndarray, stride: int = 1, groups: int = 1) -> np.ndarray:
    windows = tf_windows(x, w.shape[0], stride, 0.0)
    pieces = zip(np.split(windows, groups, -1), np.split(w, groups, -1), strict=True)
    return np.concatenate([np.tensordot(p, k, ([3, 4, 5], [0, 1, 2])) for p, k in pieces], -1)


def tf_evaluate(
    arrays: dict[str, np.ndarray], architecture: Architecture, bgr_0_255: np.ndarray
) -> np.ndarray:
    """The network of the release on images as OpenCV reads them: NHWC, BGR, 0..255."""

    def bn(name: str, x: np.ndarray) -> np.ndarray:
        gamma, beta, mean, variance = (
            arrays[f"{name}/bn/{part}"] for part in ("gamma", "beta", "mean/EMA", "variance/EMA")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    def conv_bn(name: str, x: np.ndarray, stride: int = 1, groups: int = 1) -> np.ndarray:
        return bn(name, tf_conv(x, arrays[f"{name}/W"], stride, groups))

    def non_local(name: str, x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1, x.shape[-1])
        if architecture.operation == "gaussian":
            theta, phi = (flat @ arrays[f"{name}/embedding_{e}/W"][0, 0] for e in ("theta", "phi"))
            f = np.exp(theta @ phi.transpose(0, 2, 1) / np.sqrt(theta.shape[-1]))
            f = f / f.sum(-1, keepdims=True)
        else:
            f = flat @ flat.transpose(0, 2, 1) / flat.shape[1]
        return x + conv_bn(f"{name}/conv", (f @ flat).reshape(x.shape))

    x = conv_bn("conv0", bgr_0_255 / 127.5 - 1, 2).clip(0)
    x = tf_windows(x, 3, 2, -np.inf).max((3, 4))
    for g, depth in enumerate(architecture.depths):
        for i in range(depth):
            name, stride = f"group{g}/block{i}", 2 if g > 0 and i == 0 else 1
            y = conv_bn(f"{name}/conv1", x).clip(0)
            y = conv_bn(f"{name}/conv2", y, stride, architecture.groups).clip(0)
            y = conv_bn(f"{name}/conv3", y)
            x = conv_bn(f"{name}/convshortcut", x, stride) if i == 0 else x
            x = (x + y).clip(0)
            if architecture.after == "block":
                x = non_local(f"{name}/non_local", x)
        if architecture.after == "stage":
            x = non_local(f"group{g}_denoise", x)
    return x.mean((1, 2)) @ arrays["linear/W"] + arrays["linear/b"]


@pytest.fixture(scope="module", params=SMALL)
def released(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "weights.npz"
    return path, SMALL[request.param], write(path, SMALL[request.param], ":0")


@pytest.mark.parametrize("size", [(32, 32), (45, 45), (38, 51)])
def test_it_computes_what_tensorflow_does(released, size):
    """Sizes whose halves are even and odd at different depths, as those of 224 and 299 are."""
    path, architecture, arrays = released
    images = np.random.default_rng(1).random((2, *size, 3))  # RGB in [0, 1]
    expected = tf_evaluate(arrays, architecture, 255 * images[..., ::-1])
    model = load_published(path, architecture).double()
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert np.abs(expected).max() > 0.5
    assert np.allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_padding_is_that_of_the_facts():
    """At 224 the stem pads (2, 3), a strided 3x3 and pooling (0, 1); at 299 the stem (3, 3)."""
    for size, kernel, pads in (
        (224, 7, (2, 3)),
        (112, 3, (0, 1)),
        (56, 3, (0, 1)),
        (299, 7, (3, 3)),
    ):
        assert same_padding(size, kernel, 2) == pads


def test_what_comes_back(released):
    path, architecture, _ = released
    before = torch.get_rng_state()
    model = load_published(path, architecture)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    counters = [t for n, t in model.state_dict().items() if n.endswith("num_batches_tracked")]
    assert len(counters) > 0
    assert not any(counters)
    names = set(model.network.state_dict())
    assert ("layer2.1.denoise.conv.weight" in names) == (architecture.after != "none")
    assert ("layer2.0.denoise.conv.weight" in names) == (architecture.after == "block")
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    x = torch.rand(1, 3, 40, 40, requires_grad=True)
    model(x).sum().backward()  # what attacks need
    assert x.grad is not None


def test_names_of_the_known_networks():
    """Counts by hand: each ResNet-152 has 50 blocks, ResNeXt-101 33, of three convolutions."""
    layers = {"resnet152": 1 + 150 + 4, "resnet152_denoise": 1 + 150 + 4 + 4}
    layers["resnext101_denoise_all"] = 1 + 99 + 4 + 33
    parameters = {}
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            network = build(architecture, 1000)
        own = {k for k in network.state_dict() if not k.endswith("num_batches_tracked")}
        parameters[name] = sum(p.numel() for p in network.parameters())
        found = {key: array_name(key, architecture) for key in own}
        embeddings = 8 if name == "resnet152_denoise" else 0
        assert len(set(found.values())) == 5 * layers[name] + embeddings + 2 == len(own)
    # 2 C^2 + 2 C for C = 256, ..., 2048; the paper says 11.15 million.
    assert parameters["resnet152_denoise"] - parameters["resnet152"] == 11_148_800
    # Those of torchvision's ResNeXt-101 32x8d, and C^2 + 2 C for each of its blocks.
    blocks = zip((3, 4, 23, 3), (256, 512, 1024, 2048), strict=True)
    added = sum(number * (c * c + 2 * c) for number, c in blocks)
    assert parameters["resnext101_denoise_all"] == 88_791_336 + added
    assert found["layer3.22.denoise.bn.running_var"] == (
        "group2/block22/non_local/conv/bn/variance/EMA"
    )


def refused(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_published(path, **{"architecture": SMALL["none"], **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_files(tmp_path):
    path = tmp_path / "weights.npz"
    write(path, SMALL["none"])
    with np.load(path) as file:
        arrays = dict(file)
    assert "28 missing (first 'group0_denoise/conv/W')" in refused(
        path, architecture=SMALL["stage"]
    )
    assert "did you mean resnet152" in refused(path, architecture="resnet50")

    def changed(**others: object) -> str:
        kept = {k: v for k, v in {**arrays, **others}.items() if v is not None}
        kept = {k: v for k, v in kept.items() if not k.startswith("group")}  # small, and missing
        np.savez(path, **kept)
        return refused(path)

    assert "1 unknown (first 'queue/x')" in changed(**{"queue/x": np.zeros(1)})
    changed(**{"linear/b": None})
    for name, bad, message in (
        ("conv0/W", np.zeros((7, 7, 4, 64), "f4"), "not floating point of shape (7, 7, 3, 64)"),
        ("linear/W", np.zeros((CLASSES, 2048), "f4"), "shape (2048, 5)"),
        ("conv0/bn/gamma", np.zeros(64, int), "conv0/bn/gamma is int64"),
    ):
        np.savez(path, **{**arrays, name: bad})
        assert message in refused(path)
    np.savez(path, **{**arrays, "conv0/W": np.array([{}], dtype=object)})
    assert "not an intact .npz" in refused(path)
    for content in (b"", b"not a zip", pickle.dumps({"conv0/W": 1}), b"PK\x03\x04cut off"):
        path.write_bytes(content)
        assert "not an intact .npz" in refused(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "not an intact .npz" in refused(tmp_path / "one.npy")
    assert "do not exist" in refused(tmp_path / "none.npz")
