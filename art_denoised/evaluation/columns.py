"""The columns of a run: an attack with a way of taking gradients, and what it does to a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from art_denoised import checks
from art_denoised.attacks.suites import NORMS, distances, within
from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import CLEAN, AttackRow, CheckRow, ImageRow
from art_denoised.evaluation.target import Target, attack_name
from art_denoised.runs.identity import describe
from art_denoised.types import Images, Labels

# A warning of AutoAttack, whether the result stands (None: a masking check decides), its meaning.
_FLAGS = (
    (
        "randomized defense",
        False,
        "two calls differ, but this version takes gradients of one draw; use autoattack-rand or "
        "PGD with EOT, and read the accuracy on fresh noise",
    ),
    (
        "probability distribution",
        False,
        "the model returns probabilities, and its losses take their logarithm again; return logits "
        "or log-probabilities",
    ),
    (
        "zero gradient",
        None,
        "some images have no gradient at some step; the check 'zero gradients' decides whether "
        "there are too many",
    ),
    (
        "Square Attack has decreased",
        None,
        "Square broke images that its gradient attacks missed; the check 'gradient-free attacks' "
        "runs a Square of its own and decides whether there are too many",
    ),
    (
        "dynamic defense",
        True,
        "the forward pass takes gradients itself, as likelihood maximization does; AutoAttack "
        "cannot tell whether its own gradients pass through that, the checks here do",
    ),
)


@dataclass(frozen=True)
class Column:
    """An attack with one way of taking gradients.

    Attributes:
        name: Name of the attack.
        gradient: "exact", "bpda" or "none".
        attack: The attack, with ``eps`` and ``norm``.
        mixed: Whether only some of its parts take gradients. What it breaks does not show that
            gradients find it.
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


@dataclass(frozen=True)
class NoAttack:
    """What is done to the images of the column "clean": nothing."""

    norm: str
    eps: float = 0.0


def clean_column(norm: str = NORMS[0]) -> Column:
    """Return the column of the images without attack, which every run begins with.

    Example:
        >>> clean_column().key
        ('clean', 'none', 0.0)
    """
    return Column(CLEAN, "none", NoAttack(norm))


def columns(
    attacks: Iterable[Any] | Mapping[str, Any], gradients: tuple[str, ...]
) -> Iterator[Column]:
    """Yield each attack with each way of taking gradients, under a name of its own.

    Raises:
        InputError: Something is not an attack within a ball, or is given twice.

    Example:
        >>> from art_denoised.attacks.autoattack import AutoAttack
        >>> [column.key for column in columns([AutoAttack(0.1)], ("exact", "bpda"))]
        [('autoattack', 'exact', 0.1), ('autoattack', 'bpda', 0.1)]
    """
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
                    f"attack {name!r} is given twice with eps {column.key[2]:g}; give pairs "
                    "of a name and an attack"
                )
            seen.add(column.key)
            yield column


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


def attack_settings(used: Iterable[Column]) -> list[dict[str, Any]]:
    """Return what determines each attack, its own seed among it, as JSON values.

    Example:
        >>> from art_denoised.attacks.autoattack import AutoAttack
        >>> (one,) = attack_settings(columns([AutoAttack(0.1)], ("exact", "bpda")))
        >>> one["name"], one["gradients"], one["version"]
        ('autoattack', ['exact', 'bpda'], 'standard')
    """
    settings: dict[tuple[str, float], dict[str, Any]] = {}
    for column in used:
        name, gradient, eps = column.key
        own = describe(column.attack)
        own = own if isinstance(own, dict) else {"held": own}  # a function
        common = {"type": type(column.attack).__name__, "eps": eps, "norm": column.attack.norm}
        named = {"name": name, "gradients": [], "mixed": column.mixed}
        settings.setdefault((name, eps), {**own, **common, **named})["gradients"].append(gradient)
    return list(settings.values())


