"""Signs that the attack failed where a defence seems strong.

Sources: Athalye et al., "Obfuscated Gradients" (ICML 2018, arXiv 1802.00420), section 3.1; Carlini
et al., "On Evaluating Adversarial Robustness" (arXiv 1902.06705).

Each check counts images among a few. It fails if, at confidence 99 %, the share of images that
speak against the result exceeds its tolerance. For a randomised model, an image is broken by one
attack and not by another only if it is right in at most a quarter of its evaluations under the one
and in at least three quarters under the other: smaller differences are chance.
docs/tutorials/attack.md says what to do about a failed check.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from scipy import special
from torch import Tensor, nn

from art_denoised import checks
from art_denoised.attacks.pgd import PGD, direction, margin
from art_denoised.attacks.suites import AutoAttack, Generators
from art_denoised.checks import InputError
from art_denoised.evaluation.attack_rows import CHECKS, CLEAN, AttackRow, CheckRow
from art_denoised.evaluation.target import Column, Target
from art_denoised.types import Images, Labels

ALPHA = 0.01  # probability of accusing a model whose share is at the tolerance
_LOST, _KEPT = 0.25, 0.75  # shares of right answers; between them the noise of the model decides
_MISSED = 0.02  # images that another attack may break and the gradient attacks miss
_NOISE = 0.05  # images on which a stronger attack may fail by the luck of its start
_HELD = 0.05  # images that may survive an eps at which none should
_ZERO = 0.01  # images without gradient
_LOSSES = 0.2  # images whose loss may rise more along noise than along the gradient
_SATURATED, _TINY = 80.0, 1e-5  # margins: exp(-88) is 0 in float32, and 1e-6 of 1 is rounding

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
class Probes:
    """Size of the masking checks.

    Attributes:
        images: Number of images: the first that are right without attack.
        steps: Number of steps of the PGD with the margin loss.
        queries: Number of queries of Square, on images that gradient attacks left.
        eot: Number of draws averaged for randomised models.

    Raises:
        InputError: A value is not a whole number above 0.

    Example:
        >>> Probes(images=16).steps
        20
    """

    images: int = 32
    steps: int = 20
    queries: int = 200
    eot: int = 8

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        for size in fields(self):
            checks.count(size.name, getattr(self, size.name))


class Ball(NamedTuple):
    """A ball of images; its words stand in findings."""

    norm: Any
    eps: float

    def __str__(self) -> str:
        return f"{self.norm}, eps {self.eps:g}"


@dataclass
class Subject:
    """What the checks look at: a few images, by their ``indices``, and attacks of our own on them.

    ``rows`` and ``columns`` are those of the run.
    """

    target: Target
    x: Images
    y: Labels
    indices: tuple[int, ...]
    rows: tuple[AttackRow, ...]
    columns: tuple[Column, ...]
    undefended: nn.Module | None
    probes: Probes
    _probed: dict[tuple[Ball, int], Tensor] = field(default_factory=dict)

    @property
    def balls(self) -> list[Ball]:
        """The balls of the attacks."""
        return sorted({Ball(column.attack.norm, column.attack.eps) for column in self.columns})

    @property
    def ball(self) -> Ball:
        """The largest ball of the run in which some image survives gradient attacks."""
        by_size = sorted(self.balls, key=lambda ball: -ball.eps)
        left = (ball for ball in by_size if (self.by_gradients(ball) >= _KEPT).any())
        return next(left, by_size[-1])

    @property
    def eot(self) -> int:
        """Number of draws to average."""
        return self.probes.eot if self.target.randomised else 1

    def need_right_images(self) -> None:
        """Raise unless all the images are right without attack."""
        right = {row.index for row in self.rows if row.attack == CLEAN and row.clean}
        if not right >= set(self.indices):
            raise InputError("no image is right without attack")

    def right(self, x_adv: Images) -> Tensor:
        """Return how often the model is right on each image, in [0, 1]."""
        return self.target.right(x_adv, self.y, seed=1).float().mean(0)

    def attacked(self, attack: Any, gradient: str, chosen: Tensor) -> Tensor:
        """Return how often images are right after an attack on the chosen ones."""
        x_adv = self.x.clone()
        x_adv[chosen] = self.target.attempt(
            attack, gradient, self.x[chosen], self.y[chosen], 0
        ).x_adv
        return self.right(x_adv)

    def pgd(self, ball: Ball, steps: int) -> Tensor:
        """Return how often images are right under PGD, with the worst of the model's gradients."""
        if not self.target.differentiable:
            return self.right(self.x)
        if (ball, steps) not in self._probed:
            attack, every = probe(ball, steps, self.eot), torch.ones(len(self.x), dtype=torch.bool)
            found = [self.attacked(attack, how, every) for how in self.target.gradients()]
            self._probed[ball, steps] = torch.stack(found).amin(0)
        return self._probed[ball, steps]

    def by_gradients(self, ball: Ball) -> Tensor:
        """Return how often images are right under the worst gradient attack, PGD among them."""
        seen = worst(self.seeing(ball))
        mine = torch.tensor([seen.get(index, 1.0) for index in self.indices])
        return torch.minimum(mine, self.pgd(ball, self.probes.steps))

    def by_square(self, ball: Ball) -> Tensor:
        """Return how often images are right under Square, which attacks what gradients left."""
        left = self.by_gradients(ball) >= _KEPT
        if not left.any():
            return torch.ones(len(self.x))
        square = AutoAttack(
            ball.eps, norm=ball.norm, parts=("square",), queries=self.probes.queries
        )
        return self.attacked(square, "none", left)

    def alone(self, ball: Ball, shares: Tensor) -> Tensor:
        """Return which images are broken in ``shares`` but not by gradient attacks.

        They are attacked harder first: Square finds a few images that a short PGD of one start
        misses, on honest models too.
        """
        alone = lost_alone(shares, self.by_gradients(ball))
        attack = replace(probe(ball, 5 * self.probes.steps, self.eot), restarts=4)
        for how in self.target.gradients() if self.target.differentiable else ():
            if alone.any():
                alone &= self.attacked(attack, how, alone) >= _KEPT
        return alone

    def seeing(self, ball: Ball) -> list[AttackRow]:
        """Return the rows of attacks in a ball that use gradients and nothing else.

        What a mixed attack such as AutoAttack breaks shows neither that gradients find it, nor that
        scores do.
        """
        mixed = {column.key for column in self.columns if column.mixed}
        here = self.tried(ball)
        return [row for row in here if row.gradient != "none" and row.column not in mixed]

    def blind(self, ball: Ball) -> list[AttackRow]:
        """Return the rows of attacks in a ball that use no gradient."""
        return [row for row in self.tried(ball) if row.gradient == "none"]

    def tried(self, ball: Ball) -> list[AttackRow]:
        """Return the rows of all attacks in a ball."""
        here = (row for row in self.rows if (row.norm, row.eps) == ball)
        return [row for row in here if row.attack != CLEAN]

    def broken_by_pgd(self, ball: Ball, rows: Iterable[AttackRow]) -> int:
        """Return how many images PGD breaks that the attacks in ``rows`` left."""
        left = worst(rows)
        shares = torch.tensor([left.get(index, 0.0) for index in self.indices])
        if not (shares >= _KEPT).any():
            return 0
        return int(lost_alone(self.pgd(ball, self.probes.steps), shares).sum())

    def gradients(self, how: str) -> Images:
        """Return the gradients of the margin loss at the images, averaged over draws."""
        total = torch.zeros_like(self.x)
        with self.target.session(0), self.target.taking(how), torch.enable_grad():
            for _ in range(self.eot):
                leaf = self.x.clone().requires_grad_()
                loss = margin(self.target.logits(leaf), self.y).sum()
                if loss.requires_grad:
                    (part,) = torch.autograd.grad(loss, leaf, allow_unused=True)
                    total += 0 if part is None else part
        return total

    @torch.no_grad()
    def losses(self, x: Images) -> Tensor:
        """Return the margin loss of each image, averaged over draws."""
        with self.target.session(2):
            draws = [margin(self.target.logits(x), self.y) for _ in range(self.eot)]
        return torch.stack(draws).mean(0)


