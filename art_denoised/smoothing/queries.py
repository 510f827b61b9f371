"""Votes of a classifier that can only be queried: nothing paid for is lost or asked twice."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.blackbox import Answer, StoppedError
from art_denoised.smoothing.noise import Noise, Stream, StreamKey
from art_denoised.smoothing.stops import Counts, Draw, Stage
from art_denoised.smoothing.voters import Task

if TYPE_CHECKING:
    from art_denoised.types import Denoiser

FIRST_ANSWERS = 20  # after so many, one must be among the classes
_GRACE = 0.8  # seconds that calls under way get when a run is interrupted
_SHOWN = 10  # words of a list in a message

Key = tuple[int, int, int]  # index of the image, stage, sample


@runtime_checkable
class QueryOnly(Protocol):
    """A classifier that can only be queried, such as a `BlackBox`.

    Attributes:
        batch_size: Number of images in a call.
        workers: Number of calls at once.
        spent: Number of queries so far, failed ones included.
    """

    batch_size: int
    workers: int
    spent: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        ...

    def query(
        self,
        images: np.ndarray,
        failed: Callable[[str, int], None],
        stopped: threading.Event,
        /,
    ) -> Sequence[Answer]:
        """Return an answer for each image; see `BlackBox.query`."""
        ...

    def label(self, answer: Answer, /) -> int:
        """Return the class of an answer, -1 for an empty one."""
        ...


class Ledger(Protocol):
    """Where answers are kept the moment they come. It is used by one thread at a time."""

    @property
    def spent(self) -> int:
        """Number of queries so far, failed ones included."""
        ...

    @property
    def answered(self) -> int:
        """Number of answers that are kept."""
        ...

    def get(self, key: Key, /) -> int | None:
        """Return the class that was answered about a sample; None: it was not answered."""
        ...

    def keep(self, answers: Mapping[Key, Answer], /) -> None:
        """Keep answers; they are safe when this returns."""
        ...

    def fail(self, reason: str, queries: int, /) -> None:
        """Keep an attempt that failed and may have been charged."""
        ...


class MemoryLedger:
    """A ledger that is lost with the process; ``label`` turns an answer into its class."""

    def __init__(self, label: Callable[[Any], int]) -> None:
        self._label, self._labels = label, dict[Key, int]()
        self.spent = 0

    @property
    def answered(self) -> int:
        """Number of answers that are kept."""
        return len(self._labels)

    def get(self, key: Key) -> int | None:
        """Return the class that was answered about a sample."""
        return self._labels.get(key)

    def keep(self, answers: Mapping[Key, Answer]) -> None:
        """Keep answers."""
        self._labels.update((key, self._label(answer)) for key, answer in answers.items())
        self.spent += len(answers)

    def fail(self, reason: str, queries: int) -> None:
        """Keep the number of queries that failed."""
        self.spent += queries


class _Call(NamedTuple):
    """Images that are sent together, all of one task."""

    task: Task[Any]
    samples: list[tuple[Stage, int]]
    images: np.ndarray

    @property
    def keys(self) -> list[Key]:
        return [(self.task.index, int(stage), sample) for stage, sample in self.samples]


class ApiVoter:
    """Queries a classifier sample by sample, never about a sample that the ledger holds.

    Calls run in threads; noise and denoiser run in the thread of the caller. Each answer is in the
    ledger before its thread sends the next query, so a killed process loses at most one call for
    each worker. After a failure, answers so far are kept.
    """

    def __init__(
        self,
        box: QueryOnly,
        noise: Noise,
        seed: int,
        *,
        denoiser: Denoiser | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._box, self._noise, self._seed, self._denoiser = box, noise, seed, denoiser
        self._ledger: Ledger = MemoryLedger(box.label) if ledger is None else ledger
        box.spent = max(box.spent, self._ledger.spent)
        # A resumed run has been told already; its user knows better. One that ended before, such as
        # by a server that was down, has not.
        told = self._ledger.answered >= FIRST_ANSWERS
        self._strange: list[Answer] | None = None if told else []
        self.appetite = box.workers * box.batch_size
        self._todo: WeakKeyDictionary[Task[Any], deque[tuple[Stage, int]]] = WeakKeyDictionary()
        self._ready: deque[tuple[Task[Any], Draw, Counts]] = deque()
        self._under_way = self._sent = 0  # calls, and samples in them
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[_Call, list[int] | BaseException]] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._closed = False

    @property
    def pending(self) -> int:
        """Number of samples submitted and not yet returned."""
        return len(self._ready) + self._sent + sum(map(len, self._todo.values()))

    def submit(self, task: Task[Any], draw: Draw) -> None:
        """Accept a draw. What the ledger holds of it is answered at once."""
        todo = self._todo.setdefault(task, deque())
        for sample in range(draw.start, draw.stop):
            with self._lock:
                label = self._ledger.get((task.index, int(draw.stage), sample))
            if label is None:
                todo.append((draw.stage, sample))
            else:
                self._ready.append((task, Draw(draw.stage, sample, sample + 1), {label: 1}))

    def next(self) -> tuple[Task[Any], Draw, Counts]:
        """Return one sample of a submitted draw with its vote."""
        self._send()
        while not self._ready:
            call, result = self._receive()
            if isinstance(result, BaseException):
                self._stopped.set()
                while self._under_way:  # answers to these are paid for, and kept
                    self._receive()
                raise result
            for (stage, sample), label in zip(call.samples, result, strict=True):
                self._ready.append((call.task, Draw(stage, sample, sample + 1), {label: 1}))
            self._send()
        return self._ready.popleft()

    def close(self) -> None:
        """Send nothing more, and wait a little for answers to what was sent."""
        self._stopped.set()
        for _ in self._threads:
            self._calls.put(None)
        end = time.monotonic() + _GRACE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            self._closed = True  # the ledger may be closed from now on

    def _receive(self) -> tuple[_Call, list[int] | BaseException]:
        call, result = self._results.get()
        self._under_way -= 1
        self._sent -= len(call.samples)
        return call, result

    def _send(self) -> None:
        """Keep every worker busy, with samples of the oldest tasks."""
        for task, todo in list(self._todo.items()):
            while todo and self._under_way < self._box.workers:
                size = min(len(todo), self._box.batch_size)
                samples = [todo.popleft() for _ in range(size)]
                images = np.concatenate([self._image(task, *sample) for sample in samples])
                self._under_way += 1
                self._sent += size
                if len(self._threads) < self._under_way:
                    # Not a pool, whose threads would be waited for when the process is interrupted.
                    thread = threading.Thread(target=self._work, daemon=True)
                    thread.start()
                    self._threads.append(thread)
                self._calls.put(_Call(task, samples, images))

    @torch.no_grad()
    def _image(self, task: Task[Any], stage: Stage, sample: int) -> np.ndarray:
        """Return a noisy, denoised copy of an image, (1, channels, height, width).

        It does not depend on which other samples are missing.
        """
        key = StreamKey(self._seed, task.index, stage)
        stream = Stream(self._noise, key, task.x.shape, task.x.device, sample)
        x = self._noise.add(self._noise.centre(task.x), stream.take(1))
        if self._denoiser is not None:
            placed = checks.placed(x, self._denoiser)
            x = self._denoiser(placed, self._noise.sigma).float()
        return x.cpu().contiguous().numpy()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                answers = self._box.query(call.images, self._fail, self._stopped)
                result: list[int] | BaseException = self._keep(call.keys, answers)
            except BaseException as error:
                result = error
            self._results.put((call, result))

    def _keep(self, keys: Sequence[Key], answers: Sequence[Answer]) -> list[int]:
        """Keep answers first of all, since they are paid for, then return their classes."""
        labels: dict[Key, int] = {}
        kept: dict[Key, Answer] = {}
        with self._lock:
            if self._closed:
                raise StoppedError
            bad: InputError | None = None
            for key, answer in zip(keys, answers, strict=True):
                try:
                    labels[key] = self._box.label(answer)
                except InputError as error:
                    bad = error
                    self._ledger.fail(str(error), 1)
                    continue
                text = answer is None or isinstance(answer, str)
                kept[key] = answer if text else labels[key]  # numbers of numpy and torch, too
            self._ledger.keep(kept)
            if bad is not None:
                raise bad
            if any(0 <= label < len(self._box.classes) for label in labels.values()):
                self._strange = None
            if self._strange is not None:
                self._strange += answers
                self._refuse_strangers()
        return list(labels.values())

    def _refuse_strangers(self) -> None:
        """Refuse to go on when none of the first answers is among the classes."""
        if self._strange and len(self._strange) >= FIRST_ANSWERS:
            words = list(dict.fromkeys(map(repr, self._strange)))
            raise InputError(
                f"none of the first {len(self._strange)} answers is among the classes: answers are "
                f"{_some(words)}; classes are {_some([*map(repr, self._box.classes)])}; give "
                "synonyms, or resume the run if this is right (answers so far are kept)"
            )

    def _fail(self, reason: str, queries: int) -> None:
        with self._lock:
            if not self._closed:
                self._ledger.fail(reason, queries)


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more
