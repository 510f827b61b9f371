"""Certify or predict a data set: one row for each image, written as it is made, resumable."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from art_denoised.checks import InputError
from art_denoised.data.chosen import Chosen
from art_denoised.data.sources import ImageData
from art_denoised.evaluation.answers import AnswerRun
from art_denoised.evaluation.rows import CERTIFY, PREDICT, CertifyRow, LabelledRow, Log, PredictRow
from art_denoised.runs.identity import identity as identity_of
from art_denoised.runs.identity import versions
from art_denoised.runs.journal import Kind, Run
from art_denoised.smoothing.queries import QueryOnly
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.statistics import top_class
from art_denoised.smoothing.stops import (
    FIRST_TURN,
    Anytime,
    AtRadii,
    FixedN,
    Procedure,
    Stop,
    Voting,
)
from art_denoised.smoothing.voters import Task, Voter, drive

ToProcedure = Callable[[int, int, Mapping[str, Any]], Procedure[Any]]


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
        resume: Continue the run in the folder if there is one. Its settings, images and model are
            compared.
        indices: Indices of the images; None: all. The noise of an image depends on its index alone.
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
    if not isinstance(stop, (FixedN, AtRadii, Anytime)):
        raise InputError(f"stop is {stop!r}; give FixedN, AtRadii or Anytime")

    def procedure(index: int, label: int, record: Mapping[str, Any]) -> Procedure[Any]:
        return stop.procedure(label, record)

    with _Work(smoother, data, stop, CERTIFY, run, resume, indices, identity, progress) as work:
        if isinstance(stop, Anytime):
            work.write_in_turns(stop)
        else:
            work.write(procedure, CertifyRow.of)
        return work.log()


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

    Args:
        smoother: What predicts.
        data: Pairs of an image (channels, height, width) in [0, 1] and its class.
        stop: Number of votes and alpha; by default `Voting()`.
        run: Folder of the run.
        resume: Continue the run in the folder if there is one.
        indices: Indices of the images; None: all.
        identity: What else must agree before a run is continued; JSON values.
        progress: Show a progress bar on standard error.

    Returns:
        The log; a prediction of -1 is an abstention.

    Raises:
        InputError: Something cannot be used; completed rows are kept.
        OSError: The log cannot be written.

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
    stop = Voting() if stop is None else stop
    if not isinstance(stop, Voting):
        raise InputError(f"stop is {stop!r}; give Voting")
    if isinstance(smoother.base, QueryOnly):
        raise InputError("the base can only be queried; use certify, which keeps its answers")

    def procedure(index: int, label: int, record: Mapping[str, Any]) -> Procedure[Any]:
        return stop.procedure(None, record)

    with _Work(smoother, data, stop, PREDICT, run, resume, indices, identity, progress) as work:
        work.write(procedure, PredictRow.of)
        return work.log()


def choose(smoother: Smoother, data: ImageData, indices: Sequence[int] | None) -> Chosen:
    """Return the images of a run, once it is known that the smoother takes the first of them.

    Args:
        smoother: What will sample them.
        data: Pairs of an image in [0, 1] and its class.
        indices: Indices of the images; None: all.

    Raises:
        InputError: Indices, the first image or the model cannot be used, or the smoother is for
            pixels of another range.

    Example:
        >>> from art_denoised.data import load_data
        >>> from art_denoised.demo import digits_classifier
        >>> choose(Smoother(digits_classifier(), sigma=0.1), load_data("digits"), [7]).classes
        10
    """
    low, high = smoother.clip_values
    if np.any(np.not_equal(low, 0)) or np.any(np.not_equal(high, 1)):
        raise InputError(
            f"clip_values are {smoother.clip_values}, but data sets hold images in [0, 1]; "
            "rescale in the base, and give sigma in these units"
        )
    images = Chosen(data, indices)
    if len(images):
        x, _ = images[images.indices[0]]
        images.classes = smoother.check(smoother.prepare(x[None]))
    return images


def answers(
    smoother: Smoother,
    images: Chosen,
    procedure: ToProcedure,
    *,
    todo: Iterable[int],
    voter: Voter,
    until: float | None = None,
) -> Iterator[tuple[int, int, Any, float]]:
    """Yield (index, label, answer, seconds since the last one) as images are finished.

    Args:
        smoother: What is sampled.
        images: Images, by index.
        procedure: Function of index, label and sampling record that says what to find out.
        todo: Indices.
        voter: Voter that answers draws.
        until: Time of `time.monotonic` at which to stop.

    Raises:
        InputError: An image cannot be used; raised once the images before it are finished.
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
            yield Task(index, x, procedure(index, labels[index], smoother.record(x.shape)))

    last = time.perf_counter()
    for index, answer in drive(tasks(), voter, until=until):
        now = time.perf_counter()
        yield index, labels.pop(index), answer, now - last
        last = now
    if failure:
        raise failure[0]


