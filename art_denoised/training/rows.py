"""What a training writes down after each epoch."""

from __future__ import annotations

from typing import Any

import msgspec

from art_denoised.runs.journal import Kind, Row


class EpochRow(Row, frozen=True, kw_only=True):
    """One epoch of a training.

    Attributes:
        epoch: Number of the epoch, from 1.
        loss: Mean loss of its steps.
        lr: Learning rate of its last step.
        seconds: Time that it took, evaluation left out.
        figures: What was measured after it, such as "accuracy".
    """

    epoch: int
    loss: float
    lr: float
    seconds: float
    figures: dict[str, float] = msgspec.field(default_factory=dict)

    @property
    def key(self) -> int:
        """Number of the epoch."""
        return self.epoch


def _upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of version 1, which held the figures beside the rest, as one of today."""
    own = {"epoch": "epoch", "loss": "loss", "rate": "lr", "seconds": "seconds"}
    figures = {name: value for name, value in record.items() if name not in own}
    return {**{new: record[old] for old, new in own.items()}, "figures": figures}


TRAINING: Kind[EpochRow] = Kind("train", EpochRow, upgrade=_upgraded, title="training log")
