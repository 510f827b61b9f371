"""Crews of workers that are slow, or die: processes, actors of Ray, or a simulation.

A crew sends work and receives reports. A `Team` keeps the books of one: which workers are ready and
what each of them holds, so that nothing is lost and nothing is counted twice. It does not know what
the work is: parts of draws (smoothing) or batches of an attack (evaluation).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from art_denoised.checks import InputError
from art_denoised.runs.identity import differences

if TYPE_CHECKING:
    import numpy as np

AHEAD = 2  # pieces of work that a worker holds: the one that it computes and the next one
_BEGUN = 4  # batches for each worker that are begun before the first of them is done
_DEATHS = 5  # for each worker, before it answers and in a row; then something kills them all

W = TypeVar("W")


@dataclass(frozen=True)
class Ready:
    """A worker has built its network, whose identity this is, and can be given work."""

    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Answered:
    """A worker has answered the oldest work that it holds, in seconds of its time."""

    answer: Any
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


class Parcel(Protocol):
    """A part of what is sent at once: a frozen dataclass with images."""

    @property
    def x(self) -> np.ndarray:
        """The images. Those that are the same object are the same, and need not be sent again."""
        ...


P = TypeVar("P", bound=Parcel)


class Crew(Protocol):
    """Workers by number: what a driver needs of processes, actors or a simulation."""

    @property
    def size(self) -> int:
        """Number of workers, ready or not."""
        ...

    def send(self, worker: int, work: Sequence[Any], /) -> None:
        """Send work to a worker that is ready; it is answered in order, or the worker is lost."""
        ...

    def receive(self) -> tuple[int, Report]:
        """Wait for the next report of any worker."""
        ...

    def close(self) -> None:
        """End all workers at once."""
        ...


class Server(Protocol):
    """What a worker answers with."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What all workers and the driver must agree in, as JSON values."""
        ...

    def answer(self, work: Sequence[Any], /) -> Any:
        """Return the answer to what was sent."""
        ...


class Plan(Protocol):
    """What a worker is built from. It is sent to the worker by pickle."""

    def __call__(self, device: str | None, /) -> Server:
        """Return the server; on that device if one is given."""
        ...


class Place(Protocol):
    """Where workers run: `Workers` or `Cluster`."""

    @property
    def allow_mixed(self) -> bool:
        """Whether workers may have other processors than the driver."""
        ...

    @property
    def build(self) -> Any:
        """Function that returns the network; None: the network itself is sent."""
        ...

    def start(self, plan: Plan, /, *, gpu: bool) -> Crew:
        """Start the workers; ``gpu`` says whether the network of the driver is on one."""
        ...


class Finished(NamedTuple, Generic[W]):
    """Work that came back."""

    worker: int
    work: W
    answer: Any
    seconds: float


class Team(Generic[W]):
    """The books of a crew: who is ready, and who holds which work.

    Every worker must have this ``identity``; with ``allow_mixed`` its processor may differ. The
    cost of an event does not depend on the number of workers.
    """

    def __init__(self, crew: Crew, identity: Mapping[str, Any], *, allow_mixed: bool) -> None:
        self._crew, self._identity, self._mixed = crew, identity, allow_mixed
        self.held: dict[int, deque[W]] = {}  # by worker that is ready, oldest first
        self.lost: deque[W] = deque()  # of workers that died; whoever gives it out again takes it
        self._levels: list[set[int]] = [set() for _ in range(AHEAD + 1)]  # by works held
        self._deaths = 0
        self._answered: set[int] = set()  # workers that have answered since they began

    @property
    def size(self) -> int:
        """Number of workers, ready or not."""
        return self._crew.size

    def free(self, most: int = AHEAD - 1) -> int | None:
        """Return a worker that holds least, ``most`` works at most; None: there is none."""
        for level in self._levels[: most + 1]:
            if level:
                return next(iter(level))
        return None

    def give(self, worker: int, work: W, message: Sequence[Parcel]) -> None:
        """Send work to a worker, as this message."""
        self._move(worker, +1)
        self.held[worker].append(work)
        self._crew.send(worker, message)

    def receive(self) -> Finished[W] | None:
        """Wait for the next event; None: it was that a worker came or went."""
        worker, report = self._crew.receive()
        if isinstance(report, Answered):
            self._deaths = 0
            self._answered.add(worker)
            self._move(worker, -1)
            return Finished(worker, self.held[worker].popleft(), report.answer, report.seconds)
        if isinstance(report, Failed):
            raise InputError(report.problem)
        if isinstance(report, Ready):
            self._admit(report.identity)
            self.held[worker] = deque()
            self._levels[0].add(worker)
        else:
            self._bury(worker, report.reason)
        return None

    def close(self) -> None:
        """End all workers; what they are computing is dropped."""
        self._crew.close()

    def _move(self, worker: int, by: int) -> None:
        level = len(self.held[worker])
        self._levels[level].remove(worker)
        self._levels[level + by].add(worker)

    def _admit(self, identity: Mapping[str, Any]) -> None:
        free = {"processor"} if self._mixed else set()
        mine, other = (
            {name: value for name, value in known.items() if name not in free}
            for known in (self._identity, identity)
        )
        changes = differences(mine, other)
        if changes.startswith("processor "):
            raise InputError(
                f"workers have different processors ({changes}); give all workers the same, or "
                "allow that",
                allow_mixed=True,
            )
        if changes:
            raise InputError(
                f"a worker has another network or other packages ({changes}); give all workers "
                "the same"
            )

    def _bury(self, worker: int, reason: str) -> None:
        held = self.held.pop(worker, None)
        if held is not None:
            self._levels[len(held)].remove(worker)
            self.lost.extend(held)
        if worker in self._answered:
            self._answered.remove(worker)
            return
        self._deaths += 1
        if self._deaths > _DEATHS * self._crew.size:
            raise InputError(
                f"workers end before they answer ({reason}); give them more memory, or fewer of "
                "them, and guard a script by `if __name__ == '__main__':`"
            )

    def __str__(self) -> str:
        """Return how many workers are ready, in words."""
        ready = len(self.held)
        return f"{ready} workers" if ready == self.size else f"{ready} of {self.size} workers"


def in_order(team: Team[P], works: Iterable[P]) -> Iterator[tuple[P, Any]]:
    """Yield works with their answers, in the order of the works, whatever dies.

    A worker holds one at a time. Few are begun before earlier ones are yielded, so that little is
    lost with the driver.
    """
    todo = iter(works)
    begun, again = deque[P](), deque[P]()
    answers: dict[int, Any] = {}  # by the id of a work that was begun

    def following() -> P | None:
        if again:
            return again.popleft()
        if len(begun) < _BEGUN * team.size and (work := next(todo, None)) is not None:
            begun.append(work)
            return work
        return None

    def begin() -> None:
        if (work := following()) is not None:
            again.append(work)

    begin()
    while begun:
        while (worker := team.free(most=0)) is not None and (work := following()) is not None:
            team.give(worker, work, [work])
        if (finished := team.receive()) is not None:
            answers[id(finished.work)] = finished.answer
        again.extend(team.lost)
        team.lost.clear()
        while begun and id(begun[0]) in answers:
            work = begun.popleft()
            yield work, answers.pop(id(work))
            if not begun:
                begin()