def verified(column: Column, indices: Sequence[int], x: Images, x_adv: Any) -> Images:
    """Return attacked images after checking that the attack may return them.

    Raises:
        InputError: Another shape, NaN, pixels outside [0, 1] by more than 1e-6, or a change that is
            not `within` the ball.
    """
    who, eps, norm = f"attack {column.name!r}", column.attack.eps, column.attack.norm
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        raise InputError(
            f"{who} returned {tuple(getattr(x_adv, 'shape', ()))} for images of shape "
            f"{tuple(x.shape)}; it must return one image for each"
        )
    x_adv = x_adv.detach().to(x)
    if not bool(torch.isfinite(x_adv).all()):
        raise InputError(f"{who} returned NaN or infinite pixels; clamp them, or leave it out")
    low, high = float(x_adv.min()), float(x_adv.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(f"{who} returned pixels in [{low:g}, {high:g}]; clamp them to [0, 1]")
    if not bool(within(x, x_adv, norm, eps).all()):
        far = distances(x, x_adv)[norm]
        index = indices[int(far.argmax())]
        raise InputError(
            f"{who} returned an example outside the eps-ball: image {index} moved by "
            f"{float(far.max()):.6g} in {norm}, eps is {eps:g}; give the attack the norm and eps "
            "that it works in"
        )
    return x_adv


def autoattack_flags(column: Column, flags: Sequence[str], randomised: bool) -> CheckRow:
    """Return AutoAttack's warnings about the model as a check, explained.

    The check passes only if no warning spoils the result or leaves the decision to another check.

    Example:
        >>> from art_denoised.attacks.autoattack import AutoAttack
        >>> (column,) = columns([AutoAttack(0.1)], ("exact",))
        >>> row = autoattack_flags(column, ["... dynamic defense! ..."], randomised=False)
        >>> row.passed, row.finding[:42]
        (True, 'dynamic defense: the forward pass takes gr')
    """
    verdicts: set[bool | None] = set()
    words = []
    for flag in flags:
        known = next((entry for entry in _FLAGS if entry[0] in flag), None)
        verdicts.add(known[1] if known else None)
        words.append(f"{known[0]}: {known[2]}" if known else flag)
    return CheckRow(
        f"flags of {column.words}",
        False if False in verdicts else None if None in verdicts else True,
        "; ".join(dict.fromkeys(words)) or "none",
        {"flags": list(flags), "randomised": randomised},
    )


@dataclass(frozen=True)
class Batch:
    """Images that are attacked together, with random numbers of their own.

    Attributes:
        indices: Indices of the images in the data set.
        x: Images.
        y: True classes.
        seed: Seed of all that is drawn for them.
    """

    indices: Sequence[int]
    x: Images
    y: Labels
    seed: int


class Found(NamedTuple):
    """What became of a batch.

    Attributes:
        x_adv: Images after the attack.
        clean: Whether each was right without attack, (batch,).
        counted: Whether each was right by the attack's own count, (batch,).
        right: Whether each was right in the later evaluations, (repeats, batch).
        flags: Warnings of the attack about the model.
    """

    x_adv: Images
    clean: Tensor
    counted: Tensor
    right: Tensor
    flags: tuple[str, ...] = ()


def unattacked(target: Target, batch: Batch) -> Found:
    """Evaluate images without attack.

    Raises:
        InputError: A model that seemed deterministic is randomised, or the model failed.
    """
    if target.randomised:
        right = target.right(batch.x, batch.y, batch.seed)
    else:
        right = target.steady(batch.x, batch.y, batch.seed, batch.indices)
    return Found(batch.x, right.any(0), right[0], right)


def attacked(target: Target, column: Column, batch: Batch, clean: Tensor) -> Found:
    """Attack those images that are right without attack, and evaluate them again.

    Raises:
        InputError: The model or the attack failed, or returned what it may not.
    """
    x_adv, counted = batch.x.clone(), torch.zeros(len(clean), dtype=torch.bool)
    right = torch.zeros(target.repeats, len(clean), dtype=torch.bool)
    if not bool(clean.any()):
        return Found(x_adv, clean, counted, right)
    mine = clean.to(batch.x.device)
    x, y = batch.x[mine], batch.y[mine]
    found = target.attempt(column.attack, column.gradient, x, y, batch.seed)
    numbers = [index for index, ever in zip(batch.indices, clean.tolist(), strict=True) if ever]
    x_adv[mine] = verified(column, numbers, x, found.x_adv)
    right[:, clean] = later = target.right(x_adv[mine], y, batch.seed + 1)
    if found.counted is not None:
        counted[clean] = found.counted.cpu()
    elif target.randomised:  # a draw of its own, which no later evaluation shares
        counted[clean] = target.right(x_adv[mine], y, batch.seed + 2, repeats=1)[0]
    else:
        counted[clean] = later[0]
    return Found(x_adv, clean, counted, right, found.flags)


def rows_of(column: Column, batch: Batch, found: Found, seconds: float) -> list[AttackRow]:
    """Return one row for each image; the time is divided over those that were attacked."""
    attack, gradient, eps = column.key
    far = distances(batch.x, found.x_adv)
    each = round(seconds / max(int(found.clean.sum()), 1), 6)
    return [
        AttackRow(
            index=index,
            label=int(batch.y[i]),
            attack=attack,
            gradient=gradient,
            norm=column.attack.norm,
            eps=eps,
            clean=clean,
            counted=clean and bool(found.counted[i]),
            fresh=tuple(clean and right for right in found.right[:, i].tolist()),
            distance_linf=float(far["linf"][i]),
            distance_l2=float(far["l2"][i]),
            seconds=each if clean else 0.0,
        )
        for i, (index, clean) in enumerate(zip(batch.indices, found.clean.tolist(), strict=True))
    ]


def pictures_of(
    target: Target, column: Column, batch: Batch, found: Found, wanted: Collection[int]
) -> Iterator[ImageRow]:
    """Yield pictures of the wanted images, before and after the defence's purification."""
    attack, gradient, eps = column.key
    stages = ("attacked", "attacked and denoised") if eps else ("clean", "denoised")
    for i, index in enumerate(batch.indices):
        x = found.x_adv[i : i + 1]
        for stage in stages if index in wanted else ():
            image = target.denoised(x) if stage.endswith("denoised") else x
            if image is not None:
                pixels = image[0].detach().cpu()
                yield ImageRow.of(
                    pixels, index=index, attack=attack, gradient=gradient, eps=eps, stage=stage
                )
