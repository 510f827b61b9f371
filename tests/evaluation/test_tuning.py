"""Tuning: measured once, remembered, and never in the way."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from art_denoised.checks import InputError
from art_denoised.demo import digits_classifier
from art_denoised.evaluation import tuning
from art_denoised.evaluation.tuning import tune

X = torch.zeros(1, 8, 8)


class Flattening(nn.Module):
    """As many networks do: `view` cannot flatten channels-last images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1)


def test_a_setting_is_measured_once(tmp_path, monkeypatch):
    cache = tmp_path / "folder" / "tuning.json"
    first = tune(digits_classifier(), X, cache=cache)
    assert first.batch_size in tuning._BATCH_SIZES
    assert first.rate > 0
    monkeypatch.setattr(tuning, "_measure", None)  # a second measurement would fail
    assert tune(digits_classifier(), X, cache=cache) == first


def test_other_networks_types_and_threads_are_measured_on_their_own(tmp_path):
    cache = tmp_path / "tuning.json"
    for base in (digits_classifier(), digits_classifier().bfloat16(), nn.Flatten()):
        tune(base, X, cache=cache)
    tune(nn.Flatten(), torch.zeros(1, 4, 4), cache=cache)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        tune(nn.Flatten(), X, cache=cache)
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads(cache.read_text())) == 5


def test_a_broken_or_forbidden_cache_is_done_without(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": [1]')
    assert tune(nn.Flatten(), X, cache=broken).rate > 0
    assert len(json.loads(broken.read_text())) == 1  # mended
    (tmp_path / "file").write_text("")
    assert tune(nn.Flatten(), X, cache=tmp_path / "file" / "tuning.json").rate > 0


def test_networks_that_flatten_with_view_keep_the_default_order(tmp_path):
    x = torch.zeros(3, 8, 8)
    cache = tmp_path / "tuning.json"
    assert tune(Flattening(), x, cache=cache).channels_last is False
    known = json.loads(cache.read_text())  # of a network of that name that could take them
    cache.write_text(json.dumps({key: {**v, "channels_last": True} for key, v in known.items()}))
    assert tune(Flattening(), x, cache=cache).channels_last is False


class Large(nn.Module):
    """Fits into memory with so many images and no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return x.flatten(1)


def test_batches_that_do_not_fit_are_not_taken(tmp_path):
    assert tune(Large(40), X, cache=tmp_path / "a.json").batch_size <= 32
    with pytest.raises(InputError, match="a batch of 16 images does not fit"):
        tune(Large(4), X, cache=tmp_path / "b.json")
