"""The attacks of a run: named, checked, and what they return verified."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import art_denoised
from art_denoised import checks
from art_denoised.attacks.suites import NORMS, Suite, distances, within
from art_denoised.checks import InputError
from art_denoised.evaluation.attacked.records import CLEAN
from art_denoised.evaluation.attacked.settings import describe
from art_denoised.types import Images

_PACKAGES = ("torch", "adversarial-robustness-toolbox", "torchattacks", "pyautoattack")


@dataclass(frozen=True)
class Column:
    """An attack with one way of taking gradients.

    Attributes:
        name: Of the attack.
        gradient: "exact", "bpda" or "none".
        attack: The attack, with ``eps`` and ``norm``.
        mixed: Whether it takes gradients in some of its parts only: what it breaks is no proof that
            gradients find it.
    """

    name: str
    gradient: str
    attack: Any
    mixed: bool = False

    @property
    def key(self) -> tuple[str, str, float]:
        """As `AttackRow.column`."""
        return (self.name, self.gradient, float(self.attack.eps))


def columns(
    attacks: Iterable[Any] | Mapping[str, Any], gradients: tuple[str, ...]
) -> Iterator[Column]:
    """Yield each attack with each way of taking gradients, under a name of its own.

    Raises:
        InputError: Something is no attack with a ball, or is given twice.

    Example:
        >>> from art_denoised.attacks.autoattack import AutoAttack
        >>> [column.key for column in columns([AutoAttack(0.1)], ("exact", "bpda"))]
        [('autoattack', 'exact', 0.1), ('autoattack', 'bpda', 0.1)]
    """
    given = attacks.items() if isinstance(attacks, Mapping) else attacks
    named = [one if isinstance(one, tuple) else (attack_name(one), one) for one in given]
    seen = set()
    for name, attack in named:
        if not callable(attack) or getattr(attack, "norm", None) not in NORMS:
            raise InputError(
                f"attack {name!r} is a {type(attack).__name__}; give a callable "
                "(model, x, y) -> x_adv with eps and norm ('linf' or 'l2')"
            )
        eps = getattr(attack, "eps", None)
        checks.eps(checks.positive(f"eps of {name}", eps), attack.norm)  # type: ignore[arg-type]
        if name == CLEAN:
            raise InputError(f"an attack is named {name!r}, as the images without attack are")
        free = bool(getattr(attack, "gradient_free", False))
        mixed = bool(getattr(attack, "mixed", False))
        for gradient in ("none",) if free else gradients:
            column = Column(name, gradient, attack, mixed)
            if column.key in seen:
                raise InputError(
                    f"attack {name!r} is given twice with eps {column.key[2]:g}; give pairs "
                    "of a name and an attack"
                )
            seen.add(column.key)
            yield column


def attack_name(attack: Any) -> str:
    """Return the name of an attack that was given none.

    Example:
        >>> from art_denoised.attacks.pgd import PGD
        >>> attack_name(PGD(0.1))
        'pgd'
    """
    if isinstance(attack, Suite):
        return attack.name
    return str(getattr(attack, "__name__", type(attack).__name__)).lower()


def attack_settings(attack: Any) -> dict[str, Any]:
    """Return what determines an attack, its own seed among it, as plain JSON values.

    Example:
        >>> from art_denoised.attacks.autoattack import AutoAttack
        >>> attack_settings(AutoAttack(0.1, parts=("apgd-ce",)))["parts"]
        ['apgd-ce']
    """
    own = describe(attack)
    own = own if isinstance(own, dict) else {"held": own}  # a function
    return {**own, "type": type(attack).__name__, "eps": float(attack.eps), "norm": attack.norm}


def versions() -> dict[str, str]:
    """Return the versions of what the rows depend on.

    Example:
        >>> versions()["art_denoised"] == art_denoised.__version__
        True
    """
    versions = {"art_denoised": art_denoised.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def verified(column: Column, indices: Sequence[int], x: Images, x_adv: Any) -> Images:
    """Return attacked images that are what the attack may return.

    Raises:
        InputError: Another shape, NaN, pixels outside [0, 1] by more than 1e-6, or a change that is
            not `within` the ball.
    """
    who, eps, norm = f"attack {column.name!r}", column.attack.eps, column.attack.norm
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        raise InputError(
            f"{who} returned {tuple(getattr(x_adv, 'shape', ()))} for images of "
            f"{tuple(x.shape)}; it must return one image for each"
        )
    x_adv = x_adv.detach().to(x)
    if not bool(torch.isfinite(x_adv).all()):
        raise InputError(f"{who} returned NaN or infinite pixels")
    if float(x_adv.min()) < -1e-6 or float(x_adv.max()) > 1 + 1e-6:
        raise InputError(
            f"{who} left [0, 1]: its pixels span [{float(x_adv.min()):g}, {float(x_adv.max()):g}]"
        )
    if not bool(within(x, x_adv, norm, eps).all()):
        far = distances(x, x_adv)[norm]
        index = indices[int(far.argmax())]
        raise InputError(
            f"{who} left its ball: image {index} moved by {float(far.max()):.6g} in {norm}, "
            f"eps is {eps:g}; give the attack the norm and eps that it works in"
        )
    return x_adv
