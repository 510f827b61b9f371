"""Certify or predict a whole data set: one row an image, written as it is made, resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from art_denoised import checks
from art_denoised.data import ImageData
from art_denoised.evaluation.records import CertifyRow, Log, PredictRow
from art_denoised.evaluation.runner import Runner, write_rows
from art_denoised.smoothing.certify import certification_plan
from art_denoised.smoothing.procedures import Procedure, certifying, voting
from art_denoised.smoothing.statistics import Certificate, Vote


def certify_data(
    base: nn.Module,
    data: ImageData,
    out: Path | str,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    radii: Sequence[float] = (),
    use_labels: bool = True,
    noise: str = "gaussian",
    seed: int = 0,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    tsv: bool = False,
    progress: bool = True,
) -> Log:
    """Certify images of a data set into the log ``out/certify.jsonl``.

    A row is written as soon as its image is done. A run that was killed goes on with
    ``resume=True`` and ends with the rows of one that was not. With ``radii`` an image is sampled
    until each of them is proved or out of reach, which makes the table of certified accuracy at
    these radii from a tenth of the samples.

    Args:
        base: Base classifier in eval mode, on the device to use.
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        out: Folder for the log, created if need be.
        sigma: Standard deviation of the noise in image units.
        n0: Samples that select the class.
        n: Samples that bound its probability; with ``radii`` the most that are drawn.
        alpha: Failure probability of each certificate.
        radii: l2 radii of the table; none: the full radius of every image.
        use_labels: With ``radii``, spend no samples on an image whose selected class is wrong: its
            row is an abstention.
        noise: "gaussian", or "quantised" for 8-bit images.
        seed: Seed of the noise.
        batch_size: Noisy copies classified at once; changes nothing but speed. By default measured
            at the start, see `tune`.
        indices: Which images, all by default. An image's noise depends on its index alone.
        identity: What else must agree before a run is continued, such as the names of model and
            data. The weights are always compared.
        resume: Continue the run in ``out`` if there is one.
        tsv: Also write the field's six-column ``out/certify.tsv``.
        progress: Show a progress bar on standard error.

    Returns:
        The finished log.

    Raises:
        InputError: Something cannot be used; what was computed before stays in the log.
        OSError: The log cannot be written, for example on a full disk.

    Example:
        >>> import tempfile
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> with tempfile.TemporaryDirectory() as out:
        ...     log = certify_data(
        ...         digits_classifier(), load_data("digits"), out,
        ...         sigma=0.1, n=100, indices=range(3), progress=False,
        ...     )
        >>> [row.idx for row in log.rows]
        [0, 1, 2]
    """
    procedure = certifying_procedure(n0=n0, n=n, alpha=alpha, radii=radii, use_labels=use_labels)
    run = Runner(base, data, sigma, noise, seed, batch_size, indices)
    settings = run.settings(procedure.settings, identity)
    return write_rows("certify", run, procedure, certify_row, out, settings, resume, tsv, progress)


@dataclass(frozen=True)
class CertifyingProcedure:
    """How each image of a run is certified: called with its index, label and sampling record.

    Attributes:
        plan: As `certification_plan` returns it.
        use_labels: Whether images whose selected class is wrong are skipped.
    """

    plan: Mapping[str, Any]
    use_labels: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What of it determines the rows, as plain JSON values."""
        n0, alpha, radii = (self.plan[name] for name in ("n0", "alpha", "radii"))
        table = {"radii": list(radii), "use_labels": self.use_labels} if radii else {}
        return {"alpha": alpha, "n0": n0, "n": self.plan["bound"].last, **table}

    def __call__(self, index: int, label: int, record: dict[str, Any]) -> Procedure[Certificate]:
        """Return the procedure of one image."""
        known = label if self.plan["radii"] and self.use_labels else None
        return certifying(**self.plan, label=known, **record)


def certifying_procedure(
    *,
    n0: int,
    n: int,
    alpha: float,
    radii: Sequence[float] = (),
    use_labels: bool = True,
) -> CertifyingProcedure:
    """Check how the images of a run are to be certified (arguments of `certify_data`).

    Raises:
        InputError: A value out of range.

    Example:
        >>> certifying_procedure(n0=100, n=1000, alpha=0.001).settings
        {'alpha': 0.001, 'n0': 100, 'n': 1000}
    """
    return CertifyingProcedure(certification_plan(n0=n0, n=n, alpha=alpha, radii=radii), use_labels)


def predict_data(
    base: nn.Module,
    data: ImageData,
    out: Path | str,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    noise: str = "gaussian",
    seed: int = 0,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    tsv: bool = False,
    progress: bool = True,
) -> Log:
    """Predict the smoothed classifier's labels into the log ``out/predict.jsonl``.

    Args, Returns, Raises: As `certify_data`; ``n`` samples vote, -1 is an abstention.

    Example:
        >>> import tempfile
        >>> from art_denoised.demo import digits_classifier
        >>> from art_denoised.data import load_data
        >>> with tempfile.TemporaryDirectory() as out:
        ...     log = predict_data(
        ...         digits_classifier(), load_data("digits"), out,
        ...         sigma=0.1, n=100, indices=[5], progress=False,
        ...     )
        >>> len(log.rows)
        1
    """
    options: dict[str, Any] = {"alpha": checks.alpha(alpha), "n": checks.count("n", n)}

    def procedure(index: int, label: int, record: dict[str, Any]) -> Procedure[Vote]:
        return voting(options["n"], alpha=options["alpha"], **record)

    run = Runner(base, data, sigma, noise, seed, batch_size, indices)
    settings = run.settings(options, identity)
    return write_rows("predict", run, procedure, _predict_row, out, settings, resume, tsv, progress)


def certify_row(index: int, label: int, answer: Certificate, seconds: float) -> CertifyRow:
    """Return the row of an answer.

    Example:
        >>> c = Certificate.from_counts({3: 50}, {3: 1000}, alpha=0.001, sigma=0.25)
        >>> certify_row(7, 3, c, seconds=1.5).correct
        True
    """
    return CertifyRow(index, label, answer.label, answer.radius, seconds, answer)


def _predict_row(index: int, label: int, answer: Vote, seconds: float) -> PredictRow:
    return PredictRow(index, label, answer.label, seconds, answer)
