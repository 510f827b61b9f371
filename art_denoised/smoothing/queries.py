"""Query-only classifiers: each query is charged, some fail, and nothing paid for is asked twice.

A `BlackBox` knows nothing of certificates or files. It queries a classifier about images, tries
again after failures that may pass, and keeps to a budget. A voter of such a classifier keeps every
answer.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.smoothing.noise import Noise, Stream, StreamKey
from art_denoised.smoothing.statistics import ABSTAIN
from art_denoised.smoothing.stops import Counts, Draw, Stage
from art_denoised.smoothing.voters import Task

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from art_denoised.types import Denoiser

NO_ANSWER = ABSTAIN  # votes for it select nothing and count against every class
LONGEST_LABEL = 200  # characters of an answer that are kept
_LONGEST_WAIT = 60.0
Answer = str | int | None
Ask = Callable[[np.ndarray], Sequence[Answer]]
FIRST_ANSWERS = 20  # after so many, one must be among the classes
_GRACE = 0.8  # seconds that calls under way get when a run is interrupted
_SHOWN = 10  # words of a list in a message
Key = tuple[int, int, int]  # index of the image, stage, sample


class TransientError(Exception):
    """A failure that may pass, such as an overloaded server.

    Args:
        reason: Description of the failure.
        retry_after: Seconds after which the server wants to be queried again; None: unknown.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class BudgetError(InputError):
    """The budget does not suffice."""


class StoppedError(Exception):
    """The run was stopped before the query was sent."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limit on what is spent, over all runs of one journal; failed attempts count.

    Attributes:
        queries: Largest number of queries; None: no limit.
        cost: Largest sum to pay; None: no limit.
        cost_per_query: Price of a query, in the unit of ``cost``.

    Raises:
        InputError: A number is negative or infinite, or there is a cost limit without the price
            of a query.

    Example:
        >>> Budget(cost=1.0, cost_per_query=0.25).limit
        4
    """

    queries: int | None = None
    cost: float | None = None
    cost_per_query: float = 0.0

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        if self.queries is not None:
            checks.count("budget in queries", self.queries, 0)
        if not 0 <= checks.real("cost_per_query", self.cost_per_query) < math.inf:
            raise InputError(f"cost_per_query is {self.cost_per_query}; give a number >= 0")
        if self.cost is not None:
            checks.positive("cost_per_query, with a cost limit,", self.cost_per_query)
            if not 0 <= checks.real("cost", self.cost) < math.inf:
                raise InputError(
                    f"budget in cost is {self.cost}; give a number >= 0, or None for no limit"
                )

    @property
    def limit(self) -> float:
        """Largest number of queries that both limits allow, infinite without limits."""
        by_cost = math.inf
        if self.cost is not None:
            by_cost = int(self.cost / self.cost_per_query * (1 + 1e-12))
        return min(math.inf if self.queries is None else self.queries, by_cost)

    def check(self, spent: int, needed: int) -> None:
        """Raise `BudgetError` if ``needed`` queries more than ``spent`` are beyond the limit."""
        if spent + needed > self.limit:
            price = f" ({needed * self.cost_per_query:,.2f})" if self.cost_per_query else ""
            raise BudgetError(
                f"{needed:,} more queries{price} are needed, but the budget has only "
                f"{self.limit - spent:,.0f} left; raise it, or take fewer images or samples"
            )


@dataclass(frozen=True, slots=True)
class Retry:
    """When a query that failed is tried again.

    Attributes:
        times: Number of retries.
        backoff: Seconds before the first retry, doubled for each next one, at most a minute. A
            server that says how long to wait is obeyed, within that minute.
        transient: Exceptions that may pass, beside `TransientError`.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> Retry(backoff=0.5).wait(2, TimeoutError())
        2.0
    """

    times: int = 5
    backoff: float = 1.0
    transient: tuple[type[Exception], ...] = (ConnectionError, TimeoutError)

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.count("times", self.times, 0)
        kinds = self.transient
        if not isinstance(kinds, tuple) or not all(isinstance(one, type) for one in kinds):
            raise InputError(f"transient is {kinds!r}; give a tuple of exceptions")
        if not 0 <= checks.real("backoff", self.backoff) < math.inf:
            raise InputError(f"backoff is {self.backoff}; give seconds >= 0")

    def wait(self, retries: int, error: BaseException | None) -> float:
        """Return the seconds to wait after ``retries`` retries, the last of which met ``error``."""
        said = getattr(error, "retry_after", None)
        return float(min(self.backoff * 2**retries if said is None else said, _LONGEST_WAIT))


