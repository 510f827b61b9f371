"""Worker processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from art_denoised import checks
from art_denoised.runs.crew import Crew, Lost, Parcel, Plan, Report
from art_denoised.runs.replica import dumps
from art_denoised.runs.worker import serve


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
        InputError: ``count`` is below 1.

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

    def start(self, plan: Plan, *, gpu: bool) -> Crew:
        """Start the processes."""
        devices: Sequence[str | None] = self.devices or [None]
        return _Processes(dumps(plan), [devices[i % len(devices)] for i in range(self.count)])


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
