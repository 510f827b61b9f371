"""Attacked models beside each other: how they differ, and where the comparison is unfair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from art_denoised.reports.results import ALL, Ball, Model, sign_test


@dataclass(frozen=True)
class Difference:
    """How two models differ on the same images, under all attacks on each.

    Attributes:
        first, second: Names of the models.
        norm: "linf" or "l2".
        eps: Radius of the ball, image units.
        images: Number of images that both were attacked on.
        only_first, only_second: Numbers of images that only this model keeps.
        p_value: p-value of the exact two-sided sign test that both are equally good.
        trusted: Whether the results of both are reliable, as `Model.trusted`.
    """

    first: str
    second: str
    norm: str
    eps: float
    images: int
    only_first: int
    only_second: int
    p_value: float
    trusted: bool | None

    @property
    def ball(self) -> Ball:
        """Norm and eps."""
        return Ball(self.norm, self.eps)

    @property
    def gain(self) -> float:
        """Share of images that the second keeps, minus that of the first."""
        return (self.only_second - self.only_first) / self.images


def differences(models: Sequence[Model]) -> list[Difference]:
    """Return how each model differs from the first, in each ball with images that both share.

    An image is kept if it is right in at least half of its evaluations under all attacks. Images
    with equal index and label count as the same; `conflicts` says where runs name other data.

    Example:
        >>> from art_denoised.evaluation.attack_rows import AttackRow
        >>> def model(name, right):
        ...     row = AttackRow(0, 1, "pgd", "exact", "l2", 0.5, True, right, (right,), 0, 0, 0)
        ...     return Model(name, (row,))
        >>> differences([model("plain", False), model("denoised", True)])[0].gain
        1.0
    """
    return [
        _difference(models[0], second, ball, pairs)
        for second in models[1:]
        for ball in models[0].columns
        if (pairs := list(_pairs(models[0], second, ball)))
    ]


def conflicts(models: Sequence[Model]) -> list[str]:
    """Return in words where results that stand beside each other do not compare like with like.

    Models are compared with the first: if all equal it, they equal each other.

    Example:
        >>> from art_denoised.evaluation.attack_rows import AttackRow
        >>> rows = [
        ...     AttackRow(i, 1, "pgd", "exact", "l2", 0.5, True, True, (True,), 0, 0, 0)
        ...     for i in range(2)
        ... ]
        >>> conflicts([Model("a", (rows[0],)), Model("b", (rows[1],))])
        ['a and b: other images were attacked (1 and 1, 0 in common) in l2 eps 0.5']
    """
    found = [words for model in models for words in _within(model)]
    attacked = [model for model in models if model.columns]
    for second in attacked[1:]:
        where: dict[str, list[str]] = {}
        for words, ball in _between(attacked[0], second):
            where.setdefault(words, []).extend([str(ball)] if ball else [])
        names = f"{attacked[0].name} and {second.name}"
        for words, balls in where.items():
            found.append(f"{names}: {words}" + (f" in {', '.join(balls)}" if balls else ""))
    return found


def _within(model: Model) -> Iterator[str]:
    for ball, attacks in model.columns.items():
        sizes = {name: set(rows) for name, rows in attacks.items()}
        common = set.intersection(*sizes.values())
        if any(indices != common for indices in sizes.values()):
            counts = ", ".join(f"{name} {len(indices)}" for (name, _), indices in sizes.items())
            yield (
                f"{model.name}: attacks in {ball} tried other images ({counts}); "
                f"'{ALL}' is over the {len(common)} in common"
            )
    if model.certified and model.unlike:
        yield f"{model.name}: {model.unlike}, so they are not compared"
    if model.certified and not model.same_images:
        yield f"{model.name}: attacks and certificates are of other data, so nothing is paired"


def _between(first: Model, second: Model) -> Iterator[tuple[str, Ball | None]]:
    data = [{str(s["data"]) for _, s in model.settings if "data" in s} for model in (first, second)]
    if all(data) and data[0] != data[1]:
        yield f"other data ({' and '.join('; '.join(sorted(names)) for names in data)})", None
    pixels = [
        {str(s["indices"]): s["pixels"] for _, s in model.settings if {"indices", "pixels"} <= {*s}}
        for model in (first, second)
    ]
    if any(pixels[1].get(choice, found) != found for choice, found in pixels[0].items()):
        yield "other pixels under the same indices", None
    for ball in sorted({*first.columns, *second.columns}):
        attacks = [model.columns.get(ball, {}) for model in (first, second)]
        if not all(attacks):
            yield f"only {(first if attacks[0] else second).name} was attacked", ball
            continue
        for name, mine, other in zip(
            (first.name, second.name), attacks, reversed(attacks), strict=True
        ):
            lone = [f"{attack} ({gradient})" for attack, gradient in sorted(set(mine) - set(other))]
            if lone:
                yield f"only {name} was attacked with {', '.join(lone)}", ball
        images = [set(model.survivals[ball]) for model in (first, second)]
        if images[0] != images[1]:
            common = len(images[0] & images[1])
            counts = f"{len(images[0])} and {len(images[1])}, {common} in common"
            yield f"other images were attacked ({counts})", ball


def _difference(
    first: Model, second: Model, ball: Ball, pairs: Sequence[tuple[bool, bool]]
) -> Difference:
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    verdicts = {first.trusted, second.trusted}
    return Difference(
        first.name,
        second.name,
        *ball,
        images=len(pairs),
        only_first=only_first,
        only_second=only_second,
        p_value=sign_test(only_first, only_second),
        trusted=False if False in verdicts else None if None in verdicts else True,
    )


def _pairs(first: Model, second: Model, ball: Ball) -> Iterator[tuple[bool, bool]]:
    mine, other = first.survivals.get(ball, {}), second.survivals.get(ball, {})
    for index in mine:
        if index in other and first.labels[index] == second.labels[index]:
            yield mine[index].kept, other[index].kept
