"""One face for the attacks of other libraries: ``attack(model, x, y) -> x_adv``.

The libraries run as they are. What they leave behind in the process is undone here: the global
seeds that they set, the modes of the model's layers, AutoAttack's trace function, counters and log.
And a defence that draws from the global generators gets a stream of its own while it is attacked,
so that an attack which resets the seed does not learn, or freeze, its noise.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
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
GRADIENT_FREE = ("square",)
_SINGLE = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_INSTALL = "install it with: pip install '.[attacks]' in its clone"


class Outcome(NamedTuple):
    """What an attack came to.

    Attributes:
        x_adv: Attacked images.
        counted: Whether the attack itself counted each as still right; None: it does not count.
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
        seed: Of its random choices.
        gradient_free: Whether it sees scores or labels alone.
        mixed: Whether only some of its parts do: what it breaks, gradients need not have found.
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
        """A short name for tables."""

    @abstractmethod
    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack a module, or an ART estimator over one."""

    def __call__(self, model: Any, x: Images, y: Labels, /) -> Images:
        """Return ``x_adv``, leaving the process and the model as they were."""
        with contained(as_module(model), self.seed):
            return self.run(model, x, y).x_adv


@dataclass(frozen=True)
class AutoAttack(Suite):
    """AutoAttack, whole or in parts, from pyautoattack or, without it, the official package.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks" (ICML 2020, arXiv 2003.01690).

    Its count of a randomised model is that of the attack's last draw: evaluate again with fresh
    noise, as `art_denoised.evaluate` does.

    Attributes:
        version: "standard", or "rand" for randomised models (EOT over 20 draws, no Square).
        parts: A subset in order, such as ("apgd-ce", "square"), instead of a version.
        steps: Of APGD and FAB.
        queries: Of Square.
        eot: Gradients averaged a step of APGD; by default 20 for "rand" and else 1.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> attack = AutoAttack(0.2, parts=("apgd-ce",), steps=5)
        >>> x = torch.rand(2, 1, 8, 8)
        >>> x_adv = attack(digits_classifier(), x, torch.tensor([3, 8]))
        >>> attack.name, bool((x_adv - x).abs().max() <= 0.2 + 1e-6)
        ('apgd-ce', True)
    """

    version: Literal["standard", "rand"] = "standard"
    parts: tuple[str, ...] = ()
    steps: int = 100
    queries: int = 5000
    eot: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("steps", self.steps)
        checks.count("queries", self.queries)
        if self.eot is not None:
            checks.count("eot", self.eot)
        if self.version not in ("standard", "rand"):
            raise InputError(f"version is {self.version!r}; give standard or rand")
        for part in self.parts:
            if part not in _SINGLE:
                raise InputError(f"AutoAttack has no part {part!r}; give of {', '.join(_SINGLE)}")

    @property
    def name(self) -> str:
        """Its parts, or its version."""
        if self.parts:
            return "+".join(self.parts)
        return "autoattack" if self.version == "standard" else "autoattack-rand"

    @property
    def gradient_free(self) -> bool:  # type: ignore[override]
        """Whether it is Square alone."""
        return set(self.parts) == set(GRADIENT_FREE)

    @property
    def mixed(self) -> bool:  # type: ignore[override]
        """Whether it holds Square beside attacks that take gradients; the standard version does."""
        if not self.parts:
            return self.version == "standard"
        return not self.gradient_free and not set(GRADIENT_FREE).isdisjoint(self.parts)

    @property
    def nfe(self) -> int:
        """Number of function evaluations for an image that withstands the attack, about."""
        eot = self.eot or (20 if self.version == "rand" and not self.parts else 1)
        apgd, fab = (self.steps + 1) * eot, 2 * (self.steps + 1)
        of = {"apgd-t": 9 * apgd, "fab": fab, "fab-t": 9 * fab, "square": self.queries}
        rand = self.version == "rand"
        whole = ("apgd-ce", "apgd-dlr") if rand else ("apgd-ce", "apgd-t", "fab-t", "square")
        return sum(of.get(part, apgd) for part in self.parts or whole)

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack; the flags are AutoAttack's warnings.

        Raises:
            InputError: Neither package is installed, or the model has too few classes.
        """
        module = as_module(model)
        package = _autoattack_package()
        classes = checks.class_count(module, x[:1])
        self._check_classes(classes)
        attack = self._build(package, module, x.device, classes)
        with _autoattack_flags(package) as flags, contextlib.redirect_stdout(io.StringIO()):
            if package == "pyautoattack":
                found = attack.run_standard_evaluation(x, y, batch_size=len(x))
            else:
                found = attack.run_standard_evaluation(x, y, bs=len(x), return_labels=True)
        x_adv, y_adv = found
        return Outcome(x_adv.detach(), y_adv == y, tuple(dict.fromkeys(flags)))

    def _build(self, package: str, module: nn.Module, device: torch.device, classes: int) -> Any:
        version, parts = ("custom", list(self.parts)) if self.parts else (self.version, None)
        options: dict[str, Any] = {
            "norm": {"linf": "Linf", "l2": "L2"}[self.norm],
            "eps": self.eps,
            "version": version,
            "seed": self.seed,
            "device": str(device),
            "attacks" if package == "pyautoattack" else "attacks_to_run": parts,
        }
        if package == "autoattack":
            options["verbose"] = False
            options["attacks_to_run"] = parts or []
        attack = importlib.import_module(package).AutoAttack(module, **options)
        targets = min(9, classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        attack.apgd.n_restarts = attack.fab.n_restarts = 1  # those of the standard version
        attack.fab.n_iter = self.steps
        for apgd in (attack.apgd, attack.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = self.steps
            apgd.n_iter_2 = max(int(0.22 * self.steps), 1)  # as in its constructor
            apgd.n_iter_min = max(int(0.06 * self.steps), 1)
            apgd.size_decr = max(int(0.03 * self.steps), 1)
        if self.eot is not None:
            attack.apgd.eot_iter = attack.apgd_targeted.eot_iter = self.eot
        attack.square.n_queries = self.queries
        return attack

    def _check_classes(self, classes: int) -> None:
        """DLR needs three classes and its targeted form four: AutoAttack crashes otherwise."""
        needed = {"apgd-dlr": 3, "apgd-t": 4}
        parts = self.parts or (("apgd-dlr",) if self.version == "rand" else ("apgd-t",))
        for part in parts:
            if classes < needed.get(part, 2):
                raise InputError(
                    f"{part} of AutoAttack needs {needed[part]} classes and the model has "
                    f"{classes}; give the parts apgd-ce, fab-t and square instead"
                )


@dataclass(frozen=True)
class TorchAttack(Suite):
    """Any attack of torchattacks, by the name of its class.

    ``norm``, ``seed`` and ``n_classes`` are handed on where the class takes them. Classes without
    ``eps`` look for the nearest adversarial (CW, DeepFool): what they find outside the ball is a
    failure, and the image itself is returned.

    Attributes:
        kind: Name of the class.
        options: Its other arguments.

    Example:
        >>> from art_denoised.demo import digits_classifier
        >>> attack = TorchAttack(0.2, kind="PGD", options={"alpha": 0.05, "steps": 5})
        >>> x = torch.rand(2, 1, 8, 8)
        >>> attack(digits_classifier(), x, torch.tensor([3, 8])).shape
        torch.Size([2, 1, 8, 8])
    """

    kind: str = "PGD"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_given(self.options)

    @property
    def name(self) -> str:
        """Of the library and the class."""
        return f"torchattacks:{self.kind}"

    @property
    def gradient_free(self) -> bool:  # type: ignore[override]
        """Whether it uses scores alone."""
        return self.kind in ("Square", "OnePixel", "Pixle", "SPSA")

    @property
    def mixed(self) -> bool:  # type: ignore[override]
        """Whether it is AutoAttack, with Square in it."""
        return self.kind == "AutoAttack" and self.options.get("version") != "rand"

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack.

        Raises:
            InputError: torchattacks is not installed or has no such attack, or an option is wrong.
        """
        module = as_module(model)
        known = _torchattacks_class(self.kind)
        given = {
            "eps": self.eps,
            "norm": {"linf": "Linf", "l2": "L2"}[self.norm],
            "seed": self.seed,
            "n_classes": checks.class_count(module, x[:1]),
        }
        options, bounded = fill_in(known, given, self.options)
        with contextlib.redirect_stdout(io.StringIO()):
            attack = known(module, **options)
            attack.set_device(x.device)
            x_adv = attack(x, y).detach()
        return Outcome(x_adv if bounded else keep_inside(x, x_adv, self.norm, self.eps))


def as_module(model: Any) -> nn.Module:
    """Return the module of an ART estimator; a module is returned as it is.

    Raises:
        InputError: Neither, or an estimator that is not what its module is.
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
                "that does all of it (art_denoised.estimators.preprocessing)"
            )
    return module


def _is_identity(step: Any) -> bool:
    """Whether a step is ART's default standardisation, which subtracts 0 and divides by 1."""
    mean, std = getattr(step, "mean", None), getattr(step, "std", None)
    return mean is not None and std is not None and not np.any(mean) and bool(np.all(std == 1))


def refuse_given(options: Mapping[str, Any]) -> None:
    """Check that options do not say again what an attack is told by its own arguments.

    Raises:
        InputError: They name eps, norm or seed: rows under one eps would be of another.

    Example:
        >>> refuse_given({"steps": 20})
    """
    for name in ("eps", "norm", "seed"):
        if name in options:
            raise InputError(
                f"the options hold {name} = {options[name]!r}; give {name} to the attack itself"
            )


def fill_in(
    known: type, given: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Return the arguments for a class: ``options``, and of ``given`` what it takes beside them.

    Returns:
        The arguments, and whether ``eps`` is among those it takes.

    Raises:
        InputError: It has no argument of the name of an option.

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
    return {**taken, **options}, "eps" in parameters


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


def _autoattack_package() -> str:
    for package in ("pyautoattack", "autoattack"):
        if importlib.util.find_spec(package) is not None:
            return package
    raise InputError(f"AutoAttack needs pyautoattack; {_INSTALL}")


@contextlib.contextmanager
def _autoattack_flags(package: str) -> Iterator[list[str]]:
    """Collect AutoAttack's warnings, and put back the logger, the counters and the trace.

    It finds "dynamic" defences by counting calls with a trace function; the counters are never
    set back, so after one such model all others of the process would be flagged too.
    """
    flags: list[str] = []
    counters = importlib.import_module(f"{package}.checks").funcs
    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    before = (logger.handlers, logger.propagate, logger.level)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: flags.append(record.getMessage())  # type: ignore[method-assign]
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)
    counters.update(dict.fromkeys(counters, 0))
    try:
        with warnings.catch_warnings(record=True) as caught:  # the official package warns
            warnings.simplefilter("always")
            yield flags
        flags += [str(one.message) for one in caught if one.category is Warning]
    finally:
        counters.update(dict.fromkeys(counters, 0))
        sys.settrace(trace)
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


def _torchattacks_class(kind: str) -> Any:
    try:
        import torchattacks
    except ImportError:
        raise InputError(f"this attack needs torchattacks; {_INSTALL}") from None
    known = getattr(torchattacks, kind, None)
    if not (inspect.isclass(known) and issubclass(known, torchattacks.attack.Attack)):
        raise InputError(f"torchattacks has no attack {kind!r}; for example PGD, APGD or Square")
    return known
