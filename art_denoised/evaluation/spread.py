"""Attack batches elsewhere: what workers are built from, what is sent, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from art_denoised.evaluation.attack import Batch, Work, judged, pictures_of
from art_denoised.evaluation.attack_rows import AttackRow, ImageRow
from art_denoised.evaluation.target import Target
from art_denoised.runs.crew import Place, Team, in_order
from art_denoised.runs.identity import identity, processor, versions
from art_denoised.runs.replica import Held
from art_denoised.types import Images


def attack_elsewhere(work: Work, place: Place, x: Images) -> None:
    """Write the rows and pictures that a run does not hold yet, in their order, with workers.

    ``x`` are the images with which the target was queried first; workers query theirs with them.
    """
    target = work.target
    plan = _Plan(place.build or Held(target.given), x.cpu().numpy(), target.choices)
    crew = place.start(plan, gpu=target.device.type == "cuda")
    team: Team[Batch] = Team(crew, _identity(target), allow_mixed=place.allow_mixed)
    with closing(team), work.progress() as progress:
        for columns in ((work.clean,), work.columns):  # attacks need to know what is right without
            todo = (batch for column in columns for batch in work.batches(column))
            for batch, outcome in in_order(team, todo):
                column = batch.column
                progress.begin(
                    f"{column.name}, {team}", len(work.missing(column, batch.indices)), None
                )
                work.keep(column, outcome.rows, outcome.flags)
                work.run.append(outcome.pictures)
                progress.end(work.standing(column))


class Outcome(NamedTuple):
    """What a worker made of a batch."""

    rows: list[AttackRow]
    flags: tuple[str, ...]
    pictures: list[ImageRow]


def _identity(target: Target) -> dict[str, Any]:
    """Return what all workers and the driver must agree in."""
    return {
        **identity(target.module),
        **target.settings,
        "batch_size": target.choices["batch_size"],
        "processor": processor(target.device),
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Plan:
    """What a worker is built from: the model, and what makes an equal target of it."""

    build: Callable[[], Any]
    x: np.ndarray
    choices: Mapping[str, Any]

    def __call__(self, device: str | None) -> _Attacker:
        model = self.build()
        if device is not None and isinstance(model, nn.Module):
            model = model.to(device)
        return _Attacker(Target(model, torch.tensor(self.x), **self.choices))


class _Attacker:
    """Attacks batches."""

    def __init__(self, target: Target) -> None:
        self._target, self.identity = target, _identity(target)
        self._asked = ExitStack()  # as long as the process lives
        self._asked.enter_context(target.as_asked())

    def answer(self, work: Sequence[Batch]) -> Outcome:
        """Return what became of one batch."""
        (batch,) = work
        rows, found = judged(self._target, batch)
        return Outcome(rows, found.flags, list(pictures_of(self._target, batch, found.x_adv)))
