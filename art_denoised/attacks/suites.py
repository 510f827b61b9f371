"""The attacks of other libraries: AutoAttack, torchattacks, and one face for all of them.

The libraries run unchanged. What they leave behind in the process is undone: global seeds, modes of
the model's layers, AutoAttack's trace function, counters and log. A defence that draws from the
global generators gets a stream of its own while it is attacked, so that an attack which resets the
seed neither learns nor freezes its noise.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import logging
import random
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.pgd import NORMS, Norm, within
from art_denoised.checks import InputError
from art_denoised.types import Images, Labels, Logits

INSTALL = "install it with: pip install '.[attacks]' in its clone"
# Arguments of attack classes that are set by a field of the attack itself.
_OWN = {"eps": "eps", "max_epsilon": "eps", "norm": "norm", "seed": "seed"}
_LINF = (
    "BIM", "DIFGSM", "EOTPGD", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM", "PGD", "PGDRS",
    "PIFGSM", "PIFGSMPP", "RFGSM", "SINIFGSM", "SPSA", "TIFGSM", "TPGD", "UPGD", "VMIFGSM",
    "VNIFGSM",
)  # fmt: skip
PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # that DLR and its targeted form need
_FLAG = "Warning: "  # how the official package begins the lines that it prints


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
        InputError: It is neither, or the estimator takes images of another range than [0, 1], or
            transforms images or answers outside its module.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"the model is a {type(model).__name__}; give an nn.Module or an ART PyTorchClassifier"
        )
    if module is not model:
        checks.unit_range("an attack", getattr(model, "clip_values", None))
        steps = [*model.preprocessing_operations, *(model.postprocessing_defences or ())]
        if any(not _is_identity(step) for step in steps):
            raise InputError(
                "the ART estimator transforms images or answers outside its model; give a module "
                "that does all of it (art_denoised.estimators.without_preprocessing)"
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


@dataclass(frozen=True)
class TorchAttack(ClassAttack):
    """Any attack of torchattacks, by the name of its class.

    ``eps``, ``norm``, ``seed`` and ``n_classes`` are handed on where the class takes them. Classes
    without ``eps`` look for the nearest adversarial (CW, DeepFool): an example outside the ball is
    a failure, and the image itself is returned.

    Some losses of torchattacks (CW, the margin of UPGD) have no gradient where all outputs are
    negative, as log-probabilities are. So the attack sees outputs shifted by a constant per image,
    such that the lowest is at least 1: no prediction, softmax or margin changes.

    Attributes:
        kind: Name of the class.
        options: Other arguments of the class.

    Raises:
        InputError: torchattacks is not installed or has no such class, the norm is not the one of
            the class, an option repeats an argument, or a value is out of range.

    Example:
        >>> import torch
        >>> from art_denoised.demo import digits_classifier
        >>> attack = TorchAttack(0.2, kind="PGD", options={"alpha": 0.05, "steps": 5})
        >>> x = torch.rand(2, 1, 8, 8)
        >>> attack(digits_classifier(), x, torch.tensor([3, 8])).shape
        torch.Size([2, 1, 8, 8])
    """

    library = "torchattacks"
    fixed_norms = dict.fromkeys(_LINF, "linf") | dict.fromkeys(("PGDL2", "PGDRSL2"), "l2")
    blind = ("Square", "OnePixel", "Pixle", "SPSA")

    kind: str = "PGD"

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("torchattacks") is None:
            raise InputError(f"this attack needs torchattacks; {INSTALL}")
        _attack_class(self.kind)

    @property
    def mixed(self) -> bool:
        """Whether it is AutoAttack with Square in it."""
        return self.kind == "AutoAttack" and self.options.get("version") != "rand"

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack.

        Raises:
            InputError: An option is wrong.
        """
        module, known = as_module(model), _attack_class(self.kind)
        arguments = self.arguments(
            known,
            eps=self.eps,
            max_epsilon=self.eps,  # PIFGSM's name for it
            norm={"linf": "Linf", "l2": "L2"}[self.norm],
            seed=self.seed,
            n_classes=checks.class_count(module, x),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            attack = known(_Shifted(module), **arguments)
            attack.set_device(x.device)
            return self.outcome(known, x, attack(x, y).detach())


class _Shifted(nn.Module):
    """A model whose outputs are raised to at least 1, by one constant per image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Images) -> Logits:
        output = self.model(x)
        least = output.detach().masked_fill(output.isinf(), 0).amin(1, keepdim=True)
        shifted: Logits = output + (1 - least).clamp_min(0)
        return shifted


def _attack_class(kind: str) -> Any:
    try:
        import torchattacks
    except ImportError:
        raise InputError(f"this attack needs torchattacks; {INSTALL}") from None
    base = torchattacks.attack.Attack
    return class_named(kind, base, torchattacks, "torchattacks has no attack", "PGD or Square")


def class_named(kind: str, base: type, module: object, words: str, example: str) -> Any:
    """Return the class of an attack of another library, or say which one may be meant."""
    names = {
        name.lower(): name
        for name, one in vars(module).items()
        if inspect.isclass(one) and issubclass(one, base)
    }
    if kind in names.values():
        return getattr(module, kind)
    close = difflib.get_close_matches(kind.lower(), names)
    hint = f"did you mean {names[close[0]]}?" if close else f"give for example {example}"
    raise InputError(f"{words} {kind!r}; {hint}")


@dataclass(frozen=True)
class AutoAttack(Suite):
    """AutoAttack, whole or in parts.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks" (ICML 2020, arXiv 2003.01690).

    It judges a randomised model by the attack's last draw: evaluate again with fresh noise, as
    `art_denoised.evaluate` does.

    Attributes:
        version: "standard", or "rand" for randomised models (EOT over 20 draws, no Square).
        parts: Attacks to run in this order instead of a version, such as ("apgd-ce", "square").
        steps: Number of steps of APGD and FAB.
        queries: Number of queries of Square.
        eot: Number of gradients that a step of APGD averages; None: 20 for "rand" and else 1.

    Raises:
        InputError: Neither package is installed, or a value is out of range.

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
        if self.version not in _VERSIONS:
            raise InputError(f"version is {self.version!r}; give standard or rand")
        if not isinstance(self.parts, (tuple, list)):
            raise InputError(f"parts is {self.parts!r}; give a sequence, such as ('apgd-ce',)")
        if self.parts and self.version != "standard":
            raise InputError(
                f"version is {self.version!r} and parts are given, which run instead of a version; "
                "leave version out, and for a randomised model give eot=20"
            )
        for part in self.parts:
            if part not in PARTS:
                raise InputError(f"AutoAttack has no part {part!r}; give of {', '.join(PARTS)}")
        _package()  # a run that lacks it ends before its first attack

    @property
    def name(self) -> str:
        """Its parts, or its version."""
        if self.parts:
            return "+".join(self.parts)
        return "autoattack" if self.version == "standard" else "autoattack-rand"

    @property
    def _run(self) -> tuple[str, ...]:
        return self.parts or _VERSIONS[self.version]

    @property
    def gradient_free(self) -> bool:
        """Whether it is Square alone."""
        return set(self._run) == {"square"}

    @property
    def mixed(self) -> bool:
        """Whether it holds Square beside attacks that take gradients; the standard version does."""
        return "square" in self._run and not self.gradient_free

    @property
    def nfe(self) -> int:
        """Number of function evaluations for an image that withstands the attack, about."""
        apgd = (self.steps + 1) * (self.eot or (20 if self.version == "rand" else 1))
        fab = 2 * (self.steps + 1)
        of = {"apgd-t": 9 * apgd, "fab": fab, "fab-t": 9 * fab, "square": self.queries}
        return sum(of.get(part, apgd) for part in self._run)

    def run(self, model: Any, x: Images, y: Labels) -> Outcome:
        """Attack; the flags are AutoAttack's warnings.

        Raises:
            InputError: The model has too few classes.
        """
        module = as_module(model)
        package = _package()
        classes = checks.class_count(module, x)
        for part in self._run:
            if classes < (needed := _CLASSES.get(part, 2)):  # AutoAttack would crash
                raise InputError(
                    f"{part} of AutoAttack needs {needed} classes and the model has "
                    f"{classes}; give the parts apgd-ce, fab-t and square instead"
                )
        attack = self._build(package, module, x.device, classes)
        with _flags(package) as flags:
            if package == "pyautoattack":
                found = attack.run_standard_evaluation(x, y, batch_size=len(x))
            else:
                found = attack.run_standard_evaluation(x, y, bs=len(x), return_labels=True)
        x_adv, y_adv = found
        return Outcome(x_adv, y_adv == y, tuple(dict.fromkeys(flags)))

    def _build(self, package: str, module: nn.Module, device: torch.device, classes: int) -> Any:
        version, parts = ("custom", list(self.parts)) if self.parts else (self.version, None)
        options: dict[str, Any] = {
            "norm": {"linf": "Linf", "l2": "L2"}[self.norm],
            "eps": self.eps,
            "version": version,
            "seed": self.seed,
            "device": str(device),
        }
        if package == "autoattack":
            options |= {"verbose": False, "attacks_to_run": parts or []}
        else:
            options["attacks"] = parts
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


def _package() -> str:
    for package in ("pyautoattack", "autoattack"):
        if importlib.util.find_spec(package) is not None:
            return package
    raise InputError(f"AutoAttack needs pyautoattack; {INSTALL}")


@contextlib.contextmanager
def _flags(package: str) -> Iterator[list[str]]:
    """Collect AutoAttack's warnings, and put back the logger, the counters and the trace.

    pyautoattack logs its warnings, the official package prints them; both use the warnings module
    where they have no logger. AutoAttack detects "dynamic" defences by counting calls with a trace
    function. It never resets the counters, so that after one such model it would flag all others.
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
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            yield flags
        lines = printed.getvalue().splitlines()
        flags += [line.removeprefix(_FLAG) for line in lines if line.startswith(_FLAG)]
        flags += [str(one.message) for one in caught if one.category is Warning]
    finally:
        counters.update(dict.fromkeys(counters, 0))
        sys.settrace(trace)
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
