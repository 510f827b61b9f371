"""Hand draws out to many workers, whatever they are: processes, actors of Ray, a simulation.

A worker answers a bundle of pieces of draws at a time. Bundles take about a quarter of a second, so
that messages cost little and no worker waits for another one at the end; each worker has one more
bundle ahead. What a worker took with it when it died is handed out again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias
from weakref import ref

import numpy as np

from art_denoised.checks import InputError
from art_denoised.runs.identity import differences
from art_denoised.smoothing.noise import PART
from art_denoised.smoothing.stops import Counts, Draw
from art_denoised.smoothing.voters import Task

AHEAD = 2  # bundles that a worker holds: the one that it computes and the next one
_SECONDS = 0.25  # that a bundle should take: an image that stops early waits for each look
_LARGEST = 100 * PART  # samples of a bundle
_DEATHS = 5  # for each worker, without an answer in between; then something kills them all


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A part of a draw, as it is sent: index of the image, its pixels, and the samples."""

    index: int
    x: np.ndarray
    draw: Draw


@dataclass(frozen=True)
class Ready:
    """A worker has built its network, whose identity this is, and can be given work."""

    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Answered:
    """A worker has answered its oldest bundle: votes of each piece, in seconds of work."""

    votes: Sequence[Counts]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """A worker's network or images cannot be used; ``problem`` is one line."""

    problem: str


@dataclass(frozen=True)
class Lost:
    """A worker died, for a reason in words. One in its place reports when it is ready."""

    reason: str


Report: TypeAlias = Ready | Answered | Failed | Lost


class Crew(Protocol):
    """Workers by number: what a `Dispatcher` needs of processes, actors or a simulation."""

    @property
    def size(self) -> int:
        """Number of workers, ready or not."""
        ...

    def send(self, worker: int, bundle: Sequence[Piece], /) -> None:
        """Send work to a worker that is ready; it is answered in order, or the worker is lost."""
        ...

    def receive(self) -> tuple[int, Report]:
        """Wait for the next report of any worker."""
        ...

    def close(self) -> None:
        """End all workers at once."""
        ...


class _Part:
    """A part of a draw on its way; the task is held by the driver alone."""

    __slots__ = ("draw", "task")

    def __init__(self, task: ref[Task[Any]], draw: Draw) -> None:
        self.task, self.draw = task, draw

    @property
    def size(self) -> int:
        return self.draw.stop - self.draw.start


_Bundle: TypeAlias = "list[tuple[_Part, Piece]]"


class Dispatcher:
    """A `Voter` that hands draws out to a crew, and asks again for what was lost.

    Args:
        crew: The workers; closed with the voter.
        identity: What every worker must say of its network, as JSON values.

    Attributes:
        pending: Number of samples submitted and not yet returned.

    Raises:
        InputError: When results are taken: a worker failed or differs, or workers only die.

    Example:
        >>> class Alone:
        ...     size, reports = 1, [Ready({})]
        ...     def send(self, worker, bundle):
        ...         votes = [{3: piece.draw.stop - piece.draw.start} for piece in bundle]
        ...         self.reports.append(Answered(votes, seconds=0.1))
        ...     def receive(self):
        ...         return 0, self.reports.pop(0)
        >>> import torch
        >>> from art_denoised.smoothing import Voting, drive
        >>> record = {"sigma": 0.25, "seed": 0, "dtype": "float32", "noise": "gaussian"}
        >>> task = Task(7, torch.zeros(1, 2, 2), Voting(150).procedure(None, record))
        >>> [(i, vote.counts) for i, vote in drive([task], Dispatcher(Alone(), {}))]
        [(7, {3: 150})]
    """

    def __init__(self, crew: Crew, identity: Mapping[str, Any]) -> None:
        self._crew, self._identity = crew, identity
        self._queue: deque[_Part] = deque()
        self._held: dict[int, deque[_Bundle]] = {}  # by workers that are ready, oldest first
        self._done: deque[tuple[Task[Any], Draw, Counts]] = deque()
        self._queued = 0  # samples in the queue
        self._grain = PART
        self._deaths = 0
        self.pending = 0

    @property
    def appetite(self) -> int:
        """Number of samples that keeps all workers busy."""
        return AHEAD * self._grain * self._crew.size

    def submit(self, task: Task[Any], draw: Draw) -> None:
        """Accept a draw."""
        self._queue.append(_Part(ref(task), draw))
        self._queued += draw.stop - draw.start
        self.pending += draw.stop - draw.start

    def next(self) -> tuple[Task[Any], Draw, Counts]:
        """Return a part of a submitted draw with its votes."""
        while not self._done:
            self._hand_out()
            self._take_in(*self._crew.receive())
        task, draw, votes = self._done.popleft()
        self.pending -= draw.stop - draw.start
        return task, draw, votes

    def close(self) -> None:
        """End all workers; what they are computing is dropped."""
        self._crew.close()

    def _hand_out(self) -> None:
        """Fill up the workers, first those that have nothing to do."""
        for depth in range(AHEAD):
            for worker, held in self._held.items():
                if len(held) == depth and (bundle := self._bundle()):
                    held.append(bundle)
                    self._crew.send(worker, [piece for _, piece in bundle])

    def _bundle(self) -> _Bundle:
        """Take work from the queue, no more than a fair share of it."""
        room = min(self._grain, max(PART, -(-self._queued // len(self._held))))
        bundle: _Bundle = []
        while room > 0 and self._queue:
            part = self._queue.popleft()
            task, (stage, start, stop) = part.task(), part.draw
            if task is None:  # the driver has dropped it
                self._queued -= part.size
                self.pending -= part.size
                continue
            if part.size > room:
                cut = start + room
                cut -= cut % PART if cut - cut % PART > start else 0  # a stream's parts stay whole
                self._queue.appendleft(_Part(part.task, Draw(stage, cut, stop)))
                part = _Part(part.task, Draw(stage, start, cut))
            room -= part.size
            self._queued -= part.size
            bundle.append((part, Piece(task.index, task.x.cpu().numpy(), part.draw)))
        return bundle

    def _take_in(self, worker: int, report: Report) -> None:
        if isinstance(report, Ready):
            if changes := differences(self._identity, report.identity):
                raise InputError(
                    f"a worker has another network or other packages ({changes}); give all workers "
                    "the same"
                )
            self._held[worker] = deque()
        elif isinstance(report, Answered):
            self._count(self._held[worker].popleft(), report)
        elif isinstance(report, Failed):
            raise InputError(report.problem)
        else:
            for bundle in reversed(self._held.pop(worker, deque())):
                self._queue.extendleft(part for part, _ in reversed(bundle))
                self._queued += sum(part.size for part, _ in bundle)
            self._deaths += 1
            if self._deaths > _DEATHS * self._crew.size:
                raise InputError(
                    f"workers end before they answer ({report.reason}); give them more memory, or "
                    "fewer of them, and guard a script by `if __name__ == '__main__':`"
                )

    def _count(self, bundle: _Bundle, report: Answered) -> None:
        self._deaths = 0
        samples = sum(part.size for part, _ in bundle)
        wanted = PART * round(_SECONDS * samples / max(report.seconds, 1e-6) / PART)
        self._grain = min(max(wanted, PART), 2 * self._grain, _LARGEST)
        for (part, _), votes in zip(bundle, report.votes, strict=True):
            if (task := part.task()) is None:
                self.pending -= part.size
            else:
                self._done.append((task, part.draw, votes))
