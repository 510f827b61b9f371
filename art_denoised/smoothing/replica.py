"""What a worker is: a copy of the network that answers bundles of draws."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from art_denoised import checks
from art_denoised.checks import InputError, one_line
from art_denoised.runs.identity import identity, versions
from art_denoised.smoothing.dispatch import Answered, Failed, Piece, Ready, Report
from art_denoised.smoothing.passes import NearTies
from art_denoised.smoothing.smoother import Smoother
from art_denoised.smoothing.stops import Counts, Draw, Procedure, Stage
from art_denoised.smoothing.voters import Task, Voter

if TYPE_CHECKING:
    from art_denoised.types import Classifier


@dataclass(frozen=True)
class Plan:
    """What a worker builds its copy from.

    Attributes:
        build: Returns the network.
        settings: Arguments of its `Smoother`.
        near_ties: How the driver decides near ties; every worker must do the same.
    """

    build: Callable[[], Classifier]
    settings: Mapping[str, Any]
    near_ties: NearTies | None = None

    @classmethod
    def of(cls, smoother: Smoother, build: Callable[[], Classifier] | None) -> Plan:
        """Return the plan of a smoother; without ``build`` it holds the network itself."""
        assert smoother.network is not None  # refused by the smoother
        names = ("sigma", "noise", "seed", "batch_size", "clip_values")
        settings = {name: getattr(smoother, name) for name in names}
        rule = next((passes.near_ties for passes in smoother.tried.values()), None)
        return cls(_Held(smoother.network) if build is None else build, settings, rule)

    def dumps(self, dump: Callable[[Any], bytes] = pickle.dumps) -> bytes:
        """Return the plan as bytes; refuse a network that cannot be pickled."""
        try:
            return dump(self)
        except Exception as error:  # whatever its attributes raise
            raise InputError(
                f"the network cannot be sent to workers ({one_line(error)}); give `build`, a "
                "function of a module that returns it"
            ) from None


@dataclass(frozen=True)
class _Held:
    """Returns a network that was sent itself, pickled."""

    network: Classifier

    def __call__(self) -> Classifier:
        return self.network


def expected(network: Any) -> dict[str, Any]:
    """Return what every copy of a network must agree in."""
    return {**identity(network), "versions": versions()}


class Replica:
    """A copy of the network, in a worker.

    Args:
        plan: A `Plan` as bytes.
        device: Device of the copy; None: that of the network.
        threads: Number of threads that it may use.
    """

    def __init__(self, plan: bytes, device: str | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._failure: Failed | None = None
        try:
            made: Plan = pickle.loads(plan)
            network = made.build()
            if device is not None and isinstance(network, nn.Module):
                network = network.to(device)
            self._network = network
            smoother = Smoother(network, **made.settings)
            smoother.near_ties = made.near_ties
            self._voter: Voter = smoother.voter()
        except Exception as error:  # whatever the user's function raises
            self._failure = _failed(error)

    def hello(self) -> Report:
        """Return the first report."""
        return self._failure or Ready(expected(self._network))

    def answer(self, bundle: Sequence[Piece]) -> Report:
        """Return the votes of each piece."""
        begin = time.perf_counter()
        try:
            votes = self._votes(bundle)
        except Exception as error:  # whatever the network raises
            return _failed(error)
        return Answered(votes, time.perf_counter() - begin)

    def _votes(self, bundle: Sequence[Piece]) -> list[Counts]:
        device = checks.model_device(self._network)
        tasks = {}
        for place, piece in enumerate(bundle):
            x = torch.from_numpy(piece.x).to(device)
            task: Task[None] = Task(piece.index, x, _unused())
            tasks[task] = place
            self._voter.submit(task, piece.draw)
        counts: list[Counter[int]] = [Counter() for _ in bundle]
        while self._voter.pending:
            task, _, votes = self._voter.next()
            counts[tasks[task]].update(votes)
        return [dict(each) for each in counts]


def _unused() -> Procedure[None]:
    """Return a procedure that nobody runs: the driver holds the real one."""
    yield Draw(Stage.PILOT, 0, 0)


def _failed(error: Exception) -> Failed:
    kind = "" if isinstance(error, InputError) else f"a worker failed: {type(error).__name__}: "
    return Failed(f"{kind}{one_line(error)}")
