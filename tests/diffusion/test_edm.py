"""Networks of EDM against the reference implementation, and their pickles, read as data."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from art_denoised import load_diffusion
from art_denoised.checks import InputError
from art_denoised.cli import main
from art_denoised.diffusion import EDM, edm_diffusion, save_diffusion
from tests.diffusion.edm_files import Call, module, persistent, precond, write
from tests.golden import published
from tests.golden.published import figures, frozen, normal, weights

CONFIG = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_type": "SongUNet"}
CONFIG |= {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
CONFIG |= {"augment_dim": 9}
X, Y = torch.rand(2, 3, 8, 8), torch.tensor([1, 3])


def model(**config):
    built = edm_diffusion(**{**CONFIG, **config}).eval().requires_grad_(False)
    weights(built.network)
    return built


def root(**config):
    network, given = model(**config).network, {"dropout": np.float64(0.2), **CONFIG, **config}
    return {"ema": precond(network, given), "loss_fn": persistent("EDMLoss", {})}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_diffusion(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(("name", "config"), list(published.edm_cases()))
def test_outputs_equal_the_reference(name, config):
    diffusion = edm_diffusion(**config).eval().requires_grad_(False)
    weights(diffusion.network)
    y = torch.tensor([1, 4]) if config.get("label_dim") else None
    x, sigma = normal(1, 2, 3, 16, 16).double(), torch.tensor([0.3, 2.0])  # in [-1, 1]
    x_hat = 2 * diffusion((x + 1) / 2, sigma / 2, y) - 1
    assert figures(x_hat) == pytest.approx(frozen("edm")["D"][name], abs=1e-5)


@pytest.mark.parametrize(("kind", "eps"), [("SongUNet", 1e-6), ("DhariwalUNet", 1e-5)])
def test_norms_add_the_eps_of_their_network(kind, eps):
    parts = model(model_type=kind).network.modules()
    assert {part.eps for part in parts if isinstance(part, nn.GroupNorm)} == {eps}


def test_published_sizes():
    expected = frozen("edm")["parameters"]
    assert expected["cifar10-cond-vp"] / 1e6 == pytest.approx(55.7, abs=0.05)
    for name, config in published.FULL_SIZE.items():
        with torch.device("meta"):
            assert published.parameters(edm_diffusion(**config).network) == expected[name]


DEFAULTS = {  # of EDMPrecond and of both networks
    "label_dim": 0, "sigma_min": 0.0, "sigma_max": float("inf"), "sigma_data": 0.5,
    "use_fp16": False, "augment_dim": 0, "channel_mult_emb": 4, "dropout": 0.1,
    "label_dropout": 0.0,
}  # fmt: skip
SONG = {
    "model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,),
    "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
    "decoder_type": "standard", "resample_filter": (1, 1),
}  # fmt: skip
ADM = {
    "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3,
    "attn_resolutions": (32, 16, 8),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "own"), [("SongUNet", SONG), (None, ADM)])
def test_arguments_that_are_missing_have_the_defaults_of_edm(kind, own):
    given = {"img_resolution": 64, "img_channels": 3}
    with torch.device("meta"):
        built = edm_diffusion(**given, **({"model_type": kind} if kind else {}))
    assert msgspec.structs.asdict(built.network.config) == {**given, **DEFAULTS, **own}


def test_random_frequencies_have_the_deviation_16():
    """Half of the normal distribution is within 0.674 deviations."""
    torch.manual_seed(0)
    network = edm_diffusion(**CONFIG, embedding_type="fourier", channel_mult_noise=128).network
    middle = float(network.map_noise.freqs.abs().median())
    assert middle == pytest.approx(16 * 0.674, rel=0.1)


@pytest.mark.parametrize("channels", [3, 34, 132])
def test_channels_that_do_not_form_groups(channels):
    """Groups have four channels, and there are at most 32."""
    with pytest.raises(InputError, match=f"a level has {channels} channels"):
        model(model_channels=channels)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"label_dim": 0, "encoder_type": "residual", "embedding_type": "fourier"},
        {"model_type": "DhariwalUNet"},
    ],
)
def test_a_pickle_is_read_without_its_code(tmp_path, config, protocol):
    loaded = load_diffusion(write(tmp_path / "edm.pkl", root(**config), protocol))
    original = model(**config)
    y = Y if original.classes else None
    assert torch.equal(loaded(X, 0.3, y), original(X, 0.3, y))
    assert loaded.preconditioning == EDM(0.5, 0.0, float("inf"))
    assert not loaded.training


def test_the_null_class(tmp_path):
    """There is one where the training left out classes."""
    assert model().null_class is None
    with pytest.raises(InputError, match="no null class"):
        model()(X, 0.3)
    null = model(label_dropout=0.1)
    assert torch.equal(null(X, 0.3), null(X, 0.3, torch.tensor([4, 4])))
    assert not torch.equal(null(X, 0.3), null(X, 0.3, Y))
    with pytest.raises(InputError, match="classes is 10, but .* has 4 classes"):
        load_diffusion(write(tmp_path / "edm.pkl", root()), classes=10)


def test_weights_of_edm_into_a_network(tmp_path):
    """The release of RDC holds state dicts of EDMPrecond."""
    state = {f"model.{name}": value for name, value in model().network.state_dict().items()}
    torch.save(state, tmp_path / "edm.pt")
    loaded = load_diffusion(tmp_path / "edm.pt", into=edm_diffusion(**CONFIG))
    assert torch.equal(loaded(X, 0.3, Y), model()(X, 0.3, Y))


def test_a_folder_needs_no_pickle(tmp_path):
    for config in ({}, {"model_type": "DhariwalUNet", "sigma_max": 80.0, "label_dropout": 0.1}):
        before = model(**config)
        save_diffusion(before, tmp_path / "saved")
        after = load_diffusion(tmp_path / "saved")
        assert (after.preconditioning, after.null_class) == (
            before.preconditioning,
            before.null_class,
        )
        assert torch.equal(after(X, 0.3, Y), before(X, 0.3, Y))
    (tmp_path / "saved" / "config.json").write_text('{"_class_name": "EDM", "width": 3}')
    with pytest.raises(InputError, match="img_resolution|width"):
        load_diffusion(tmp_path / "saved")


def test_the_command_converts(tmp_path, capsys):
    path = write(tmp_path / "edm.pkl", root())
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    assert torch.equal(load_diffusion(tmp_path / "out")(X, 0.3, Y), model()(X, 0.3, Y))
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_images_of_another_size():
    with pytest.raises(InputError, match=r"\(3, 16, 16\).*trained on \(3, 8, 8\)"):
        model()(torch.rand(1, 3, 16, 16), 0.3, Y[:1])


def test_half_precision(tmp_path):
    half = load_diffusion(write(tmp_path / "edm.pkl", root()), dtype="float16")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    torch.testing.assert_close(half(X, 0.3, Y), model()(X, 0.3, Y), atol=5e-3, rtol=0)


# --- files that mean harm ------------------------------------------------------------------------
@pytest.fixture
def harm(tmp_path):
    """A command that would leave a trace, and the trace."""
    trace = tmp_path / "harmed"
    yield f"touch {trace}"
    assert not trace.exists()


def tampered(place: str, thing: object) -> object:
    """A file of EDM that holds ``thing`` somewhere."""
    whole = root()
    meta = whole["ema"].args[0]
    {"top": whole, "meta": meta, "state": meta["state"]}.get(place, {})["also"] = thing
    if place == "kwargs":
        meta["state"]["_init_kwargs"] = {**CONFIG, "model_channels": thing}
    return whole


@pytest.mark.parametrize("place", ["top", "meta", "state", "kwargs"])
def test_a_call_is_refused_by_its_name(tmp_path, harm, place):
    path = write(tmp_path / "edm.pkl", tampered(place, Call("os", "system", harm)))
    assert f"it names {os.system.__module__}.system" in refusal(path)
    path = write(tmp_path / "edm.pkl", tampered(place, Call("another.package", "run", harm)))
    assert "it names another.package.run" in refusal(path)
    path = write(tmp_path / "edm.pkl", tampered(place, Call("builtins", "eval", "1 + 1")))
    assert "it names builtins.eval" in refusal(path)


def test_a_storage_that_is_a_pickle_of_its_own(tmp_path, harm):
    inner = pickle.dumps(Call("os", "system", harm), 2)
    old = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
    archive, tar = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(2)}, archive)
    options = {"format": tarfile.GNU_FORMAT, "encoding": "latin-1"}
    with tarfile.open(fileobj=tar, mode="w", **options) as file:
        name = tarfile.TarInfo(old.decode("latin-1"))  # looks like the old format too
        name.size = len(inner)
        file.addfile(name, io.BytesIO(inner))
    assert tar.getvalue().startswith(old)
    for raw in (inner, old + inner, archive.getvalue(), tar.getvalue(), old, b""):
        call = Call("torch.storage", "_load_from_bytes", raw)
        refusal(write(tmp_path / "edm.pkl", tampered("state", call)))


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (b"\x80\x04K\x01Q.", "opcode 0x51"),  # a persistent id
        (b"\x80\x04(K\x01K\x02tQ.", "opcode 0x51"),
        (b"\x80\x04Pname\n.", "opcode 0x50"),
        (b"\x80\x04\x82\x01.", "opcode 0x82"),  # an extension
        (b"(S'touch x'\nios\nsystem\n.", "opcode 0x53"),
        (b"\x80\x04(cos\nsystem\nX\x01\x00\x00\x00xo.", "names os.system"),
        (b"\x80\x04}}b.", "sets the state of a dict"),
        (b"\x80\x04ccollections\nOrderedDict\n}b.", "sets the state of a type"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names os.system"),
        (b"\x80\x04K\x01r\xff\xff\xff\xff.", "no network"),  # a memo of 2^32 places
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "damaged"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.", "damaged"),
        (b"\x80\x04" + b"(" * 1000 + b".", "damaged"),
        (b"\x80\x09N.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x04N.", "no network"),
        (b"\x80\x04}.", "no network"),
    ],
)
def test_opcodes_that_are_not_known(tmp_path, opcodes, words):
    path = tmp_path / "edm.pkl"
    path.write_bytes(opcodes)
    assert words in refusal(path)


def sized(size, stride, offset=0):
    storage = torch.ones(4)._typed_storage()
    parameters = {"w": Call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride)}
    parameters["w"].args += (False, {})
    return parameters["w"]


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 20, 1 << 20), (0, 0), 0),
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2,), (1 << 40,), 0),
        ((2,), (4,), 0),
        ((2,), (-1,), 1),
        ((-2,), (1,), 0),
        ((2,), (1,), -1),
    ],
)
def test_a_tensor_larger_than_its_storage(tmp_path, size, stride, offset):
    path = write(tmp_path / "edm.pkl", tampered("state", sized(size, stride, offset)))
    assert f"has a tensor of shape {size} over 4 numbers" in refusal(path)


def test_a_storage_that_claims_more_than_it_holds(tmp_path):
    raw = io.BytesIO()
    storage = torch.ones(1000)._typed_storage()
    torch.save(storage, raw, _use_new_zipfile_serialization=False)
    claimed = raw.getvalue().replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f")  # 1000 as 2^31 - 1
    assert claimed != raw.getvalue()
    call = Call("torch.storage", "_load_from_bytes", claimed)
    refusal(write(tmp_path / "edm.pkl", tampered("state", call)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_channels": 10**9},
        {"channel_mult": [1] * 1000},
        {"channel_mult": []},
        {"num_blocks": 10**9},
        {"num_blocks": 2},
        {"img_resolution": 10**6},
        {"img_resolution": 9},
        {"label_dim": 5},
        {"attn_resolutions": []},
        {"model_type": "VPUNet"},
        {"unknown": 1},
        {"dropout": "0.1"},
        {"img_channels": None},
    ],
)
def test_arguments_that_contradict_the_weights(tmp_path, wrong):
    whole = {"ema": precond(model().network, {**CONFIG, **wrong})}
    with pytest.raises(InputError) as caught:
        load_diffusion(write(tmp_path / "edm.pkl", whole))
    assert "\n" not in str(caught.value)


def test_modules_within_themselves(tmp_path):
    whole = root()
    state = whole["ema"].args[0]["state"]
    part = module(torch.nn.Module(), "Block")
    for _ in range(60):  # 2^60 paths
        twice = module(torch.nn.Module(), "Block")
        twice.args[0]["state"]["_modules"] = {"a": part, "b": part}
        part = twice
    state["_modules"]["deep"] = part
    assert "twice" in refusal(write(tmp_path / "edm.pkl", whole))


def test_names_with_more_than_one_line(tmp_path):
    whole = root()
    state = whole["ema"].args[0]["state"]
    state["_buffers"] = {"a\nb": torch.ones(2)}
    assert r"named 'a\nb'" in refusal(write(tmp_path / "a.pkl", whole))
    whole = {"ema": precond(model().network, {**CONFIG, "model_type": "a\nb" + "c" * 999})}
    with pytest.raises(InputError, match="arguments of EDM are wrong") as caught:
        load_diffusion(write(tmp_path / "b.pkl", whole))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_other_models_of_the_repository(tmp_path):
    whole = root()
    whole["ema"].args[0]["class_name"] = "VPPrecond"
    assert "holds 'VPPrecond' where only EDMPrecond" in refusal(write(tmp_path / "a.pkl", whole))
    whole = root()
    whole["ema"].args[0]["state"]["_init_args"] = (8, 3)
    assert "without their names" in refusal(write(tmp_path / "b.pkl", whole))


def test_damaged_files(tmp_path):
    """Files that are cut off or hold wrong bytes load as they are, or end in one line."""
    content = write(tmp_path / "edm.pkl", root()).read_bytes()
    path, numbers = tmp_path / "damaged.pkl", np.random.RandomState(0)
    for length in (1, 2, 100, *numbers.randint(0, len(content), 8)):
        path.write_bytes(content[:length])
        refusal(path)
    for _ in range(24):
        changed = bytearray(content)
        for place in numbers.randint(0, len(content), 20):
            changed[place] = numbers.randint(256)
        path.write_bytes(changed)
        with contextlib.suppress(InputError):  # and no other error
            load_diffusion(path)
