"""Crews of workers that are slow, or die: processes of this machine, or others like them.

A crew sends work and receives reports. A `Team` keeps the books of one: which workers are ready and
what each of them holds, so that nothing is lost and nothing is counted twice. It does not know what
the work is: parts of draws (smoothing) or batches of an attack (evaluation). A `Replica` is what
runs in a worker, wherever that is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.runs.journal import differences, identity, processor, versions
from art_denoised.runs.worker import serve

if TYPE_CHECKING:
    import numpy as np

AHEAD = 2  # pieces of work that a worker holds: the one that it computes and the next one
_AT_ONCE = 4  # batches for each worker that are begun before the first of them is done
_ROUNDING = 0.05  # share of the largest answer, by which answers may differ in any type
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


def agreed(
    model: object, device: torch.device, batch_size: int, answers: Sequence[float]
) -> dict[str, Any]:
    """Return what all workers and the driver must agree in; ``answers`` but for rounding."""
    return {
        **identity(model),
        "processor": processor(device),
        "batch_size": batch_size,
        "versions": versions(),
        "answers": list(answers),
    }


def built(build: Callable[[], Any], device: str | None) -> Any:
    """Return what a function of the user returns, on a device if one is given."""
    model = build()
    return model.to(device) if device is not None and isinstance(model, nn.Module) else model


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
        free = {"answers", *(["processor"] if self._mixed else [])}
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
        here, there = (known.get("answers", ()) for known in (self._identity, identity))
        near = _ROUNDING * max(map(abs, here), default=0.0)
        if any(abs(mine - other) > near for mine, other in zip(here, there, strict=False)):
            raise InputError(
                "a worker's network answers otherwise to the same images, though its weights are "
                "the same; keep what it draws or reads as a buffer"
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
        if len(begun) < _AT_ONCE * team.size and (work := next(todo, None)) is not None:
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


def packed(plan: Plan, dump: Callable[[Any], bytes] = pickle.dumps) -> bytes:
    """Return a plan as bytes; refuse a network or an attack that cannot be pickled."""
    try:
        return dump(plan)
    except Exception as error:  # whatever its attributes raise
        raise InputError(
            f"the network cannot be sent to workers ({one_line(error)}); give `build`, a "
            "function of a module that returns it"
        ) from None


@dataclass(frozen=True)
class SentNetwork:
    """Returns a network that was sent itself, pickled."""

    network: Any

    def __post_init__(self) -> None:
        modules = self.network.modules() if isinstance(self.network, nn.Module) else ()
        # A pickle leaves out what was compiled: workers would compute another function.
        if any(module._compiled_call_impl is not None for module in modules):
            raise InputError(
                "the network is compiled, which cannot be sent to workers; give `build`, a "
                "function of a module that returns it compiled"
            )

    def __call__(self) -> Any:
        """Return it."""
        return self.network


class Replica:
    """A worker.

    Args:
        plan: A `Plan` as bytes.
        device: Device of its network; None: as it is built.
        threads: Number of threads that it may use.
    """

    def __init__(self, plan: bytes, device: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._first: Report
        try:
            made: Plan = pickle.loads(plan)
            self._server: Server = made(device)
            self._first = Ready(dict[str, Any](self._server.identity))
        except Exception as error:  # whatever the user's function raises
            self._first = _failed(error)

    def hello(self) -> Report:
        """Return the first report."""
        return self._first

    def answer(self, work: Any) -> Report:
        """Return the answer to work."""
        begin = time.perf_counter()
        try:
            answer = self._server.answer(work)
        except Exception as error:  # whatever the network raises
            return _failed(error)
        return Answered(answer, time.perf_counter() - begin)


def _failed(error: Exception) -> Failed:
    kind = "" if isinstance(error, InputError) else f"a worker failed: {type(error).__name__}: "
    return Failed(f"{kind}{one_line(error)}")


@dataclass(frozen=True)
class Workers:
    """Processes of this machine that sample or attack, each with a copy of the network.

    They are given as ``Smoother(..., workers=Workers(4))`` or to `evaluate`. Results are those of
    one process. A worker that dies is replaced, and its work is done again. Processes run while
    images are certified or attacked, and take a few seconds to start. A script that uses them needs
    the usual ``if __name__ == "__main__":``.

    Attributes:
        count: Number of processes. They share the threads of this one.
        build: Function that returns the network: that of the smoother, behind its denoiser if there
            is one, or the model that is attacked. It is sent by name, and what it returns must
            equal the network of this process. None: the network is sent itself, by pickle.
        devices: Devices of the copies, such as ("cuda:0", "cuda:1"), each for every k-th process;
            empty: that of the network.
        allow_mixed: Whether the devices may be of different models. Votes close to a tie may then
            depend on which of them counted, so a log says that this was allowed.

    Raises:
        InputError: ``count`` is below 1, or a value is of another type.

    Example:
        >>> from art_denoised import Smoother
        >>> from art_denoised.demo import digits_classifier
        >>> smoother = Smoother(digits_classifier(), sigma=0.25, workers=Workers(2))
        >>> smoother.workers.count
        2
    """

    count: int
    build: Callable[[], Any] | None = None
    devices: Sequence[str] = ()
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", checks.count("workers", self.count))
        object.__setattr__(self, "devices", tuple(checks.words("devices", self.devices)))
        if not (self.build is None or callable(self.build)):
            raise InputError(f"build is {self.build!r}; give a function that returns the network")

    def start(self, plan: Plan, *, gpu: bool) -> Crew:
        """Start the processes."""
        devices: Sequence[str | None] = self.devices or [None]
        return _Processes(packed(plan), [devices[i % len(devices)] for i in range(self.count)])


@dataclass(frozen=True)
class _Member:
    """A process and its pipe."""

    process: BaseProcess
    pipe: connection.Connection

    def end(self) -> None:
        """End it, whatever it computes."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


