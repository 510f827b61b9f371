"""Answers that were paid for: on the disk before anything else happens, and never asked twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from art_denoised.checks import InputError
from art_denoised.data.images import Chosen
from art_denoised.evaluation.logs import CERTIFY, CertifyRow, Index, Log
from art_denoised.runs.journal import Kind, Row, Run, describe, fingerprint, read_run
from art_denoised.runs.journal import identity as identity_of
from art_denoised.smoothing.queries import Answer, Vocabulary
from art_denoised.smoothing.statistics import ABSTAIN, Certificate, Look, top_class
from art_denoised.smoothing.stops import AtRadii, Counts, Draw, FixedN, Stage, simulate

if TYPE_CHECKING:
    from art_denoised.smoothing.smoother import Smoother
    from art_denoised.types import Image

Key: TypeAlias = tuple[int, int, int]  # image, stage, sample


class AnswerRow(Row, frozen=True, kw_only=True, tag="answer", tag_field="kind"):
    """One answer: a class name or index, or None."""

    index: Index
    stage: Index
    sample: Index
    answer: str | int | None

    @property
    def key(self) -> Key:
        """Image, stage and sample."""
        return self.index, self.stage, self.sample


class FailedRow(Row, frozen=True, kw_only=True, tag="failed", tag_field="kind"):
    """An attempt that may have been paid in vain."""

    reason: str
    queries: Index

    @property
    def key(self) -> None:
        """Nothing: each attempt counts."""
        return None


class AskedRow(Row, frozen=True, kw_only=True, tag="image", tag_field="kind"):
    """The image that answers are about, by a hash of its pixels, and its true class."""

    index: Index
    label: Index
    pixels: str

    @property
    def key(self) -> int:
        """The index."""
        return self.index


def _upgrade(record: dict[str, Any]) -> dict[str, Any]:
    if "failed" in record:
        return {"kind": "failed", "reason": record["failed"], "queries": record["queries"]}
    if "answer" in record:
        return {**record, "kind": "answer", "index": record["idx"]}
    names = {"idx": "index", "image": "pixels"}
    return {"kind": "image", **{names.get(name, name): value for name, value in record.items()}}


ANSWERS: Kind[Any] = Kind(
    "answers", AnswerRow | FailedRow | AskedRow, _upgrade, "journal of answers"
)


class MissingError(Exception):
    """Samples of a draw have no answer."""

    def __init__(self, index: int, draw: Draw, samples: list[int]) -> None:
        self.samples = samples
        super().__init__(
            f"holds {draw.stop - len(samples)} of the {draw.stop} samples of image {index} that "
            f"are needed ({draw.stage.name.lower()}); give a smaller n or n0, or resume the run"
        )


class Answers:
    """The answers in the rows of a journal, read as classes."""

    def __init__(self, words: Vocabulary, rows: Iterable[Any]) -> None:
        self._words = words
        self._classes: dict[Key, int] = {}
        self._asked: dict[int, AskedRow] = {}
        self.spent = 0
        for row in rows:
            self._take(row)

    @property
    def answered(self) -> int:
        """Number of answers that are kept."""
        return len(self._classes)

    @property
    def labels(self) -> dict[int, int]:
        """The class of each image that was asked about."""
        return {index: row.label for index, row in sorted(self._asked.items())}

    def get(self, key: Key) -> int | None:
        """Return the class that a sample was answered with; None: not asked yet."""
        return self._classes.get(key)

    def missing(self, index: int, draw: Draw) -> list[int]:
        """Return the samples of a draw that have no answer."""
        samples = range(draw.start, draw.stop)
        return [s for s in samples if (index, int(draw.stage), s) not in self._classes]

    def votes(self, index: int, draw: Draw) -> Counts:
        """Count the answers of a draw, or raise MissingError."""
        if missing := self.missing(index, draw):
            raise MissingError(index, draw, missing)
        stage, samples = int(draw.stage), range(draw.start, draw.stop)
        return Counter(self._classes[index, stage, sample] for sample in samples)

    def needed(
        self, index: int, label: int, stop: FixedN | AtRadii, record: Mapping[str, Any]
    ) -> int:
        """Return the fewest queries that an image will still take."""
        try:
            simulate(stop.procedure(label, record), partial(self.votes, index))
        except MissingError as missing:
            # With labels the selection alone may show that the image is misclassified.
            by_labels = isinstance(stop, AtRadii) and stop.labels is True
            first = stop.bound.first
            return max(
                len(missing.samples), stop.n0 + (0 if by_labels else first) - self.held(index)
            )
        return 0

    def held(self, index: int) -> int:
        """Return the number of answers about an image."""
        return sum(key[0] == index for key in self._classes)

    def check(self, index: int, x: Image, label: int) -> None:
        """Refuse an image or label that is not the one that the answers are about."""
        asked = self._asked.get(index)
        if asked is None:
            return
        changes = [f"label is {asked.label}, not {label}"] if label != asked.label else []
        changes += ["pixels differ"] if fingerprint(x) != asked.pixels else []
        if changes:
            raise InputError(
                f"image {index} is not the one that the journal holds answers about "
                f"({', '.join(changes)}); give the same data or choose another folder"
            )

    def _take(self, row: Any) -> None:
        if isinstance(row, AskedRow):
            self._asked[row.index] = row
            return
        if isinstance(row, AnswerRow):
            self._classes[row.key] = self._words.index(row.answer)
        self.spent += row.queries if isinstance(row, FailedRow) else 1


class AnswerRun(Answers):
    """A journal of answers that is being written: the ledger of a voter.

    The number of answers depends on the stop rule, so a later run must not choose another one,
    knowing the votes.
    """

    def __init__(
        self,
        folder: Path | str,
        smoother: Smoother,
        stop: FixedN | AtRadii,
        record: Mapping[str, Any],
        identity: Mapping[str, Any],
        *,
        resume: bool,
    ) -> None:
        box: Any = smoother.base
        self._box, self._stop, self._record = box, stop, record
        self._log = Path(folder) / f"{CERTIFY.name}.jsonl"
        if self._log.exists() and not (Path(folder) / f"{ANSWERS.name}.jsonl").exists():
            raise InputError(
                f"{folder} already holds a run of another kind ({self._log.name} without answers); "
                "choose another folder"
            )
        denoiser = smoother.denoiser
        settings = {
            "classifier": describe(getattr(box, "identity", None)),
            "denoiser": None if denoiser is None else identity_of(denoiser),
            **identity,
            **{name: record[name] for name in ("noise", "tv", "sigma", "seed")},
            **{name: value for name, value in stop.settings.items() if name != "alpha"},
            "classes": list(box.words.classes),  # answers are kept as indices of them
        }
        self._run: Run[Any] = Run(folder, ANSWERS, settings, resume=resume)
        try:
            super().__init__(box.words, self._run.rows.values())
        except BaseException:
            self._run.close()
            raise

    def close(self) -> None:
        """Close the journal."""
        self._run.close()

    def drop_log(self) -> None:
        """Remove the certificates, all of which follow from the answers."""
        self._log.unlink(missing_ok=True)

    def finished(self) -> list[int]:
        """Return the images whose certificates follow from the answers that are here."""
        return [
            index
            for index, label in self.labels.items()
            if not self.needed(index, label, self._stop, self._record)
        ]

    def begin(self, index: int, x: Image, label: int) -> None:
        """Note the class of an image, and which one it is, before it is asked about."""
        self.check(index, x, label)
        if index not in self._asked:
            self._append(AskedRow(index=index, label=label, pixels=fingerprint(x)))

    def keep(self, answers: Mapping[Key, Answer]) -> None:
        """Write answers that have come; one that is none is refused once the others are written."""
        bad: InputError | None = None
        for (index, stage, sample), answer in answers.items():
            try:
                label = self._words.index(answer)
            except InputError as error:
                bad = error
                self.fail(str(error), 1)
                continue
            plain = answer if answer is None or isinstance(answer, str) else label
            self._append(AnswerRow(index=index, stage=stage, sample=sample, answer=plain))
        if bad is not None:
            raise bad

    def fail(self, reason: str, queries: int) -> None:
        """Note an attempt that may have been paid in vain."""
        self._append(FailedRow(reason=reason, queries=queries))

    def check_budget(self, images: Chosen) -> None:
        """Refuse a run whose fewest queries the budget cannot pay, before anything is asked."""
        self._box.spent = max(self._box.spent, self.spent)
        needed = 0
        for index, x, label in images:
            self.check(index, x, label)
            needed += self.needed(index, label, self._stop, self._record)
        self._box.budget.check(self._box.spent, needed)

    def _append(self, row: Row) -> None:
        self._run.append([row])
        self._take(row)


def recertify(
    run: Path | str,
    *,
    alpha: float,
    n0: int | None = None,
    n: int | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> Log:
    """Certify again from the answers in a journal, asking nothing.

    That is possible at another alpha, with other synonyms, or with fewer samples. For the
    certificates to hold, these must not be chosen by what they make of the answers. The number of
    answers of a run with radii depends on the votes, so its journal is certified by the tests of
    `AtRadii`, at the looks that the run reached. Images that an interrupted run did not finish are
    left out.

    Args:
        run: Folder of the run, or its ``answers.jsonl``.
        alpha: Failure probability of each certificate.
        n0: Number of selection samples; None: that of the run.
        n: Number of estimation samples; None: that of the run.
        synonyms: Other words for the classes: word -> name.

    Returns:
        The log; its ``notices`` name the images that were left out.

    Raises:
        InputError: The journal does not hold these samples, is damaged, or a value is out of range;
            or another number of samples is asked of a run with radii.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from art_denoised.evaluation.certify import certify
        >>> from art_denoised.smoothing.queries import BlackBox
        >>> from art_denoised.smoothing.smoother import Smoother
        >>> data = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 1)]
        >>> box = BlackBox(lambda images: ["dark"] * len(images), classes=["dark", "light"])
        >>> smoother, stop = Smoother(box, sigma=0.25), FixedN(50, n0=20)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     _ = certify(smoother, data, stop, run=run, indices=[0], progress=False)
        ...     log = recertify(run, alpha=0.05)
        >>> log.rows[0].radius, box.spent
        (0.392612, 70)
    """
    contents = read_run(run, ANSWERS)
    settings = contents.settings
    words = Vocabulary(tuple(settings["classes"]), synonyms or {})
    held = Answers(words, contents.rows.values())
    early = bool(settings.get("radii"))
    last = settings["n"] if "n" in settings else settings["looks"][1]  # as version 1 wrote it
    if early and (n0, n) != (None, None):
        raise InputError(
            f"n0 is {n0} and n is {n}, but the number of answers in {run} depends on the votes; "
            "leave n0 and n as they were"
        )
    stop: FixedN | AtRadii
    if early:
        labels = settings.get("use_labels", True)
        stop = AtRadii(settings["radii"], last, settings["n0"], alpha, labels)
    else:
        stop = FixedN(last if n is None else n, settings["n0"] if n0 is None else n0, alpha)
    of_noise = {"noise": settings.get("noise", "gaussian"), "tv": settings.get("tv", 0.0)}
    record = {name: settings[name] for name in ("sigma", "seed")} | of_noise
    record |= {"alpha": stop.alpha}
    rows, unfinished = [], []
    for index, label in held.labels.items():
        if label >= len(words.classes):
            raise InputError(
                f"image {index}: label {label} is out of range; the journal is damaged"
            )
        try:
            if isinstance(stop, AtRadii):
                certificate = _of_table(held, index, label, stop, record)
            else:
                certificate = simulate(stop.procedure(label, record), partial(held.votes, index))[0]
        except MissingError as missing:
            whole = [Draw(Stage.SELECTION, 0, settings["n0"]), Draw(Stage.ESTIMATION, 0, last)]
            if not early and not any(held.missing(index, draw) for draw in whole):
                raise InputError(f"{run} {missing}") from None
            unfinished.append(str(index))
            continue
        rows.append(CertifyRow.of(index, label, certificate))
    if unfinished and not rows:
        raise InputError(f"{run} holds no finished image; resume the run")
    left_out = f"left out, since the run did not finish them: images {', '.join(unfinished)}"
    notices = (*contents.notices, *([left_out] if unfinished else []))
    plan = {**settings, **stop.settings, "dtype": "float32"}
    return Log("certify", {"noise": "gaussian", **plan}, tuple(rows), notices)


def _of_table(
    held: Answers, index: int, label: int, stop: AtRadii, record: Mapping[str, Any]
) -> Certificate:
    """Certify from the looks that a run reached: why it went no further plays no part."""
    chosen, selection, counts = label, Counter[int](), Counter[int]()
    if stop.labels != "class":
        selection += Counter(held.votes(index, Draw(Stage.SELECTION, 0, stop.n0)))
        chosen = top_class(selection)
    looks: list[Look] = []
    for start, end in pairwise((0, *stop.bound.counts)):
        draw = Draw(Stage.ESTIMATION, start, end)
        if missing := held.missing(index, draw):
            if stop.labels == "class" and not looks:
                raise MissingError(index, draw, missing)
            break
        counts += Counter(held.votes(index, draw))
        looks.append(Look(end, counts[chosen] if chosen != ABSTAIN else 0))
    level = {"sigma": record["sigma"], "tv": record["tv"], "alpha": stop.alpha}
    proofs = stop.bound.proofs(looks, stop.radii, **level)
    return Certificate.from_proofs(chosen, selection, counts, proofs, bound=stop.bound, **record)
