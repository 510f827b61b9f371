"""Worker processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import torch

from art_denoised import checks
from art_denoised.smoothing.dispatch import Dispatcher, Lost, Piece, Report
from art_denoised.smoothing.replica import Plan, expected
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.voters import Voter
from art_denoised.smoothing.worker import serve

if TYPE_CHECKING:
    from art_denoised.types import Classifier


@dataclass(frozen=True)
class Workers:
    """Processes of this machine that sample for a `Smoother`, each with a copy of the network.

    It is given as ``Smoother(..., workers=Workers(4))``. Results are those of one process. A worker
    that dies is replaced, and its samples are drawn again. Processes run while images are
    certified, and take a few seconds to start. A script that uses them needs the usual
    ``if __name__ == "__main__":``.

    Attributes:
        count: Number of processes. They share the threads of this one.
        build: Function that returns the network, behind its denoiser if there is one. It is sent by
            name, and what it returns must equal the network of the smoother. None: the network is
            sent itself, by pickle.
        devices: Devices of the copies, such as ("cuda:0", "cuda:1"), each for every k-th process;
            empty: that of the network.

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
    build: Callable[[], Classifier] | None = None
    devices: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", checks.count("workers", self.count))

    def __call__(self, smoother: Smoother) -> Voter:
        """Start the processes and return a voter that hands draws out to them."""
        plan = Plan.of(smoother, self.build).dumps()
        devices: Sequence[str | None] = self.devices or [None]
        crew = _Processes(plan, [devices[i % len(devices)] for i in range(self.count)])
        return Dispatcher(crew, expected(smoother.network))


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

    def send(self, worker: int, bundle: Sequence[Piece]) -> None:
        """Send work."""
        with contextlib.suppress(OSError):  # it died, which the next report says
            self._members[worker].pipe.send(bundle)

    def receive(self) -> tuple[int, Report]:
        """Wait for the next report; a process that died is replaced."""
        pipes = {member.pipe: worker for worker, member in enumerate(self._members)}
        pipe = connection.wait(list(pipes))[0]
        assert isinstance(pipe, connection.Connection)  # it waits for nothing else
        worker = pipes[pipe]
        try:
            report: Report = pipe.recv()
            return worker, report
        except (EOFError, OSError):
            member = self._members[worker]
            member.process.join(1)
            reason = f"exit code {member.process.exitcode}"
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

    def _start(self, worker: int) -> _Member:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._plan, self._devices[worker], self._threads)
        process = self._context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Member(process, ours)
