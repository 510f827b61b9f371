"""Signs that the attack failed where a defence seems strong.

Sources: Athalye et al., "Obfuscated Gradients" (ICML 2018, arXiv 1802.00420), section 3.1; Carlini
et al., "On Evaluating Adversarial Robustness" (arXiv 1902.06705).

Each check looks at a few images and decides by counting them: it fails when, at confidence 99 %,
the share of images that speak against the figure exceeds its tolerance. Of a randomised model, an
image is broken by one attack and not by another only if it is right in at most a quarter of its
evaluations under the one and in at least three quarters under the other: less is luck.
docs/attack.md says what to do about a failed check.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

import torch

from art_denoised.attacks.contained import Generators, contained
from art_denoised.checks import InputError
from art_denoised.evaluation.attacked.probing import (
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
from art_denoised.evaluation.attacked.records import CHECKS as NAMES
from art_denoised.evaluation.attacked.records import CLEAN, CheckRow
from art_denoised.evaluation.attacked.target import Target
from art_denoised.types import Images

Check: TypeAlias = Callable[[Subject], CheckRow]

_MISSED = 0.02  # images that another attack may break and the gradient attacks miss
_NOISE = 0.05  # images on which a stronger attack may fail by the luck of its start
_HELD = 0.05  # images that may survive an eps at which none should
_ZERO = 0.01  # images without gradient
_LOSSES = 0.2  # images whose loss may rise more along noise than along the gradient
_SATURATED, _TINY = 80.0, 1e-5  # margins: exp(-88) is 0 in float32, and 1e-6 of 1 is rounding


def gradient_free(s: Subject) -> CheckRow:
    """An attack that sees scores alone, or labels, must not find what gradient attacks miss.

    Square is always tried, in every ball: the run's own gradient-free attacks may be weak.
    """
    name = "gradient-free attacks"
    if not s.attackable:
        return _nothing(name)
    own = [count for ball in s.balls if (count := _own_columns(s, *ball))]
    among = len(own) + len(s.balls)
    most, failed = gravest(own, _MISSED, among) if own else (None, False)
    if not failed:
        most, failed = gravest([*own, *(_square(s, *ball) for ball in s.balls)], _MISSED, among)
    assert most is not None  # a run has balls
    masked = "; gradients are masked, the figure is too high" if failed else ""
    return _counted(name, failed, most.k, most.n, _MISSED, most.finding + masked, among)


def stronger_attack(s: Subject) -> CheckRow:
    """A plain PGD must not break many images that all attacks of the run left standing."""
    name = "stronger attack"
    if not s.attackable:
        return _nothing(name)
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
    most, failed = gravest(counts, _NOISE, len(counts))
    harder = "; attack harder" if failed else ""
    return _counted(name, failed, most.k, most.n, _NOISE, most.finding + harder, len(counts))


def zero_gradients(s: Subject) -> CheckRow:
    """Images without a gradient cannot be attacked by one."""
    without = torch.ones(len(s.x), dtype=torch.bool)
    for how in s.target.gradients():
        gradients = s.gradients(how).flatten(1)
        size = gradients.abs().amax(1)
        without &= (~(torch.isfinite(gradients).all(1) & (size > 0))).cpu()
    k, n = int(without.sum()), len(without)
    failed = exceeds(k, n, _ZERO)
    remedy = "; make the defence differentiable, or attack it through BPDA" if failed else ""
    finding = f"{k} of {n} images have a gradient that is zero or not finite{remedy}"
    return _counted("zero gradients", failed, k, n, _ZERO, finding)


def more_steps(s: Subject) -> CheckRow:
    """More steps must not help the defence."""
    if not s.attackable:
        return _nothing("more steps")
    (norm, eps), few = s.ball, max(s.probes.steps // 4, 1)
    less, more = s.pgd(norm, eps, few), s.pgd(norm, eps, s.probes.steps)
    k, n = int(((less <= LOST) & (more >= KEPT)).sum()), len(less)
    failed = exceeds(k, n, _NOISE)
    finding = (
        f"{k} of {n} images survive PGD of {s.probes.steps} steps and not of {few} "
        f"({norm}, eps {eps:g})"
    )
    return _counted("more steps", failed, k, n, _NOISE, finding)


def larger_eps(s: Subject) -> CheckRow:
    """A larger ball must not help the defence."""
    if not s.attackable:
        return _nothing("larger eps")
    norm, eps = s.ball
    beyond = 2 * eps if norm == "l2" else max(min(2 * eps, 1.0), eps)
    small, large = (s.pgd(norm, e, s.probes.steps) for e in (eps, beyond))
    shares = [("PGD", norm, eps, beyond, list(zip(small.tolist(), large.tolist(), strict=True)))]
    columns: dict[tuple[str, str, str], dict[float, dict[int, float]]] = {}
    for row in s.rows:
        if row.attack != CLEAN and row.clean:
            at = columns.setdefault((row.attack, row.gradient, row.norm), {})
            at.setdefault(row.eps, {})[row.index] = row.mean
    for (attack, gradient, norm), at in columns.items():
        for low, high in itertools.pairwise(sorted(at)):
            both = [(share, at[high][i]) for i, share in at[low].items() if i in at[high]]
            shares.append((f"{attack} ({gradient})", norm, low, high, both))
    counts = []
    for who, norm, low, high, both in shares:
        k, n = sum(less <= LOST and more >= KEPT for less, more in both), len(both)
        where = f"under {who} at {norm} eps {high:g} and not at {low:g}"
        if both:
            counts.append(Count(k, n, f"{k} of {n} images survive {where}"))
    most, failed = gravest(counts, _NOISE, len(counts))
    return _counted("larger eps", failed, most.k, most.n, _NOISE, most.finding, len(counts))


def large_enough_eps(s: Subject) -> CheckRow:
    """At an eps where all images can be made the same grey, no defence can be right."""
    name = "eps large enough"
    if not s.attackable:
        return _nothing(name)
    norm = s.ball[0]
    eps = 0.5 if norm == "linf" else 0.5 * math.sqrt(s.x[0].numel())
    held = s.pgd(norm, eps, 2 * s.probes.steps) > 0.5
    k, n = int(held.sum()), len(held)
    failed = exceeds(k, n, _HELD)
    finding = (
        f"{k} of {n} images survive PGD at eps {eps:g} in {norm}, where each can be made plain grey"
        + ("; the attack fails, not the image" if failed else "")
    )
    return _counted(name, failed, k, n, _HELD, finding)


def gradient_against_random(s: Subject) -> CheckRow:
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
    failed = exceeds(n - wins, n, _LOSSES)
    finding = (
        f"for {wins} of {n} images the loss rises more along the gradient than along noise "
        f"({norm}, length {step:g})" + ("; the gradient does not say where to go" if failed else "")
    )
    return _counted("gradient against random", failed, n - wins, n, _LOSSES, finding)


def transfer(s: Subject) -> CheckRow:
    """Images that fool the bare classifier must not fool the defence where its own do not."""
    name = "transfer"
    if s.bare is None:
        return CheckRow(name, None, "not made: the bare classifier was not given")
    if not s.attackable:
        return _nothing(name)
    norm, eps = s.ball
    bare = Target(s.bare, s.x[:2], noise=None, repeats=1, seed=0)
    x_adv = bare.attempt(probe(norm, eps, s.probes.steps), bare.gradients()[0], s.x, s.y, 0).x_adv
    alone = (s.right(x_adv) <= LOST) & (s.by_gradients(norm, eps) >= KEPT)
    k, n = int(alone.sum()), len(s.x)
    failed = exceeds(k, n, _MISSED)
    finding = (
        f"{k} of {n} images are broken by attacks on the bare classifier and not by gradient "
        f"attacks on the defence ({norm}, eps {eps:g})"
    )
    return _counted(name, failed, k, n, _MISSED, finding)


@torch.no_grad()
def logits(s: Subject) -> CheckRow:
    """Logits that do not depend on the image, saturate the softmax, or drown in rounding."""
    with contained(s.target.module, 0):
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
    return CheckRow("logits", not failed, finding, {**numbers, "spread": spread})


@torch.no_grad()
def global_seed(s: Subject) -> CheckRow:
    """A forward pass must not set the global seeds: attacks draw from them, and so may its noise.

    One that only draws from them is given a stream of its own in our runs; other tools do not.
    """
    caller, ends, drawn = Generators.now(), [], set()
    try:
        for seed in (1, 2):
            begin = Generators.seeded(seed, 0)
            begin.put_back()
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
            "here it had a stream of its own, but attacks run elsewhere that set the seed make its "
            "noise repeat itself; draw from a torch.Generator"
        )
    return CheckRow("global seed", not reset, finding, {"sets": reset, "draws": sorted(drawn)})


def _made(name: str, check: Check, s: Subject) -> CheckRow:
    """Make a check. What it cannot do to this model must not take the run's figures along."""
    if not s.balls:
        return CheckRow(name, None, "not made: the run has no attack")
    try:
        return check(s)
    except InputError as error:
        return CheckRow(name, None, f"not made: {error}", {"error": str(error)})