class _Work:
    """A run under way: images and model checked, the log open; a context manager."""

    def __init__(
        self,
        smoother: Smoother,
        data: ImageData,
        stop: Stop[Any],
        kind: Kind[Any],
        folder: Path | str,
        resume: bool,
        indices: Sequence[int] | None,
        identity: Mapping[str, Any] | None,
        progress: bool,
    ) -> None:
        self._smoother, self._progress = smoother, progress
        self._images = choose(smoother, data, indices)
        self._bar = partial(tqdm, unit="image", disable=not progress, dynamic_ncols=True)
        named = dict(identity or {})
        images = self._images.settings(partial(self._bar, desc="reading", delay=2, leave=False))
        of_model = (
            {"dtype": "float32"} if smoother.network is None else identity_of(smoother.network)
        )
        settings = {
            **named,
            **images,
            **of_model,
            "sigma": smoother.sigma,
            "noise": smoother.noise,
            **stop.settings,
            "seed": smoother.seed,
            "versions": versions(),
        }
        with ExitStack() as stack:
            self._ledger: AnswerRun | None = None
            if isinstance(smoother.base, QueryOnly):
                if not isinstance(stop, (FixedN, AtRadii)):
                    raise InputError(f"stop is {stop!r}; a query-only base takes FixedN or AtRadii")
                record = smoother.record(self._images.shape or (1, 1, 1))
                of_noise = {"noise": record["noise"], "tv": record["tv"]}
                ledger = AnswerRun(
                    folder, smoother, stop, resume=resume, identity={**named, **of_noise}
                )
                self._ledger = stack.enter_context(ledger)
                ledger.check_budget(self._images, stop, record)
                ledger.drop_log()  # it follows from the answers, and is made again
                resume = False
            self._run: Run[LabelledRow] = stack.enter_context(
                Run(folder, kind, settings, resume=resume)
            )
            for notice in (*self._run.notices, *self._images.notices):
                tqdm.write(f"notice: {notice}", file=sys.stderr)
            self._voter = smoother.voter(self._ledger)
            stack.callback(self._voter.close)
            self._held = stack.pop_all()

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def log(self) -> Log:
        """Return what the log holds."""
        return Log.of(self._run.kind, self._run.settings, self._run.rows)

    def write(self, procedure: ToProcedure, make_row: Callable[..., LabelledRow]) -> None:
        """Write the rows that are missing."""
        todo = [index for index in self._images.indices if index not in self._run.rows]
        total = len(self._images)
        with self._bar(desc=self._run.kind.name, initial=total - len(todo), total=total) as bar:
            for found in self._answers(procedure, todo):
                self._run.append([make_row(*found)])
                bar.update()

    def write_in_turns(self, stop: Anytime) -> None:
        """Double the samples of each image in turn until the time is up."""
        until = None if stop.seconds is None else time.monotonic() + stop.seconds
        with self._bar(desc="certify", unit="row") as bar:
            while (turn := self._next_turn(stop)) and not _is_over(until):
                target, todo = turn
                bar.set_postfix_str(f"{target:,} samples an image")

                def procedure(
                    index: int, label: int, record: Mapping[str, Any], target: int = target
                ) -> Procedure[Any]:
                    known = self._run.rows.get(index)
                    earlier = known.certificate if isinstance(known, CertifyRow) else None
                    return stop.upto(target).procedure(label, record, earlier)

                for found in self._answers(procedure, todo, until):
                    self._run.append([CertifyRow.of(*found)])
                    bar.update()

    def _answers(
        self, procedure: ToProcedure, todo: Sequence[int], until: float | None = None
    ) -> Iterator[tuple[int, int, Any, float]]:
        if self._ledger is not None:
            for index in todo:
                x, label = self._images[index]
                self._ledger.begin(index, label, x)
        yield from answers(
            self._smoother, self._images, procedure, todo=todo, voter=self._voter, until=until
        )

    def _next_turn(self, stop: Anytime) -> tuple[int, list[int]] | None:
        """Return the next sample count to reach and the images that have fewer."""
        samples = {}
        for index in self._images.indices:
            row = self._run.rows.get(index)
            if not isinstance(row, CertifyRow):
                samples[index] = 0
            elif row.n < stop.n and not (stop.labels and _is_wrong(row)):
                samples[index] = row.n
        if not samples:
            return None
        target = min(max(FIRST_TURN, 2 * min(samples.values())), stop.n)
        return target, [index for index, have in samples.items() if have < target]


def _is_wrong(row: CertifyRow) -> bool:
    return top_class(row.selection_counts or {}) != row.label


def _is_over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until
