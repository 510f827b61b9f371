"""ART classifiers as plain modules: their preprocessing becomes part of the network."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification.pytorch import PyTorchClassifier
from torch import nn

from art_denoised.checks import InputError
from art_denoised.types import Images, Logits


def without_preprocessing(classifier: nn.Module | PyTorchClassifier) -> nn.Module:
    """Return a module from raw images to what an ART classifier's model returns for them.

    Args:
        classifier: An nn.Module, returned as it is, or an ART PyTorchClassifier.

    Raises:
        InputError: Another type, preprocessing that is not torch, or postprocessing.

    Example:
        >>> import torch
        >>> from art_denoised.demo import digits_classifier
        >>> art_classifier = PyTorchClassifier(
        ...     digits_classifier(), nn.CrossEntropyLoss(), (1, 8, 8), 10,
        ...     clip_values=(0, 1), preprocessing=(0.5, 2.0), device_type="cpu",
        ... )
        >>> x = torch.rand(2, 1, 8, 8)
        >>> module = without_preprocessing(art_classifier)
        >>> bool((module(x) == art_classifier.model((x - 0.5) / 2)).all())
        True
    """
    if isinstance(classifier, nn.Module):
        return classifier
    if not isinstance(classifier, PyTorchClassifier):
        raise InputError(
            f"classifier is a {type(classifier).__name__}; give an nn.Module or an ART "
            "PyTorchClassifier"
        )
    if classifier.postprocessing_defences:
        raise InputError(
            "the ART classifier has postprocessing defences, which smoothing would hide; "
            "give its .model"
        )
    steps = [step for step in classifier.preprocessing_operations if step.apply_predict]
    for step in steps:
        if not isinstance(step, PreprocessorPyTorch):
            raise InputError(
                f"the ART classifier preprocesses with {type(step).__name__}, which is not torch; "
                "use its PyTorch form"
            )
    return _Preprocessed(steps, classifier.model) if steps else classifier.model


class _Preprocessed(nn.Module):
    def __init__(self, steps: list[Any], model: nn.Module) -> None:
        super().__init__()
        self.steps, self.model = steps, model
        self.training = model.training
        # What tells it from another, to whom a run or a log belongs: ART's objects do not say it.
        self.parameters_of_steps = [
            {name: getattr(step, name, None) for name in step.params} for step in steps
        ]

    def forward(self, x: Images) -> Logits:
        for step in self.steps:
            x, _ = step.forward(x)
        return self.model(x)

    def extra_repr(self) -> str:
        with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
            return ", ".join(
                f"{type(step).__name__}({parameters})"
                for step, parameters in zip(self.steps, self.parameters_of_steps, strict=True)
            )
