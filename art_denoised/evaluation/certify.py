"""Certify or predict a data set: one row for each image, written as it is made, resumable."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.data.images import Chosen, ImageData, Shard
from art_denoised.evaluation.answers import AnswerRun
from art_denoised.evaluation.logs import CERTIFY, PREDICT, CertifyRow, Log
from art_denoised.runs.journal import Kind, Run, read_run, versions
from art_denoised.runs.journal import identity as identity_of
from art_denoised.runs.progress import Progress, waiting, watched
from art_denoised.smoothing.dispatch import Dispatcher
from art_denoised.smoothing.queries import QueryOnly
from art_denoised.smoothing.smoother import DenoisedClassifier, Smoother
from art_denoised.smoothing.statistics import Certificate, top_class
from art_denoised.smoothing.stops import FIRST_TURN, Anytime, AtRadii, FixedN, Stop, Voting
from art_denoised.smoothing.voters import Task, Voter, drive

_FIRST_LOOK_IMAGES = 32
_SHOWN_RADII = 3  # beside the bar


def certify(
    smoother: Smoother,
    data: ImageData,
    stop: FixedN | AtRadii | Anytime,
    *,
    run: Path | str,
    resume: bool = False,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Log:
    """Certify images of a data set into the log ``run/certify.jsonl``.

    The row of an image is written as soon as the image is done. A killed run that is resumed ends
    with the rows of an uninterrupted one. Under `Anytime` the images are sampled in turns, each of
    which doubles the samples of an image and writes a row; the last row of an image counts. A
    query-only base classifier also writes each answer to ``run/answers.jsonl`` the moment it comes,
    and no answer is ever asked for twice.

    Args:
        smoother: What is certified.
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        stop: When an image is done.
        run: Folder of the run, created where it is missing.
        resume: Continue the run in the folder if there is one, with the settings, images and model
            that it was begun with.
        indices: Indices of the images, or a `Shard` of them; None: all. The noise of an image
            depends on its index alone.
        identity: What else must agree before a run is continued, such as the names of model and
            data; JSON values. Of functions and of paid classifiers little is known: name here
            what their answers depend on.
        progress: Show a progress bar on standard error.

    Returns:
        The log. Under `Anytime`, images that were not reached have no row.

    Raises:
        InputError: Something cannot be used; completed rows are kept.
        OSError: The log cannot be written, for example on a full disk.

    Example:
        >>> import tempfile
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> smoother = Smoother(digits_classifier(), sigma=0.1)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     log = certify(
        ...         smoother, load_data("digits"), FixedN(100), run=run, indices=range(3),
        ...         progress=False,
        ...     )
        >>> [row.index for row in log.rows]
        [0, 1, 2]
    """
    _check(smoother)
    if not isinstance(stop, (FixedN, AtRadii, Anytime)):
        raise InputError(f"stop is {stop!r}; give FixedN, AtRadii or Anytime")
    if isinstance(smoother.base, QueryOnly) and isinstance(stop, Anytime):
        raise InputError(f"stop is {stop!r}; a query-only base takes FixedN or AtRadii")
    if isinstance(smoother.base, QueryOnly) and isinstance(indices, Shard):
        raise InputError("a query-only base has one budget and one journal; certify it unsharded")
    return _sample(
        CERTIFY, smoother, data, stop, run, indices, identity, resume=resume, progress=progress
    )


def predict(
    smoother: Smoother,
    data: ImageData,
    stop: Voting | None = None,
    *,
    run: Path | str,
    resume: bool = False,
    indices: Sequence[int] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Log:
    """Predict the smoothed classifier's labels into the log ``run/predict.jsonl``.

    ``stop`` says how many samples vote; all else is as in `certify`. In the log, a prediction of -1
    is an abstention.

    Example:
        >>> import tempfile
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> smoother = Smoother(digits_classifier(), sigma=0.1)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     log = predict(
        ...         smoother, load_data("digits"), Voting(100), run=run, indices=[5], progress=False
        ...     )
        >>> len(log.rows)
        1
    """
    _check(smoother)
    stop = Voting() if stop is None else stop
    if not isinstance(stop, Voting):
        raise InputError(f"stop is {stop!r}; give Voting")
    if isinstance(smoother.base, QueryOnly):
        raise InputError("the base can only be queried; use certify, which keeps its answers")
    return _sample(
        PREDICT, smoother, data, stop, run, indices, identity, resume=resume, progress=progress
    )


def _check(smoother: object) -> None:
    if not isinstance(smoother, Smoother):
        raise InputError(
            f"smoother is a {type(smoother).__name__}; give Smoother(classifier, sigma=...)"
        )


def _sample(
    kind: Kind[Any],
    smoother: Smoother,
    data: ImageData,
    stop: FixedN | AtRadii | Anytime | Voting,
    folder: Path | str,
    indices: Sequence[int] | None,
    identity: Mapping[str, Any] | None,
    *,
    resume: bool,
    progress: bool,
) -> Log:
    """Check images and model, open the log, sample what is missing in it, and return it."""
    reading = partial(watched, what="reading", visible=progress)
    identity = checks.json_values("identity", identity)
    with waiting("trying the classifier on the first image", visible=progress):
        images = choose(smoother, data, indices)
    of_images = images.settings(reading)
    with ExitStack() as stack:
        ledger: AnswerRun | None = None
        if isinstance(smoother.base, QueryOnly):
            assert isinstance(stop, (FixedN, AtRadii))
            record = smoother.record(images.shape or (1, 1, 1))
            ledger = AnswerRun(folder, smoother, stop, record, identity, resume=resume)
            stack.enter_context(closing(ledger))
            if kept := set(ledger.finished()) - set(images.indices):
                images = Chosen(data, sorted(kept | set(images.indices)), images.classes)
                of_images = images.settings(reading)
            ledger.check_budget(images)
            ledger.drop_log()  # it follows from the answers, and is made again
            resume = False
        settings = {
            **identity,
            **of_images,
            **({"dtype": "float32"} if ledger is not None else identity_of(smoother.network)),
            "sigma": smoother.sigma,
            "noise": smoother.noise,
            **stop.settings,
            **_passes(smoother, images),
            "seed": smoother.seed,
            "versions": versions(),
            **({"allow_mixed": True} if getattr(smoother.workers, "allow_mixed", False) else {}),
        }
        run: Run[Any] = stack.enter_context(Run(folder, kind, settings, resume=resume))
        for notice in (*run.notices, *images.notices):
            print(f"notice: {notice}", file=sys.stderr)
        voter = stack.enter_context(closing(smoother.voter(ledger)))
        if ledger is not None:
            for image in images:
                ledger.begin(*image)
        _write(run, smoother, images, stop, voter, progress)
        return Log.of(run)


def _passes(smoother: Smoother, images: Chosen) -> dict[str, Any]:
    """Return what a header says of the passes of a network, the same for every shard."""
    if smoother.network is None or not images.whole:
        return {}
    x, _ = images[images.whole[0]]
    passes = smoother.passes(smoother.prepare(x[None])[0])
    return {"batch_size": passes.batch_size, "near_ties": passes.near_ties}


def begun_with(run: Path | str, *names: str) -> dict[str, Any]:
    """Return these settings of the run in a folder, as far as there is one that has them."""
    with suppress(InputError):
        settings = read_run(Path(run), CERTIFY, PREDICT).settings
        return {name: settings[name] for name in names if name in settings}
    return {}


def _write(
    run: Run[Any],
    smoother: Smoother,
    images: Chosen,
    stop: Stop[Any],
    voter: Voter,
    visible: bool,
) -> None:
    """Write the rows that are missing; under `Anytime` in turns, until the time is up."""
    seconds = stop.seconds if isinstance(stop, Anytime) else None
    end = None if seconds is None else time.monotonic() + seconds
    scale: dict[str, Any] = {"total": len(images), "done": len(run.rows)}
    if isinstance(stop, Anytime):  # an image has a row in each turn
        scale = {"total": None, "unit": "row"}

    def note() -> str:
        where = voter.note() if isinstance(voter, Dispatcher) else ""
        return ", ".join(filter(None, [where, _note(run.rows, stop, smoother)]))

    with Progress(run.kind.name, visible=visible, **scale) as shown:
        under_way = _UnderWay(shown, _most_samples(stop), note)
        for turn, todo in _turns(stop, images.indices, run.rows):
            if isinstance(turn, Anytime):
                shown.move(shown.n, what=f"{run.kind.name}, {turn.n:,} samples an image")
            earlier = {i: run.rows[i].certificate for i in todo if i in run.rows}
            for found in answers(
                smoother, images, turn, todo, voter, earlier=earlier, until=end, tell=under_way.tell
            ):
                run.append([run.kind.row.of(*found)])
                under_way.finish(found[0])
            if end is not None and time.monotonic() >= end:
                return


class _UnderWay:
    """Progress in images: those under way count by the share of their samples that is there."""

    def __init__(self, shown: Progress, most: int | None, note: Callable[[], str]) -> None:
        self._shown, self._most, self._note = shown, most, note
        self._finished = shown.n
        self._samples: Counter[int] = Counter()

    def tell(self, index: int, samples: int) -> None:
        """Count samples of an image."""
        if self._most is not None:
            self._samples[index] += samples
            self._move()

    def finish(self, index: int) -> None:
        """Count an image as finished."""
        self._finished += 1
        self._samples.pop(index, None)
        self._move()

    def _move(self) -> None:
        part = self._samples.total() / self._most if self._most else 0.0
        self._shown.move(self._finished + part, self._note)


def _most_samples(stop: Stop[Any]) -> int | None:
    """Return the largest number of samples of an image; None where turns share them out."""
    if isinstance(stop, Voting):
        return stop.n
    return stop.n0 + stop.n if isinstance(stop, (FixedN, AtRadii)) else None


def _note(rows: Mapping[Any, Any], stop: Stop[Any], smoother: Smoother) -> str:
    """Return what was found so far: certified accuracy at some radii, or accuracy."""
    found, words = list(rows.values()), []
    if not found:
        return ""
    if isinstance(stop, Voting):
        words.append(f"{sum(row.correct for row in found) / len(found):.1%} correct")
    else:
        radii = stop.radii if isinstance(stop, AtRadii) else (0.0, float(smoother.sigma))
        for radius in radii[:_SHOWN_RADII]:
            held = sum(row.correct and row.radius >= radius for row in found)
            words.append(f"{held / len(found):.1%} at r={radius:g}")
        words[0] = f"certified {words[0]}"
    if isinstance(smoother.base, QueryOnly):
        words.append(f"{smoother.base.spent:,} queries")
    return ", ".join(words)


def _turns(
    stop: Stop[Any], indices: Sequence[int], rows: Mapping[Any, Any]
) -> Iterator[tuple[Stop[Any], list[int]]]:
    """Yield the rule and the images to do; `Anytime` with sample counts that double."""
    if not isinstance(stop, Anytime):
        yield stop, [index for index in indices if index not in rows]
        return

    def is_done(row: CertifyRow) -> bool:
        skipped = stop.labels and top_class(row.selection_counts or {}) != row.label
        return row.n >= stop.n or skipped

    def drawn() -> dict[int, int]:
        return {
            i: rows[i].n if i in rows else 0
            for i in indices
            if not (i in rows and is_done(rows[i]))
        }

    while have := drawn():
        target = min(max(FIRST_TURN, 2 * min(have.values())), stop.n)
        yield stop.upto(target), [index for index, n in have.items() if n < target]


def answers(
    smoother: Smoother,
    images: Chosen,
    stop: Stop[Any],
    todo: Iterable[int],
    voter: Voter,
    *,
    earlier: Mapping[int, Certificate | None] | None = None,
    until: float | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, int, Any, float]]:
    """Yield (index, label, answer, seconds since the last one) as images are finished.

    An image that cannot be used is refused once the images before it are finished. ``tell`` is
    called with an index and a number of samples whenever votes come in.
    """
    labels: dict[int, int] = {}
    failure: list[Exception] = []

    def tasks() -> Iterator[Task[Any]]:
        for index in todo:
            try:
                x, labels[index] = images[index]
                x = smoother.prepare(x[None])[0]
            except (InputError, OSError) as error:
                failure.append(error)
                return
            record, held = smoother.record(x.shape), (earlier or {}).get(index)
            yield Task(index, x, stop.procedure(labels[index], record, held), stop.looks)

    last = time.perf_counter()
    for index, answer in drive(tasks(), voter, until=until, tell=tell):
        now = time.perf_counter()
        yield index, labels.pop(index), answer, now - last
        last = now
    if failure:
        raise failure[0]


def choose(smoother: Smoother, data: ImageData, indices: Sequence[int] | None) -> Chosen:
    """Return the images of a run, once it is known that the smoother takes the first of them."""
    checks.unit_range("a data set", smoother.clip_values)
    images = Chosen(data, indices)
    if len(images):
        x, _ = images[images.indices[0]]
        images.classes = smoother.check(smoother.prepare(x[None]))
    return images


@dataclass(frozen=True, slots=True)
class FirstLook:
    """How many of the first images a base classifier gets right, clean and in a noisy copy."""

    images: int
    clean: int
    noisy: int
    sigma: float
    denoised: bool = False

    def __str__(self) -> str:
        """Return it in words, for the terminal."""
        base = "classifier behind the denoiser" if self.denoised else "base classifier"
        words = (
            f"the {base} gets {self.clean} of the first {self.images} images right, and "
            f"{self.noisy} of them with noise of sigma = {self.sigma:g}"
        )
        if 2 * self.clean >= self.images:
            return words
        first = "first without the denoiser: " if self.denoised else ""
        remedy = f"check {first}weights, normalisation and order of classes"
        return f"{words}. If these are too few, {remedy}"


@torch.no_grad()
def first_look(smoother: Smoother, data: ImageData, indices: Sequence[int]) -> FirstLook:
    """Evaluate a base classifier on the first images of a run, clean and noisy.

    Wrong preprocessing shows here in a second instead of in a log full of abstentions. The noise is
    a stream of its own and enters no certificate.
    """
    network = smoother.network
    if network is None:
        raise InputError("the base classifier is query-only; a first look would cost queries")
    chosen = choose(smoother, data, indices)
    images, labels = chosen.stack(chosen.indices[:_FIRST_LOOK_IMAGES])
    x = smoother.prepare(images)
    generator = torch.Generator().manual_seed(smoother.seed)
    noise = torch.randn(images.shape, generator=generator).to(x)
    clean, noisy = (
        int((network(z.to(checks.model_dtype(network))).argmax(1).cpu() == labels).sum())
        for z in (x, x + smoother.sigma * noise)
    )
    parts = network.modules() if isinstance(network, torch.nn.Module) else ()
    denoised = any(isinstance(part, DenoisedClassifier) for part in parts)
    return FirstLook(len(images), clean, noisy, smoother.sigma, denoised)
