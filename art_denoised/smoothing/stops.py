"""When to sample and when to stop: frozen stop rules, each of which makes pure procedures.

A procedure is a generator. It yields a `Draw`, is sent the votes of those samples, and in the end
returns a `Certificate` or a `Vote`. It knows nothing of images, networks or batches, so the very
code that certifies images is simulated on known probabilities in the tests, replayed on stored
logs, and run ahead in a preview.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.statistics import (
    ABSTAIN,
    Certificate,
    Look,
    Looks,
    Mixture,
    Proof,
    Sequential,
    Vote,
    top_class,
)

FIRST_TURN = 100  # samples of each image before time is spent on more of any
_SELECTION = 100  # samples that select the class, unless another number is given

Counts: TypeAlias = Mapping[int, int]
"""Votes by class."""
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Stage(IntEnum):
    """What a noise stream is for. Samples of different stages are independent."""

    SELECTION = 0
    ESTIMATION = 1
    VOTE = 2
    SMOOTHING = 3
    PILOT = 4


class Draw(NamedTuple):
    """A request for the votes of samples ``start`` to ``stop`` of one stage's noise stream."""

    stage: Stage
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.stop - self.start


Procedure: TypeAlias = Generator[Draw, Counts, T]
"""A generator that asks for votes and returns an answer."""


def simulate(procedure: Procedure[T], votes: Callable[[Draw], Counts]) -> tuple[T, int]:
    """Run a procedure on votes from elsewhere than a network.

    Args:
        procedure: A fresh one.
        votes: Answers a draw with class -> votes.

    Returns:
        What the procedure returns, and the number of samples that it asked for.

    Example:
        >>> steps = AtRadii([0.25], n=10_000).procedure(None, {"sigma": 0.25})
        >>> certificate, samples = simulate(steps, lambda draw: {3: draw.size})
        >>> certificate.label, certificate.radius, samples
        (3, 0.25, 164)
    """
    samples = 0
    try:
        draw = next(procedure)
        while True:
            samples += draw.size
            draw = procedure.send(votes(draw))
    except StopIteration as end:
        return end.value, samples


class Stop(Protocol[T_co]):
    """A rule that says when an image is done: `FixedN`, `AtRadii`, `Anytime` or `Voting`."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the header of a log says of the rule, as JSON values."""
        ...

    @property
    def looks(self) -> Sequence[int]:
        """Numbers of estimation samples at which it may stop, if it looks more than once."""
        ...

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[T_co]:
        """Return the procedure for one image.

        Args:
            label: True class of the image; None where it is not known.
            record: What an answer says of its samples except votes (`Smoother.record`).
            earlier: Certificate to go on from; only `Anytime` can.

        Raises:
            InputError: There is an earlier certificate, and the rule cannot go on from it.
        """
        ...


@dataclass(frozen=True)
class FixedN:
    """Draw a fixed number of samples from every image (Cohen et al., 2019, Certify).

    Attributes:
        n: Number of estimation samples, which bound the probability of the selected class. At
            alpha = 0.001 the largest radius is 2.46 sigma for 1,000, 3.20 sigma for 10,000 and
            3.81 sigma for 100,000.
        n0: Number of selection samples, which select the class.
        alpha: Failure probability of each certificate, in (0, 0.5).

    Raises:
        InputError: A value is out of range, or ``n`` samples can certify nothing.

    Example:
        >>> FixedN(1000).settings
        {'alpha': 0.001, 'n0': 100, 'n': 1000}
    """

    looks: ClassVar[Sequence[int]] = ()

    n: int = 10_000
    n0: int = _SELECTION
    alpha: float = 0.001

    def __post_init__(self) -> None:
        _check(self)

    @property
    def settings(self) -> dict[str, Any]:
        """What the header of a log says of the rule."""
        return {"alpha": self.alpha, "n0": self.n0, "n": self.n}

    @property
    def bound(self) -> Looks:
        """One look, after all samples."""
        return Looks.fixed(self.n)

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[Certificate]:
        """Return the procedure for one image."""
        _refuse(self, earlier)
        return _certifying(self, {"alpha": self.alpha, **record})


