from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conformance.defences import DEFENCES, Defence

IMAGES = 6


@pytest.fixture(params=DEFENCES)
def defence(request) -> Defence:
    """Each defence in turn."""
    return DEFENCES[request.param]


@pytest.fixture(params=[name for name, row in DEFENCES.items() if row.noisy])
def noisy(request) -> Defence:
    """Each defence that draws noise."""
    return DEFENCES[request.param]


@pytest.fixture(scope="session")
def x(digits) -> np.ndarray:
    return digits[0][:IMAGES].numpy()


@pytest.fixture(scope="session")
def y(digits) -> np.ndarray:
    return digits[1][:IMAGES].numpy()


@pytest.fixture(autouse=True)
def _seeded():
    """The attacks draw from the global generators; the defences do not."""
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 10 ms for absent GPUs
