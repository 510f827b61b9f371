"""The model under evaluation: how it is asked, with which noise, and how gradients are taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.attacks.contained import contained
from art_denoised.attacks.suites import Outcome, Suite, as_module
from art_denoised.checks import InputError, model_device
from art_denoised.evaluation.attacked.columns import attack_name
from art_denoised.evaluation.attacked.settings import attributes
from art_denoised.rdc.classifier import DiffusionClassifier
from art_denoised.rdc.likelihood import LikelihoodMaximization
from art_denoised.smoothing.modules import DenoisedClassifier, SmoothedClassifier
from art_denoised.types import Images, Labels, Logits

_SEEDED = (DiffusionClassifier, LikelihoodMaximization, SmoothedClassifier)
_SAME = 1e-5  # two answers that differ by less, relative to their size, differ by rounding
_MIXING = 0x9E3779B1  # odd, so that no two seeds of an attack are mixed to the same
LOOKED, _ANSWERS, _CALLS = 32, 96, 16  # images, answers and calls before a model is deterministic


class Target:
    """A model to attack, asked again and again at the start to see whether it is randomised.

    It is, if two calls ever differ by more than rounding: of 16 calls with the first two images,
    then of 3 with all (of more, where that makes fewer than 96 answers). The first difference ends
    it; a deterministic model pays some 130 passes of one image. Where noise changes each answer
    with probability p, it is missed with probability (1 - p)^96 or less: 1e-6 at p = 0.135. Where
    it changes all answers of a call at once, with (1 - p)^16 or so: `steady` may yet find it.

    Args:
        model: A module in eval mode, or an ART estimator over one.
        x: Images, of which the first 32 are looked at.
        noise: "fixed"; "fresh", which makes a model randomised whatever its calls say; or None: as
            the model comes.
        repeats: Evaluations of an attacked image, if it is randomised.
        seed: Fixes noise that is asked to be fixed and is not; of the global generators.
        batch_size: Images in a call, at most.

    Attributes:
        given: The model as it was given, for attacks of ART.
        module: Its module.
        randomised: Whether calls differ.
        repeats: Evaluations of an attacked image; 1 if not randomised.
        differentiable: Whether autograd reaches the images.
        classes: Their number.
        device: Where images go.

    Raises:
        InputError: The model cannot be used, or has no noise that can be fixed.

    Example:
        >>> base = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> model = SmoothedClassifier(base, sigma=0.25, samples=4, seed=0)
        >>> Target(model, torch.rand(2, 1, 8, 8), noise="fresh", repeats=5, seed=0).randomised
        True
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
        checks.eval_mode(self.module)
        self._seeded = [part for part in self.module.modules() if isinstance(part, _SEEDED)]
        if noise not in (None, "fixed", "fresh"):
            raise InputError(f"noise is {noise!r}; give fixed or fresh, or leave it as it comes")
        if noise == "fixed" and not self._seeded:
            raise InputError(
                "noise is 'fixed', but the model has no part whose noise can be set; leave it as "
                "it comes"
            )
        self._noise, self._seed = noise, seed
        self.device = model_device(self.module)
        x = x[:LOOKED].to(self.device)
        self.classes = checks.class_count(self.module, x[:1])
        with self.as_asked():
            self.randomised = noise == "fresh" or self._differs(x, batch_size)
            with contained(self.module, seed), torch.enable_grad():
                leaf = x[:2].detach().clone().requires_grad_()
                self.differentiable = self.logits(leaf).requires_grad
            fixed = all(part.seed is not None for part in self._seeded)
        self.repeats = repeats if self.randomised else 1
        self._kind = "fresh" if self.randomised else ("fixed" if self._seeded and fixed else "none")

    @property
    def settings(self) -> dict[str, Any]:
        """What determines its answers, beside the weights."""
        return {
            "classes": self.classes,
            "randomised": self.randomised,
            "noise": self._kind,
            "repeats": self.repeats,
        }

    @contextlib.contextmanager
    def as_asked(self) -> Iterator[None]:
        """Fix or free the noise as asked, and put it back at the end."""
        before = [part.seed for part in self._seeded]
        try:
            for part in self._seeded:
                if self._noise == "fixed" and part.seed is None:
                    part.seed = self._seed
                elif self._noise == "fresh":
                    part.seed = None
            yield
        finally:
            for part, one in zip(self._seeded, before, strict=True):
                part.seed = one

    def gradients(self, asked: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the ways of taking gradients that the model has, or of these the ones asked for.

        Raises:
            InputError: It has not what is asked for.
        """
        both = any(isinstance(part, LikelihoodMaximization) for part in self.module.modules())
        has = ("exact", "bpda") if both else ("exact",)
        if asked is not None and not asked:
            raise InputError(f"gradients is empty; this model has {' and '.join(has)}")
        for one in asked or ():
            if one not in has:
                raise InputError(f"gradients has {one!r}; this model has {' and '.join(has)}")
        return has if asked is None else tuple(asked)

    def logits(self, x: Images) -> Logits:
        """Return the model's answer.

        Raises:
            InputError: It raised, or returned something else than logits.
        """
        try:
            output = self.module(x)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the model failed: {_words(error)}; what was done is kept") from error
        self._check_shape(output, len(x))
        return checks.logits(output, len(x))

    @torch.no_grad()
    def right(self, x: Images, y: Labels, seed: int, repeats: int | None = None) -> Tensor:
        """Return whether each image is right, (repeats, batch), in evaluations with fresh noise."""
        with contained(self.module, seed):
            answers = [self.logits(x).argmax(1) == y for _ in range(repeats or self.repeats)]
        return torch.stack(answers).cpu()

    @torch.no_grad()
    def steady(self, x: Images, y: Labels, seed: int, indices: Sequence[int]) -> Tensor:
        """Return what `right` does, (1, batch), asking twice a model taken for deterministic.

        Raises:
            InputError: It answers differently.
        """
        with contained(self.module, seed):
            first, second = self.logits(x), self.logits(x)
        gaps = _gaps(first, second)
        if bool((gaps > _SAME).any()):
            index = indices[int(gaps.argmax())]
            raise InputError(
                f"the model is randomised, though its first calls agreed: image {index} was "
                "answered differently when asked again; give noise='fresh' (--noise fresh) and "
                "another folder"
            )
        return (first.argmax(1) == y)[None].cpu()

    def attempt(self, attack: Any, gradient: str, x: Images, y: Labels, seed: int) -> Outcome:
        """Run an attack with one way of taking gradients, seeded by ``seed`` and its own seed.

        Raises:
            InputError: It failed.
        """
        if is_dataclass(attack) and any(option.name == "seed" for option in fields(attack)):
            own = attributes(attack)["seed"]
            seed = (seed + own * _MIXING) % 2**31 if isinstance(own, int) else seed
            attack = replace(attack, seed=seed)  # type: ignore[type-var]
        try:
            with contained(self.module, seed), self.taking(gradient), self._watched():
                if isinstance(attack, Suite):
                    return attack.run(self.given, x, y)
                return Outcome(attack(self.module, x, y))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"attack {attack_name(attack)!r} failed: {_words(error)}; what was done is kept"
            ) from error

    @contextlib.contextmanager
    def taking(self, gradient: str) -> Iterator[None]:
        """Let likelihood maximization take its gradients this way; "none" changes nothing."""
        parts = [p for p in self.module.modules() if isinstance(p, LikelihoodMaximization)]
        before = [part.gradient for part in parts]
        try:
            if gradient != "none":
                for part in parts:
                    part.gradient = gradient  # type: ignore[assignment]
            yield
        finally:
            for part, one in zip(parts, before, strict=True):
                part.gradient = one

    @torch.no_grad()
    def denoised(self, x: Images) -> Images | None:
        """Return what the defence's denoising makes of images, for people to see."""
        for part in self.module.modules():
            if isinstance(part, LikelihoodMaximization):
                return part(x)
            if isinstance(part, SmoothedClassifier) and isinstance(part.base, DenoisedClassifier):
                generator = torch.Generator().manual_seed(self._seed)
                noise = torch.randn(x.shape, generator=generator).to(x)
                return part.base.denoiser(x + part.sigma * noise, part.sigma)
        return None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Check the shape of what the model returns to an attack, which would blame itself."""

        def look(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self._check_shape(output, len(inputs[0]))

        hook = self.module.register_forward_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def _check_shape(self, output: Any, batch: int) -> None:
        shape = tuple(getattr(output, "shape", ()))
        if shape != (batch, self.classes):
            raise InputError(
                f"the model returned shape {shape} for {batch} images; at first it returned "
                f"{self.classes} logits for each"
            )

    @torch.no_grad()
    def _differs(self, x: Images, batch_size: int) -> bool:
        times = max(3, math.ceil(_ANSWERS / len(x)))
        todo = [(x[:2], _CALLS), *((block, times) for block in torch.split(x, batch_size))]
        with contained(self.module, self._seed):
            for block, calls in todo:
                first = self.logits(block)
                for _ in range(calls - 1):
                    if bool((_gaps(first, self.logits(block)) > _SAME).any()):
                        return True
        return False


def _gaps(first: Logits, second: Logits) -> Tensor:
    """Return by how much two answers to each image differ, relative to their size."""
    gaps = (first - second).abs().masked_fill(first == second, 0)  # log-probabilities of -inf too
    size = first.abs().masked_fill(first.isinf(), 0).max()
    return gaps.amax(1) / (1 + size)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
