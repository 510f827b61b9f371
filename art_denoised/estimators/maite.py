"""MAITE's faces of our models, data and attacks; MAITE itself is not imported.

MAITE (Modular AI Trustworthy Engineering) describes models, data sets and augmentations as
protocols, so a class that has their methods is one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.types import Images, Logits


class MaiteModel:
    """A classifier as `maite.protocols.image_classification.Model`.

    Args:
        model: Module from images in [0, 1] to logits, in eval mode.
        name: Name, the "id" of its metadata.
        classes: Names of the classes, in the order of the labels.

    Attributes:
        metadata: ``{"id": name}``, with "index2label" if classes are given.

    Raises:
        InputError: The model is in training mode. When called: the images are not in [0, 1], or
            the model does not take them.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> model = MaiteModel(digits_classifier(), "digits")
        >>> [answer.shape for answer in model([np.zeros((1, 8, 8), np.float32)])]
        [(10,)]
    """

    def __init__(self, model: nn.Module, name: str, classes: Sequence[str] = ()) -> None:
        checks.eval_mode(model)
        self._model = model
        names = checks.words("classes", classes)
        self.metadata: dict[str, Any] = {"id": name, **_labels(names)}

    @torch.no_grad()
    def __call__(self, batch: Sequence[Any], /) -> list[np.ndarray]:
        """Return the class probabilities of images (channels, height, width)."""
        x = checks.placed(_stack(batch), self._model)
        logits = checks.logits(self._model(x), len(x))
        return list(logits.float().softmax(1).cpu().numpy())


class MaiteDataset:
    """A data set as `maite.protocols.image_classification.Dataset`.

    Args:
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        name: Name, the "id" of its metadata.
        classes: Names of the classes, or their number.

    Attributes:
        metadata: ``{"id": name}``, with "index2label" if names of classes are given.

    Example:
        >>> from art_denoised.data import load_data
        >>> image, target, metadata = MaiteDataset(load_data("digits"), "digits", 10)[7]
        >>> image.shape, target.shape, metadata
        ((1, 8, 8), (10,), {'id': 7})
    """

    def __init__(self, data: ImageData, name: str, classes: Sequence[str] | int) -> None:
        self._data = data
        names: Sequence[str] = ()
        if not isinstance(classes, (int, np.integer)):
            classes = len(names := checks.words("classes", classes))
        self._count = checks.count("classes", classes, 2)
        self.metadata: dict[str, Any] = {"id": name, **_labels(names)}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Return an image, the one-hot vector of its class, and its metadata."""
        image, label = self._data[index]
        if not 0 <= int(label) < self._count:
            raise InputError(f"image {index} is of class {int(label)}; give classes, all of them")
        target = np.eye(self._count, dtype=np.float32)[int(label)]
        return np.asarray(image, np.float32), target, {"id": index}


class MaiteAttack:
    """An attack as `maite.protocols.image_classification.Augmentation`.

    With it `maite.tasks.evaluate` measures accuracy under attack. `art_denoised.evaluate` also
    checks whether that figure is reliable.

    Args:
        attack: Attack ``(model, x, y) -> x_adv``, such as `PGD`.
        model: Module that is attacked, in eval mode.
        name: Name, the "id" of its metadata.

    Attributes:
        metadata: ``{"id": name}``.

    Example:
        >>> from art_denoised import PGD
        >>> from art_denoised.demo import digits_classifier
        >>> attack = MaiteAttack(PGD(0.1, steps=2), digits_classifier(), "pgd")
        >>> image, target = np.full((1, 8, 8), 0.5, np.float32), np.eye(10)[3]
        >>> (attacked,), _, _ = attack(([image], [target], [{"id": 0}]))
        >>> bool(np.abs(attacked - image).max() <= 0.1 + 1e-6)
        True
    """

    def __init__(self, attack: Any, model: nn.Module, name: str) -> None:
        checks.eval_mode(model)
        self._attack, self._model = attack, model
        self.metadata: dict[str, Any] = {"id": name}

    def __call__(
        self, batch: tuple[Sequence[Any], Sequence[Any], Sequence[Any]], /
    ) -> tuple[list[np.ndarray], Sequence[Any], Sequence[Any]]:
        """Return the attacked images with their targets and metadata."""
        images, targets, metadata = batch
        device = checks.model_device(self._model)
        x = _stack(images).to(device)
        y: Logits = torch.as_tensor(np.stack([np.asarray(target) for target in targets]))
        attacked = self._attack(self._model, x, y.argmax(1).to(device))
        return list(attacked.detach().cpu().numpy()), targets, metadata


def _stack(batch: Sequence[Any]) -> Images:
    return checks.images(np.stack([np.asarray(image, np.float32) for image in batch]))


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {"index2label": dict(enumerate(classes))} if classes else {}
