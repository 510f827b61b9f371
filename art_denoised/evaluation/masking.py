"""Signs that the attack failed where a defence seems strong.

Sources: Athalye et al., "Obfuscated Gradients" (ICML 2018, arXiv 1802.00420), section 3.1; Carlini
et al., "On Evaluating Adversarial Robustness" (arXiv 1902.06705).

Each check counts images among a few. It fails if, at confidence 99 %, the share of images that
speak against the result exceeds its tolerance. For a randomised model, an image is broken by one
attack and not by another only if it is right in at most a quarter of its evaluations under the one
and in at least three quarters under the other: smaller differences are chance.
docs/attack.md says what to do about a failed check.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from art_denoised.attacks.contained import Generators
from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import CLEAN, AttackRow, CheckRow
from art_denoised.evaluation.columns import Column
from art_denoised.evaluation.probing import (
    ALPHA,
    KEPT,
    LOST,
    Count,
    Subject,
    exceeds,
    gravest,
    probe,
    worst,
)
from art_denoised.evaluation.target import Target
from art_denoised.types import Images

_MISSED = 0.02  # images that another attack may break and the gradient attacks miss
_NOISE = 0.05  # images on which a stronger attack may fail by the luck of its start
_HELD = 0.05  # images that may survive an eps at which none should
_ZERO = 0.01  # images without gradient
_LOSSES = 0.2  # images whose loss may rise more along noise than along the gradient
_SATURATED, _TINY = 80.0, 1e-5  # margins: exp(-88) is 0 in float32, and 1e-6 of 1 is rounding


class Verdict(NamedTuple):
    """What a check found; the fields of `CheckRow` after its name."""

    passed: bool | None
    finding: str
    numbers: dict[str, Any]


class _NotMadeError(Exception):
    """The check cannot be made, for the reason given."""


def make(name: str, subject: Subject) -> CheckRow:
    """Make one of `CHECKS`. A check that cannot be made does not end the run."""
    if not subject.columns:
        return CheckRow(name, None, "not made: the run has no attack")
    return _made(name, functools.partial(_CHECKS[name], subject))


def _made(name: str, check: Callable[[], Verdict]) -> CheckRow:
    try:
        return CheckRow(name, *check())
    except (InputError, _NotMadeError) as error:
        return CheckRow(name, None, f"not made: {error}", {"error": str(error)})


def gradient_free(s: Subject) -> Verdict:
    """An attack that sees scores or labels alone must not find what gradient attacks miss.

    Square is always tried, in every ball: the run's own gradient-free attacks may be weak.
    """
    _need_right_images(s)
    counts = [count for ball in s.balls if (count := _own_columns(s, *ball))]
    among = len(counts) + len(s.balls)
    if not (counts and gravest(counts, _MISSED, among)[1]):
        counts += [_square(s, *ball) for ball in s.balls]
    remedy = "; gradients are masked, the result is too high"
    return _judged(gravest(counts, _MISSED, among)[0], _MISSED, remedy, among)


def stronger_attack(s: Subject) -> Verdict:
    """A plain PGD must not break many images that all attacks of the run left."""
    _need_right_images(s)
    counts = []
    for norm, eps in s.balls:
        left = worst(row for row in s.rows if (row.norm, row.eps) == (norm, eps))
        stands = torch.tensor([left.get(index, 0.0) >= KEPT for index in s.indices])
        k, n = 0, len(stands)
        if stands.any():
            k = int(((s.pgd(norm, eps, s.probes.steps) <= LOST) & stands).sum())
        finding = (
            f"PGD of {s.probes.steps} steps on the margin broke {k} of {n} images that no attack "
            f"of the run broke ({norm}, eps {eps:g})"
        )
        counts.append(Count(k, n, finding))
    most, _ = gravest(counts, _NOISE, len(counts))
    return _judged(most, _NOISE, "; attack harder", len(counts))


def zero_gradients(s: Subject) -> Verdict:
    """Images without a gradient cannot be attacked by one."""
    without = torch.ones(len(s.x), dtype=torch.bool)
    for how in s.target.gradients():
        gradients = s.gradients(how).flatten(1)
        size = gradients.abs().amax(1)
        without &= (~(torch.isfinite(gradients).all(1) & (size > 0))).cpu()
    k, n = int(without.sum()), len(without)
    count = Count(k, n, f"{k} of {n} images have a gradient that is zero or not finite")
    remedy = "; make the defence differentiable, or attack it through BPDA"
    return _judged(count, _ZERO, remedy)


def more_steps(s: Subject) -> Verdict:
    """More steps must not help the defence."""
    _need_right_images(s)
    (norm, eps), few = s.ball, max(s.probes.steps // 4, 1)
    less, more = s.pgd(norm, eps, few), s.pgd(norm, eps, s.probes.steps)
    k, n = int(((less <= LOST) & (more >= KEPT)).sum()), len(less)
    finding = (
        f"{k} of {n} images survive PGD of {s.probes.steps} steps but not of {few} "
        f"({norm}, eps {eps:g})"
    )
    return _judged(Count(k, n, finding), _NOISE)


def larger_eps(s: Subject) -> Verdict:
    """A larger ball must not help the defence."""
    _need_right_images(s)
    norm, eps = s.ball
    beyond = 2 * eps if norm == "l2" else max(min(2 * eps, 1.0), eps)
    small, large = (s.pgd(norm, e, s.probes.steps) for e in (eps, beyond))
    shares = [("PGD", norm, eps, beyond, list(zip(small.tolist(), large.tolist(), strict=True)))]
    counts = []
    for who, norm, low, high, both in [*shares, *_growing(s.rows)]:
        k, n = sum(less <= LOST and more >= KEPT for less, more in both), len(both)
        where = f"under {who} at {norm} eps {high:g} but not at {low:g}"
        if both:
            counts.append(Count(k, n, f"{k} of {n} images survive {where}"))
    most, _ = gravest(counts, _NOISE, len(counts))
    return _judged(most, _NOISE, among=len(counts))


def _growing(
    rows: tuple[AttackRow, ...],
) -> Iterator[tuple[str, str, float, float, list[tuple[float, float]]]]:
    """Yield shares of right answers under an attack at one eps and at the next larger one."""
    columns: dict[tuple[str, str, str], dict[float, dict[int, float]]] = {}
    for row in rows:
        if row.attack != CLEAN and row.clean:
            at = columns.setdefault((row.attack, row.gradient, row.norm), {})
            at.setdefault(row.eps, {})[row.index] = row.mean
    for (attack, gradient, norm), at in columns.items():
        for low, high in itertools.pairwise(sorted(at)):
            both = [(share, at[high][i]) for i, share in at[low].items() if i in at[high]]
            yield f"{attack} ({gradient})", norm, low, high, both


def large_enough_eps(s: Subject) -> Verdict:
    """At an eps where all images can become the same grey, no defence can be right."""
    _need_right_images(s)
    norm = s.ball[0]
    eps = 0.5 if norm == "linf" else 0.5 * math.sqrt(s.x[0].numel())
    held = s.pgd(norm, eps, 2 * s.probes.steps) > 0.5
    k, n = int(held.sum()), len(held)
    finding = (
        f"{k} of {n} images survive PGD at eps {eps:g} in {norm}, where each can become plain grey"
    )
    return _judged(Count(k, n, finding), _HELD, "; the attack fails, not the image")


def gradient_against_random(s: Subject) -> Verdict:
    """The loss must rise more along the gradient than along a random direction as long."""
    norm, eps = s.ball
    step, n = eps / 4, len(s.x)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(s.x.shape, generator=generator).to(s.x)
    before = s.losses((s.x + step * _direction(noise, norm)).clamp(0, 1))
    wins = 0
    for how in s.target.gradients():
        along = _direction(torch.nan_to_num(s.gradients(how)), norm)
        wins = max(wins, int((s.losses((s.x + step * along).clamp(0, 1)) > before).sum()))
    finding = (
        f"for {wins} of {n} images the loss rises more along the gradient than along noise "
        f"({norm}, length {step:g})"
    )
    remedy = "; the gradient does not show where to go"
    return _judged(Count(n - wins, n, finding), _LOSSES, remedy)


def transfer(s: Subject) -> Verdict:
    """Attacks on the undefended classifier must not break what attacks on the defence do not."""
    if s.undefended is None:
        return Verdict(None, "not made: the undefended classifier was not given", {})
    _need_right_images(s)
    norm, eps = s.ball
    other = Target(s.undefended, s.x[:2], noise=None, repeats=1, seed=0)
    attack = probe(norm, eps, s.probes.steps)
    x_adv = other.attempt(attack, other.gradients()[0], s.x, s.y, 0).x_adv
    alone = (s.right(x_adv) <= LOST) & (s.by_gradients(norm, eps) >= KEPT)
    k, n = int(alone.sum()), len(s.x)
    finding = (
        f"{k} of {n} images are broken by attacks on the undefended classifier but not by gradient "
        f"attacks on the defence ({norm}, eps {eps:g})"
    )
    return _judged(Count(k, n, finding), _MISSED)


@torch.no_grad()
def logits(s: Subject) -> Verdict:
    """Logits must depend on the image, not saturate the softmax, and not drown in rounding."""
    with s.target.session(0):
        answer = s.target.logits(s.x).double()
    finite = answer[answer.isfinite()]  # a class that is ruled out has a logit of -inf
    answer = answer.clamp(finite.min(), finite.max()) if len(finite) else torch.zeros_like(answer)
    top = answer.topk(2, dim=1).values
    gaps = top[:, 0] - top[:, 1]
    typical, spread = float(gaps.median()), float((answer - answer[:1]).abs().max())
    saturated = int((gaps > _SATURATED).sum())
    scale = 1 + float(answer.abs().max())
    finding, failed = f"the median margin of the logits is {typical:.3g}", False
    if len(s.x) > 1 and spread <= 1e-6 * scale:
        finding, failed = "the logits are the same for every image", True
    elif typical <= _TINY * scale:
        finding, failed = f"{finding}, lost in rounding; scale the logits up", True
    elif exceeds(saturated, len(gaps), _NOISE):
        failed = True
        finding = (
            f"{saturated} of {len(gaps)} images have a margin above {_SATURATED:g}, where the "
            "gradient of cross-entropy is 0 in float32; scale the logits down (a temperature), "
            "or attack with the margin or DLR loss"
        )
    numbers = {"images": len(gaps), "median_margin": typical, "saturated": saturated}
    return Verdict(not failed, finding, {**numbers, "spread": spread})


@torch.no_grad()
def global_seed(s: Subject) -> Verdict:
    """A forward pass must not set the global seeds: attacks draw from them, and so may its noise.

    A model that only draws from them gets a stream of its own in our runs, but not in other tools.
    """
    caller, ends, drawn = Generators.now(), [], set()
    try:
        for seed in (1, 2):
            begin = Generators.seeded(seed, 0)
            begin.put_back()
            with s.target.guarded():
                s.target.logits(s.x[:2])
            ends.append(Generators.now())
            drawn.update(ends[-1].differing(begin))
    finally:
        caller.put_back()
    reset = sorted(drawn - set(ends[0].differing(ends[1])))
    finding = "the forward pass leaves the global random state alone"
    if reset:
        finding = (
            f"the forward pass sets the seed of {' and '.join(reset)}: its noise is the same in "
            "every call, and attacks that draw numbers are frozen; draw from a torch.Generator"
        )
    elif drawn:
        finding = (
            f"the forward pass draws from the global generator of {' and '.join(sorted(drawn))}; "
            "here it had a stream of its own, but an attack elsewhere that sets the seed makes its "
            "noise repeat itself; draw from a torch.Generator"
        )
    return Verdict(not reset, finding, {"sets": reset, "draws": sorted(drawn)})


def unmoved(s: Subject) -> list[CheckRow]:
    """Return a check for each gradient attack that moved no image, as with a gradient of zero.

    It fails if PGD breaks such images: then the attack did not work. Otherwise there is no verdict,
    since an attack that returns only what it broke moves nothing on a robust model. A gradient-free
    attack that moves nothing had too few queries, which says nothing of the model.
    """
    seeing = [column for column in s.columns if column.gradient != "none"]
    still = [column for column in seeing if _moved_nothing(s.rows, column)]
    return [
        _made(f"moved by {column.words}", functools.partial(_unmoved, s, column, len(still)))
        for column in still
    ]


def _unmoved(s: Subject, column: Column, among: int) -> Verdict:
    norm, eps = column.attack.norm, column.attack.eps
    kept = worst(row for row in s.rows if row.column == column.key)
    stands = torch.tensor([kept.get(index, 0.0) >= KEPT for index in s.indices])
    k, n = int(((s.pgd(norm, eps, s.probes.steps) <= LOST) & stands).sum()), len(stands)
    finding = f"the attack moved no image; PGD of {s.probes.steps} steps broke {k} of {n}"
    remedy = "; the attack does not work on this model"
    verdict = _judged(Count(k, n, finding), _NOISE, remedy, among)
    return verdict if verdict.passed is False else verdict._replace(passed=None)


def _moved_nothing(rows: tuple[AttackRow, ...], column: Column) -> bool:
    attacked = [row for row in rows if row.column == column.key and row.clean]
    return bool(attacked) and all(row.distance_linf == 0 for row in attacked)


_CHECKS: dict[str, Callable[[Subject], Verdict]] = {
    "gradient-free attacks": gradient_free,
    "stronger attack": stronger_attack,
    "zero gradients": zero_gradients,
    "more steps": more_steps,
    "larger eps": larger_eps,
    "eps large enough": large_enough_eps,
    "gradient against random": gradient_against_random,
    "transfer": transfer,
    "logits": logits,
    "global seed": global_seed,
}


def _own_columns(s: Subject, norm: str, eps: float) -> Count | None:
    """Count what the run's gradient-free attacks broke in a ball and its gradient attacks did not.

    Images count that both tried. If no attack of the run uses gradients alone, our PGD stands in.
    """
    rows = s.blind(norm, eps)
    blind, seen = worst(rows), worst(s.seeing(norm, eps))
    both = blind.keys() & (seen.keys() or s.indices)
    if not both:
        return None
    if seen:
        k = sum(blind[i] <= LOST and seen[i] >= KEPT for i in both)
    else:
        k = int(s.alone(norm, eps, torch.tensor([blind.get(i, 1.0) for i in s.indices])).sum())
    return _missed(", ".join(sorted({row.attack for row in rows})), k, len(both), norm, eps)


def _square(s: Subject, norm: str, eps: float) -> Count:
    alone = int(s.alone(norm, eps, s.by_square(norm, eps)).sum())
    return _missed(f"Square ({s.probes.queries} queries)", alone, len(s.x), norm, eps)


def _missed(who: str, k: int, n: int, norm: str, eps: float) -> Count:
    where = f"broke {k} of {n} images that no gradient attack broke ({norm}, eps {eps:g})"
    return Count(k, n, f"{who} {where}")


def _direction(gradients: Images, norm: str) -> Images:
    if norm == "linf":
        return gradients.sign()
    length = gradients.flatten(1).norm(dim=1).clamp_min(1e-30)
    return gradients / length.reshape(-1, 1, 1, 1)


def _need_right_images(s: Subject) -> None:
    if not s.attackable:
        raise _NotMadeError("no image is right without attack")


def _judged(count: Count, tolerance: float, remedy: str = "", among: int = 1) -> Verdict:
    """Return whether so many images are a sign; ``remedy`` is added to the words if they are."""
    k, n, finding = count
    numbers = {"images": n, "count": k, "tolerance": tolerance, "alpha": ALPHA}
    if not exceeds(n, n, tolerance, among):  # no count of so few would be a sign
        words = f"{n} images are too few to tell"
        return Verdict(None, f"not made: {words}", {**numbers, "error": words})
    failed = exceeds(k, n, tolerance, among)
    return Verdict(not failed, finding + remedy * failed, numbers)
