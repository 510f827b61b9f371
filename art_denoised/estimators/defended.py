"""What all our ART classifiers have in common: they are what their torch module is."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from art.estimators.classification.pytorch import PyTorchClassifier
from art.utils import check_and_transform_label_format
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


def optimizer_like(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Return a fresh optimizer of that type and those defaults for the parameters of ``model``.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> optimizer_like(torch.optim.AdamW(net.parameters(), lr=0.1), net).defaults["lr"]
        0.1
    """
    kind: Any = type(optimizer)  # AdamW keeps more in its defaults than it takes as arguments
    known = inspect.signature(kind).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    return kind(model.parameters(), **options)


class _Whole(nn.Module):
    """What ART calls: the outputs of all layers, here of one, which is the module.

    ART's own takes an nn.Sequential apart, and its TRADES trainer then reads the output of the
    first layer as logits.
    """

    get_layers = ("output",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self._model(x)]


class DefendedClassifier(PyTorchClassifier):
    """An ART classifier over a module that is the whole defence.

    Beside ART's: input is checked, the global random state is left alone, and pickles leave no
    files behind.
    """

    def predict(
        self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """Return the outputs of ``.model``, exactly.

        Args:
            x: Images (batch, channels, height, width), float. They may leave ``clip_values`` a
                little, as those of an attack under way do.
            batch_size: Images at once.
            training_mode: As in ART, which also leaves the model in this mode.
            **kwargs: Ignored, as in ART.

        Returns:
            float32 array (batch, nb_classes).

        Raises:
            InputError: Shape, dtype, NaN, or images in other units.
        """
        # Not ART's loop: its DataLoader draws from the global random state.
        self.model.train(mode=training_mode)
        with torch.no_grad():
            images = self._check(x, slack=1.0)
            batches = torch.split(images, checks.count("batch_size", batch_size))
            outputs = [self.model(batch.to(self.device)).float().cpu() for batch in batches]
        return torch.cat(outputs).numpy()

    def loss_gradient(self, x: Any, y: Any, training_mode: bool = False, **kwargs: Any) -> Any:
        """Return the gradient of the loss of ``.model`` in the images.

        Args:
            x: Images, array or tensor (batch, channels, height, width).
            y: Labels: indices (batch,), or one-hot or probabilities (batch, nb_classes).
            training_mode: As in ART.
            **kwargs: Ignored, as in ART.

        Returns:
            Gradients, shaped like ``x``.
        """
        y = check_and_transform_label_format(y, self.nb_classes)
        return super().loss_gradient(x, y, training_mode=training_mode, **kwargs)

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name, as in ART, which cannot take the module that it hands out."""
        model = kwargs.pop("model", None)
        if model is not None:
            self._model = self._make_model_wrapper(model).to(self._device)
        super().set_params(**kwargs)

    def clone_for_refitting(self) -> Self:
        """Return a copy with freshly initialised weights and its own optimizer."""
        clone = copy.deepcopy(self)
        clone.reset()
        if self._optimizer is not None:
            clone._optimizer = optimizer_like(self._optimizer, clone.model)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the device; unlike ART's, writes no files."""
        state = self.__dict__.copy()
        del state["_device"]
        state["_model"] = self.model
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        gpu = self.device_type != "cpu" and torch.cuda.is_available()
        self._device = torch.device(f"cuda:{torch.cuda.current_device()}" if gpu else "cpu")
        self._model = self._make_model_wrapper(state["_model"]).to(self._device)

    def _make_model_wrapper(self, model: nn.Module) -> nn.Module:
        return _Whole(model)

    def _check(self, x: Any, slack: float = 0.0) -> torch.Tensor:
        x = checks.images(x, clip_values=self.clip_values, shape=self.input_shape, slack=slack)
        return x.float()

    def _check_classes(self) -> None:
        """Classify one grey image, to find a misfit before the work starts."""
        middle = torch.as_tensor(np.mean(self.clip_values, axis=0), dtype=torch.float32)
        grey = middle.expand(1, *self.input_shape).to(self.device)
        classes = checks.class_count(self.model, grey)
        if classes != self.nb_classes:
            raise InputError(f"nb_classes is {self.nb_classes} but the model returns {classes}")
