"""What our ART classifiers have in common, and what comes from ART: classifiers and attacks."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from art.attacks import EvasionAttack, evasion
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import ClassifierMixin
from art.estimators.classification.classifier import InputFilter
from art.estimators.classification.pytorch import PyTorchClassifier
from torch import nn

from art_denoised import checks
from art_denoised.attacks.suites import ClassAttack, Outcome, as_module, class_named
from art_denoised.checks import InputError
from art_denoised.smoothing.queries import Answer, Ask
from art_denoised.types import Images, Labels, Logits

if TYPE_CHECKING:
    from typing import Self

_BLIND = (
    "BoundaryAttack",
    "GRAPHITEBlackbox",
    "GeoDA",
    "HopSkipJump",
    "PixelAttack",
    "SignOPTAttack",
    "SimBA",
    "SpatialTransformation",
    "SquareAttack",
    "ThresholdAttack",
    "ZooAttack",
)
# Whose labels are the classes to reach: the true ones would make every model look robust.
_TARGETED = (
    *("GRAPHITEBlackbox", "GRAPHITEWhiteboxPyTorch", "LowProFool"),
    "TargetedUniversalPerturbation",
)
_DRAWS_TARGETS = "SaliencyMapMethod"  # wrong classes, where it is given no labels
_FIXED_NORMS = {"BasicIterativeMethod": "linf", "VirtualAdversarialMethod": "l2"}


def optimizer_like(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Return a fresh optimizer of that type and those defaults for the parameters of ``model``."""
    kind: Any = type(optimizer)  # AdamW keeps more in its defaults than it takes as arguments
    known = inspect.signature(kind).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    return kind(model.parameters(), **options)


class _Whole(nn.Module):
    """What ART calls: the outputs of all layers, here of one, which is the module."""

    # ART's own wrapper takes an nn.Sequential apart, and its TRADES trainer then reads the output
    # of the first layer as logits.

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        super().__init__()
        self._model = model
        self.get_layers = layers

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = self._model(x)
        if torch.is_grad_enabled() and not outputs.requires_grad:
            outputs.requires_grad_().register_hook(_refuse_weights)
        return [outputs]


def _refuse_weights(gradient: torch.Tensor) -> None:
    """Say what torch says of a tensor without a gradient, where a trainer asks for one."""
    raise InputError(
        "the weights of this defence get no gradient in eval mode; use a trainer that puts the "
        "model into training mode, such as AdversarialTrainerMadryPGD"
    )


class _Unfiltered(InputFilter):
    """ART's metaclass, without its wrapper of `predict` and `fit`, which makes arrays of tensors.

    That fails for a tensor with a gradient, before our own checks see it.
    """

    def __init__(self, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, {})


