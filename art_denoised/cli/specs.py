"""Attacks as words: ``pgd:steps=100:eot=20``, ``square``, ``torchattacks:PGD``, ``art:NAME``."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from art_denoised.checks import InputError

PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
KNOWN = ("pgd", "autoattack", "autoattack-rand", *PARTS, "torchattacks:NAME", "art:NAME")
_MEANT = {"iters": "steps", "iterations": "steps", "max_iter": "steps", "stepsize": "step_size"}


def parse_attacks(specs: Sequence[str], eps: Sequence[float], norm: str) -> list[tuple[str, Any]]:
    """Return (name, attack) for each attack of a list and each eps.

    Args:
        specs: Names, each followed by its options after colons.
        eps: Radii of the balls.
        norm: "linf" or "l2".

    Raises:
        InputError: There is no such attack, or it has no such option.

    Example:
        >>> [(name, attack.eps) for name, attack in parse_attacks(["square"], [0.1, 0.2], "linf")]
        [('square', 0.1), ('square', 0.2)]
    """
    return [(spec, _parse(spec, radius, norm)) for spec in specs for radius in eps]


def _parse(spec: str, eps: float, norm: Any) -> Any:
    from art_denoised.attacks.autoattack import AutoAttack
    from art_denoised.attacks.pgd import PGD
    from art_denoised.attacks.torchattack import TorchAttack

    head, *rest = spec.split(":")
    if head in ("torchattacks", "art"):
        if not rest or not rest[0] or "=" in rest[0]:
            raise InputError(
                f"attack {spec!r} names no class; give for example {head}:SquareAttack"
            )
        kind, options = rest[0], dict(_option(spec, text) for text in rest[1:])
        if head == "torchattacks":
            return TorchAttack(eps, norm=norm, kind=_torchattacks_name(kind), options=options)
        from art_denoised.estimators.adapters import ArtAttack

        return ArtAttack(eps, norm=norm, kind=kind, options=options)
    options = dict(_option(spec, text) for text in rest)
    if head == "pgd":
        _check_options(spec, options, PGD)
        return PGD(eps, norm=norm, **options)
    if head not in KNOWN:
        raise InputError(f"there is no attack {head!r}; {_hint(head, KNOWN)}")
    _check_options(spec, options, AutoAttack)
    if head in PARTS:
        return AutoAttack(eps, norm=norm, parts=(head,), **options)
    version: Any = "rand" if head.endswith("rand") else "standard"
    return AutoAttack(eps, norm=norm, version=version, **options)


def _option(spec: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise InputError(f"attack {spec!r} has the option {text!r}; give name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _check_options(spec: str, options: Iterable[str], attack: Any) -> None:
    given = {"eps", "norm", "seed", "parts", "version", "_"}  # by other options
    known = [field.name for field in fields(attack) if field.name not in given]
    for name in options:
        if name not in known:
            meant = _MEANT.get(name, name)
            raise InputError(f"attack {spec!r} has no option {name!r}; {_hint(meant, known)}")


def _torchattacks_name(kind: str) -> str:
    """Return the class of torchattacks that is spelt so but for its case."""
    try:
        import torchattacks
    except ImportError:
        return kind  # the attack itself says what is missing
    known = {name.lower(): name for name, _ in inspect.getmembers(torchattacks, inspect.isclass)}
    if kind.lower() not in known:
        raise InputError(f"torchattacks has no attack {kind!r}; {_hint(kind, known.values())}")
    return known[kind.lower()]


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"give one of {', '.join(known)}"
