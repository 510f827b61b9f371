"""Weights that this project publishes, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from art_denoised import load_denoiser, load_diffusion
from art_denoised.checks import InputError
from art_denoised.runs import identity

RESULTS = Path(__file__).parents[2] / "results"
WEIGHTS = json.loads((RESULTS / "weights.json").read_text())


def test_every_file_of_weights_of_a_denoiser_or_diffusion_model_is_listed():
    found = set(RESULTS.rglob("denoiser.safetensors")) | set(RESULTS.rglob("unet/*.safetensors"))
    assert {RESULTS / entry["weights"] for entry in WEIGHTS.values()} == found
    assert all((RESULTS / entry["card"]).is_file() for entry in WEIGHTS.values())
    assert all(entry["command"].startswith("art-denoised train-") for entry in WEIGHTS.values())


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_name_loads_what_its_path_loads(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it is found beside the package, too
    entry = WEIGHTS[name]
    load = load_denoiser if "denoiser" in entry["path"] else load_diffusion
    options = {} if load is load_denoiser else {"classes": 10}
    by_name = load(f"art-denoised:{name}", **options)
    assert identity(by_name) == identity(load(RESULTS / entry["path"], **options))


def test_what_was_changed_or_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cifar10-hybrid-0\.25"):
        load_denoiser("art-denoised:cifar10-hybrid-0.26")
    entry = WEIGHTS["cifar10-dncnn-0.25"]
    place = tmp_path / "results" / entry["path"]
    place.parent.mkdir(parents=True)
    torch.save({}, place)
    (tmp_path / "results" / "weights.json").write_text(json.dumps(WEIGHTS))
    with pytest.raises(InputError, match="dncnn"):
        load_denoiser("art-denoised:cifar10-dncnn-0.25")
