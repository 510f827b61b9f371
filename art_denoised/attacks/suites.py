"""One face for the attacks of other libraries: ``attack(model, x, y) -> x_adv``.

The libraries run unchanged. What they leave behind in the process is undone: global seeds, modes of
the model's layers, AutoAttack's trace function, counters and log. A defence that draws from the
global generators gets a stream of its own while it is attacked, so that an attack which resets the
seed neither learns nor freezes its noise.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.ascent import NORMS, Norm, within
from art_denoised.checks import InputError
from art_denoised.types import Images, Labels

INSTALL = "install it with: pip install '.[attacks]' in its clone"
# Arguments of attack classes that are set by a field of the attack itself.
_OWN = {"eps": "eps", "max_epsilon": "eps", "norm": "norm", "seed": "seed"}


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
    """

    eps: float
    _: KW_ONLY
    norm: Norm = "linf"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        if self.norm not in NORMS:
            raise InputError(f"norm is {self.norm!r}; give one of {', '.join(NORMS)}")
        checks.eps(checks.positive("eps", self.eps), self.norm)
        checks.count("seed", self.seed, 0)

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables."""

    @property
    @abstractmethod
    def gradient_free(self) -> bool:
        """Whether it sees scores or labels alone."""

    @property
    @abstractmethod
    def mixed(self) -> bool:
        """Whether a part of it does, so that its successes need not be due to gradients."""

    @abstractmethod
    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack a module, or an ART estimator over one."""

    def __call__(self, model: Any, x: Images, y: Labels, /) -> Images:
        """Return ``x_adv``, leaving the process, the model and the images as they were."""
        if not len(x):
            return x
        x, y = checks.images(x), checks.labels(y)
        checks.one_each(x, y)
        module, own = as_module(model), x.detach().clone()
        errors = checks.in_one_line(f"attack {self.name!r}", "change the attack or the model")
        with errors, torch.inference_mode(False), contained(module, self.seed):
            classes = checks.class_count(module, own)
            return self.run(model, own, checks.labels(y, classes).to(x.device)).x_adv


@dataclass(frozen=True)
class ClassAttack(Suite):
    """An attack of a library by the name of its class, with options for the class."""

    library: ClassVar[str]
    fixed_norms: ClassVar[Mapping[str, str]]  # the norm of each class that has one alone
    blind: ClassVar[Collection[str]]  # classes that use scores or labels alone

    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.options, Mapping):
            raise InputError(
                f"options is {self.options!r}; give a dictionary, such as {{'steps': 20}}"
            )
        for option in _OWN.keys() & self.options.keys():
            raise InputError(
                f"the options hold {option} = {self.options[option]!r}; give {_OWN[option]} to the "
                "attack itself"
            )
        if self.options.get("targeted"):
            raise InputError(
                "the options hold targeted = True, which leads to the true labels; leave it out"
            )
        own = self.fixed_norms.get(self.kind, self.norm)
        if own != self.norm:
            twins = (f"{self.kind}L2", self.kind.removesuffix("L2"))
            twin = [f" or the class {t}" for t in twins if self.fixed_norms.get(t) == self.norm]
            raise InputError(
                f"norm is {self.norm!r}, but the norm of {self.kind} of {self.library} is {own!r}; "
                f"give that{''.join(twin)}"
            )

    @property
    def name(self) -> str:
        """Library and class."""
        return f"{self.library.lower()}:{self.kind}"

    @property
    def gradient_free(self) -> bool:
        """Whether it uses scores or labels alone."""
        return self.kind in self.blind

    def arguments(self, known: Any, **given: Any) -> dict[str, Any]:
        """Return the options, and what the class ``known`` takes of ``given``."""
        parameters = inspect.signature(known).parameters
        for option in self.options.keys() - parameters.keys():
            raise InputError(
                f"{self.kind} has no option {option!r}; it has {', '.join(parameters)}"
            )
        words = {name: value for name, value in self.options.items() if isinstance(value, str)}
        for option, word in words.items():
            default = parameters[option].default
            if isinstance(default, bool):
                checks.flag(option, word)
            elif isinstance(default, (int, float)):
                checks.real(option, word)  # type: ignore[arg-type]
        return {**{name: given[name] for name in given if name in parameters}, **self.options}

    def outcome(self, known: Any, x: Images, x_adv: Images) -> Outcome:
        """Return ``x_adv``, but ``x`` where a class without a radius left the ball: it failed."""
        if {"eps", "max_epsilon"}.isdisjoint(inspect.signature(known).parameters):
            inside = within(x, x_adv, self.norm, self.eps)
            x_adv = torch.where(inside.reshape(-1, 1, 1, 1), x_adv, x)
        return Outcome(x_adv)


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
    return not np.any(mean) and bool(np.all(std == 1))


@contextlib.contextmanager
def contained(module: nn.Module, seed: int) -> Iterator[None]:
    """Seed the global generators; restore their states and the layers' modes at the end.

    Meanwhile the module's forward passes draw from a stream of their own, get copies of the images,
    into which they may write, and return tensors where the module returns ``.logits``.
    """
    outer, modes = Generators.now(), [(part, part.training) for part in module.modules()]
    inner = [Generators.seeded(seed, 1)]
    attackers: list[Generators] = []

    def enter(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        attackers.append(Generators.now())
        inner[0].put_back()
        return (inputs[0].clone(), *inputs[1:]) if inputs else inputs

    def leave(_: Any, __: Any, output: Any) -> Any:
        inner[0] = Generators.now()
        attackers.pop().put_back()
        return checks.unwrapped(output)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        Generators.seeded(seed, 0).put_back()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes:
            part.training = training
        outer.put_back()


class Generators(NamedTuple):
    """The states of all global generators.

    Example:
        >>> before = Generators.now()
        >>> _ = torch.rand(1), random.random()
        >>> Generators.now().differing(before)
        ['torch', 'random']
        >>> before.put_back()
        >>> Generators.now().differing(before)
        []
    """

    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> Generators:
        """Return the current states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        state = np.random.get_state()  # noqa: NPY002
        return cls(torch.get_rng_state(), cuda, state, random.getstate())

    @classmethod
    def seeded(cls, seed: int, stream: int) -> Generators:
        """Return states that depend on seed and stream alone; the current ones do not change."""
        before = cls.now()
        number = np.random.SeedSequence([seed, stream]).generate_state(1).item()
        if any(kind.is_available() for kind in (torch.cuda, torch.xpu, torch.backends.mps)):
            torch.manual_seed(number)
        else:  # it would keep each call, with its stack, for devices that may come: 10 ms
            torch.default_generator.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002
        random.seed(number)
        states = cls.now()
        before.put_back()
        return states

    def differing(self, other: Generators) -> list[str]:
        """Return the libraries whose states differ."""
        cuda = len(self.cuda) == len(other.cuda) and all(map(torch.equal, self.cuda, other.cuda))
        differing = [] if cuda and torch.equal(self.cpu, other.cpu) else ["torch"]
        mine, theirs = (repr((g.numpy[1].tobytes(), *g.numpy[2:])) for g in (self, other))
        differing += ["numpy"] if mine != theirs else []
        return differing + (["random"] if self.python != other.python else [])

    def put_back(self) -> None:
        """Make these the current states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
