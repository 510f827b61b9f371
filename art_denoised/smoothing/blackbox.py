"""Query-only classifiers: each query is charged, and some fail.

Nothing here knows of certificates or files. A `BlackBox` queries a classifier about images, tries
again after failures that may pass, and keeps to a budget.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.smoothing.statistics import ABSTAIN

if TYPE_CHECKING:
    from tenacity import RetryCallState

NO_ANSWER = ABSTAIN  # votes for it select nothing and count against every class
LONGEST_LABEL = 200  # characters of an answer that are kept
_LONGEST_WAIT = 60.0

Answer = str | int | None
Ask = Callable[[np.ndarray], Sequence[Answer]]


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