@dataclass(frozen=True)
class AtRadii:
    """Sample until each of some radii is proved or out of reach.

    The radii are tested in ascending order by exact group-sequential tests at the full alpha
    (docs/explanation/sequential.md). A certificate states the largest radius of the table that was
    proved, and is an abstention if none was; with probability at least 1 - alpha it is true. It
    usually takes a fifteenth of the samples of `FixedN`.

    Attributes:
        radii: l2 radii in image units, at least one; kept in ascending order.
        n: Largest number of estimation samples.
        n0: Number of selection samples; 0 with ``labels="class"``.
        alpha: Failure probability of each certificate, in (0, 0.5).
        labels: What the true label of an image is for, if it is known. True: sampling stops at once
            where another class was selected, because that image counts as wrong whatever its
            radius; its certificate is an abstention. "class": the label is certified, and no class
            is selected, which is sound because the label does not depend on samples; the
            certificate's ``selection_counts`` are empty. False: nothing.

    Raises:
        InputError: A value is out of range, ``n`` samples can certify nothing, there is no radius,
            or there is an ``n0`` where no class is selected. From `procedure`: an image without a
            label where ``labels`` is "class".

    Example:
        >>> AtRadii([0.5, 0.25], n=1000).settings["radii"]
        [0.25, 0.5]
    """

    radii: Sequence[float]
    n: int = 100_000
    n0: int = _SELECTION
    alpha: float = 0.001
    labels: bool | Literal["class"] = True

    def __post_init__(self) -> None:
        if not isinstance(self.labels, bool) and self.labels != "class":
            raise InputError(f"labels is {self.labels!r}; give True, False or 'class'")
        selects = self.labels != "class"
        if not selects:
            if self.n0 not in (0, _SELECTION):
                raise InputError(f"n0 is {self.n0}, but labels is 'class'; leave n0 out")
            object.__setattr__(self, "n0", 0)
        _check(self, least=int(selects))
        object.__setattr__(self, "radii", checks.radii(self.radii))
        if not self.radii:
            raise InputError("radii is empty; give at least one l2 radius, or use FixedN")

    @property
    def settings(self) -> dict[str, Any]:
        """What the header of a log says of the rule."""
        table = {"radii": list(self.radii), "use_labels": self.labels, "rule": "sequential"}
        return {"alpha": self.alpha, "n0": self.n0, "n": self.n, **table}

    @property
    def bound(self) -> Sequential:
        """Looks at the votes while samples come in."""
        return Sequential.upto(self.n)

    @property
    def looks(self) -> Sequence[int]:
        """Numbers of samples at which it looks at the votes."""
        return self.bound.counts

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[Certificate]:
        """Return the procedure for one image."""
        _refuse(self, earlier)
        if label is None and self.labels == "class":
            raise InputError("labels is 'class', but an image has no label; give labels")
        return _testing(self, label, {"alpha": self.alpha, **record})


@dataclass(frozen=True)
class Anytime:
    """Sample until the time is up, and go on later: sound whenever it was stopped.

    The bound holds at all sample counts at once (a confidence sequence,
    docs/explanation/sequential.md), so a certificate may be looked at, and sampling continued from
    it, as often as one likes. At equal n its radius is a few percent smaller than that of `FixedN`.

    Attributes:
        n: Largest number of estimation samples, those of an earlier certificate included.
        n0: Number of selection samples, where there is no earlier certificate.
        alpha: Failure probability of each certificate, over all sample counts together.
        seconds: Time limit of one call or run; None: no limit.
        labels: Whether to stop at once where the selected class is not the label.

    Raises:
        InputError: A value is out of range, or ``n`` samples can certify nothing.

    Example:
        >>> Anytime(1000).upto(400).n
        400
    """

    looks: ClassVar[Sequence[int]] = ()

    n: int = 100_000
    n0: int = _SELECTION
    alpha: float = 0.001
    seconds: float | None = None
    labels: bool = True

    def __post_init__(self) -> None:
        _check(self)
        checks.flag("labels", self.labels)
        if self.seconds is not None:
            object.__setattr__(self, "seconds", checks.positive("seconds", self.seconds))

    @property
    def settings(self) -> dict[str, Any]:
        """What the header of a log says of the rule: not ``n`` and ``seconds``, which may grow."""
        prior = [self.bound.a, self.bound.b]
        return {"alpha": self.alpha, "n0": self.n0, "prior": prior, "use_labels": self.labels}

    @property
    def bound(self) -> Mixture:
        """The bound that holds at all sample counts at once."""
        return Mixture()

    def upto(self, n: int) -> Anytime:
        """Return this rule with a smaller ``n``, but one that can certify something."""
        return replace(self, n=min(max(n, checks.fewest_samples(self.alpha)), self.n))

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[Certificate]:
        """Return the procedure for one image; an earlier certificate needs the same settings."""
        record = {**record, "alpha": self.alpha, "bound": self.bound}
        for name, value in record.items() if earlier is not None else ():
            if getattr(earlier, name) != value:
                raise InputError(
                    f"the earlier certificate has {name} {getattr(earlier, name)}, not {value}; "
                    "go on with the settings that it was made with"
                )
        return _tightening(self, earlier, label if self.labels else None, record)


