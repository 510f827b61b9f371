"""Classifiers that can only be asked: each answer costs money, and some never come.

Nothing here knows of certificates or files. A `BlackBox` asks about images, several at a time,
tries again where the failure may pass, keeps to a budget, and hands over each answer the moment it
comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from art_denoised import checks
from art_denoised.checks import InputError
from art_denoised.smoothing.statistics import ABSTAIN

NO_ANSWER = ABSTAIN  # votes for it select nothing and count against every class
_LONGEST_WAIT = 60.0

Answer = str | int | None
Ask = Callable[[np.ndarray], Sequence[Answer]]


class TransientError(Exception):
    """A failure that may pass, such as an overloaded server.

    Args:
        reason: In words.
        retry_after: Seconds after which the server wants to be asked again; None: it did not say.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class BudgetError(InputError):
    """The budget does not suffice."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent, over all runs of one journal; failed attempts count.

    Attributes:
        queries: Most queries; None: no limit.
        cost: Most to pay; None: no limit.
        cost_per_query: In the unit of ``cost``.

    Raises:
        InputError: A number that is negative or infinite, or a cost limit without the cost of a
            query.

    Example:
        >>> Budget(cost=1.0, cost_per_query=0.25).limit
        4
    """

    queries: int | None = None
    cost: float | None = None
    cost_per_query: float = 0.0

    def __post_init__(self) -> None:
        if self.queries is not None:
            checks.count("budget in queries", self.queries, 0)
        if not 0 <= self.cost_per_query < float("inf"):
            raise InputError(f"cost_per_query is {self.cost_per_query}; give a number >= 0")
        if self.cost is not None:
            checks.positive("cost_per_query, with a cost limit,", self.cost_per_query)
            if not 0 <= self.cost < float("inf"):
                raise InputError(
                    f"budget in cost is {self.cost}; give a number >= 0, or None for no limit"
                )

    @property
    def limit(self) -> float:
        """Most queries that both limits allow, infinite without limits."""
        by_cost = float("inf")
        if self.cost is not None:
            by_cost = int(self.cost / self.cost_per_query * (1 + 1e-12))
        return min(float("inf") if self.queries is None else self.queries, by_cost)

    def check(self, spent: int, needed: int) -> None:
        """Refuse work that cannot be paid.

        Raises:
            BudgetError: ``needed`` queries after those ``spent`` are beyond the limit.

        Example:
            >>> Budget(queries=100).check(spent=40, needed=60)
        """
        if spent + needed > self.limit:
            price = f" ({needed * self.cost_per_query:,.2f})" if self.cost_per_query else ""
            raise BudgetError(
                f"{needed:,} more queries{price} are needed, but only {self.limit - spent:,.0f} of "
                f"the budget are left; raise it, or take fewer images or samples"
            )


@dataclass(frozen=True)
class Vocabulary:
    """The classes that answers are read as.

    Attributes:
        classes: Their names, in the order of the labels.
        synonyms: Other words for them: word -> name. Neither case nor space around them matters.

    Raises:
        InputError: A class or a synonym twice, one without letters, or a synonym of no class.

    Example:
        >>> words = Vocabulary(("cat", "dog"), {"tabby": "cat"})
        >>> [words.index(answer) for answer in ("Dog", "tabby", "stone", "", None, 1)]
        [1, 0, 2, -1, -1, 1]
    """

    classes: tuple[str, ...]
    synonyms: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, words in (("classes", self.classes), ("synonyms", tuple(self.synonyms))):
            plain = {_plain(word) for word in words}
            if len(plain) != len(words) or "" in plain:
                raise InputError(f"{what} are {list(words)}; give each once, and none empty")
        for word, name in self.synonyms.items():
            if _plain(name) not in map(_plain, self.classes):
                raise InputError(f"synonym {word!r} is of {name!r}, which is none of the classes")

    @cached_property
    def _indices(self) -> dict[str, int]:
        names = {_plain(name): index for index, name in enumerate(self.classes)}
        return names | {_plain(word): names[_plain(name)] for word, name in self.synonyms.items()}

    @property
    def other(self) -> int:
        """Index of an answer that names none of the classes: a class of its own."""
        return len(self.classes)

    def index(self, answer: Answer) -> int:
        """Return the class of an answer, -1 for an empty one.

        Empty is None, or a text without letters. A number is an index already.

        Raises:
            InputError: A number that is no index of a class, or another type.
        """
        if answer is None or (isinstance(answer, str) and not _plain(answer)):
            return NO_ANSWER
        if isinstance(answer, str):
            return self._indices.get(_plain(answer), self.other)
        with suppress(AttributeError, TypeError):  # numbers of numpy and torch too
            if 0 <= (index := int(answer.__index__())) < len(self.classes):
                return index
        raise InputError(
            f"the classifier answered {answer!r}; it must answer the name of a class, an index "
            f"from 0 to {len(self.classes) - 1}, or None"
        )


