"""Tuning: measured once, remembered, and never in the way."""

from __future__ import annotations

import json

import torch
from torch import nn

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
    assert len(json.loads(cache.read_text())) == 4


def test_a_broken_or_forbidden_cache_is_done_without(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": [1]')
    assert tune(nn.Flatten(), X, cache=broken).rate > 0
    assert len(json.loads(broken.read_text())) == 1  # mended
    (tmp_path / "file").write_text("")
    assert tune(nn.Flatten(), X, cache=tmp_path / "file" / "tuning.json").rate > 0


def test_networks_that_flatten_with_view_keep_the_default_order(tmp_path):
    x = torch.zeros(3, 8, 8)
    assert tune(Flattening(), x, cache=tmp_path / "tuning.json").channels_last is False