def lost_alone(shares: Tensor, others: Tensor) -> Tensor:
    """Return which images are broken in ``shares`` and not in ``others``."""
    return (shares <= _LOST) & (others >= _KEPT)


def probe(ball: Ball, steps: int, eot: int = 1) -> PGD:
    """Return the attack of the checks. An l_inf ball beyond 1 becomes 1, which holds all images."""
    eps = min(ball.eps, 1.0) if ball.norm == "linf" else ball.eps
    return PGD(eps, norm=ball.norm, steps=steps, loss="margin", eot=eot)


def worst(rows: Iterable[AttackRow]) -> dict[int, float]:
    """Return how often each image is right under the worst of the attacks in ``rows``."""
    shares: dict[int, float] = {}
    for row in rows:
        if row.attack != CLEAN and row.clean:
            shares[row.index] = min(row.mean, shares.get(row.index, 1.0))
    return shares


class Count(NamedTuple):
    """``k`` of ``n`` images speak against the result, in words ``finding``."""

    k: int
    n: int
    finding: str

    @classmethod
    def of(cls, images: Tensor, words: str, before: str = "") -> Count:
        """Return the count of the images that are true, with the words around it."""
        k, n = int(images.sum()), len(images)
        return cls(k, n, f"{before}{k} of {n} images {words}")


