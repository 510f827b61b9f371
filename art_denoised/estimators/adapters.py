"""What comes from ART: classifiers as plain modules or query functions, attacks as ours."""

from __future__ import annotations

import difflib
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack, evasion
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import ClassifierMixin
from art.estimators.classification.pytorch import PyTorchClassifier
from torch import nn

from art_denoised import checks
from art_denoised.attacks.suites import ClassAttack, Outcome, as_module
from art_denoised.checks import InputError
from art_denoised.smoothing.blackbox import Answer, Ask
from art_denoised.types import Images, Labels, Logits

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
    names = {
        name.lower(): name
        for name, one in vars(evasion).items()
        if inspect.isclass(one) and issubclass(one, EvasionAttack)
    }
    if kind not in names.values():
        close = difflib.get_close_matches(kind.lower(), names, 1)
        hint = f"did you mean {names[close[0]]}?" if close else "give ProjectedGradientDescent"
        raise InputError(f"ART has no evasion attack {kind!r}; {hint}")
    if kind in _TARGETED:
        raise InputError(f"art:{kind} leads to given classes; give an untargeted attack")
    return getattr(evasion, kind)


def _estimator(model: nn.Module, x: Images) -> PyTorchClassifier:
    return PyTorchClassifier(
        model=as_module(model),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=checks.class_count(model, x),
        clip_values=(0.0, 1.0),
        device_type=x.device.type if x.device.type == "cpu" else "gpu",
    )