class BlackBox:
    """Asks a classifier that costs money and fails.

    Args:
        ask: Images (batch, channels, height, width), float32 and not clipped, to one answer each:
            a class name or index, or None. Called from several threads.
        batch_size: Images a call; a call counts as so many queries.
        workers: Calls under way at once.
        retries: How often a call is tried again.
        backoff: Seconds before the first retry, doubled for each next one, at most a minute; a
            server that says how long to wait is obeyed, within that minute.
        transient: Exceptions of ``ask`` that may pass, beside `TransientError`.
        budget: What may be spent.

    Attributes:
        spent: Queries so far, failed ones included. Set it to go on from an earlier run.
        identity: What ``ask`` says of itself as ``ask.identity``, as `HttpClassifier` does; None if
            it says nothing.

    Raises:
        InputError: A value out of range, or ``ask`` cannot be called.

    Example:
        >>> box = BlackBox(lambda images: ["cat" if x.mean() > 0.5 else "dog" for x in images])
        >>> answers = {}
        >>> box.ask_all({"a": np.ones((3, 8, 8)), "b": np.zeros((3, 8, 8))}.items(), answers.update)
        >>> sorted(answers.items())
        [('a', 'cat'), ('b', 'dog')]
    """

    def __init__(
        self,
        ask: Ask,
        *,
        batch_size: int = 1,
        workers: int = 4,
        retries: int = 5,
        backoff: float = 1.0,
        transient: tuple[type[Exception], ...] = (ConnectionError, TimeoutError),
        budget: Budget | None = None,
    ) -> None:
        if not callable(ask):
            raise InputError(
                f"ask is a {type(ask).__name__}, which cannot be called; give a function of "
                "images, of an ART estimator ask_estimator(estimator)"
            )
        self.batch_size = checks.count("batch_size", batch_size)
        self.workers = checks.count("workers", workers)
        self.retries = checks.count("retries", retries, 0)
        self.budget = Budget() if budget is None else budget
        self.spent = 0
        self.identity: Any = getattr(ask, "identity", None)
        self._ask, self._backoff = ask, backoff
        self._transient: tuple[type[Exception], ...] = (TransientError, *transient)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def ask_all(
        self,
        queries: Iterable[tuple[Any, np.ndarray]],
        answered: Callable[[Mapping[Any, Answer]], None],
        failed: Callable[[str, int], None] = lambda reason, queries: None,
    ) -> None:
        """Ask about all images, and return when all answers have come.

        Args:
            queries: (key, image) pairs, consumed as workers become free.
            answered: Called with key -> answer as soon as a call returns, one call at a time.
            failed: Called with reason and queries of each attempt in vain, likewise.

        Raises:
            BudgetError: The budget is used up. Answers that have come were handed over.
            InputError: ``ask`` failed for good, or returned something else than an answer an image.
                The same holds.
        """
        batches = _batches(queries, self.batch_size)
        under_way: set[Future[None]] = set()
        self._stopped.clear()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for batch in batches:
                    under_way.add(pool.submit(self._call, batch, answered, failed))
                    if len(under_way) >= self.workers:
                        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                        for call in done:
                            call.result()
                for call in under_way:
                    call.result()
            except BaseException:
                self._stopped.set()  # calls under way are finished and handed over, none is begun
                raise

    def _call(
        self,
        batch: list[tuple[Any, np.ndarray]],
        answered: Callable[[Mapping[Any, Answer]], None],
        failed: Callable[[str, int], None],
    ) -> None:
        images = np.stack([image for _, image in batch])
        for attempt in range(self.retries + 1):
            with self._lock:
                if self._stopped.is_set():
                    return
                self.budget.check(self.spent, len(batch))
                self.spent += len(batch)
            try:
                answers = list(self._ask(images))
                if len(answers) != len(batch):
                    raise InputError(
                        f"the classifier gave {len(answers)} answers for {len(batch)} images"
                    )
            except Exception as error:
                with self._lock:
                    failed(_reason(error), len(batch))
                if not isinstance(error, self._transient):
                    raise _final(error) from error
                if attempt == self.retries:
                    raise InputError(
                        f"the classifier failed {attempt + 1} times in a row ({_reason(error)}); "
                        "answers so far are kept, --resume goes on"
                    ) from error
                self._stopped.wait(self._pause(error, attempt))
                continue
            with self._lock:
                answered({key: a for (key, _), a in zip(batch, answers, strict=True)})
            return

    def _pause(self, error: Exception, attempt: int) -> float:
        said = getattr(error, "retry_after", None)
        return float(min(self._backoff * 2**attempt if said is None else said, _LONGEST_WAIT))


def _batches(
    queries: Iterable[tuple[Any, np.ndarray]], size: int
) -> Iterable[list[tuple[Any, np.ndarray]]]:
    batch = []
    for query in queries:
        batch.append(query)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _plain(word: str) -> str:
    return word.strip().casefold()


def _final(error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(
        f"the classifier failed ({type(error).__name__}: {_reason(error)}); answers so far are kept"
    )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