@dataclass(frozen=True)
class Voting:
    """Predict by majority vote over a fixed number of samples (Cohen et al., 2019, Predict).

    Attributes:
        n: Number of samples that vote.
        alpha: Failure probability of each prediction, in (0, 0.5).

    Raises:
        InputError: A value is out of range.

    Example:
        >>> Voting(100).settings
        {'alpha': 0.001, 'n': 100}
    """

    looks: ClassVar[Sequence[int]] = ()

    n: int = 1000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", checks.count("n", self.n))
        object.__setattr__(self, "alpha", checks.alpha(self.alpha))

    @property
    def settings(self) -> dict[str, Any]:
        """What the header of a log says of the rule."""
        return {"alpha": self.alpha, "n": self.n}

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[Vote]:
        """Return the procedure for one image."""
        _refuse(self, earlier)
        return _voting(self.n, {"alpha": self.alpha, **record})


def _check(stop: FixedN | AtRadii | Anytime, least: int = 1) -> None:
    """Check the values that certifying rules share, and keep them as plain numbers."""
    alpha = checks.alpha(stop.alpha)
    object.__setattr__(stop, "alpha", alpha)
    object.__setattr__(stop, "n", checks.sample_count(stop.n, alpha))
    object.__setattr__(stop, "n0", checks.count("n0", stop.n0, least))


def _refuse(stop: object, earlier: Certificate | None) -> None:
    if earlier is not None:
        raise InputError(
            f"{type(stop).__name__} cannot go on from an earlier certificate, which would be one "
            "more look at the votes; use Anytime"
        )


def _certifying(stop: FixedN, record: Mapping[str, Any]) -> Procedure[Certificate]:
    selection = yield Draw(Stage.SELECTION, 0, stop.n0)
    counts = yield Draw(Stage.ESTIMATION, 0, stop.n)
    return Certificate.from_counts(selection, counts, bound=stop.bound, **record)


def _testing(stop: AtRadii, label: int | None, record: Mapping[str, Any]) -> Procedure[Certificate]:
    """Choose a class, then look at its votes until all radii are proved or the next is futile.

    Only crossing a boundary proves a radius, so when sampling is given up may cost power, never
    soundness.
    """
    plan, selection, counts = stop.bound, dict[int, int](), dict[int, int]()
    level = {name: record.get(name, 0.0) for name in ("sigma", "tv", "alpha")}
    proofs: tuple[Proof, ...] = ()
    if stop.labels == "class" and label is not None:
        chosen = label
    else:
        selection = dict((yield Draw(Stage.SELECTION, 0, stop.n0)))
        chosen = top_class(selection)
    skipped = stop.labels is True and label is not None and chosen != label
    for before, n in pairwise((0, *plan.counts) if not skipped else ()):
        counts = _sum(counts, (yield Draw(Stage.ESTIMATION, before, n)))
        look = Look(n, counts.get(chosen, 0) if chosen != ABSTAIN else 0)
        proofs += plan.proofs([look], stop.radii[len(proofs) :], **level)
        unproved = stop.radii[len(proofs) :]
        if not unproved or plan.is_futile(look, unproved[0], **level):
            break
    return Certificate.from_proofs(chosen, selection, counts, proofs, bound=plan, **record)


def _tightening(
    stop: Anytime, earlier: Certificate | None, label: int | None, record: Mapping[str, Any]
) -> Procedure[Certificate]:
    """Go on from an earlier certificate, if there is one, up to ``stop.n`` samples in all.

    The last draw may be answered with the votes of its first samples alone, when time is up.
    """
    if earlier is None:
        selection = yield Draw(Stage.SELECTION, 0, stop.n0)
        earlier = Certificate.from_counts(selection, {}, **record)
    selection = earlier.selection_counts
    if (label is not None and top_class(selection) != label) or earlier.n >= stop.n:
        return earlier
    further = yield Draw(Stage.ESTIMATION, earlier.n, stop.n)
    return Certificate.from_counts(selection, _sum(earlier.counts, further), **record)


def _voting(n: int, record: Mapping[str, Any]) -> Procedure[Vote]:
    votes = yield Draw(Stage.VOTE, 0, n)
    return Vote.from_counts(votes, **{k: v for k, v in record.items() if k != "tv"})


def _sum(counts: Counts, further: Counts) -> dict[int, int]:
    return {c: counts.get(c, 0) + further.get(c, 0) for c in sorted({*counts, *further})}
