"""What all our ART classifiers have in common: they are what their torch module is."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

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

    ART's own wrapper takes an nn.Sequential apart, and its TRADES trainer then reads the output of
    the first layer as logits.
    """

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        super().__init__()
        self._model = model
        self.get_layers = layers

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self._model(x)]


class DefendedClassifier(PyTorchClassifier):
    """An ART classifier over a module that is the whole defence.

    Beside ART's: input is checked, the global random state is left alone, pickles leave no files
    behind, and preprocessing belongs to the module, so that predictions and gradients are of one
    function.
    """

    # Whether the layers of the module see one row an image: those of a defence that makes many
    # noisy copies of an image do not, and detectors would read samples as images.
    _layers_see_images: ClassVar[bool] = False
    _shown: ClassVar[tuple[str, ...]] = ()  # attributes in the repr, beside those of all
    _warned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_processing(kwargs)
        super().__init__(*args, **kwargs)

    def predict(
        self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """Return the outputs of ``.model``, exactly.

        Args:
            x: Images (batch, channels, height, width), float. Images outside ``clip_values``, as
                attacks make that clip at the end only, are classified with one warning.
            batch_size: Number of images at once.
            training_mode: Whether the model is put into training mode, where it stays, as in ART.
            **kwargs: Ignored, as in ART.

        Returns:
            float32 array (batch, nb_classes); (0, nb_classes) for an empty batch.

        Raises:
            InputError: Shape, dtype, NaN or infinite pixels.
        """
        # Not ART's loop: its DataLoader draws from the global random state.
        self.model.train(mode=training_mode)
        if np.shape(x) == (0, *self.input_shape):
            return np.zeros((0, self.nb_classes), np.float32)
        with torch.no_grad():
            images = self._attacked(x)
            batches = torch.split(images, checks.count("batch_size", batch_size))
            outputs = [self.model(batch.to(self.device)).float().cpu() for batch in batches]
        return torch.cat(outputs).numpy()

    def loss_gradient(self, x: Any, y: Any, training_mode: bool = False, **kwargs: Any) -> Any:
        """Return the gradient of the loss of ``.model`` in the images.

        Args:
            x: Images, array or tensor (batch, channels, height, width).
            y: Labels: indices (batch,), or one-hot or probabilities (batch, nb_classes).
            training_mode: Whether the model is put into training mode.
            **kwargs: Ignored, as in ART.

        Returns:
            Gradients, shaped like ``x``.
        """
        y = check_and_transform_label_format(y, self.nb_classes)
        return super().loss_gradient(x, y, training_mode=training_mode, **kwargs)

    def get_activations(
        self,
        x: np.ndarray | torch.Tensor,
        layer: int | str | None = None,
        batch_size: int = 128,
        framework: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Return the output of a layer of ``.model``.

        Args:
            x: Images (batch, channels, height, width).
            layer: Name or number of the layer, as in ``layer_names``.
            batch_size: Number of images at once; with ``framework`` all are.
            framework: Return a tensor that can be differentiated.

        Returns:
            Activations, one row for each image.

        Raises:
            InputError: No such layer, or a defence whose layers see noisy copies and not images.
        """
        hooked = dict(self.model.named_modules())[self._layer(layer)]
        found: list[torch.Tensor] = []
        handle = hooked.register_forward_hook(lambda module, args, output: found.append(output))
        self.model.eval()
        try:
            if framework:
                self.model(torch.as_tensor(x).to(self.device))
                return found[0]
            with torch.no_grad():
                for batch in torch.split(torch.as_tensor(x), batch_size):
                    self.model(batch.to(self.device))
        finally:
            handle.remove()
        return torch.cat(found).cpu().numpy()

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name, as in ART, which cannot take the module that it hands out.

        Raises:
            InputError: Preprocessing or postprocessing, which predictions and gradients would see
                differently.
        """
        _refuse_processing(kwargs, self)
        model = kwargs.pop("model", None)
        if model is not None:
            self._model = self._make_model_wrapper(model).to(self._device)
        super().set_params(**kwargs)

    def clone_for_refitting(self) -> Self:
        """Return a copy with its own optimizer, in which what ``fit`` trains is fresh."""
        clone = copy.deepcopy(self)
        clone.reset()
        if self._optimizer is not None:
            clone._optimizer = optimizer_like(self._optimizer, clone.model)
        return clone

    def reset(self) -> None:
        """Initialise what ``fit`` trains, and nothing else."""
        trained = self._trained_by_fit
        if trained is not None:
            trained.apply(_initialise)

    def __repr__(self) -> str:
        """Return defence, noise, classes and device in a line."""
        names = (*self._shown, "input_shape", "nb_classes")
        told = [f"{name}={getattr(self, name)!r}" for name in names]
        low, high = (float(np.min(self.clip_values[0])), float(np.max(self.clip_values[1])))
        told.append(f"clip_values=({low:g}, {high:g})")
        return f"{type(self).__name__}({', '.join(told)}, device={str(self.device)!r})"

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

    @property
    def _trained_by_fit(self) -> nn.Module | None:
        return self.model

    def _make_model_wrapper(self, model: nn.Module) -> nn.Module:
        layers = [name for name, _ in model.named_children()] if self._layers_see_images else []
        return _Whole(model, layers)

    def _layer(self, layer: int | str | None) -> str:
        names = self.layer_names
        if not self._layers_see_images:
            raise InputError(
                f"layers of {type(self).__name__} see noisy copies, not images; put the classifier "
                "behind it into a PyTorchClassifier and ask that one"
            )
        if isinstance(layer, str) and layer in names:
            return layer
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            return names[layer]
        raise InputError(f"layer is {layer!r}; give one of {', '.join(names)}, or its number")

    def _attacked(self, x: Any) -> torch.Tensor:
        """Return images of an attack under way, warning once of those in other units."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            x = checks.attacked_images(x, clip_values=self.clip_values, shape=self.input_shape)
        if found and not self._warned:
            self._warned = True
            warnings.warn(str(found[0].message), stacklevel=3)
        return x.float()

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


def _refuse_processing(options: dict[str, Any], estimator: object = None) -> None:
    """Refuse what predictions and gradients of ART would see differently, unless it is there."""
    for name in ("preprocessing", "preprocessing_defences", "postprocessing_defences"):
        if options.get(name) and options[name] is not getattr(estimator, name, None):
            raise InputError(
                f"{name} is {options[name]}; it must be part of the module: wrap the classifier "
                "in a PyTorchClassifier with torch preprocessing and build the defence over it"
            )


def _initialise(module: nn.Module) -> None:
    start_again = getattr(module, "reset_parameters", None)
    if callable(start_again):
        start_again()