class _Processes:
    """A `Crew` of processes."""

    def __init__(self, plan: bytes, devices: Sequence[str | None]) -> None:
        # Not forked from this process, which may have threads and a CUDA context.
        self._context = multiprocessing.get_context("forkserver")
        self._plan, self._devices = plan, devices
        self._threads = max(1, torch.get_num_threads() // len(devices))
        self._members: list[_Member] = []
        self._pipes = selectors.DefaultSelector()
        self._heard: deque[tuple[int, connection.Connection]] = deque()
        try:
            for worker in range(len(devices)):
                self._members.append(self._start(worker))
        except BaseException:  # such as Ctrl-C
            self.close()
            raise

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self._devices)

    def send(self, worker: int, work: Sequence[Parcel]) -> None:
        """Send work."""
        with contextlib.suppress(OSError):  # it died, which the next report says
            self._members[worker].pipe.send(work)

    def receive(self) -> tuple[int, Report]:
        """Wait for the next report; a process that died is replaced."""
        while not self._heard:
            for key, _ in self._pipes.select():
                self._heard.append((key.data, self._members[key.data].pipe))
        worker, pipe = self._heard.popleft()
        try:
            report: Report = pipe.recv()
            return worker, report
        except (EOFError, OSError):
            member = self._members[worker]
            member.process.join(1)
            reason = f"exit code {member.process.exitcode}"
            self._pipes.unregister(pipe)
            self._members[worker] = self._start(worker)
            member.end()
            return worker, Lost(reason)

    def close(self) -> None:
        """Kill all processes."""
        for member in self._members:
            member.process.kill()
        for member in self._members:
            member.end()
        self._members.clear()
        self._pipes.close()

    def _start(self, worker: int) -> _Member:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._plan, self._devices[worker], self._threads)
        process = self._context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._pipes.register(ours, selectors.EVENT_READ, worker)
        return _Member(process, ours)
