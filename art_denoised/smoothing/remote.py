"""Sample a smoother elsewhere: what workers are built from, and what they answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from art_denoised import checks
from art_denoised.runs.crew import Place
from art_denoised.runs.identity import identity, processor, versions
from art_denoised.runs.replica import Held
from art_denoised.smoothing.dispatch import Dispatcher, Piece
from art_denoised.smoothing.passes import NearTies
from art_denoised.smoothing.stops import Counts, Procedure
from art_denoised.smoothing.voters import Task, Voter

if TYPE_CHECKING:
    from art_denoised.smoothing.smoother import Smoother
    from art_denoised.types import Classifier


def dispatched(smoother: Smoother, place: Place) -> Voter:
    """Return a voter that hands the draws of a smoother out to workers, which it starts."""
    network = smoother.network
    assert network is not None  # refused by the smoother
    names = ("sigma", "noise", "seed", "batch_size", "clip_values")
    settings = {name: getattr(smoother, name) for name in names}
    rule = next((passes.near_ties for passes in smoother.tried.values()), None)
    plan = _Plan(place.build or Held(network), settings, rule)
    crew = place.start(plan, gpu=checks.model_device(network).type == "cuda")
    return Dispatcher(
        crew,
        _identity(smoother),
        batch_size=smoother.batch_size,
        allow_mixed=place.allow_mixed,
    )


def _identity(smoother: Smoother) -> dict[str, Any]:
    """Return what all workers and the driver must agree in."""
    network = smoother.network
    return {
        **identity(network),
        "processor": processor(checks.model_device(network)),
        "batch_size": smoother.batch_size,
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Plan:
    """What a worker is built from: a function that returns the network, and its `Smoother`.

    All workers decide near ties as the driver does.
    """

    build: Callable[[], Classifier]
    settings: Mapping[str, Any]
    near_ties: NearTies | None

    def __call__(self, device: str | None) -> _Sampler:
        from art_denoised.smoothing.smoother import Smoother

        network = self.build()
        if device is not None and isinstance(network, nn.Module):
            network = network.to(device)
        smoother = Smoother(network, **self.settings)
        smoother.near_ties = self.near_ties
        return _Sampler(smoother)


class _Sampler:
    """Answers bundles of pieces with their votes."""

    def __init__(self, smoother: Smoother) -> None:
        self.identity = _identity(smoother)
        self._device = checks.model_device(smoother.network)
        self._voter = smoother.voter()

    def answer(self, bundle: Sequence[Piece]) -> list[Counts]:
        """Return the votes of each piece."""
        tasks = {}
        for place, piece in enumerate(bundle):
            x = torch.from_numpy(piece.x).to(self._device)
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
    yield from ()
