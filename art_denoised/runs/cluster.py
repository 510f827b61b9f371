"""Workers on many machines, as actors of Ray. The rest of the package never imports Ray."""

from __future__ import annotations

import os
import socket
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.runs.workers import Crew, Lost, Plan, Replica, Report, packed

_PATIENCE = 10.0  # seconds that a cluster may take to answer


@dataclass(frozen=True)
class Cluster:
    """Actors of a Ray cluster that sample or attack, each with a copy of the network.

    They are given as ``Smoother(..., workers=Cluster())`` or to `evaluate`. Results are those of
    one process. An actor that dies or whose node is lost is replaced once there is room, and its
    work is done again. All nodes need this package and what ``build`` imports, in the versions of
    this process, and networks on the same kind of device. If this process is connected to a cluster
    already, that one is used.

    Attributes:
        address: Address for ``ray.init``, such as "ray://HOST:10001"; "auto": the cluster that runs
            on this machine, or else a new one of this machine alone.
        count: Number of actors. Those for which there is no room start when nodes join. None: as
            many as there is room for at the start.
        build: Function that returns the network, as in `Workers`. None: the network is sent itself.
        num_cpus: Number of CPU cores of an actor.
        num_gpus: Number of GPUs of an actor, which may be a fraction; None: 1 if the network of
            this process is on a GPU, else 0.
        allow_mixed: Whether nodes may have different processors, as in `Workers`.

    Raises:
        InputError: ``count`` is below 1, or ``address`` is no address. In use: Ray is missing, or
            cannot be reached.

    Example:
        >>> Cluster("ray://head:10001", count=64, num_gpus=1).count
        64
    """

    address: str = "auto"
    count: int | None = None
    build: Callable[[], Any] | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        if self.count is not None:
            object.__setattr__(self, "count", checks.count("workers", self.count))
        if self.address != "auto":
            _host_and_port(self.address)

    def start(self, plan: Plan, *, gpu: bool) -> Crew:
        """Start the actors, in the cluster that this process is in or enters for it."""
        ray = _import_ray()
        sent = packed(plan, ray.cloudpickle.dumps)
        gpus = float(gpu) if self.num_gpus is None else self.num_gpus
        with ExitStack() as stack:
            if not ray.is_initialized():
                _connect(ray, self.address)
                stack.callback(ray.shutdown)
            resources = {"num_cpus": self.num_cpus, "num_gpus": gpus}
            count = self.count or _room(ray.cluster_resources(), self.num_cpus, gpus)
            crew = _Actors(ray, sent, count, resources, max(1, int(self.num_cpus)))
            stack.callback(crew.kill)
            crew.held = stack.pop_all()
        return crew


class _Actor(Replica):
    """A worker whose images come from the object store, once for each node."""

    def answer(self, work: Sequence[Any], *images: np.ndarray) -> Report:
        """Return the answer to work without its images."""
        whole = [replace(one, x=np.array(x)) for one, x in zip(work, images, strict=True)]
        return super().answer(whole)


class _Actors:
    """A `Crew` of actors.

    Attributes:
        held: What is closed with it.
    """

    def __init__(
        self, ray: Any, plan: bytes, size: int, resources: dict[str, float], threads: int
    ) -> None:
        self._ray, self.size, self._threads = ray, size, threads
        self._plan = ray.put(plan)
        # Not restarted by Ray: an actor that is new must say who it is.
        self._kind = ray.remote(_Actor).options(max_restarts=0, **resources)
        self._actors: list[Any] = []
        self._reports: dict[Any, int] = {}  # references to reports, with their workers
        self._heard: deque[Any] = deque()
        self._stored: dict[int, Any] = {}  # images in the object store
        self.held = ExitStack()
        for worker in range(size):
            self._actors.append(self._start(worker))

    def send(self, worker: int, work: Sequence[Any]) -> None:
        """Send work, and images that were never sent."""
        bare = [replace(one, x=None) for one in work]
        images = [self._store(one.x) for one in work]
        self._reports[self._actors[worker].answer.remote(bare, *images)] = worker

    def receive(self) -> tuple[int, Report]:
        """Wait for the next report; an actor that died is replaced."""
        while not self._heard:
            references = list(self._reports)  # oldest first: each actor answers in order
            self._ray.wait(references, num_returns=1)
            found, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
            self._heard.extend(found)
        reference = self._heard.popleft()
        worker = self._reports.pop(reference)
        try:
            return worker, self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._reports = {ref: w for ref, w in self._reports.items() if w != worker}
            self._heard = deque(ref for ref in self._heard if ref in self._reports)
            self._ray.kill(self._actors[worker])
            self._actors[worker] = self._start(worker)
            return worker, Lost(one_line(error)[:200])

    def kill(self) -> None:
        """Kill all actors."""
        for actor in self._actors:
            self._ray.kill(actor)

    def close(self) -> None:
        """Kill all actors, and leave the cluster if it was entered for them."""
        self.held.close()

    def _start(self, worker: int) -> Any:
        actor = self._kind.remote(self._plan, None, self._threads)
        self._reports[actor.hello.remote()] = worker
        return actor

    def _store(self, x: np.ndarray) -> Any:
        """Return the reference to an image, which leaves the store when the driver drops it."""
        if id(x) not in self._stored:
            self._stored[id(x)] = self._ray.put(x)
            weakref.finalize(x, self._stored.pop, id(x), None)
        return self._stored[id(x)]


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError(
            "a cluster needs Ray; install it with: pip install '.[cluster]' in its clone"
        ) from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """Enter a cluster, or start one on this machine. Ray raises errors of all classes."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address != "auto":
            _answers(address)
        ray.init(address=address, **quiet)
        return
    except Exception as error:
        none_here = address == "auto" and isinstance(error, ConnectionError)
        if not none_here:
            raise InputError(
                f"the cluster {address} cannot be reached ({one_line(error)}); give another address"
            ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody has agreed to them
    try:
        ray.init(address="local", include_dashboard=False, num_cpus=_lent_cores(), **quiet)
    except Exception as error:
        raise InputError(
            f"Ray does not start on this machine ({one_line(error)}); start it with "
            "`ray start --head`, or use processes"
        ) from None


def _lent_cores() -> int | None:
    """Return the number of cores that a scheduler lends this process; None: all, as Ray counts.

    Ray itself counts those of the whole machine: a SLURM job of 4 cores would get 128 actors.
    """
    if not hasattr(os, "sched_getaffinity"):  # not on Linux
        return None
    lent = len(os.sched_getaffinity(0))
    return lent if lent < (os.cpu_count() or 1) else None


def _answers(address: str) -> None:
    """Raise an OSError where nobody listens: Ray tries for minutes."""
    socket.create_connection(_host_and_port(address), timeout=_PATIENCE).close()


def _host_and_port(address: str) -> tuple[str, int]:
    """Return where a cluster listens, for clients (ray://) or for its own processes."""
    try:
        place = urlsplit(address if "://" in address else f"ray://{address}")
        known = place.hostname, place.port
    except ValueError:
        known = None, None
    host, port = known
    if not host or not port:
        raise InputError(
            f"the cluster is {address!r}; give auto, or an address such as ray://HOST:10001"
        )
    return host, port


def _room(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """Return the number of actors that fit, at least one."""
    rooms = [resources.get("CPU", 0) / cpus] if cpus else []
    rooms += [resources.get("GPU", 0) / gpus] if gpus else []
    return max(1, int(min(rooms, default=1)))