_FUNCTIONS: tuple[Check, ...] = (
    gradient_free,
    stronger_attack,
    zero_gradients,
    more_steps,
    larger_eps,
    large_enough_eps,
    gradient_against_random,
    transfer,
    logits,
    global_seed,
)
CHECKS: dict[str, Check] = {
    name: functools.partial(_made, name, check)
    for name, check in zip(NAMES, _FUNCTIONS, strict=True)
}


def _own_columns(s: Subject, norm: str, eps: float) -> Count | None:
    """Count what the run's gradient-free attacks broke in a ball and its gradient attacks did not.

    Of images that both tried; where no attack of the run uses gradients alone, against our PGD.
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


def _counted(
    name: str, failed: bool, k: int, n: int, tolerance: float, finding: str, among: int = 1
) -> CheckRow:
    numbers = {"images": n, "count": k, "tolerance": tolerance, "alpha": ALPHA}
    if not exceeds(n, n, tolerance, among):  # no count of so few would be a sign
        words = f"{n} images are too few to tell"
        return CheckRow(name, None, f"not made: {words}", {**numbers, "error": words})
    return CheckRow(name, not failed, finding, numbers)


def _nothing(name: str) -> CheckRow:
    words = "no image is right without attack"
    return CheckRow(name, None, f"not made: {words}", {"error": words})