@dataclass(frozen=True)
class Vocabulary:
    """The classes that answers are read as, in the order of the labels, and other words for them.

    Example:
        >>> words = Vocabulary(("cat", "dog"), {"tabby": "cat"})
        >>> [words.index(answer) for answer in ("Dog", "tabby", "stone", "", None, 1)]
        [1, 0, 2, -1, -1, 1]
    """

    classes: tuple[str, ...]
    synonyms: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.synonyms, Mapping):
            raise InputError(f"synonyms is {self.synonyms!r}; give a dictionary: word -> name")
        checks.words("synonyms", [*self.synonyms, *self.synonyms.values()])
        for what, words in (("classes", self.classes), ("synonyms", tuple(self.synonyms))):
            plain = {_plain(word) for word in words}
            if len(plain) != len(words) or "" in plain:
                raise InputError(f"{what} are {list(words)}; give each once, and none empty")
            if any(len(word) > LONGEST_LABEL for word in words):
                raise InputError(f"{what} hold a word of more than {LONGEST_LABEL} characters")
        for word, name in self.synonyms.items():
            if _plain(name) not in map(_plain, self.classes):
                raise InputError(f"synonym {word!r} is of {name!r}, which is none of the classes")

    @cached_property
    def _indices(self) -> dict[str, int]:
        names = {_plain(name): index for index, name in enumerate(self.classes)}
        return names | {_plain(word): names[_plain(name)] for word, name in self.synonyms.items()}

    def index(self, answer: Answer) -> int:
        """Return the class of an answer: -1 for an empty one, one more than all for other words.

        A number must be the index of a class; a boolean or another type is refused.
        """
        if answer is None or (isinstance(answer, str) and not _plain(answer)):
            return NO_ANSWER
        if isinstance(answer, str):
            return self._indices.get(_plain(answer), len(self.classes))
        with suppress(AttributeError, TypeError):  # numbers of numpy and torch, too
            index = int(answer.__index__())
            boolean = "bool" in str(getattr(answer, "dtype", type(answer)))
            if not boolean and 0 <= index < len(self.classes):
                return index
        raise InputError(
            f"the classifier answered {answer!r}; it must answer the name of a class, an index "
            f"from 0 to {len(self.classes) - 1}, or None"
        )


class BlackBox:
    """A classifier that is query-only, paid and unreliable.

    Args:
        ask: Function from images (batch, channels, height, width), float32 and not clipped, to an
            answer for each: the name of a class, its index, or None. It is called from several
            threads.
        classes: Names of the classes, in the order of the labels. Any other word is one more
            class, the last; an empty answer is none, and can never be certified.
        synonyms: Other words for the classes: word -> name. Neither case nor space around words
            matters.
        batch_size: Number of images in a call; a call counts as so many queries.
        workers: Number of calls at once.
        retry: When a query that failed is tried again.
        budget: Limit on what is spent.

    Attributes:
        spent: Number of queries so far, failed ones included.
        identity: What ``ask.identity`` says, as that of `HttpClassifier` does; None if it says
            nothing.

    Raises:
        InputError: A value is out of range, ``ask`` cannot be called, or a class or synonym is
            there twice, is empty or too long, or a synonym is of no class.

    Example:
        >>> box = BlackBox(lambda x: ["cat" if image.mean() > 0.5 else "dog" for image in x],
        ...     classes=["cat", "dog"])
        >>> box.query(np.ones((1, 3, 8, 8), np.float32)), box.spent
        (['cat'], 1)
    """

    def __init__(
        self,
        ask: Ask,
        classes: Sequence[str],
        synonyms: Mapping[str, str] | None = None,
        *,
        batch_size: int = 1,
        workers: int = 4,
        retry: Retry | None = None,
        budget: Budget | None = None,
    ) -> None:
        if not callable(ask):
            raise InputError(
                f"ask is a {type(ask).__name__}, which cannot be called; give a function of "
                "images, of an ART estimator ask_estimator(estimator)"
            )
        for name, part, kind in (("retry", retry, Retry), ("budget", budget, Budget)):
            if part is not None and not isinstance(part, kind):
                raise InputError(f"{name} is {part!r}; give a {kind.__name__}")
        self.words = Vocabulary(checks.words("classes", classes), synonyms or {})
        self.classes = self.words.classes
        self.label = self.words.index
        self.batch_size = checks.count("batch_size", batch_size)
        self.workers = checks.count("workers", workers)
        self.retry = Retry() if retry is None else retry
        self.budget = Budget() if budget is None else budget
        self.spent = 0
        self.identity: Any = getattr(ask, "identity", None)
        self._ask = ask
        self._lock = threading.Lock()

    def query(
        self,
        images: np.ndarray,
        failed: Callable[[str, int], None] = lambda reason, queries: None,
        stopped: threading.Event | None = None,
    ) -> list[Answer]:
        """Return the classifier's answers to one call, about images (batch, ...).

        ``failed`` is called with reason and number of queries of each attempt that failed;
        ``stopped`` ends waiting for a retry.

        Raises:
            BudgetError: The budget is used up.
            InputError: The classifier failed for good, or did not give an answer for each image.
            StoppedError: ``stopped`` was set before the query was sent.
        """
        import tenacity

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return self.retry.wait(state.attempt_number - 1, error)

        stopped = threading.Event() if stopped is None else stopped
        transient: tuple[type[Exception], ...] = (TransientError, *self.retry.transient)
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(transient),
            stop=tenacity.stop_after_attempt(self.retry.times + 1),
            wait=wait,
            sleep=tenacity.sleep_using_event(stopped),
            reraise=True,
        )
        try:
            return attempts(self._once, images, failed, stopped)
        except (InputError, StoppedError):
            raise
        except Exception as error:
            how = f" ({type(error).__name__}: {one_line(error)})"
            if isinstance(error, transient):
                how = f" {self.retry.times + 1} times in a row ({one_line(error)})"
            raise InputError(f"the classifier failed{how}; answers so far are kept") from error

    def _once(
        self, images: np.ndarray, failed: Callable[[str, int], None], stopped: threading.Event
    ) -> list[Answer]:
        with self._lock:
            if stopped.is_set():
                raise StoppedError
            self.budget.check(self.spent, len(images))
            self.spent += len(images)
        try:
            answers = list(self._ask(images))
            if len(answers) != len(images):
                raise InputError(
                    f"the classifier gave {len(answers)} answers for {len(images)} images"
                )
        except Exception as error:
            failed(one_line(error), len(images))
            raise
        return [a[:LONGEST_LABEL] if isinstance(a, str) else a for a in answers]


def _plain(word: str) -> str:
    return word.strip().casefold()


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
