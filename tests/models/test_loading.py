"""Weights as people save them: wrapped, prefixed, tied."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from art_denoised.checks import InputError
from art_denoised.models import load_weights, read_state_dict


class Tied(nn.Module):
    """An encoder and a decoder that share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_their_values_are_refused(tmp_path, kind):
    """One that a sparse or meta device left in a state dict ended with a traceback."""
    state = nn.Linear(2, 2).state_dict()
    weight = state["weight"]
    state["weight"] = weight.to_sparse() if kind == "sparse" else weight.to("meta")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"weight of checkpoint .* {kind}"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.pth")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "1.", "model._orig_mod."]
)
def test_wrapped_and_prefixed_weights_are_read(tmp_path, wrapper, prefix):
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "a.pth")
    load_weights(loaded, tmp_path / "a.pth")
    assert same(saved, loaded)


def test_tied_weights_of_safetensors_are_read(tmp_path):
    saved, loaded = Tied(), Tied()
    save_model(saved, str(tmp_path / "a.safetensors"))
    load_weights(loaded, tmp_path / "a.safetensors")
    assert same(saved, loaded)
    assert loaded.decoder.weight is loaded.encoder.weight


def test_a_choice_of_weights_is_not_made_silently(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    torch.save({"model": state, "net": state}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="model and net"):
        read_state_dict(tmp_path / "a.pth")


def test_long_lists_of_names_are_cut(tmp_path):
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "a.safetensors")
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(50)))
    with pytest.raises(InputError, match="100 missing") as error:
        load_weights(deep, tmp_path / "a.safetensors")
    assert len(str(error.value)) < 400 + len(str(tmp_path))
    with pytest.raises(InputError, match=r"\(2, 3\), not \(2, 4\)"):
        load_weights(nn.Linear(4, 2), tmp_path / "a.safetensors")