class Verdict(NamedTuple):
    """What a check found; the fields of `CheckRow` after its name."""

    passed: bool | None
    finding: str
    numbers: dict[str, Any]


def make(name: str, subject: Subject) -> CheckRow:
    """Make one of `CHECKS`. A check that cannot be made does not end the run."""
    if not subject.columns:
        return CheckRow(name, None, "not made: the run has no attack")
    return _made(name, functools.partial(_CHECKS[name], subject))


def _made(name: str, check: Callable[[], Verdict]) -> CheckRow:
    try:
        return CheckRow(name, *check())
    except InputError as error:
        return CheckRow(name, None, f"not made: {error}", {"error": str(error)})


def gradient_free(s: Subject) -> Verdict:
    """An attack that sees scores or labels alone must not find what gradient attacks miss."""
    s.need_right_images()
    counts = [count for ball in s.balls if (count := _own_columns(s, ball))]
    among = len(counts) + len(s.balls)
    if not any(exceeds(k, n, _MISSED, among) for k, n, _ in counts):
        # Square is tried in every ball: the run's own gradient-free attacks may be weak.
        for ball in s.balls:
            alone = s.alone(ball, s.by_square(ball))
            counts.append(_missed(alone, f"Square ({s.probes.queries} queries)", ball))
    return judged(counts, _MISSED, "; gradients are masked, the result is too high", among)


def _own_columns(s: Subject, ball: Ball) -> Count | None:
    """Count what the run's gradient-free attacks broke in a ball and its gradient attacks did not.

    Images count that both tried. If no attack of the run uses gradients alone, our PGD stands in.
    """
    rows = s.blind(ball)
    blind, seen = worst(rows), worst(s.seeing(ball))
    both = blind.keys() & (seen.keys() or s.indices)
    if not both:
        return None
    if seen:
        alone = lost_alone(*(torch.tensor([shares[i] for i in both]) for shares in (blind, seen)))
    else:
        every = s.alone(ball, torch.tensor([blind.get(i, 1.0) for i in s.indices]))
        alone = every[torch.tensor([index in both for index in s.indices])]
    return _missed(alone, ", ".join(sorted({row.attack for row in rows})), ball)


def _missed(alone: Tensor, who: str, ball: Ball) -> Count:
    return Count.of(alone, f"that no gradient attack broke ({ball})", f"{who} broke ")


def stronger_attack(s: Subject) -> Verdict:
    """A plain PGD must not break many images that all attacks of the run left."""
    s.need_right_images()
    counts, n = [], len(s.x)
    for ball in s.balls:
        k = s.broken_by_pgd(ball, s.tried(ball))
        finding = (
            f"PGD of {s.probes.steps} steps on the margin broke {k} of {n} images that no attack "
            f"of the run broke ({ball})"
        )
        counts.append(Count(k, n, finding))
    return judged(counts, _NOISE, "; attack harder")


def zero_gradients(s: Subject) -> Verdict:
    """Images without a gradient cannot be attacked by one."""
    without = torch.ones(len(s.x), dtype=torch.bool)
    for how in s.target.gradients():
        gradients = s.gradients(how).flatten(1)
        usable = gradients.isfinite().all(1) & (gradients != 0).any(1)
        without &= ~usable.cpu()
    count = Count.of(without, "have a gradient that is zero or not finite")
    return judged([count], _ZERO, "; make the defence differentiable, or attack it through BPDA")


