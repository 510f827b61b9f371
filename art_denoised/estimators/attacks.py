"""The evasion attacks of the Adversarial Robustness Toolbox behind ``attack(model, x, y)``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack, evasion
from art.estimators.classification.pytorch import PyTorchClassifier
from torch import nn

from art_denoised import checks
from art_denoised.attacks.suites import ClassAttack, Outcome, as_module
from art_denoised.checks import InputError
from art_denoised.types import Images, Labels

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
_FIXED_NORMS = {"BasicIterativeMethod": "linf", "VirtualAdversarialMethod": "l2"}


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

    @property
    def mixed(self) -> bool:  # type: ignore[override]
        """Whether it is AutoAttack, with Square in it."""
        return self.kind == "AutoAttack"

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack.

        Raises:
            InputError: ART has no such attack, it cannot attack such a model, or an option is
                wrong.
        """
        known: Any = getattr(evasion, self.kind, None)
        is_attack = inspect.isclass(known) and issubclass(known, EvasionAttack)
        if not is_attack:
            raise InputError(
                f"ART has no evasion attack {self.kind!r}; for example ProjectedGradientDescent"
            )
        norm = np.inf if self.norm == "linf" else 2
        arguments = self.arguments(
            known, eps=self.eps, norm=norm, eps_step=self.eps / 4, verbose=False
        )
        estimator = _estimator(model, x) if isinstance(model, nn.Module) else model
        try:
            attack = known(estimator, **arguments)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.name} cannot be made: {error}") from None
        found = attack.generate(x.detach().cpu().numpy(), y.cpu().numpy())
        return self.outcome(known, x, torch.from_numpy(np.asarray(found)).to(x))


def _estimator(model: nn.Module, x: Images) -> PyTorchClassifier:
    return PyTorchClassifier(
        model=as_module(model),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=checks.class_count(model, x[:1]),
        clip_values=(0.0, 1.0),
        device_type=x.device.type if x.device.type == "cpu" else "gpu",
    )
