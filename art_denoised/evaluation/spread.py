"""Attack batches elsewhere: what workers are built from, what is sent, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from art_denoised.evaluation.attack import Batch, Work, judged, pictures_of, standing
from art_denoised.evaluation.attack_rows import AttackRow, ImageRow
from art_denoised.evaluation.target import Column, Target
from art_denoised.runs.crew import Place, Team, in_order
from art_denoised.runs.identity import identity, processor, versions
from art_denoised.runs.journal import Run
from art_denoised.runs.replica import Held
from art_denoised.types import Images


def attack_elsewhere(work: Work, run: Run[Any], place: Place, x: Images, visible: bool) -> None:
    """Write the rows and pictures that a run does not hold yet, in their order, with workers.

    ``x`` are the images with which the target was queried first; workers query theirs with them.
    """
    target = work.target
    plan = _Plan(place.build or Held(target.given), x.cpu().numpy(), target.choices)
    crew = place.start(plan, gpu=target.device.type == "cuda")
    team: Team[Sent] = Team(crew, _identity(target), allow_mixed=place.allow_mixed)
    with closing(team), work.progress(run, visible) as progress:
        for columns in ((work.clean,), work.columns):  # attacks need to know what is right without
            for sent, outcome in in_order(team, _todo(work, run, columns)):
                missing = work.rows(run, sent.column, sent.indices)
                progress.begin(f"{sent.column.name}, {team}", len(missing), None)
                work.keep(run, sent.column, outcome.rows, outcome.flags)
                run.append(outcome.pictures)
                progress.end(standing(run.rows.values(), sent.column))


def _todo(work: Work, run: Run[Any], columns: Sequence[Column]) -> Iterator[Sent]:
    for column in columns:
        for block in work.missing(run, column):
            batch = work.batch(run, column, block)
            yield Sent.of(batch, work.pictured.intersection(block))


@dataclass(frozen=True, eq=False)
class Sent:
    """A `Batch` as it is sent, and the images of which pictures are wanted."""

    column: Column
    indices: Sequence[int]
    x: np.ndarray
    y: np.ndarray
    seed: int
    clean: np.ndarray | None
    pictured: frozenset[int]

    @classmethod
    def of(cls, batch: Batch, pictured: frozenset[int]) -> Sent:
        """Return what is sent of a batch."""
        x, y = batch.x.cpu().numpy(), batch.y.cpu().numpy()
        clean = None if batch.clean is None else batch.clean.numpy()
        return cls(batch.column, tuple(batch.indices), x, y, batch.seed, clean, pictured)

    def batch(self, device: torch.device) -> Batch:
        """Return the batch."""
        x, y = (torch.tensor(array).to(device) for array in (self.x, self.y))
        clean = None if self.clean is None else torch.tensor(self.clean)
        return Batch(self.column, self.indices, x, y, self.seed, clean)


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

    def answer(self, work: Sequence[Sent]) -> Outcome:
        """Return what became of one batch."""
        (sent,) = work
        batch = sent.batch(self._target.device)
        rows, found = judged(self._target, batch)
        pictures = list(pictures_of(self._target, batch, found.x_adv, sent.pictured))
        return Outcome(rows, found.flags, pictures)
