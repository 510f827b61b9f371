"""Feature denoising and adversarial training with the faces of ART."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from art.defences.trainer import Trainer
from art.estimators.classification.pytorch import PyTorchClassifier
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.estimators.defended import (
    DefendedClassifier,
    check_optimizer,
    image_shape,
    optimizer_like,
    without_preprocessing,
)
from art_denoised.networks.activations import smooth_activations
from art_denoised.networks.feature_denoising import Operation
from art_denoised.networks.surgery import add_feature_denoising
from art_denoised.training.config import TrainingConfig
from art_denoised.training.loop import EpochRow
from art_denoised.training.robust import RECIPES, ROBUST_CONFIG, Recipe, train_robust


class FeatureDenoisingClassifier(DefendedClassifier):
    """Any backbone with denoising blocks and smooth activations, as an ART classifier.

    ``.model`` is a copy of the backbone, changed. It is made robust by training, with
    `RobustTrainer` or the trainers of ART: the blocks alone defend nothing.

    Source: Xie et al., "Feature Denoising for Improving Adversarial Robustness" (CVPR 2019, arXiv
    1812.03411); "Smooth Adversarial Training" (arXiv 2006.14536) for the activations.

    Args:
        backbone: Images in [0, 1] to logits.
        input_shape: (channels, height, width).
        nb_classes: Number of logits.
        operation: Name of the denoising operation of the blocks; None adds no blocks.
        where: "stages", or names of the modules that a block follows.
        block: Further options of `FeatureDenoising`.
        activation: Name or module of the smooth activation that replaces ReLU; None keeps ReLU.
        optimizer: Optimizer whose type and defaults are taken for the parameters of the changed
            copy; for ``fit`` and for ART's trainers.
        **kwargs: ``loss``, ``device_type`` and further arguments of PyTorchClassifier.
            Preprocessing and postprocessing are refused: they belong to the backbone.

    Raises:
        InputError: The backbone cannot be changed as asked, or cannot take such images.

    Example:
        >>> from torchvision.models import resnet18
        >>> classifier = FeatureDenoisingClassifier(
        ...     resnet18(num_classes=10), input_shape=(3, 32, 32), nb_classes=10,
        ...     operation="mean", activation="silu", device_type="cpu",
        ... )
        >>> classifier.predict(np.zeros((2, 3, 32, 32), np.float32)).shape
        (2, 10)
    """

    _layers_see_images = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        nb_classes: int,
        operation: Operation | None = "gaussian",
        where: str | Sequence[str] = "stages",
        block: Mapping[str, Any] | None = None,
        activation: str | nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        shape, model = image_shape(input_shape), copy.deepcopy(backbone)
        if activation is not None:
            model = smooth_activations(model, activation, input_shape=shape)
        if operation is not None:
            model = add_feature_denoising(
                model, where, operation, input_shape=shape, **(block or {})
            )
        check_optimizer(optimizer)
        if optimizer is not None:
            optimizer = optimizer_like(optimizer, model)
        super().__init__(
            model, input_shape=shape, nb_classes=nb_classes, optimizer=optimizer, **kwargs
        )


class RobustTrainer(Trainer):
    """`train_robust` as a trainer of ART: images stay tensors, and a recipe is the attack.

    Args:
        classifier: Any PyTorchClassifier for images in [0, 1]. Its module is trained, behind its
            preprocessing; its optimizer and loss are not used.
        recipe: Recipe as `train_robust` takes it.
        config: How to train.

    Attributes:
        rows: Rows of the epochs of the last training.

    Raises:
        InputError: No PyTorchClassifier, other images than in [0, 1], preprocessing that is not
            torch, or something else than a recipe or a config.

    Example:
        >>> from art_denoised.demo import digits_network
        >>> classifier = FeatureDenoisingClassifier(
        ...     digits_network(), input_shape=(1, 8, 8), nb_classes=10, operation=None,
        ...     device_type="cpu",
        ... )
        >>> trainer = RobustTrainer(classifier, recipe="sat")
        >>> x, y = np.random.rand(64, 1, 8, 8).astype(np.float32), np.arange(64) % 10
        >>> trainer.fit(x, y, nb_epochs=2, batch_size=32)
        >>> len(trainer.rows), trainer.get_classifier() is classifier
        (2, True)
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        *,
        recipe: str | Recipe = "pgd",
        config: TrainingConfig = ROBUST_CONFIG,
    ) -> None:
        if not isinstance(classifier, PyTorchClassifier):
            raise InputError(
                f"classifier is a {type(classifier).__name__}; give an ART PyTorchClassifier"
            )
        checks.unit_range("training", classifier.clip_values)
        if isinstance(recipe, str):
            checks.choice("recipe", recipe, RECIPES)
        elif isinstance(recipe, type) or not callable(getattr(recipe, "loss", None)):
            raise InputError(
                f"recipe is {checks.shown(recipe)}; give one of {', '.join(RECIPES)}, or a Recipe"
            )
        if not isinstance(config, TrainingConfig):
            raise InputError(f"config is {checks.shown(config)}; give a TrainingConfig")
        super().__init__(classifier)
        self.recipe, self.config = recipe, config
        self.rows: list[EpochRow] = []
        without_preprocessing(classifier)  # refuses what cannot be trained

    def fit(
        self,
        x: np.ndarray,
        y: np.ndarray,
        validation_data: tuple[np.ndarray, np.ndarray] | None = None,
        batch_size: int | None = None,
        nb_epochs: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Train the classifier's module in place.

        Args:
            x: Images (batch, channels, height, width) in [0, 1].
            y: Labels: indices (batch,), or one-hot (batch, nb_classes).
            validation_data: Images and labels that are attacked after each epoch.
            batch_size: Number of images in a step; None: that of the config.
            nb_epochs: Number of passes over the images; None: that of the config.
            **kwargs: Further options of `train_robust`: ``run``, ``resume`` and ``progress``, which
                is off by default.

        Raises:
            InputError: `train_robust` refuses.
        """
        config = replace(
            self.config,
            batch_size=self.config.batch_size if batch_size is None else batch_size,
            epochs=self.config.epochs if nb_epochs is None else nb_epochs,
        )
        validation = None
        if validation_data is not None:
            held_out = checks.several("validation_data", validation_data, "images and of labels")
            if len(held_out) != 2:
                raise InputError(
                    f"validation_data holds {len(held_out)} entries; give a pair (x, y) of images "
                    "and labels"
                )
            validation = self._data(*held_out)
        self.rows = train_robust(
            without_preprocessing(self._classifier),  # as it is now: parameters can be set
            self._data(x, y),
            self.recipe,
            config,
            validation=validation,
            **{"progress": False, **kwargs},
        )

    def _data(self, x: np.ndarray, y: np.ndarray) -> torch.utils.data.TensorDataset:
        labels = checks.class_indices(y, self._classifier.nb_classes)
        images = checks.images(x, shape=self._classifier.input_shape).detach().float()
        checks.one_each(images, labels)
        return torch.utils.data.TensorDataset(images, labels)
