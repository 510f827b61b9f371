from __future__ import annotations

from collections.abc import Callable

import pytest

from art_denoised import DenoisedSmoothing
from art_denoised.demo import digits_classifier, digits_denoiser


@pytest.fixture
def make() -> Callable[..., DenoisedSmoothing]:
    """Builds the estimator over the packaged digits networks, with changed options."""

    def build(**changes: object) -> DenoisedSmoothing:
        options = {
            "classifier": digits_classifier(),
            "denoiser": digits_denoiser(),
            "sigma": 0.25,
            "input_shape": (1, 8, 8),
            "nb_classes": 10,
            "seed": 0,
            "samples": 8,
            **changes,
        }
        return DenoisedSmoothing(**options)  # type: ignore[arg-type]

    return build
