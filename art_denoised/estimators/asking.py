"""Estimators of ART as query-only classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
from art.estimators.classification import ClassifierMixin

from art_denoised.checks import InputError
from art_denoised.smoothing.blackbox import Answer, Ask


def ask_estimator(estimator: Any) -> Ask:
    """Return the function by which a `BlackBox` queries an ART classifier.

    Args:
        estimator: Classifier whose ``predict`` gives a row of scores for each image. A row that
            is all zero, as ART writes an abstention, holds NaN or has no finite maximum, is an
            empty answer.

    Raises:
        InputError: It is not an ART classifier.

    Example:
        >>> from art.estimators.classification import BlackBoxClassifier
        >>> def predict(x):
        ...     return np.eye(10)[np.zeros(len(x), int)]
        >>> ask = ask_estimator(BlackBoxClassifier(predict, (1, 8, 8), 10, clip_values=(0, 1)))
        >>> ask(np.zeros((2, 1, 8, 8), np.float32))
        [0, 0]
    """
    if not isinstance(estimator, ClassifierMixin):
        raise InputError(
            f"the estimator is a {type(estimator).__name__}; give an ART classifier, or a function"
        )

    def ask(images: np.ndarray) -> list[Answer]:
        scores = np.asarray(estimator.predict(images))
        known = np.isfinite(scores.max(1)) & (scores != 0).any(1)  # max passes NaN on
        return [int(row.argmax()) if ok else None for row, ok in zip(scores, known, strict=True)]

    return ask
