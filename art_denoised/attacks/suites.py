"""One face for the attacks of other libraries: ``attack(model, x, y) -> x_adv``.

The libraries run unchanged. What they leave behind in the process is undone: global seeds, modes of
the model's layers, AutoAttack's trace function, counters and log. A defence that draws from the
global generators gets a stream of its own while it is attacked, so that an attack which resets the
seed neither learns nor freezes its noise.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.contained import contained
from art_denoised.checks import InputError
from art_denoised.types import Images, Labels

Norm = Literal["linf", "l2"]
NORMS = ("linf", "l2")
INSTALL = "install it with: pip install '.[attacks]' in its clone"


class Outcome(NamedTuple):
    """The result of an attack.

    Attributes:
        x_adv: Attacked images.
        counted: Whether the attack itself judged each to be still right; None: it does not judge.
        flags: Warnings of the library about the model.
    """

    x_adv: Images
    counted: Tensor | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite(ABC):
    """An attack of another library within a ball.

    Attributes:
        eps: Radius of the ball, image units.
        norm: "linf" or "l2".
        seed: Seed of its random choices.
        gradient_free: Whether it sees scores or labels alone.
        mixed: Whether a part of it does, so that its successes need not be due to gradients.
    """

    gradient_free: ClassVar[bool] = False
    mixed: ClassVar[bool] = False

    eps: float
    _: KW_ONLY
    norm: Norm = "linf"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError(f"norm is {self.norm!r}; give one of {', '.join(NORMS)}")
        checks.eps(checks.positive("eps", self.eps), self.norm)
        checks.count("seed", self.seed, 0)

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables."""

    @abstractmethod
    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack a module, or an ART estimator over one."""

    def __call__(self, model: Any, x: Images, y: Labels, /) -> Images:
        """Return ``x_adv``, leaving the process and the model as they were."""
        with contained(as_module(model), self.seed):
            return self.run(model, x, y).x_adv


def as_module(model: Any) -> nn.Module:
    """Return the module of an ART estimator; a module is returned as it is.

    Raises:
        InputError: It is neither, or the estimator transforms images or answers outside its module.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"the model is a {type(model).__name__}; give an nn.Module or an ART PyTorchClassifier"
        )
    if module is not model:
        steps = [*model.preprocessing_operations, *(model.postprocessing_defences or ())]
        if any(not _is_identity(step) for step in steps):
            raise InputError(
                "the ART estimator transforms images or answers outside its model; give a module "
                "that does all of it (art_denoised.estimators.adapters)"
            )
    return module


def _is_identity(step: Any) -> bool:
    """Whether a step is ART's default standardisation, which subtracts 0 and divides by 1."""
    mean, std = getattr(step, "mean", None), getattr(step, "std", None)
    return mean is not None and std is not None and not np.any(mean) and bool(np.all(std == 1))


def refuse_given(options: Mapping[str, Any]) -> None:
    """Check that options do not repeat arguments of the attack itself.

    Raises:
        InputError: They name eps, norm or seed, so that rows of one eps would be of another.

    Example:
        >>> refuse_given({"steps": 20})
    """
    own = {"eps": "eps", "max_epsilon": "eps", "norm": "norm", "seed": "seed"}
    for option in own.keys() & options.keys():
        raise InputError(
            f"the options hold {option} = {options[option]!r}; give {own[option]} to the attack "
            "itself"
        )


def check_norm(library: str, kind: str, norm: str, fixed: Mapping[str, str]) -> None:
    """Check that an attack whose norm is fixed was asked for in that norm.

    Args:
        library: Name of its library.
        kind: Name of its class.
        norm: Norm that was asked for.
        fixed: Norms of the classes that have one alone.

    Raises:
        InputError: Its norm is another.

    Example:
        >>> check_norm("torchattacks", "PGDL2", "l2", {"PGD": "linf", "PGDL2": "l2"})
    """
    own = fixed.get(kind, norm)
    if own != norm:
        twins = (f"{kind}L2", kind.removesuffix("L2"))
        twin = next((f" or the class {t}" for t in twins if fixed.get(t) == norm), "")
        raise InputError(
            f"norm is {norm!r}, but the norm of {kind} of {library} is {own!r}; give that{twin}"
        )


def fill_in(
    known: type, given: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Return the arguments of a class: ``options``, and what it takes of ``given``.

    Returns:
        The arguments, and whether the class takes the radius of a ball.

    Raises:
        InputError: The class has no argument of the name of an option.

    Example:
        >>> fill_in(nn.Dropout, {"eps": 0.1, "p": 0.3}, {})
        ({'p': 0.3}, False)
    """
    parameters = inspect.signature(known).parameters
    for option in options:
        if option not in parameters:
            raise InputError(
                f"{known.__name__} has no option {option!r}; it has {', '.join(parameters)}"
            )
    taken = {name: value for name, value in given.items() if name in parameters}
    return {**taken, **options}, not {"eps", "max_epsilon"}.isdisjoint(parameters)


def keep_inside(x: Images, x_adv: Images, norm: str, eps: float) -> Images:
    """Return ``x_adv`` where it lies `within` the ball, and ``x`` where it does not.

    Example:
        >>> x = torch.zeros(2, 1, 1, 1)
        >>> keep_inside(x, torch.tensor([0.1, 0.5]).reshape(2, 1, 1, 1), "linf", 0.2).flatten()
        tensor([0.1000, 0.0000])
    """
    return torch.where(within(x, x_adv, norm, eps).reshape(-1, 1, 1, 1), x_adv, x)


def within(x: Images, x_adv: Images, norm: str, eps: float) -> Tensor:
    """Return whether each image lies in its ball, up to rounding: eps (1 + 1e-4) + 1e-6.

    Example:
        >>> within(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.200001), "linf", 0.2)
        tensor([True])
    """
    return distances(x, x_adv)[norm] <= eps * (1 + 1e-4) + 1e-6


def distances(x: Images, x_adv: Images) -> dict[str, Tensor]:
    """Return the length of each change, in either norm.

    Example:
        >>> distances(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        {'linf': tensor([1.]), 'l2': tensor([2.])}
    """
    change = (x_adv - x).flatten(1)
    return {"linf": change.abs().amax(1), "l2": change.norm(dim=1)}