def more_steps(s: Subject) -> Verdict:
    """More steps must not help the defence."""
    s.need_right_images()
    ball, few = s.ball, max(s.probes.steps // 4, 1)
    alone = lost_alone(s.pgd(ball, few), s.pgd(ball, s.probes.steps))
    words = f"survive PGD of {s.probes.steps} steps but not of {few} ({ball})"
    return judged([Count.of(alone, words)], _NOISE)


def larger_eps(s: Subject) -> Verdict:
    """A larger ball must not help the defence."""
    s.need_right_images()
    norm, eps = s.ball
    beyond = 2 * eps if norm == "l2" else max(min(2 * eps, 1.0), eps)
    small, large = (s.pgd(Ball(norm, e), s.probes.steps) for e in (eps, beyond))
    counts = []
    for who, kind, low, high, less, more in [
        ("PGD", norm, eps, beyond, small, large),
        *_growing(s.rows),
    ]:
        words = f"survive under {who} at {kind} eps {high:g} but not at {low:g}"
        counts.append(Count.of(lost_alone(less, more), words))
    return judged(counts, _NOISE)


def _growing(
    rows: tuple[AttackRow, ...],
) -> Iterator[tuple[str, str, float, float, Tensor, Tensor]]:
    """Yield shares of right answers under an attack at one eps and at the next larger one."""
    columns: dict[tuple[str, str, str], dict[float, dict[int, float]]] = {}
    for row in rows:
        if row.attack != CLEAN and row.clean:
            at = columns.setdefault((row.attack, row.gradient, row.norm), {})
            at.setdefault(row.eps, {})[row.index] = row.mean
    for (attack, gradient, norm), at in columns.items():
        for low, high in itertools.pairwise(sorted(at)):
            both = [index for index in at[low] if index in at[high]]
            less, more = (torch.tensor([at[eps][index] for index in both]) for eps in (low, high))
            if both:
                yield f"{attack} ({gradient})", norm, low, high, less, more


def large_enough_eps(s: Subject) -> Verdict:
    """At an eps where all images can become the same grey, no defence can be right."""
    s.need_right_images()
    norm = s.ball.norm
    eps = 0.5 if norm == "linf" else 0.5 * math.sqrt(s.x[0].numel())
    held = s.pgd(Ball(norm, eps), 2 * s.probes.steps) > 0.5
    words = f"survive PGD at eps {eps:g} in {norm}, where each can become plain grey"
    return judged([Count.of(held, words)], _HELD, "; the attack fails, not the image")


def gradient_against_random(s: Subject) -> Verdict:
    """The loss must rise more along the gradient than along a random direction as long."""
    norm, eps = s.ball
    step, n = eps / 4, len(s.x)

    def losses(gradient: Images) -> Tensor:
        return s.losses((s.x + step * direction(gradient, norm)).clamp(0, 1))

    noise = torch.randn(s.x.shape, generator=torch.Generator().manual_seed(0)).to(s.x)
    before = losses(noise)
    along = [losses(s.gradients(how).nan_to_num()) for how in s.target.gradients()]
    wins = max(int((after > before).sum()) for after in along)
    finding = (
        f"for {wins} of {n} images the loss rises more along the gradient than along noise "
        f"({norm}, length {step:g})"
    )
    return judged(
        [Count(n - wins, n, finding)], _LOSSES, "; the gradient does not show where to go"
    )


def transfer(s: Subject) -> Verdict:
    """Attacks on the undefended classifier must not break what attacks on the defence do not."""
    if s.undefended is None:
        return Verdict(None, "not made: the undefended classifier was not given", {})
    s.need_right_images()
    ball = s.ball
    other = Target(s.undefended, s.x[:2], noise=None, repeats=1, seed=0)
    attack = probe(ball, s.probes.steps)
    x_adv = other.attempt(attack, other.gradients()[0], s.x, s.y, 0).x_adv
    alone = lost_alone(s.right(x_adv), s.by_gradients(ball))
    words = "are broken by attacks on the undefended classifier but not by gradient attacks on the"
    return judged([Count.of(alone, f"{words} defence ({ball})")], _MISSED)


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
    finding, failed = f"the median margin of the logits is {typical:.3g}", True
    if len(s.x) > 1 and spread <= 1e-6 * scale:
        finding = "the logits are the same for every image"
    elif typical <= _TINY * scale:
        finding += ", lost in rounding; scale the logits up"
    elif exceeds(saturated, len(gaps), _NOISE):
        finding = (
            f"{saturated} of {len(gaps)} images have a margin above {_SATURATED:g}, where the "
            "gradient of cross-entropy is 0 in float32; scale the logits down (a temperature), "
            "or attack with the margin or DLR loss"
        )
    else:
        failed = False
    numbers = {"images": len(gaps), "median_margin": typical, "saturated": saturated}
    return Verdict(not failed, finding, {**numbers, "spread": spread})


@torch.no_grad()
def global_seed(s: Subject) -> Verdict:
    """A forward pass must not set the global seeds: attacks and noise may draw from them."""
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


_CHECKS: dict[str, Callable[[Subject], Verdict]] = dict(zip(CHECKS, (
    gradient_free, stronger_attack, zero_gradients, more_steps, larger_eps, large_enough_eps,
    gradient_against_random, transfer, logits, global_seed,
), strict=True))  # fmt: skip


def unmoved(s: Subject) -> Iterator[CheckRow]:
    """Yield a check for each gradient attack that moved no image, as with a gradient of zero.

    It fails if PGD breaks such images. Otherwise there is no verdict: an attack that returns only
    what it broke moves nothing on a robust model.
    """
    moved: dict[tuple[str, str, float], float] = {}
    for row in s.rows:
        if row.clean:
            moved[row.column] = max(row.distance_linf, moved.get(row.column, 0.0))
    seeing = [column for column in s.columns if column.gradient != "none"]
    still = [column for column in seeing if moved.get(column.key) == 0]
    for column in still:
        check = functools.partial(_unmoved, s, column, len(still))
        yield _made(f"moved by {column.words}", check)


def _unmoved(s: Subject, column: Column, among: int) -> Verdict:
    ball, n = Ball(column.attack.norm, column.attack.eps), len(s.x)
    k = s.broken_by_pgd(ball, (row for row in s.rows if row.column == column.key))
    finding = f"the attack moved no image; PGD of {s.probes.steps} steps broke {k} of {n}"
    remedy = "; the attack does not work on this model"
    verdict = judged([Count(k, n, finding)], _NOISE, remedy, among)
    return verdict if verdict.passed is False else verdict._replace(passed=None)


def flags_name(column: Column) -> str:
    """Return the name of the check that holds AutoAttack's warnings."""
    return f"flags of {column.words}"


def autoattack_flags(name: str, flags: Sequence[str], randomised: bool) -> CheckRow:
    """Return AutoAttack's warnings about the model as a check of this name, explained."""
    verdicts: set[bool | None] = set()
    words = []
    for flag in flags:
        known = next((entry for entry in _FLAGS if entry[0] in flag), None)
        verdicts.add(known[1] if known else None)
        words.append(f"{known[0]}: {known[2]}" if known else flag)
    return CheckRow(
        name,
        False if False in verdicts else None if None in verdicts else True,
        "; ".join(dict.fromkeys(words)) or "none",
        {"flags": list(flags), "randomised": randomised},
    )


def judged(
    counts: Sequence[Count], tolerance: float, remedy: str = "", among: int | None = None
) -> Verdict:
    """Judge the gravest of ``among`` counts; ``remedy`` is added to its words if it is a sign.

    A large share of few images does not hide a smaller share of many that exceeds the tolerance.
    """
    among = len(counts) if among is None else among
    failed, _, n, k, finding = max(
        (exceeds(k, n, tolerance, among), k / n, n, k, finding) for k, n, finding in counts
    )
    numbers = {"images": n, "count": k, "tolerance": tolerance, "alpha": ALPHA}
    if not exceeds(n, n, tolerance, among):  # no count of so few would be a sign
        words = f"{n} images are too few to tell"
        return Verdict(None, f"not made: {words}", {**numbers, "error": words})
    return Verdict(not failed, finding + remedy * failed, numbers)


def exceeds(k: int, n: int, tolerance: float, among: int = 1) -> bool:
    """Whether ``k`` of ``n`` images show that more than ``tolerance`` of all images would do so.

    One-sided exact binomial test at level 1 %, divided by ``among`` for the worst of so many counts
    (Bonferroni): the Clopper-Pearson lower bound lies above ``tolerance``.
    """
    # P(Binomial(n, tolerance) >= k) as an incomplete beta function
    return float(special.betainc(k, n - k + 1, tolerance)) < ALPHA / among
