"""Check a log without its network: every row against its votes or its ball, and the plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.images import index_range, labels_fingerprint
from art_denoised.evaluation.attack_rows import (
    CLEAN,
    AttackLog,
    AttackRow,
    Key,
    planned_columns,
)
from art_denoised.evaluation.logs import CertifyRow, LabelledRow, Log, PredictRow
from art_denoised.smoothing.statistics import (
    ABSTAIN,
    Certificate,
    Look,
    Looks,
    Mixture,
    Sequential,
    Vote,
    top_class,
)

_P_TOLERANCE = 1e-9  # other versions of scipy
_RADIUS_TOLERANCE = 1.5e-6  # one step of the rounding down, at worst
_NAMING = {"indices", "labels"}
_OF_IMAGES = {"images", "pixels"} | _NAMING  # certify and predict write all of them, or none


@dataclass(frozen=True)
class Finding:
    """Something in a log that does not follow from its rows and the settings of its run.

    Attributes:
        index: Index of the image; None where the log as a whole is meant.
        problem: What is wrong.
    """

    index: int | None
    problem: str


def verify(log: Log | AttackLog) -> list[Finding]:
    """Check every row of a log against its votes or its ball, and against the settings of the run.

    Of certify and predict it is checked that the votes were looked at where the plan in the log's
    settings allows it, that alpha, sigma, seed, type and noise are those of the settings, and that
    label, p_lower, p-value and radius follow. Of an attack it is checked that the settings plan it,
    that its images lie in the ball, and that the rows of an image agree. Images and labels must be
    those of the header. It cannot be checked that the votes or the outcomes are those of the
    network (docs/reference/logs.md).

    Args:
        log: Log as `read_log` or `read_attack_log` returns it.

    Returns:
        What is wrong; nothing for a sound log.

    Raises:
        InputError: The log has no votes (a TSV).

    Example:
        >>> c = Certificate.from_counts({3: 50}, {3: 1000}, alpha=0.001, sigma=0.25)
        >>> settings = {"alpha": 0.001, "sigma": 0.25, "n0": 50, "n": 1000, "seed": 0}
        >>> row = CertifyRow.of(7, 3, c)
        >>> verify(Log("certify", settings, (row,)))
        []
        >>> import msgspec
        >>> forged = msgspec.structs.replace(row, radius=0.9)
        >>> verify(Log("certify", settings, (forged,)))
        [Finding(index=7, problem='radius is 0.9, the votes give 0.615815')]
    """
    if not isinstance(log, (Log, AttackLog)):
        raise InputError(f"log is a {type(log).__name__}; give what read_log returns")
    settings = log.settings
    if settings is None:
        raise InputError("the log is a TSV, without votes; give the certify.jsonl of the run")
    if isinstance(log, AttackLog):
        findings = [*_attack_problems(log)]
        labels = {row.index: row.label for row in log.rows if row.attack == CLEAN}
    else:
        findings = [Finding(row.index, what) for row in log.rows for what in _of(row, settings)]
        findings += _tv_problems(log.rows)
        labels = {row.index: row.label for row in log.rows}
        findings += [Finding(None, problem) for problem in _header_problems(settings)]
    return findings + [Finding(None, problem) for problem in _image_problems(labels, settings)]


def _header_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({"alpha", "sigma", "seed"} - settings.keys()):
        yield f"the header has no {name}, so that of the rows cannot be checked"
    if _OF_IMAGES & settings.keys():  # logs of older versions name none of them
        for name in sorted(_NAMING - settings.keys()):
            yield f"the header does not name its {name}; certify again with this version"


def names_images(log: Log) -> bool:
    """Return whether the header names images and labels: else changes of them are not found."""
    return (log.settings or {}).keys() >= _NAMING


def family_wise(log: Log, alpha: float, *, images: int | None = None) -> Log:
    """Return the log as it stands if *all* its certificates shall hold with probability 1 - alpha.

    Each of m certificates is bounded again at alpha / m (Bonferroni), from the same votes, but not
    at more than its own alpha: of few images all together would else be certified further than
    each. Early stopping stays sound: the bounds at all looks hold together at any alpha.

    Args:
        log: Log of certify, with votes.
        alpha: Failure probability of all certificates together.
        images: The m of the plan; by default the number of rows. It must not depend on the votes:
            give it where the run was ended, or may be continued, by what they showed.

    Raises:
        InputError: A value out of range, fewer images than rows, or a log without certificates.

    Example:
        >>> c = Certificate.from_counts({3: 50}, {3: 1000}, alpha=0.001, sigma=0.25)
        >>> rows = tuple(CertifyRow.of(index, 3, c) for index in (7, 8))
        >>> family_wise(Log("certify", {}, rows), 0.002).rows[0].radius
        0.615815
    """
    images = max(len(log.rows), 1) if images is None else checks.count("images", images)
    if images < len(log.rows):
        raise InputError(f"images is {images}, but the log has {len(log.rows)}; give all of them")
    each = checks.alpha(alpha) / images
    rows = []
    for row in log.rows:
        if not isinstance(row, CertifyRow) or row.certificate is None:
            raise InputError("the log has no votes of certify; give a certify.jsonl")
        certificate = row.certificate.at(min(each, row.certificate.alpha))
        rows.append(CertifyRow.of(row.index, row.label, certificate, row.seconds))
    return replace(log, rows=tuple(rows))


def _tv_problems(rows: tuple[LabelledRow, ...]) -> Iterator[Finding]:
    """Compare what was subtracted for the noise, which depends on the shape of images alone."""
    tvs = {row.index: row.tv for row in rows if isinstance(row, CertifyRow)}
    common = Counter(tvs.values()).most_common(1)
    for index, tv in tvs.items():
        if tv != common[0][0]:
            yield Finding(index, f"tv is {tv:g}, that of other rows {common[0][0]:g}")


def _image_problems(labels: Mapping[int, int], settings: Mapping[str, Any]) -> Iterator[str]:
    """Compare images and labels with those in the header; older logs do not name them."""
    if "indices" not in settings:
        return
    try:
        planned = index_range(settings["indices"])
        count = len(planned)
    except (TypeError, ValueError, OverflowError):
        yield f"the header's indices are {settings['indices']!r}, which name no images"
        return
    if settings.get("images", count) != count:
        yield f"the header says {settings['images']} images and names {count}"
    foreign = [index for index in labels if index not in planned]
    if foreign:
        yield f"image {foreign[0]} is not among the {count} images of the header"
    elif (
        "labels" in settings
        and len(labels) == count
        and labels_fingerprint(labels.items()) != settings["labels"]
    ):
        yield "labels are not those of the header"


def _attack_problems(log: AttackLog) -> Iterator[Finding]:
    """Compare each row with the planned attack and with the row of its image without attack."""
    try:
        planned = planned_columns(log.settings)
    except InputError as error:
        yield Finding(None, str(error))
        return
    unattacked = {row.index: row for row in log.rows if row.attack == CLEAN}
    for row in log.rows:
        for problem in _ball_problems(row, planned):
            yield Finding(row.index, problem)
        clean = unattacked.get(row.index)
        if clean is None:
            yield Finding(row.index, "it was attacked, but has no row without attack")
        elif (row.label, row.clean) != (clean.label, clean.clean):
            yield Finding(row.index, f"label or clean differ from those without {row.attack}")


def _ball_problems(row: AttackRow, planned: Mapping[Key, str]) -> Iterator[str]:
    moved = row.distance_l2 if row.norm == "l2" else row.distance_linf
    eps = row.eps if row.clean else 0.0  # an image that is wrong anyway is not attacked
    if row.attack != CLEAN and planned.get(row.column) != row.norm:
        yield f"the settings plan no attack {row.column} in {row.norm}"
    elif not moved <= eps * (1 + 1e-4) + 1e-6:  # as an attack is held to its ball; not NaN
        yield f"{row.attack} moved it by {moved:g} in {row.norm}, more than {eps:g}"


def _of(row: LabelledRow, settings: Mapping[str, Any]) -> Iterator[str]:
    answer: Certificate | Vote | None = None
    if isinstance(row, CertifyRow):
        answer = row.certificate
    elif isinstance(row, PredictRow):
        answer = row.vote
    if answer is None:
        yield "there are no votes"
        return
    for name in ("alpha", "sigma", "seed", "dtype"):
        if name in settings and getattr(answer, name) != settings[name]:
            yield f"{name} is {getattr(answer, name)}, that of the run {settings[name]}"
    quantised = settings.get("noise") == "quantised"
    if quantised != (answer.noise == "quantised"):
        yield f"noise is {answer.noise}, that of the run {settings.get('noise')}"
    if isinstance(answer, Vote):
        yield from _vote_problems(answer, settings)
        return
    yield from _certificate_problems(answer, settings)
    if answer.n == 0 and top_class(answer.selection_counts) == row.label:
        yield "it was skipped as misclassified, but the selected class is its label"
    if settings.get("use_labels") == "class" and answer.label not in (ABSTAIN, row.label):
        yield f"label is {answer.label}, but the run certified the true class {row.label}"


def _certificate_problems(c: Certificate, settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("n0") == 0 and settings.get("use_labels") != "class":
        yield "no class was selected, but the run did not certify true classes"
    if c.n0 != settings.get("n0"):
        yield f"the class was selected from {c.n0} samples, not {settings.get('n0')}"
    skipped = c.n == 0 and settings.get("use_labels") is True
    if isinstance(c.bound, Mixture):
        planned = [c.bound.a, c.bound.b] == settings.get("prior") and c.drawn == c.n
    else:
        last = n if isinstance(n := settings.get("n"), int) else 0
        plan: Looks | Sequential = Looks.fixed(last)
        if settings.get("radii"):
            plan = (Sequential if settings.get("rule") == "sequential" else Looks).upto(last)
        looks = {c.n, c.drawn, *(proof.n for proof in c.proofs)}
        planned = "prior" not in settings and c.bound == plan and looks <= {*plan.counts}
    if not (planned or skipped):
        yield f"no look was planned after {c.n} samples of {c.drawn} drawn"
        return
    if c.tv < 0 or (c.tv == 0) != (c.noise == "gaussian"):
        yield f"tv is {c.tv}, with {c.noise} noise"
    if c.drawn < c.n or (skipped and c.drawn):
        yield f"{c.drawn} samples were drawn, but {c.n} counted"
    if isinstance(c.bound, Sequential) and not skipped:
        yield from _table_problems(c, settings)
    again = c.at(c.alpha)
    yield from _differing(c, again, "p_lower")
    if abs(c.radius - again.radius) > _RADIUS_TOLERANCE:
        yield f"radius is {c.radius:g}, the votes give {again.radius:g}"


def _differing(answer: Any, again: Any, probability: str) -> Iterator[str]:
    """Compare the label, and a probability, with those that the votes give."""
    if answer.label != again.label:
        yield f"label is {answer.label}, the votes give {again.label}"
    said, found = getattr(answer, probability), getattr(again, probability)
    if not math.isclose(said, found, rel_tol=_P_TOLERANCE):
        yield f"{probability} is {said:g}, the votes give {found:g}"


def _table_problems(c: Certificate, settings: Mapping[str, Any]) -> Iterator[str]:
    """Compare the proofs of a table of radii with its order and with all votes."""
    assert isinstance(c.bound, Sequential)
    table, radii = settings["radii"], [proof.radius for proof in c.proofs]
    if not isinstance(table, list) or radii != table[: len(radii)]:
        yield f"radii {radii} are proved, those of the run are {table}"
        return
    chosen = top_class(c.selection_counts) if c.n0 else c.label
    if c.label not in (ABSTAIN, chosen):
        yield f"label is {c.label}, the class that was selected {chosen}"
    last = Look(c.n, c.counts.get(chosen, 0) if chosen != ABSTAIN else 0)
    looks = [Look(0, 0), *(Look(proof.n, proof.votes) for proof in c.proofs), last]
    for look, later in pairwise(looks):
        if not 0 <= later.votes - look.votes <= later.n - look.n:
            of_later = f"a later one {later.votes} of {later.n}"
            yield f"a look had {look.votes} of {look.n} votes, {of_later}"
    level = {"sigma": c.sigma, "tv": c.tv, "alpha": c.alpha}
    for proof in c.bound.proofs([last], table[len(radii) : len(radii) + 1], **level):
        yield f"radius {proof.radius} is not said to be proved, but the votes prove it"


def _vote_problems(v: Vote, settings: Mapping[str, Any]) -> Iterator[str]:
    n = sum(v.counts.values())
    if n != settings.get("n"):
        yield f"there are {n} votes, not {settings.get('n')}"
    yield from _differing(v, Vote.from_counts(v.counts, alpha=v.alpha, sigma=v.sigma), "p_value")
