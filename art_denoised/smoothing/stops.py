"""Stop rules: frozen settings that say when an image has been sampled enough.

A stop rule checks its values once and turns into a procedure for each image. It knows nothing of
networks: the same rule certifies images, replays stored votes and runs ahead in a preview.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.bounds import Looks, Mixture
from art_denoised.smoothing.procedures import Procedure, certifying, tightening, voting
from art_denoised.smoothing.statistics import Certificate, Vote

FIRST_LOOK = 100  # estimation samples before the votes are looked at for the first time

T_co = TypeVar("T_co", covariant=True)


class Stop(Protocol[T_co]):
    """A rule that says when an image is done: `FixedN`, `AtRadii`, `Anytime` or `Voting`."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the header of a log says of the rule, as JSON values."""
        ...

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[T_co]:
        """Return the procedure for one image.

        Args:
            label: True class of the image; None where it is not known.
            record: What an answer says of its samples except votes (`Smoother.record`).
            earlier: Certificate to go on from; only `Anytime` can.
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

    n: int = 10_000
    n0: int = 100
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
        """Return the procedure for one image; see `Stop.procedure`."""
        _refuse(self, earlier)
        return certifying(self.bound, n0=self.n0, alpha=self.alpha, **record)


@dataclass(frozen=True)
class AtRadii:
    """Sample until each of some radii is proved or out of reach.

    It makes the same statement at the same alpha as `FixedN`, usually from a tenth of the samples
    (docs/sequential.md).

    Attributes:
        radii: l2 radii in image units, at least one; kept in ascending order.
        n: Largest number of estimation samples.
        n0: Number of selection samples.
        alpha: Failure probability of each certificate, in (0, 0.5).
        labels: Whether to stop at once where the selected class is not the label. Such an image
            counts as wrong whatever its radius; its certificate is an abstention.

    Raises:
        InputError: A value is out of range, ``n`` samples can certify nothing, or there is no
            radius.

    Example:
        >>> AtRadii([0.5, 0.25], n=1000).settings["radii"]
        [0.25, 0.5]
    """

    radii: Sequence[float]
    n: int = 100_000
    n0: int = 100
    alpha: float = 0.001
    labels: bool = True

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "radii", checks.radii(self.radii))
        if not self.radii:
            raise InputError("radii is empty; give at least one l2 radius, or use FixedN")

    @property
    def settings(self) -> dict[str, Any]:
        """What the header of a log says of the rule."""
        table = {"radii": list(self.radii), "use_labels": self.labels}
        return {"alpha": self.alpha, "n0": self.n0, "n": self.n, **table}

    @property
    def bound(self) -> Looks:
        """Looks at the votes while samples come in."""
        return Looks(min(FIRST_LOOK, self.n), self.n)

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[Certificate]:
        """Return the procedure for one image; see `Stop.procedure`."""
        _refuse(self, earlier)
        return certifying(
            self.bound,
            n0=self.n0,
            alpha=self.alpha,
            radii=self.radii,
            label=label if self.labels else None,
            **record,
        )


@dataclass(frozen=True)
class Anytime:
    """Sample until the time is up, and go on later: sound whenever it was stopped.

    The bound holds at all sample counts at once (a confidence sequence, docs/sequential.md), so a
    certificate may be looked at, and sampling continued from it, as often as one likes. At equal
    n its radius is a few percent smaller than that of `FixedN`.

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

    n: int = 100_000
    n0: int = 100
    alpha: float = 0.001
    seconds: float | None = None
    labels: bool = True

    def __post_init__(self) -> None:
        _check(self)
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
        """Return this rule with a smaller ``n``, but one that can certify something.

        Args:
            n: Largest number of estimation samples.
        """
        return replace(self, n=min(max(n, checks.fewest_samples(self.alpha)), self.n))

    def procedure(
        self, label: int | None, record: Mapping[str, Any], earlier: Certificate | None = None
    ) -> Procedure[Certificate]:
        """Return the procedure for one image; see `Stop.procedure`.

        Raises:
            InputError: ``earlier`` was made with other settings.
        """
        if earlier is not None:
            for name, value in {**record, "alpha": self.alpha, "bound": self.bound}.items():
                if getattr(earlier, name) != value:
                    raise InputError(
                        f"the earlier certificate has {name} {getattr(earlier, name)}, not "
                        f"{value}; go on with the settings that it was made with"
                    )
        return tightening(
            self.bound,
            n0=self.n0,
            n=self.n,
            earlier=earlier,
            label=label if self.labels else None,
            alpha=self.alpha,
            **record,
        )


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
        """Return the procedure for one image; see `Stop.procedure`."""
        _refuse(self, earlier)
        return voting(self.n, alpha=self.alpha, **record)


def _check(stop: FixedN | AtRadii | Anytime) -> None:
    """Check the values that certifying rules share, and keep them as plain numbers."""
    alpha = checks.alpha(stop.alpha)
    object.__setattr__(stop, "alpha", alpha)
    object.__setattr__(stop, "n", checks.sample_count(stop.n, alpha))
    object.__setattr__(stop, "n0", checks.count("n0", stop.n0))


def _refuse(stop: object, earlier: Certificate | None) -> None:
    if earlier is not None:
        raise InputError(
            f"{type(stop).__name__} cannot go on from an earlier certificate, which would be one "
            "more look at the votes; use Anytime"
        )
