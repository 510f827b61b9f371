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
from art_denoised.attacks.suites import as_module
from art_denoised.checks import InputError
from art_denoised.data import ImageData
from art_denoised.data.images import Chosen
from art_denoised.types import Images


class MaiteModel:
    """A classifier as `maite.protocols.image_classification.Model`.

    Args:
        model: Module from images in [0, 1] to logits, in eval mode.
        name: Name, the "id" of its metadata.
        classes: Names of the classes, in the order of the labels.

    Attributes:
        metadata: ``{"id": name}``, with "index2label" if classes are given.

    Raises:
        InputError: The model is in training mode. When called: it is in training mode, the images
            are not in [0, 1], the model does not take them, or its logits are not one for each
            name in ``classes``.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> model = MaiteModel(digits_classifier(), "digits")
        >>> [answer.shape for answer in model([np.zeros((1, 8, 8), np.float32)])]
        [(10,)]
    """

    def __init__(self, model: nn.Module, name: str, classes: Sequence[str] = ()) -> None:
        if not callable(model):
            raise InputError(
                f"model is a {type(model).__name__}; give an nn.Module, which "
                "art_denoised.estimators.without_preprocessing makes of an ART classifier"
            )
        checks.eval_mode(model)
        self._model = model
        self._names = checks.words("classes", classes)
        self.metadata: dict[str, Any] = {"id": name, **_labels(self._names)}

    @torch.no_grad()
    def __call__(self, batch: Sequence[Any], /) -> list[np.ndarray]:
        """Return the class probabilities of images (channels, height, width)."""
        checks.eval_mode(self._model)  # again: its mode can be set from outside
        images = checks.several("batch", batch, "images")
        if not images:
            return []
        x = checks.placed(_stack(images), self._model)
        with checks.in_one_line("the model", "give images (channels, height, width) for it"):
            output = self._model(x)
        logits = checks.logits(output, len(x))
        if self._names and logits.shape[1] != len(self._names):
            raise InputError(
                f"classes has {len(self._names)} names but the model returns {logits.shape[1]} "
                "logits; give one name for each"
            )
        return list(logits.float().softmax(1).cpu().numpy())


class MaiteDataset:
    """A data set as `maite.protocols.image_classification.Dataset`.

    Args:
        data: Pairs of an image (channels, height, width) in [0, 1] and its class. All images have
            one shape, and a second reading of an image gives the same one.
        name: Name, the "id" of its metadata.
        classes: Names of the classes, or their number.

    Attributes:
        metadata: ``{"id": name}``, with "index2label" if names of classes are given.

    Raises:
        InputError: There are fewer than two classes. When read: an image or its class is not as
            above.

    Example:
        >>> from art_denoised.data import load_data
        >>> image, target, metadata = MaiteDataset(load_data("digits"), "digits", 10)[7]
        >>> image.shape, target.shape, metadata
        ((1, 8, 8), (10,), {'id': 7})
    """

    def __init__(self, data: ImageData, name: str, classes: Sequence[str] | int) -> None:
        names: Sequence[str] = ()
        if not isinstance(classes, (int, np.integer)):
            classes = len(names := checks.words("classes", classes))
        self._count = checks.count("classes", classes, 2)
        self._chosen = Chosen(data, classes=self._count)
        self.metadata: dict[str, Any] = {"id": name, **_labels(names)}

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Return an image, the one-hot vector of its class, and its metadata.

        Negative indices count from the end, and one past it is an IndexError, as in sequences.
        """
        place = range(len(self))[checks.count("index", index, -len(self))]
        image, label = self._chosen[place]
        target = np.eye(self._count, dtype=np.float32)[label]
        return image.numpy(), target, {"id": place}


class MaiteAttack:
    """An attack as `maite.protocols.image_classification.Augmentation`.

    With it `maite.tasks.evaluate` measures accuracy under attack. `art_denoised.evaluate` also
    checks whether that figure is reliable.

    Args:
        attack: Attack ``(model, x, y) -> x_adv``, such as `PGD`.
        model: Module that is attacked, in eval mode, or an ART estimator over one.
        name: Name, the "id" of its metadata.

    Attributes:
        metadata: ``{"id": name}``.

    Raises:
        InputError: The model is in training mode. When called: it is in training mode, the images
            are not in [0, 1], or the targets are not classes of the model, as indices, one-hot
            vectors or probabilities.

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
        self._module = as_module(model)
        checks.eval_mode(self._module)
        if not callable(attack):
            raise InputError(f"attack is {checks.shown(attack)}; give a function (model, x, y)")
        self._attack, self._model = attack, model
        self.metadata: dict[str, Any] = {"id": name}

    def __call__(
        self, batch: tuple[Sequence[Any], Sequence[Any], Sequence[Any]], /
    ) -> tuple[list[np.ndarray], Sequence[Any], Sequence[Any]]:
        """Return the attacked images with their targets and metadata."""
        checks.eval_mode(self._module)  # again: its mode can be set from outside
        parts = checks.several("batch", batch, "images, of targets and of metadata")
        if len(parts) != 3:
            raise InputError(
                f"the batch holds {len(parts)} sequences; give images, targets and metadata"
            )
        names = ("images", "targets", "metadata")
        images, targets, metadata = map(checks.several, names, parts, names)
        checks.one_each(images, targets, "targets")
        checks.one_each(images, metadata, "metadata")
        if not images:
            return [], parts[1], parts[2]
        x = _stack(images).to(checks.model_device(self._module))
        y = checks.class_indices(targets, checks.class_count(self._module, x))
        attacked = self._attack(self._model, x, y.to(x.device))
        if getattr(attacked, "shape", None) != x.shape:
            raise InputError(
                f"the attack returned {checks.shown(type(attacked))}; it must return a tensor of "
                f"shape {tuple(x.shape)}"
            )
        return list(attacked.detach().cpu().numpy()), parts[1], parts[2]


def _stack(images: Sequence[Any]) -> Images:
    """Return some images as a batch; each is checked by itself, since a stack has one dtype."""
    rows: list[Images] = []
    for image in images:
        with checks.in_one_line("an image of the batch", "give an array of numbers"):
            held = image if isinstance(image, torch.Tensor) else np.asanyarray(image)
            rows.append(checks.images(held[None], shape=rows[0].shape[1:] if rows else None))
    return torch.cat([row.detach().float() for row in rows])


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {"index2label": dict(enumerate(classes))} if classes else {}
