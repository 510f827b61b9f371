"""A model under attack, and the attacks on it: noise, gradients, and how both are called.

Defences are known by what they can do (`Seeded`, `GradientModes`, `Purifies`), not by their class:
a defence that this package has never seen is evaluated like one of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.attacks.pgd import NORMS
from art_denoised.attacks.suites import Outcome, Suite, as_module, contained
from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import CLEAN
from art_denoised.types import GradientModes, Images, Labels, Logits, Purifies, Seeded

_SAME = 1e-5  # two answers that differ by less, relative to their size, differ by rounding
_MIXING = 0x9E3779B1  # odd, so that no two seeds of an attack are mixed to the same
LOOKED, _ANSWERS, _CALLS = 32, 96, 16  # images, answers and calls before a model is deterministic


class Target:
    """A model to attack, which is first queried repeatedly to detect randomness.

    The model gets copies of the images, so that it may write into its input. ``tick`` is called
    with the number of images after each forward pass, for progress bars. ``choices`` are the
    arguments that make an equal target of an equal model.
    """

    def __init__(
        self,
        model: Any,
        x: Images,
        *,
        noise: str | None,
        repeats: int,
        seed: int,
        batch_size: int = LOOKED,
    ) -> None:
        self.given, self.module = model, as_module(model)
        self.tick: Callable[[int], object] = lambda images: None
        self.queries = 0  # forward passes of one image so far
        checks.eval_mode(self.module)
        parts = list(self.module.modules())
        self._seeded: list[Any] = [part for part in parts if _has_seed(part)]
        self._modes: list[Any] = [part for part in parts if _has_modes(part)]
        self._purifier = next((part for part in parts if isinstance(part, Purifies)), None)
        self._noise, self._seed = _checked_noise(noise, bool(self._seeded)), seed
        self.choices = {"noise": noise, "repeats": repeats, "seed": seed, "batch_size": batch_size}
        self.device = checks.model_device(self.module)
        x = x[:LOOKED].to(self.device)
        self.classes = 0  # not known yet
        with self.as_asked():
            with self.session(seed):
                self.classes = checks.class_count(self.module, x)
            self.randomised = noise == "fresh" or self._differs(x, batch_size)
            if not self.randomised:
                with contained(self.module, seed):
                    checks.classifier(self.module, x)
            with self.session(seed), torch.enable_grad():
                leaf = x[:2].detach().clone().requires_grad_()
                self.differentiable = self.logits(leaf).requires_grad
            fixed = bool(self._seeded) and all(part.seed is not None for part in self._seeded)
        self.repeats = repeats if self.randomised else 1
        self._kind = "fresh" if self.randomised else "fixed" if fixed else "none"

    @property
    def settings(self) -> dict[str, Any]:
        """What determines its answers, beside the identity of the model."""
        how = {"classes": self.classes, "randomised": self.randomised}
        return {**how, "noise": self._kind, "repeats": self.repeats}

    @contextlib.contextmanager
    def as_asked(self) -> Iterator[None]:
        """Fix or free the noise of all parts as asked, and restore it at the end."""
        with _restored(self._seeded, "seed"):
            for part in self._seeded:
                if self._noise == "fixed" and part.seed is None:
                    part.seed = self._seed
                elif self._noise == "fresh":
                    part.seed = None
            yield

    @contextlib.contextmanager
    def session(self, seed: int) -> Iterator[None]:
        """Call the model, seeded, without a trace in the process, the model or the images."""
        with contained(self.module, seed), self.guarded():
            yield

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Check and count the outputs of the model before an attack sees them."""

        def checked(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            output, batch = checks.unwrapped(output), len(inputs[0])
            shape = tuple(getattr(output, "shape", ()))
            if self.classes and shape != (batch, self.classes):
                raise InputError(
                    f"the model returned shape {shape} for {batch} images; at first it returned "
                    f"{self.classes} logits for each"
                )
            self.queries += batch
            self.tick(batch)
            return output

        hook = self.module.register_forward_hook(checked)
        try:
            yield
        finally:
            hook.remove()

    def gradients(self, asked: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the ways of taking gradients that the model has, or those asked for."""
        has = tuple(dict.fromkeys(mode for part in self._modes for mode in part.gradients))
        has = has or ("exact",)
        asked = (asked,) if isinstance(asked, str) else asked
        if asked is not None and not asked:
            raise InputError(f"gradients is empty; give one of {', '.join(has)}")
        for one in asked or ():
            if one not in has:
                raise InputError(f"gradients has {one!r}; this model has {' and '.join(has)}")
        return has if asked is None else tuple(asked)

    @contextlib.contextmanager
    def taking(self, gradient: str) -> Iterator[None]:
        """Take gradients this way in all parts that have it; "none" changes nothing."""
        with _restored(self._modes, "gradient"):
            for part in self._modes:
                if gradient in part.gradients:
                    part.gradient = gradient
            yield

    def logits(self, x: Images) -> Logits:
        """Return the model's logits, within a `session`."""
        with checks.in_one_line("the model", "mend it and resume, completed rows are kept"):
            output = self.module(x.clone())  # it may write into its input
        return checks.logits(output, len(x))

    @torch.no_grad()
    def right(self, x: Images, y: Labels, seed: int, repeats: int | None = None) -> Tensor:
        """Return whether each image is right, (repeats, batch), in evaluations with fresh noise."""
        with self.session(seed):
            answers = [self.logits(x).argmax(1) == y for _ in range(repeats or self.repeats)]
        return torch.stack(answers).cpu()

    @torch.no_grad()
    def predicted(self, x: Images, seed: int) -> int:
        """Return the class of one image, (1, ...), in one evaluation."""
        with self.session(seed):
            return int(self.logits(x).argmax(1))

    @torch.no_grad()
    def steady(self, x: Images, y: Labels, seed: int, indices: Sequence[int]) -> Tensor:
        """Return whether each image is right, (1, batch), from a model that seems deterministic.

        A second call that gives other answers is an error.
        """
        with self.session(seed):
            first, second = self.logits(x), self.logits(x)
        gaps = _gaps(first, second)
        if bool((gaps > _SAME).any()):
            index = indices[int(gaps.argmax())]
            raise InputError(
                f"the model is randomised, although its first calls agreed: two calls differ for "
                f"image {index}; give noise='fresh' and another folder",
                noise="fresh",
            )
        return (first.argmax(1) == y)[None].cpu()

    def attempt(self, attack: Any, gradient: str, x: Images, y: Labels, seed: int) -> Outcome:
        """Run an attack with one way of taking gradients, seeded by ``seed`` and its own seed."""
        if is_dataclass(attack) and any(option.name == "seed" for option in fields(attack)):
            own = getattr(attack, "seed", None)
            seed = (seed + own * _MIXING) % 2**31 if isinstance(own, int) else seed
            attack = replace(attack, seed=seed)  # type: ignore[type-var]
        errors = checks.in_one_line(
            f"attack {attack_name(attack)!r}", "change it, completed rows are kept"
        )
        with errors, self.session(seed), self.taking(gradient):
            if isinstance(attack, Suite):
                return attack.run(self.given, x.clone(), y)
            return Outcome(attack(self.module, x.clone(), y))

    @torch.no_grad()
    def denoised(self, x: Images) -> Images | None:
        """Return what the defence's purification makes of images on their way through the model.

        None: it has none, or did not come to it.
        """
        if self._purifier is None:
            return None

        def stop(_: Any, inputs: tuple[Any, ...]) -> None:
            raise _ReachedError(inputs[0].detach().clone())

        hook = self._purifier.register_forward_pre_hook(stop)
        try:
            with self.session(self._seed):
                self.module(x)
            return None
        except _ReachedError as reached:
            found = reached.x[: len(x)]
        finally:
            hook.remove()  # before purify, which may call the module
        name, remedy = f"{type(self._purifier).__name__}.purify", "mend it, or give pictures=0"
        with checks.in_one_line(name, remedy), self.session(self._seed):
            clean = self._purifier.purify(found)
        if getattr(clean, "shape", None) != found.shape or not bool(clean.isfinite().all()):
            raise InputError(
                f"{name} returned something else than {len(found)} finite images of shape "
                f"{tuple(found.shape[1:])}; {remedy}"
            )
        return clean

    @torch.no_grad()
    def _differs(self, x: Images, batch_size: int) -> bool:
        """Whether two calls ever differ by more than rounding.

        Noise that changes each answer with probability p is missed with probability (1 - p)^96 or
        less, 1e-6 at p = 0.135; noise that changes all answers of a call, with (1 - p)^16 or so.
        """
        times = max(3, math.ceil(_ANSWERS / len(x)))
        todo = [(x[:2], _CALLS), *((block, times) for block in torch.split(x, batch_size))]
        with self.session(self._seed):
            for block, calls in todo:
                first = self.logits(block)
                for _ in range(calls - 1):
                    if bool((_gaps(first, self.logits(block)) > _SAME).any()):
                        return True
        return False


class _ReachedError(Exception):
    """The purification was reached, by these images: the rest of the model need not run."""

    def __init__(self, x: Images) -> None:
        self.x = x


def _checked_noise(noise: str | None, seeded: bool) -> str | None:
    if noise not in (None, "fixed", "fresh"):
        raise InputError(f"noise is {noise!r}; give 'fixed', 'fresh' or None")
    if noise == "fixed" and not seeded:
        raise InputError(
            "noise is 'fixed', but no part of the model has a seed that can be set; give None"
        )
    return noise


def _has_seed(part: object) -> bool:
    """Whether a part has a seed that can be set: not a method of that name, nor read-only."""
    held = getattr(type(part), "seed", None)
    read_only = isinstance(held, property) and held.fset is None
    return isinstance(part, Seeded) and not read_only and not callable(part.seed)


def _has_modes(part: object) -> bool:
    if not (isinstance(part, GradientModes) and isinstance(part.gradient, str)):
        return False
    if not isinstance(part.gradients, (tuple, list)):
        raise InputError(
            f"{type(part).__name__}.gradients is {part.gradients!r}; give a tuple of names, such "
            "as ('exact', 'bpda')"
        )
    return True


def _gaps(first: Logits, second: Logits) -> Tensor:
    """Return by how much two answers to each image differ, relative to their size."""
    gaps = (first - second).abs().masked_fill(first == second, 0)  # log-probabilities of -inf too
    size = first.abs().masked_fill(first.isinf(), 0).max()
    return gaps.amax(1) / (1 + size)


@contextlib.contextmanager
def _restored(parts: Sequence[Any], name: str) -> Iterator[None]:
    """Put an attribute of some parts back at the end."""
    before = [getattr(part, name) for part in parts]
    try:
        yield
    finally:
        for part, one in zip(parts, before, strict=True):
            setattr(part, name, one)


@dataclass(frozen=True)
class Column:
    """An attack with one way of taking gradients: "exact", "bpda" or "none".

    What a ``mixed`` one breaks does not show that gradients find it: only some of its parts take
    them.
    """

    name: str
    gradient: str
    attack: Any
    mixed: bool = False

    @property
    def key(self) -> tuple[str, str, float]:
        """Attack, gradient and eps, as in `AttackRow.column`."""
        return (self.name, self.gradient, float(self.attack.eps))

    @property
    def words(self) -> str:
        """The key in words, for the names of checks."""
        return "{} ({}, eps {:g})".format(*self.key)


def columns(
    attacks: Iterable[Any] | Mapping[str, Any], gradients: tuple[str, ...]
) -> Iterator[Column]:
    """Yield each attack with each way of taking gradients, under a name of its own."""
    attacks = [attacks] if callable(attacks) else attacks
    given = attacks.items() if isinstance(attacks, Mapping) else attacks
    named = [one if isinstance(one, tuple) else (attack_name(one), one) for one in given]
    seen = set()
    for name, attack in named:
        _check_attack(name, attack)
        free = bool(getattr(attack, "gradient_free", False))
        mixed = bool(getattr(attack, "mixed", False))
        for gradient in ("none",) if free else gradients:
            column = Column(name, gradient, attack, mixed)
            if column.key in seen:
                raise InputError(
                    f"two attacks are named {name!r} with eps {column.key[2]:g}, perhaps in two "
                    "norms; give pairs of a name and an attack"
                )
            seen.add(column.key)
            yield column


def attack_name(attack: Any) -> str:
    """Return the name of an attack that was given without one."""
    if isinstance(attack, Suite):
        return attack.name
    return str(getattr(attack, "__name__", type(attack).__name__)).lower()


def _check_attack(name: str, attack: Any) -> None:
    if not callable(attack) or getattr(attack, "norm", None) not in NORMS:
        raise InputError(
            f"attack {name!r} is a {type(attack).__name__}; give a callable "
            "(model, x, y) -> x_adv with eps and norm ('linf' or 'l2')"
        )
    eps: Any = getattr(attack, "eps", None)
    checks.eps(checks.positive(f"eps of {name}", eps), attack.norm)
    if name == CLEAN:
        raise InputError(
            f"an attack is named {name!r}, which stands for images without attack; choose another "
            "name"
        )