class DefendedClassifier(PyTorchClassifier, metaclass=_Unfiltered):
    """An ART classifier over a module that is the whole defence.

    Beside ART's: images and labels are checked, no images give no rows, the global random state is
    left alone, pickles leave no files behind, and preprocessing belongs to the module, so that
    predictions and gradients are of one function. The arguments are those of PyTorchClassifier.
    """

    # Whether the module takes images in other ranges than [0, 1].
    _any_range: ClassVar[bool] = False

    # Whether the layers of the module see one row an image: those of a defence that makes many
    # noisy copies of an image do not, and detectors would read samples as images.
    _layers_see_images: ClassVar[bool] = False
    _shown: ClassVar[tuple[str, ...]] = ()  # attributes in the repr, beside those of all
    _warned = False

    def __init__(
        self,
        model: nn.Module,
        *,
        input_shape: Sequence[int],
        nb_classes: int,
        loss: nn.Module | None = None,
        clip_values: tuple[Any, Any] = (0.0, 1.0),
        **kwargs: Any,
    ) -> None:
        shape = image_shape(input_shape)
        clip_values = checks.pixel_bounds(clip_values, shape)
        if not self._any_range:
            checks.unit_range(type(self).__name__, clip_values)
        options = {"loss": nn.CrossEntropyLoss() if loss is None else loss, **kwargs}
        _check_options(options)
        super().__init__(
            model=model.eval(),
            input_shape=shape,
            nb_classes=checks.count("nb_classes", nb_classes, 2),
            clip_values=clip_values,
            **options,
        )
        self._check_classes(self.model, self.nb_classes)

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
            float32 array (batch, nb_classes).

        Raises:
            InputError: Shape, dtype, NaN or infinite pixels.
        """
        # Not ART's loop: its DataLoader draws from the global random state.
        self.model.train(mode=training_mode)
        batches = torch.split(self._attacked(x), checks.count("batch_size", batch_size))
        if not len(batches[0]):
            return np.zeros((0, self.nb_classes), np.float32)
        with torch.no_grad():
            # Copies: the model may write into its input, which may be the caller's array.
            inputs = (batch.to(self.device, copy=True) for batch in batches)
            outputs = [self.model(batch).float().cpu() for batch in inputs]
        return torch.cat(outputs).numpy()

    def fit(
        self,
        x: np.ndarray,
        y: np.ndarray,
        batch_size: int = 128,
        nb_epochs: int = 10,
        *,
        drop_last: bool = False,
        **kwargs: Any,
    ) -> None:
        """Train the module on images and labels with the estimator's optimizer, as in ART.

        Raises:
            InputError: There is no optimizer of the module, no step would be taken, or images or
                labels cannot be used.
        """
        images = checks.images(x, clip_values=self.clip_values, shape=self.input_shape)
        self._check_training(nb_epochs)
        checks.count("batch_size", batch_size)
        if checks.flag("drop_last", drop_last) and len(images) < batch_size:
            raise InputError(
                f"drop_last is True and batch_size is {batch_size}, but there are {len(images)} "
                "images, so no batch is left; give a smaller batch_size"
            )
        pair = self._pair(images.detach().cpu().numpy(), y)
        super().fit(*pair, batch_size, nb_epochs, drop_last=drop_last, **kwargs)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Train the module on the batches of a generator of ART."""
        self._check_training(nb_epochs)
        super().fit_generator(generator, nb_epochs, **kwargs)

    def compute_loss(self, x: Any, y: Any, reduction: str = "none", **kwargs: Any) -> Any:
        """Return the loss of ``.model``: for each image, or its "mean" or "sum" over the images."""
        checks.choice("reduction", reduction, ("none", "mean", "sum"))
        x, y = self._pair(x, y)
        if not len(x) and reduction == "mean":
            raise InputError("there are no images, so their mean loss is undefined; give one")
        if not hasattr(self.loss, "reduction"):
            raise InputError(
                f"the loss {checks.shown(self.loss)} has no attribute 'reduction'; give one that "
                "has, such as nn.CrossEntropyLoss()"
            )
        return super().compute_loss(x, y, reduction=reduction, **kwargs)

    def loss_gradient(self, x: Any, y: Any, training_mode: bool = False, **kwargs: Any) -> Any:
        """Return the gradient of the loss of ``.model`` in the images, shaped like them.

        Labels are indices (batch,), or one-hot or probabilities (batch, nb_classes).
        """
        x, y = self._pair(x, y)
        if not len(x):
            return x
        return super().loss_gradient(x, y, training_mode=training_mode, **kwargs)

    def class_gradient(self, x: Any, label: Any = None, **kwargs: Any) -> np.ndarray:
        """Return the gradients of outputs of ``.model``, (batch, classes, channels, height, width).

        ``label`` is the class whose output it is, for all images or for each; None: every class.
        """
        if label is not None:
            chosen = checks.labels(np.atleast_1d(label), self.nb_classes).numpy()
            label = int(chosen[0]) if np.ndim(label) == 0 else chosen
        images = self._attacked(x).detach().cpu().numpy()
        if not len(images):
            classes = self.nb_classes if label is None else 1
            return np.zeros((0, classes, *self.input_shape), images.dtype)
        if np.ndim(label):
            checks.one_each(images, label)
        return super().class_gradient(images, label, **kwargs)

    def get_activations(
        self,
        x: np.ndarray | torch.Tensor,
        layer: int | str | None = None,
        batch_size: int = 128,
        framework: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Return the output of a layer of ``.model``, one row for each image.

        Args:
            x: Images (batch, channels, height, width).
            layer: Name or number of the layer, as in ``layer_names``.
            batch_size: Number of images at once; with ``framework`` all are.
            framework: Return a tensor that can be differentiated.

        Raises:
            InputError: No such layer, or a defence whose layers see noisy copies and not images.
        """
        hooked = dict(self.model.named_modules())[self._layer(layer)]
        images = self._attacked(x)
        found: list[torch.Tensor] = []
        handle = hooked.register_forward_hook(lambda module, args, output: found.append(output))
        self.model.eval()
        try:
            if framework:
                self.model(images.to(self.device))
                return found[0]
            with torch.no_grad():
                shown = images if len(images) else self._grey()
                for batch in torch.split(shown, checks.count("batch_size", batch_size)):
                    self.model(batch.to(self.device))
        finally:
            handle.remove()
        return torch.cat(found)[: len(images)].cpu().numpy()

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers of ``.model``, whose outputs detectors read.

        Raises:
            InputError: The layers of this defence see noisy copies and not images.
        """
        if not self._layers_see_images:
            raise InputError(
                f"layers of {type(self).__name__} see noisy copies, not images; put the classifier "
                "behind it into a PyTorchClassifier and ask that one"
            )
        return self._layer_names

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name, as in ART, which cannot take the module that it hands out."""
        _check_options(kwargs, self)
        kwargs = {"nb_classes": self.nb_classes, "input_shape": self.input_shape, **kwargs}
        classes = checks.count("nb_classes", kwargs["nb_classes"], 2)
        shape = kwargs["input_shape"] = image_shape(kwargs["input_shape"])
        model = kwargs.pop("model", self.model)
        given = kwargs.pop("clip_values", self.clip_values)
        if not same_range(checks.pixel_bounds(given, shape), self.clip_values):
            raise InputError(
                f"clip_values are {checks.shown(given)}, but this defence is of images in "
                f"{_ends(self.clip_values)}; build another {type(self).__name__}"
            )
        if (model, classes, shape) != (self.model, self.nb_classes, self.input_shape):
            self._check_classes(model, classes, shape)
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
        if self._trained_by_fit is not None:
            self._trained_by_fit.apply(_initialise)

    def __repr__(self) -> str:
        """Return defence, noise, classes and device in a line."""
        names = (*self._shown, "input_shape", "nb_classes")
        told = [f"{name}={getattr(self, name)!r}" for name in names]
        told.append(f"clip_values={_ends(self.clip_values)}")
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

    def _check_training(self, nb_epochs: int) -> None:
        checks.count("nb_epochs", nb_epochs)
        if self.optimizer is None:
            raise InputError("optimizer is None; build the estimator with one to train it")
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if trained.isdisjoint(map(id, self.model.parameters())):
            raise InputError(
                f"optimizer is {type(self.optimizer).__name__} over parameters of another module, "
                "so fit would train nothing; give one over those of the model"
            )

    def _make_model_wrapper(self, model: nn.Module) -> nn.Module:
        layers = [name for name, _ in model.named_children()] if self._layers_see_images else []
        return _Whole(model, layers)

    def _layer(self, layer: int | str | None) -> str:
        names = self.layer_names
        if isinstance(layer, str) and layer in names:
            return layer
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            return names[layer]
        raise InputError(f"layer is {layer!r}; give one of {', '.join(names)}, or its number")

    def _attacked(self, x: Any) -> torch.Tensor:
        """Return images of an attack under way, warning once of those in other units."""
        dtype = checks.model_dtype(self.model)
        dtype = dtype if dtype == torch.float64 else torch.float32
        x = checks.batch(x)
        if tuple(x.shape) == (0, *self.input_shape):
            return torch.zeros(0, *self.input_shape, dtype=dtype)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            x = checks.attacked_images(x, clip_values=self.clip_values, shape=self.input_shape)
        if found and not self._warned:
            self._warned = True
            warnings.warn(str(found[0].message), stacklevel=3)
        return x.to(dtype)

    def _pair(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return images and rows of probabilities, both tensors if the images are, else arrays."""
        images, rows = self._attacked(x), checks.label_rows(y, self.nb_classes)
        checks.one_each(images, rows)
        if isinstance(x, torch.Tensor):
            return images, rows.to(images)
        return images.cpu().numpy(), rows.to(images.dtype).detach().cpu().numpy()

    def _check_classes(
        self, model: nn.Module, expected: int | None, shape: tuple[int, ...] | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model is {checks.shown(model)}; give an nn.Module")
        classes = checks.class_count(model.eval().to(self.device), self._grey(shape))
        if classes != expected:
            raise InputError(f"nb_classes is {expected} but the model returns {classes}")

    def _grey(self, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        middle = torch.as_tensor(np.mean(self.clip_values, axis=0), dtype=torch.float32)
        return middle.expand(1, *(shape or self.input_shape)).to(self.device)


class RandomDefence(DefendedClassifier):
    """A defence with noise, whose seed can be set."""

    estimator_params: ClassVar[list[str]] = [*PyTorchClassifier.estimator_params, "seed"]

    @property
    def seed(self) -> int | None:
        """Seed of all noise; None: fresh noise in every call. It may be set."""
        return self._random[-1].seed

    @seed.setter
    def seed(self, value: int | None) -> None:
        for part in self._random:
            part.seed = checks.seed(value)

    def set_params(self, **kwargs: Any) -> None:
        """Set parameters by name, as in ART; a model must be a defence of the same kind."""
        model = kwargs.get("model", self.model)
        if _kinds(model) != _kinds(self.model):
            raise InputError(
                f"model is a {_kinds(model)}, not the {_kinds(self.model)} that is "
                f"this defence; build a {type(self).__name__} over it"
            )
        super().set_params(**kwargs)

    @property
    def _random(self) -> list[Any]:
        """Parts of the module that draw noise."""
        return [self.model]


def _kinds(model: object) -> str:
    """Return the type of a module, and of those in a sequence, which may be any."""
    parts = [type(part).__name__ for part in model] if isinstance(model, nn.Sequential) else []
    return type(model).__name__ + (f" of {', '.join(parts)}" if parts else "")


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return a shape as (channels, height, width), each a positive number."""
    sides = checks.shape("input_shape", shape)
    if len(sides) != 3:
        raise InputError(f"input_shape is {sides}; give (channels, height, width)")
    channels, height, width = sides
    return channels, height, width


def same_range(one: Any, other: Any) -> bool:
    """Return whether two ranges of pixels are one in float32, in which ART keeps them."""
    pairs = [(np.float32(a), np.float32(b)) for a, b in zip(one, other, strict=True)]
    try:
        return all(np.all(a == b) for a, b in pairs)
    except ValueError:  # arrays of shapes that do not fit
        return False


def _ends(clip_values: Any) -> str:
    return f"({np.min(clip_values[0]):g}, {np.max(clip_values[1]):g})"


def _check_options(options: dict[str, Any], estimator: object = None) -> None:
    """Check arguments of PyTorchClassifier in place, those of ``estimator`` if it is there."""
    _refuse_processing(options, estimator)
    if not checks.flag("channels_first", options.get("channels_first", True)):
        raise InputError("channels_first is False; give images as (channels, height, width)")
    if checks.flag("use_amp", options.get("use_amp", False)):
        raise InputError(
            "use_amp is True, which needs the abandoned package apex; leave it out, and put "
            "torch.autocast into the module"
        )
    if not isinstance(options.get("loss", nn.CrossEntropyLoss()), nn.Module):
        raise InputError(
            f"loss is {checks.shown(options['loss'])}; give a module, such as nn.CrossEntropyLoss()"
        )
    check_optimizer(options.get("optimizer"))


def check_optimizer(optimizer: object) -> None:
    """Check that an optimizer is one; None is none."""
    if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer)):
        raise InputError(
            f"optimizer is {checks.shown(optimizer)}; give one of torch.optim over the parameters "
            "of the model"
        )


def _refuse_processing(options: dict[str, Any], estimator: object = None) -> None:
    """Refuse what predictions and gradients of ART would see differently, unless it is there."""
    for name in ("preprocessing", "preprocessing_defences", "postprocessing_defences"):
        given = options.get(name)
        if isinstance(given, (list, tuple)) and not given:
            del options[name]  # ART does not take every empty one
        elif given is not None and given is not getattr(estimator, name, None):
            raise InputError(
                f"{name} is {checks.shown(given)}; it must be part of the module: wrap the "
                "classifier in a PyTorchClassifier with torch preprocessing and build the defence "
                "over it"
            )


def _initialise(module: nn.Module) -> None:
    start_again = getattr(module, "reset_parameters", None)
    if callable(start_again):
        start_again()


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


@dataclass(frozen=True)
class ArtAttack(ClassAttack):
    """Any evasion attack of ART, by the name of its class.

    ART estimators are attacked as they are; a plain module is put into a PyTorchClassifier first.
    ``eps`` and ``norm`` are handed on where the class takes them, ``eps_step`` is eps / 4 unless
    given. Classes without ``eps`` look for the nearest adversarial (CarliniL2Method, HopSkipJump):
    what they find outside the ball is a failure, and the image itself is returned.

    Attributes:
        kind: Name of the class.
        options: Its other arguments.

    Example:
        >>> import torch
        >>> from art_denoised.demo import digits_classifier
        >>> attack = ArtAttack(0.2, kind="ProjectedGradientDescent", options={"max_iter": 5})
        >>> x = torch.rand(2, 1, 8, 8)
        >>> attack(digits_classifier(), x, torch.tensor([3, 8])).shape
        torch.Size([2, 1, 8, 8])
    """

    library = "ART"
    fixed_norms = _FIXED_NORMS
    blind = _BLIND

    kind: str = "ProjectedGradientDescent"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arguments(_attack_class(self.kind))

    @property
    def mixed(self) -> bool:
        """Whether it is AutoAttack, with Square in it."""
        return self.kind == "AutoAttack"

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack."""
        known = _attack_class(self.kind)
        norm = np.inf if self.norm == "linf" else 2
        arguments = self.arguments(
            known,
            eps=self.eps,
            norm=norm,
            eps_step=self.eps / 4,
            targeted=False,  # BoundaryAttack and SignOPTAttack are targeted by default
            verbose=False,
        )
        estimator = _estimator(model, x) if isinstance(model, nn.Module) else model
        try:
            attack = known(estimator, **arguments)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.name} cannot be made: {error}") from None
        given = None if self.kind == _DRAWS_TARGETS else y.cpu().numpy()
        found = attack.generate(x.detach().cpu().numpy(), given)
        return self.outcome(known, x, torch.from_numpy(np.asarray(found)).to(x))


def _attack_class(kind: str) -> Any:
    words, example = "ART has no evasion attack", "ProjectedGradientDescent"
    found = class_named(kind, EvasionAttack, evasion, words, example)
    if kind in _TARGETED:
        raise InputError(f"art:{kind} leads to given classes; give an untargeted attack")
    return found


def _estimator(model: nn.Module, x: Images) -> PyTorchClassifier:
    return PyTorchClassifier(
        model=as_module(model),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=checks.class_count(model, x),
        clip_values=(0.0, 1.0),
        device_type=x.device.type if x.device.type == "cpu" else "gpu",
    )
