"""Shared fixtures. One thread a process; property-based tests draw the same examples always."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two threads that wait for each other are slower on small nets

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out digits: images (500, 1, 8, 8) and labels."""
    from art_denoised.data import load_data

    data = load_data("digits")
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor(labels)
